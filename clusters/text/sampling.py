"""Text sampled from the model itself."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from sparse_runtime.cost import element_size
from sparse_runtime.errors import ConfigError
from sparse_runtime.files import write_tensors
from sparse_runtime.models.fingerprint import model_fingerprint
from sparse_runtime.models.onloading import is_offloaded
from sparse_runtime.progress import Advance, ProgressReporter, SilentProgress
from sparse_runtime.version import __version__

_SEQUENCE = 256
# Of those, at most this many for what a user says.
_MESSAGE = 64
# At most so many sequences at a time, and as few as keep keys and values within so many bytes: a step
# of 128 takes the demo model three times as long as one of 32.
_BATCH, _CACHE_BYTES = 128, 2**30
# Of the tokens that they may have, what sequences have on average: what is said often ends early, and
# texts leave room for the longest of their openings.
_SPOKEN, _WRITTEN = 0.7, 0.95
# Added to the seed of text that is to be held out.
_TEST_SEED = 0x7E57
# People have answers sampled below the temperature at which a model is calibrated.
_ANSWER_TEMPERATURE = 0.7
# What every second text begins with, and what every second message of a user: left to itself a model
# writes of few things.
_TEXT_OPENINGS = (
    "def ", "class ", "import ", "#include <", "public class ", "function ", "SELECT ", "#!/bin/sh\n",
    "Problem: ", "Solve for x: ", "Let $x$ be", "Theorem. ", "Question: ", "Calculate ",
    "The history of", "In 19", "The city of", "Abstract: ", "Once upon a time", "Chapter 1\n\n",
    "He said", "Dear ", "How to ", "Ingredients:\n", "Review: ", "Breaking news: ", "Q: ", "1. ",
    "# ", "La ", "Der ", "El ",
)  # fmt: skip
_MESSAGE_OPENINGS = (
    "Write a Python function", "Write a program", "What is wrong with this code?\n", "Explain",
    "Solve", "How many", "If a", "Calculate", "What is", "Who", "Why", "How do I", "Write a story",
    "Write an email", "Summarize", "Translate", "Give me", "Tell me",
)  # fmt: skip
# Stands for what a user says while a template is taken apart.
_MARK = "\ue000"


def sampled_tokens(
    model: Any,
    tokenizer: Any,
    max_tokens: int | None,
    *,
    split: str,
    seed: int,
    keep: Path | None = None,
    progress: ProgressReporter | None = None,
) -> Tensor:
    """Sample sequences of 256 tokens at most.

    Of a model with a chat template half of the tokens are conversations: what a user says is sampled
    too, after the words that a template puts before it (Magpie, arXiv 2406.08464), and then answered.
    The others are texts from their beginning. Half of the texts and of what users say begin with given
    words. Temperature is 1, and 0.7 for answers.

    Args:
        model: a causal language model.
        tokenizer: names the token that a text begins with, and has the template.
        max_tokens: as many.
        split: ``test`` samples from another seed than ``train``.
        seed: of sampling; the global random state stays as it is.
        keep: file that they are kept in, and read from by another call for the same.
        progress: reports one unit per token.

    Returns:
        Token ids [max_tokens] int64.

    Raises:
        ConfigError: no model, or one whose weights are offloaded, or no ``max_tokens``.
    """
    if model is None:
        raise ConfigError("data source 'self' needs the model to sample from; pass model")
    if max_tokens is None:
        raise ConfigError("data source 'self' needs a number of tokens to sample; set max_tokens")
    if is_offloaded(model):
        raise ConfigError(
            "data source 'self' samples text from the model, whose weights would be read from the disk "
            "for every token; expected other sources, or a model in memory (--no-offload)"
        )
    key = "" if keep is None else _key(model, tokenizer, max_tokens, split, seed)
    if keep is not None and keep.exists():
        with safe_open(keep, framework="pt") as reader:
            if (reader.metadata() or {}).get("key") == key:
                kept: Tensor = reader.get_tensor("tokens").clone()
                return kept
    own_seed = seed + (_TEST_SEED if split == "test" else 0)
    with (progress or SilentProgress()).task("sample text", max_tokens) as advance:
        tokens = _sampled(model, tokenizer, max_tokens, own_seed, advance)
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(keep, {"tokens": tokens}, {"key": key})
    return tokens


def _key(model: Any, tokenizer: Any, *others: Any) -> str:
    """Identify what is sampled: weights, their dtype, tokenizer, and the rest."""
    template = getattr(tokenizer, "chat_template", None)
    key = [model_fingerprint(model), str(model.dtype), tokenizer.get_vocab(), template, *others]
    return hashlib.sha256(json.dumps([*key, __version__], sort_keys=True).encode()).hexdigest()


def _sampled(model: Any, tokenizer: Any, max_tokens: int, seed: int, advance: Advance) -> Tensor:
    sampler = _Sampler(model, tokenizer, min(_SEQUENCE, max_tokens), advance)
    opening = _opening(tokenizer)
    sequences: list[Tensor] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        # A last few conversations would take as many steps as all before.
        near = max_tokens // 20
        while opening is not None and (missing := max_tokens // 2 - _tokens(sequences)) > near:
            chats = sampler.conversations(opening, missing)
            if not chats:
                break  # it says nothing there
            before = accumulate(map(len, chats), initial=0)
            sequences += [
                chat for chat, first in zip(chats, before, strict=False) if first < missing
            ]
            advance(missing - max(0, max_tokens // 2 - _tokens(sequences)))
        while (missing := max_tokens - _tokens(sequences)) > 0:
            sequences += sampler.texts(missing)
            advance(missing - max(0, max_tokens - _tokens(sequences)))
    return torch.cat(sequences)[:max_tokens].clone()


class _Sampler:
    def __init__(self, model: Any, tokenizer: Any, length: int, advance: Advance) -> None:
        self._model, self._tokenizer, self._advance = model, tokenizer, advance
        # A tokenizer may name a token that the model lacks.
        self._rows = model.get_input_embeddings().weight.shape[0]
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._start = next((t for t in known if t is not None and t < self._rows), 0)
        config = model.config.get_text_config()
        self._longest = getattr(config, "max_position_embeddings", None) or math.inf
        self._length = int(max(1, min(length, self._longest - 1)))
        kept = _cache_bytes(config, model.dtype) * (self._length + _MESSAGE)
        self._batch = max(1, min(_BATCH, _CACHE_BYTES // kept))
        ends = model.generation_config.eos_token_id
        self._ends: list[int] = [ends] if isinstance(ends, int) else list(ends or ())

    def texts(self, tokens: int) -> list[Tensor]:
        """A batch from the beginning, none of which ends early: as many as have so many tokens."""
        words = self._openings(_TEXT_OPENINGS, math.ceil(tokens / (_WRITTEN * self._length)))
        rest = max(1, self._length - max(map(len, words)))
        return self._opened(torch.tensor([self._start]), words, rest, ends=False)

    def conversations(self, opening: Tensor, tokens: int) -> list[Tensor]:
        """A batch of questions and answers, with all that the template puts around them."""
        most = min(_MESSAGE, self._length)
        words = self._openings(_MESSAGE_OPENINGS, math.ceil(tokens / (_SPOKEN * self._length)))
        if len(opening) + max(map(len, words)) + most > self._longest:
            return []
        said = self._opened(opening, words, most)
        messages = (self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said)
        prompts = [
            torch.tensor(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": message}],
                    add_generation_prompt=True,
                    return_dict=True,
                )["input_ids"]
            )
            for message in messages
            if message
        ]
        rest = max(1, self._length - most)
        prompts = [
            ids
            for ids in prompts
            if len(ids) + rest <= self._longest and int(ids.max()) < self._rows
        ]
        if not prompts:
            return []
        answers = self._continued(prompts, rest, temperature=_ANSWER_TEMPERATURE)
        return [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]

    def _openings(self, choices: Sequence[str], count: int) -> list[Tensor]:
        """Words to begin with of so many sequences or a batch, of every second one none."""
        known: list[Tensor] = []
        for number in torch.randint(len(choices), [min(count, self._batch)]).tolist():
            ids = self._tokenizer(choices[number], add_special_tokens=False)["input_ids"]
            fits = len(known) % 2 == 1 and all(i < self._rows for i in ids)
            known.append(torch.tensor(ids if fits else [], dtype=torch.int64))
        return known

    def _opened(
        self, start: Tensor, words: list[Tensor], new_tokens: int, *, ends: bool = True
    ) -> list[Tensor]:
        """Words, each with what comes after it and ``start``."""
        prompts = [torch.cat([start, ids]) for ids in words]
        found = self._continued(prompts, new_tokens, ends=ends)
        return [torch.cat(pair) for pair in zip(words, found, strict=True)]

    def _continued(
        self,
        prompts: list[Tensor],
        new_tokens: int,
        *,
        ends: bool = True,
        temperature: float = 1.0,
    ) -> list[Tensor]:
        """What comes after each of some prompts, up to an end token."""
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._start)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        device = self._model.device
        draw = _Draw(temperature, () if ends else self._ends, self._advance)
        sampled = self._model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            logits_processor=LogitsProcessorList([draw]),
            temperature=None,
            top_k=None,
            top_p=None,
            max_new_tokens=new_tokens,
            pad_token_id=self._start,
        )[:, longest:].cpu()
        if not ends:
            return list(sampled)
        return [row[: self._end(row)] for row in sampled]

    def _end(self, row: Tensor) -> int:
        """Tokens up to the first end token, and with it."""
        found = torch.isin(row, torch.tensor(self._ends, dtype=row.dtype)).nonzero()
        return len(row) if not len(found) else int(found[0]) + 1


def _tokens(sequences: Sequence[Tensor]) -> int:
    return sum(map(len, sequences))


def _cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of one token's keys and values in all layers."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(config.num_hidden_layers * 2 * kept * size) * element_size(dtype)


class _Draw(LogitsProcessor):
    """Draws a token of each row, which is the likeliest one then.

    By the inverse of the distribution function: ``torch.multinomial`` draws a number for every token of
    the vocabulary, a third of a decode step's time of the demo model. And in place: other tensors of
    that size take a tenth of it.

    Args:
        temperature: that scores are divided by.
        never: tokens that are not drawn.
        advance: told of each step.
    """

    def __init__(self, temperature: float, never: Sequence[int], advance: Advance) -> None:
        self._temperature, self._never, self._advance = temperature, list(never), advance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Of scores [batch, V] float32, overwritten: zero at the drawn token, else minus infinity."""
        self._advance(0)  # how many tokens come of a batch is known when it ends
        scores[:, [token for token in self._never if token < scores.shape[-1]]] = -math.inf
        scores.sub_(scores.amax(-1, keepdim=True)).div_(self._temperature)
        sums = scores.exp_().cumsum_(-1)
        # Above zero, and at most what the sums come to: no token of probability zero.
        drawn = (1 - torch.rand(len(sums), 1, device=sums.device)) * sums[:, -1:]
        tokens = torch.searchsorted(sums, drawn)
        return scores.fill_(-math.inf).scatter_(-1, tokens, 0.0)


def _opening(tokenizer: Any) -> Tensor | None:
    """What a chat template puts before the first thing a user says; None without a template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    before = text.partition(_MARK)[0]
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids) if ids else None
