"""A needle in a long text: does the model still find one sentence thousands of tokens back?

A sentence tells a city's number, a question at the end asks for it, and the answer is begun for the
model, as in RULER (arXiv 2404.06654): what is left to it are the number's tokens. One pass over prompt
and answer tells both whether the greedy answer is right and how probable the right one is; the
latter still says something where a small model fails at the former.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.quality.standard_errors import beside
from sparse_runtime.models.ffn_layers import decoder_of
from sparse_runtime.models.output_head import output_head
from sparse_runtime.progress import Advance

_CITIES = (
    *("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Sofia", "Accra", "Hanoi", "Quito"),
    *("Riga", "Tunis", "Perth", "Boston", "Geneva", "Nairobi"),
)
_DIGITS = 5
# Prompts are cut to fit: texts may tokenize otherwise once they are joined.
_TRIES = 8


@dataclass(frozen=True)
class Needle:
    """A prompt with its answer.

    Attributes:
        length: tokens asked for, prompt and answer together.
        depth: share of the filler before the needle.
        prompt: token ids, up to the answer [n] int64.
        answer: token ids [m] int64.
    """

    length: int
    depth: float
    prompt: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Answer:
    """What a model makes of a needle.

    Attributes:
        found: its greedy answer is the right one.
        log_probability: of the right answer, in nats, summed over its tokens.
    """

    found: bool
    log_probability: float


def make_needles(
    tokenizer: Any,
    filler: Tensor,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    repeats: int,
    seed: int = 0,
) -> list[Needle]:
    """Hide needles in a text.

    Args:
        tokenizer: of the model; its chat template is used if it has one.
        filler: tokens of a text [n] int64. Prompts of one length begin at different places of it.
        lengths: tokens of prompt and answer together; a few less may come out.
        depths: shares of the filler before the needle, 0 to 1.
        repeats: prompts of each length and depth, with cities and numbers of their own.
        seed: of cities, numbers and places.

    Raises:
        ConfigError: a length is too short for the question.
        DataError: the text is shorter than the longest prompt.
    """
    if len(filler) < max(lengths):
        raise DataError(
            f"the text has {len(filler)} tokens; expected the longest needle prompt, {max(lengths)}, "
            "or more"
        )
    generator = random.Random(seed)
    needles = []
    for length in lengths:
        for depth in depths:
            for _ in range(repeats):
                city = generator.choice(_CITIES)
                number = str(generator.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))
                start = generator.randrange(len(filler) - length + 1)
                part = filler[start : start + length]
                needles.append(_fitted(tokenizer, part, length, depth, city, number))
    return needles


def _fitted(
    tokenizer: Any, filler: Tensor, length: int, depth: float, city: str, number: str
) -> Needle:
    """A needle in as much of a filler as fits a length."""
    size = length
    for _ in range(_TRIES):
        before = round(depth * size)
        pieces = [
            tokenizer.decode(part, skip_special_tokens=True).strip()
            for part in (filler[:before], filler[before:size])
        ]
        pieces.insert(1, f"The secret number of {city} is {number}.")
        prompt, answer = _encoded(tokenizer, "\n\n".join(filter(None, pieces)), city, number)
        excess = len(prompt) + len(answer) - length
        if excess <= 0:
            return Needle(length, depth, prompt, answer)
        size -= excess
        if size < 0:
            break
    raise ConfigError(
        f"a needle prompt of {length} tokens has no room for its question; expected a greater length"
    )


def _encoded(tokenizer: Any, text: str, city: str, number: str) -> tuple[Tensor, Tensor]:
    """Prompt, up to the number that is asked for, and number."""
    asked = (
        "Read this text and remember the secret number in it.\n\n"
        f"{text}\n\nWhat is the secret number of {city}?"
    )
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": asked}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        special = False  # the template has written them
    else:
        asked, special = f"{asked}\n", True
    begun = f"{asked}The secret number of {city} is"
    prompt, whole = (
        tokenizer(words, add_special_tokens=special, verbose=False)["input_ids"]
        for words in (begun, f"{begun} {number}")
    )
    ids = torch.tensor(whole, dtype=torch.int64)
    return ids[: len(prompt)], ids[len(prompt) :]


@torch.inference_mode()
def find_needles(
    model: Any,
    needles: Sequence[Needle],
    advance: Advance,
    prompts: Callable[[int], AbstractContextManager[None]] | None = None,
) -> list[Answer]:
    """Run a model over needles.

    Args:
        model: a causal language model, dense or with every token sparse.
        needles: each is one pass.
        advance: is called with 1 after each.
        prompts: prompt length -> context for a pass whose prompt is run apart, such as
            ``dense_prompts`` of ``sparse_runtime.eval.quality.forwards``; None: none is.
    """
    decoder, head = decoder_of(model), output_head(model)
    device = next(model.parameters()).device
    answers = []
    for needle in needles:
        ids = torch.cat([needle.prompt, needle.answer])[None].to(device)
        with nullcontext() if prompts is None else prompts(len(needle.prompt)):
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        logits = head(states[0, -len(needle.answer) - 1 : -1]).float()
        expected = needle.answer.to(logits.device)
        right = logits.log_softmax(-1).gather(1, expected[:, None])
        found = bool((logits.argmax(-1) == expected).all())
        answers.append(Answer(found, right.sum().item()))
        advance(1)
    return answers


def compare_needles(
    needles: Sequence[Needle], dense: Sequence[Answer], sparse: Sequence[Answer]
) -> list[dict[str, Any]]:
    """The answers of two models, by length and depth.

    Args:
        needles: what both were asked.
        dense: answers of the dense model, in the same order.
        sparse: of the sparse one.

    Returns:
        Of each length and depth, and of each length over all depths (``depth`` None): ``length``,
        ``depth``, ``prompts``, ``found`` and ``log_probability``, each with what
        :func:`sparse_runtime.eval.quality.standard_errors.beside` says.
    """
    asked = list(zip(needles, dense, sparse, strict=True))
    rows = []
    for length in dict.fromkeys(needle.length for needle in needles):
        of_length = [entry for entry in asked if entry[0].length == length]
        depths: list[float | None] = [*dict.fromkeys(needle.depth for needle, _, _ in of_length)]
        for depth in [*depths, None]:
            entries = [entry for entry in of_length if depth in (None, entry[0].depth)]
            sides = [entry[1] for entry in entries], [entry[2] for entry in entries]
            rows.append(
                {
                    "length": length,
                    "depth": depth,
                    "prompts": len(entries),
                    "found": beside(*([float(a.found) for a in side] for side in sides)),
                    "log_probability": beside(
                        *([a.log_probability for a in side] for side in sides)
                    ),
                }
            )
    return rows
