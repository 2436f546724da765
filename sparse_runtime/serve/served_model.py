"""A sparse model with its tokenizer and limits: requests become prompts, prompts become answers."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparse_runtime.api import cost_report, reset_cost
from sparse_runtime.cost import CostReport
from sparse_runtime.errors import ModelError
from sparse_runtime.generation.kept_sequence import KeptSequence
from sparse_runtime.serve.activation import Activation, prove
from sparse_runtime.serve.answer import Answer
from sparse_runtime.serve.failures import RequestFailure, too_long
from sparse_runtime.serve.parts import template_messages
from sparse_runtime.serve.requests import ChatRequest, GenerationRequest, TextRequest


@dataclass(frozen=True)
class Limits:
    """Tokens that a request may take.

    Attributes:
        prompt: of a prompt.
        answer: of an answer; also where a request names no length.
        context: of both; None where the model does not say.
    """

    prompt: int
    answer: int
    context: int | None

    @classmethod
    def of(cls, model: Any, *, prompt: int | None, answer: int) -> Limits:
        """Those of a model; ``prompt`` is what it takes if None."""
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        most = prompt or context or 2**31
        return cls(min(most, context - 1) if context else most, answer, context)

    def new_tokens(self, prompt: int, asked: int | None) -> int:
        """Length of an answer to a prompt of so many tokens.

        Raises:
            RequestFailure: the prompt is too long, or the length that is asked for.
        """
        if prompt > self.prompt:
            raise too_long(
                f"the prompt has {prompt} tokens; this server takes at most {self.prompt}"
            )
        if asked is not None and asked > self.answer:
            raise too_long(
                f"{asked} tokens are asked for; this server generates at most {self.answer}",
                "max_tokens",
            )
        room = self.answer if self.context is None else self.context - prompt
        if asked is not None and asked > room:
            raise too_long(
                f"the prompt has {prompt} tokens, and {asked} are asked for; the model's context "
                f"length is {self.context}",
                "max_tokens",
            )
        return min(asked or self.answer, room)


@dataclass(frozen=True)
class Figures:
    """What an answer took.

    Attributes:
        prompt_tokens: of the prompt.
        reused_tokens: of those, the ones that were in the cache of the sequence before.
        new_tokens: of the answer, an end token included.
        seconds: of the whole.
        tokens_per_second: after the first token; None where there is no other.
        cost: what the FFNs have read.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_second: float | None
    cost: CostReport


class ServedModel:
    """A model as it is served.

    Args:
        name: in requests.
        model: sparse, in eval mode.
        tokenizer: of the model, a fast one.
        limits: of its requests.
        reuse: keep the cache of the last sequence.

    Attributes:
        activation: what ran sparse, once :meth:`warm_up` has run.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, limits: Limits, *, reuse: bool = True
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer of {name} is a {type(tokenizer).__name__}; expected a fast one "
                "(tokenizers.Tokenizer), which answers are streamed by. Save the model with a "
                "tokenizer.json"
            )
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self.created = int(time.time())
        self.activation: Activation | None = None
        self._reuse = reuse
        self._kept: KeptSequence | None = None
        end = model.generation_config.eos_token_id
        self.end_tokens = frozenset([] if end is None else [end] if isinstance(end, int) else end)

    def warm_up(self) -> None:
        """Generate a little, in the thread that will generate; sets ``activation``."""
        self.activation = prove(self.model, self.tokenizer("Hello").input_ids or [0])

    def chat_prompt(self, request: ChatRequest) -> list[int]:
        """Token ids of a conversation in the model's chat template.

        Raises:
            RequestFailure: there is no template, or it refuses the messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise RequestFailure(
                f"{self.name} has no chat template; use /v1/completions", param="messages"
            )
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        try:
            ids = self.tokenizer.apply_chat_template(
                template_messages(messages),
                tools=request.offered_tools,
                add_generation_prompt=True,
                return_dict=True,
                **(request.chat_template_kwargs or {}),
            )["input_ids"]
        except Exception as error:  # a template is code that came with the model
            raise RequestFailure(
                f"the model's chat template refuses the messages ({type(error).__name__}: {error})",
                param="messages",
            ) from error
        return self._some(list(ids), "messages")

    def text_prompt(self, request: TextRequest) -> list[int]:
        """Token ids of a text to continue, or of token ids as they are.

        Raises:
            RequestFailure: there are none, or one is not in the vocabulary.
        """
        ids: list[int] = []
        for part in [request.prompt] if isinstance(request.prompt, str) else request.prompt:
            ids += self.tokenizer(part).input_ids if isinstance(part, str) else [part]
        most = self.model.get_input_embeddings().weight.shape[0]
        if wrong := [token for token in ids if not 0 <= token < most]:
            raise RequestFailure(
                f"token id {wrong[0]} is not in the vocabulary; expected 0 to {most - 1}",
                param="prompt",
            )
        return self._some(ids, "prompt")

    def _some(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise RequestFailure("the prompt has no tokens; expected some text", param=param)
        return ids

    def generation_config(self, request: GenerationRequest, max_new_tokens: int) -> Any:
        """The model's own settings, and in their place what a request asks for."""
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens, config.max_length = max_new_tokens, None
        config.num_beams = config.num_return_sequences = 1
        config.return_dict_in_generate = True  # with the cache
        if request.temperature is not None:
            config.do_sample = request.temperature > 0
            config.temperature = request.temperature or None
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
            return config
        for name in ("top_p", "top_k"):
            if (value := getattr(request, name)) is not None:
                setattr(config, name, value)
        return config

    def generate(
        self, prompt: Sequence[int], config: Any, answer: Answer, *, seed: int | None = None
    ) -> Figures:
        """Generate one answer; in one thread at a time.

        Args:
            prompt: token ids.
            config: as :meth:`generation_config` makes it.
            answer: follows it, and may end it.
            seed: of what is drawn; another one each time if None.
        """
        started = time.perf_counter()
        kept, self._kept = self._kept, None  # of no use to anybody where this call fails
        reused = kept.fit(prompt) if kept else 0
        cache = kept.cache if kept and reused else None
        del kept  # or two caches would be held while the prompt is computed
        reset_cost(self.model)
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        ids = torch.tensor([list(prompt)], device=self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                past_key_values=cache,
                stopping_criteria=[answer],
            )
        answer.end()
        if self._reuse:
            tokens = [*prompt, *answer.tokens]
            self._kept = KeptSequence(tokens, output.get("past_key_values"), least=len(prompt))
        return Figures(
            prompt_tokens=len(prompt),
            reused_tokens=reused,
            new_tokens=len(answer.tokens),
            seconds=time.perf_counter() - started,
            tokens_per_second=answer.tokens_per_second,
            cost=cost_report(self.model),
        )
