"""One text after the other by one model; what the next begins with is not computed again.

The cache of the last text is kept. A prompt that begins like that text, as a growing conversation does,
runs only what is new, whatever the template made of the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria

from sparse_runtime.generation.kept_sequence import KeptSequence
from sparse_runtime.generation.prompts import Prompt, room_for_answer
from sparse_runtime.generation.sampling import Sampling
from sparse_runtime.generation.streaming import TextStream


@dataclass(frozen=True)
class Answer:
    """A text, and the time it took.

    Attributes:
        text: without end tokens and stop strings.
        prompt_tokens: of the whole prompt.
        reused_tokens: of these, those that were in the cache already.
        new_tokens: without an end token.
        ended: ``end`` by an end token or a stop string, ``length`` by the number of tokens,
            ``interrupted`` from outside.
        prompt_seconds: from the call to the first new token.
        step_seconds: of each decode step, one for every new token but the first.
    """

    text: str
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    ended: Literal["end", "length", "interrupted"]
    prompt_seconds: float
    step_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float | None:
        """Of decode steps, the prompt's time aside; None without one."""
        taken = sum(self.step_seconds)
        return len(self.step_seconds) / taken if taken else None


class Session:
    """Texts by a model, one at a time: a session is of one thread.

    Args:
        model: a causal language model of transformers, sparse or not.
        tokenizer: of the model.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._kept: KeptSequence | None = None

    def answer(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        show: Callable[[str], object] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> Answer:
        """Answer a prompt, or continue it.

        Inside ``dense(model)`` the prompt's new part and the answer run dense; what is in the cache
        stays as it was computed.

        Args:
            prompt: as of :func:`encode_messages` or :func:`encode_text`.
            max_new_tokens: at most this many, an end token included, and no more than the model's
                context has room for.
            sampling: beside the model's generation config.
            stop: the text ends in front of the first of these.
            show: is told each piece of text as it comes.
            interrupted: asked after each token; True ends the text there.
            options: of ``model.generate``; with ``past_key_values`` nothing is reused or kept.

        Raises:
            ConfigError: the prompt fills the model's context; a stop string is empty.
        """
        room = room_for_answer(self._model, prompt)
        context = () if prompt.chat else prompt.ids[0].tolist()
        stream = TextStream(self._tokenizer, show, stop=stop, context=context)
        sampling = sampling or Sampling()
        tokens, reused = prompt.ids[0].tolist(), 0
        if "past_key_values" in options:
            self.forget()
        else:
            kept, self._kept = self._kept, None  # of no use where this call fails
            reused = kept.fit(tokens) if kept else 0
            if kept and reused:
                options["past_key_values"] = kept.cache
            del kept  # or two caches would be held while the prompt is computed
        ids = prompt.ids.to(self._model.device)
        follower = _Follower(stream, prompt.length, _end_tokens(self._model), interrupted)
        torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            result = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room),
                num_beams=1,
                use_cache=True,
                return_dict_in_generate=True,
                stopping_criteria=[follower],
                **sampling.options(),
                **options,
            )
        stream.end()
        self._kept = KeptSequence(tokens + follower.tokens, result.get("past_key_values"))
        return follower.answer(prompt, reused)

    def forget(self) -> None:
        """Drop the cache."""
        self._kept = None


class _Follower(StoppingCriteria):
    """Sees each token when it is chosen: notes the time, streams it, and ends the text.

    transformers' streamers come too late for that: since 5.23 a token is decided on before it is
    streamed.
    """

    def __init__(
        self,
        stream: TextStream,
        length: int,
        end_tokens: Sequence[int],
        interrupted: Callable[[], bool],
    ) -> None:
        self._stream, self._length = stream, length
        self._end_tokens, self._interrupted = end_tokens, interrupted
        self._started = time.perf_counter()
        self._times: list[float] = []
        self._was_interrupted = False
        self.tokens: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for token in input_ids[0, self._length + len(self.tokens) :].tolist():
            self._times.append(time.perf_counter())
            self.tokens.append(token)
            if token not in self._end_tokens:
                self._stream.put(token)
        self._was_interrupted = self._interrupted()
        over = self._stream.stopped or self._was_interrupted
        return torch.full((1,), over, device=input_ids.device)

    def answer(self, prompt: Prompt, reused: int) -> Answer:
        ended_itself = self.tokens[-1] in self._end_tokens
        times = self._times
        ended: Literal["end", "length", "interrupted"] = "length"
        if ended_itself or self._stream.stopped:
            ended = "end"
        elif self._was_interrupted:
            ended = "interrupted"
        return Answer(
            text=self._stream.text,
            prompt_tokens=prompt.length,
            reused_tokens=reused,
            new_tokens=len(self.tokens) - ended_itself,
            ended=ended,
            prompt_seconds=times[0] - self._started,
            step_seconds=tuple(b - a for a, b in pairwise(times)),
        )


def _end_tokens(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else end if isinstance(end, list) else [end]
