"""``chat``: a conversation in the terminal, sparse or dense by the turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.markup import escape

from sparse_runtime.api import sparsify
from sparse_runtime.cli.console import note, out
from sparse_runtime.cli.cutting import Cut, MaxLossDomainOption, MaxLossOption
from sparse_runtime.cli.figures import write_figures
from sparse_runtime.cli.generation import generate_text, load_with_clusters, ran, speed
from sparse_runtime.cli.options import (
    BudgetOption,
    ClustersOption,
    DeviceOption,
    DoSampleOption,
    DtypeOption,
    FastLinearOption,
    JsonOption,
    LinearWeightsOption,
    MinPOption,
    ModelArgument,
    RampOption,
    RepetitionPenaltyOption,
    RevisionOption,
    SeedOption,
    StopOption,
    SystemOption,
    TauOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    VerifyOption,
    WeightsOption,
    plane_options,
)
from sparse_runtime.cli.ranges import POSITIVE
from sparse_runtime.cli.terminal import interruptible, read_lines, show_text
from sparse_runtime.errors import ConfigError
from sparse_runtime.generation import (
    Sampling,
    Session,
    StopStrings,
    encode_messages,
    has_chat_template,
    room_for_answer,
)

HELP = """\
/dense   answer with all neurons from now on; what was said before stays as it was computed
/sparse  answer with the neurons of each token's cluster
/reset   forget the conversation
/help    this
/quit    leave, as the end of input does
Ctrl-C stops an answer. A line in front of which // stands begins with / itself."""


def chat(
    model: ModelArgument,
    clusters: ClustersOption,
    system: SystemOption = None,
    max_new_tokens: Annotated[
        int, typer.Option(callback=POSITIVE.callback, help="Tokens of an answer, at most.")
    ] = 512,
    stop: StopOption = None,
    do_sample: DoSampleOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where nothing can run sparse.")
    ] = False,
    fast_linear: FastLinearOption = False,
    weights: WeightsOption = None,
    linear_weights: LinearWeightsOption = None,
    tau: TauOption = None,
    ramp: RampOption = None,
    budget: BudgetOption = None,
    max_loss: MaxLossOption = None,
    max_loss_domain: MaxLossDomainOption = None,
    verify: VerifyOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Talk with a model; /dense and /sparse switch, and each answer says how fast it came.

    Only what is new of a conversation is run: the cache of what was said is kept.
    """
    sampling = Sampling(do_sample, temperature, top_p, top_k, min_p, repetition_penalty, seed)
    options: dict[str, Any] = {"sampling": sampling, "stop": StopStrings(stop or ()).strings}
    planes = plane_options(weights, linear_weights, tau, ramp)
    cut = Cut(budget, verify, max_loss, max_loss_domain)
    artifact, loaded, tokenizer = load_with_clusters(
        model, clusters, planes, cut, revision=revision, dtype=dtype, device=device
    )
    if not has_chat_template(tokenizer):
        raise ConfigError(
            f"the tokenizer of {model} has no chat template, so the model knows no conversations; take "
            "one that was tuned for them, or continue texts with `sparse-runtime generate`"
        )
    sparsify(loaded, artifact, strict=strict, fast_linear=fast_linear, **planes)
    options["max_new_tokens"] = max_new_tokens
    conversation = Conversation(loaded, tokenizer, system, **options)
    out.print("[dim]/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves[/dim]")
    for line in read_lines("> "):
        if line is None or not line.strip():
            continue
        if line.startswith("/") and not line.startswith("//"):
            if line.strip() == "/quit":
                break
            conversation.command(line.strip())
        else:
            conversation.say(line[1:] if line.startswith("//") else line)
    write_figures(json_file, {"model": model, "turns": conversation.turns})


class Conversation:
    """Messages, and what the answers took.

    Args:
        model: sparse.
        tokenizer: of the model, with a chat template.
        system: what the conversation begins with; None leaves it to the template.
        sampling: of the first answer; the seed is another one for each.
        options: of ``Session.answer``.

    Attributes:
        turns: figures of each answer, with its ``variant``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        system: str | None,
        *,
        sampling: Sampling,
        **options: Any,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._session = Session(model, tokenizer)
        self._sampling, self._options = sampling, options
        self._begin = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._begin)
        self._variant = "sparse"
        self.turns: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        """Print the answer to a message; one that cannot be answered leaves no trace."""
        messages = [*self._messages, {"role": "user", "content": text}]
        try:
            prompt = encode_messages(self._tokenizer, messages)
            room_for_answer(self._model, prompt)
        except ConfigError as error:
            begun = len(self._messages) > len(self._begin)
            note(f"{error}" + ("; /reset begins anew" if begun else ""))
            return
        # Or the same question would be answered by the same words.
        seed = (self._sampling.seed + len(self.turns)) % 2**32
        try:
            with interruptible() as interrupted:
                figures = generate_text(
                    *(self._model, self._session, prompt, self._variant),
                    show=show_text,
                    interrupted=interrupted,
                    sampling=replace(self._sampling, seed=seed),
                    **self._options,
                )
        except KeyboardInterrupt:  # the second one, which does not wait for a token
            print()
            note("the answer that was stopped is not part of the conversation")
            return
        print()
        self._messages = [*messages, {"role": "assistant", "content": figures["text"]}]
        self.turns.append({"variant": self._variant, **figures})
        self._print_figures(figures)

    def command(self, name: str) -> None:
        """Do what a line that begins with ``/`` says."""
        if name == "/help":
            out.print(HELP, markup=False)
        elif name == "/reset":
            self._messages = list(self._begin)
            self._session.forget()
            out.print("[dim]a new conversation[/dim]")
        elif name in ("/dense", "/sparse"):
            self._variant = name[1:]
            out.print(f"[dim]{self._variant} from now on; {self._speeds()}[/dim]", soft_wrap=True)
        else:
            note(f"there is no command {name}; /help lists them, and // begins a line with /")

    def _print_figures(self, figures: dict[str, Any]) -> None:
        stopped = "stopped; " if figures["ended"] == "interrupted" else ""
        if figures["ended"] == "length":
            stopped = "cut off by --max-new-tokens or the model's context; "
        new = figures["prompt_tokens"] - figures["reused_tokens"]
        prompt = f"{new} of {figures['prompt_tokens']} prompt tokens run in "
        prompt += f"{figures['prompt_seconds']:.2f} s"
        words = f"{stopped}{self._variant}: {speed(figures)}; {prompt}; {ran(figures)}"
        out.print(f"[dim]{escape(words)}[/dim]", soft_wrap=True)
        if len({turn["variant"] for turn in self.turns}) > 1:
            out.print(f"[dim]{self._speeds()}[/dim]", soft_wrap=True)
        if figures["nothing_sparse"]:
            note(f"nothing ran sparse: {figures['nothing_sparse']}")

    def _speeds(self) -> str:
        """Tokens/s of all decode steps so far, by variant."""
        said = []
        for variant in ("sparse", "dense"):
            turns = [turn for turn in self.turns if turn["variant"] == variant]
            steps = [turn for turn in turns if turn["tokens_per_second"]]
            seconds = sum(turn["decode_steps"] / turn["tokens_per_second"] for turn in steps)
            tokens = sum(turn["decode_steps"] for turn in steps)
            rate = (
                f"{tokens / seconds:.1f} tokens/s over {tokens} tokens"
                if tokens
                else "not timed yet"
            )
            said.append(f"{variant} {rate}")
        return ", ".join(said)
