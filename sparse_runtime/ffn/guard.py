"""The guard against drift: a prompt that clusters do not fit is answered dense.

A prompt runs all neurons anyway. At some of its tokens and in some layers the sparse FFN runs beside
it, and the squares of what it is off by are compared with what the build found on held-out text:

    score = mean over layers l of  mean over tokens ‖sparse(x) − dense(x)‖² ÷ level_l,

about 1 on text like that. A sequence whose score is more than 2.5 standard deviations above 1, and 1.25
at least, decodes by all neurons. The choice is kept on the sequence's cache, row by row, and nowhere
else: it follows the cache wherever that goes, and what a call computes stays a function of its input
and the model.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_runtime.artifact.measured import AuditLevels
from sparse_runtime.kernels.linear import needs_gradient

#: Tokens of a prompt that are audited.
AUDITED_TOKENS = 16
# Shorter ones say too little.
_LEAST_TOKENS = 8
# Standard deviations above the build's level: 0.6 % of a normal distribution are further up.
_DEVIATIONS = 2.5
# A build's own, of a few windows, may be far too small: texts of one kind differ by .06 to .09.
_LEAST_SPREAD = 0.1
# Of the cache.
_ATTRIBUTE = "_sparse_runtime_dense_rows"


@dataclass
class _Call:
    """An audit in one forward of the decoder.

    Attributes:
        rows: numbers of the audited tokens in the flattened batch [n] int64.
        sequences: sequence of each of these [n] int64.
        tokens: of the batch.
        batch: sequences.
        errors: layer index -> mean error of each sequence's tokens [batch] float32.
    """

    rows: Tensor
    sequences: Tensor
    tokens: int
    batch: int
    errors: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: tuple[int, int], mask: Any) -> _Call | None:
        """At evenly spaced tokens of each sequence, padding aside; None if one is too short."""
        batch, length = shape
        rows, sequences = [], []
        for number in range(batch):
            tokens = torch.arange(length)
            if isinstance(mask, Tensor) and mask.shape == (batch, mask.shape[-1]):
                tokens = mask[number, -length:].cpu().nonzero()[:, 0]
            places = audited_places(len(tokens))
            if places is None:
                return None
            rows.append(number * length + tokens[places])
            sequences.append(torch.full((len(places),), number))
        return cls(torch.cat(rows), torch.cat(sequences), batch * length, batch)

    def add(self, layer: int, errors: Tensor) -> None:
        """Take a layer's errors of the audited tokens [n]."""
        sums = torch.zeros(self.batch).index_add_(0, self.sequences, errors.float().cpu())
        self.errors[layer] = sums / self.sequences.bincount(minlength=self.batch)


def audited_places(length: int) -> Tensor | None:
    """Which of a prompt's tokens are audited [n] int64; None if it has too few."""
    if length < _LEAST_TOKENS:
        return None
    count = min(AUDITED_TOKENS, length)
    return ((torch.arange(count) + 0.5) * length / count).long()


class _Now(threading.local):
    """What the current thread's forward of the decoder is about."""

    def __init__(self) -> None:
        self.call: _Call | None = None
        self.entered = ExitStack()

    def __reduce__(self) -> tuple[type[_Now], tuple[()]]:
        # What threads are doing is not copied with a model.
        return type(self), ()


class Guard:
    """Audits prompts of one sparse model, and has the sequences decode dense that fail.

    Args:
        levels: of the build.
        state: of the model's sparse FFNs.

    Attributes:
        audited: prompts since :meth:`reset`, or turns of a conversation.
        dense: of these, those that decode dense.
        errors: of the last forward that was audited: layer index -> mean ‖sparse(x) − dense(x)‖² of
            each sequence's tokens [batch] float32.
        scores: by these, of each sequence.
    """

    def __init__(self, levels: AuditLevels, state: Any) -> None:
        self.levels = levels
        self.audited = self.dense = 0
        self.errors: dict[int, Tensor] = {}
        self.scores: list[float] = []
        self._state = state
        self._now = _Now()
        self._handles: list[Any] = []

    def attach(self, decoder: nn.Module) -> None:
        """Follow the forwards of a decoder."""
        self._handles = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    @property
    def limit(self) -> float:
        """Scores above it decode dense."""
        return 1 + _DEVIATIONS * max(self.levels.spread, _LEAST_SPREAD)

    def reset(self) -> None:
        """Count from zero."""
        self.audited = self.dense = 0

    def detach(self) -> None:
        """Follow them no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def audit(
        self, ffn: Any, hidden_states: Tensor, output: Tensor, choice: Sequence[Tensor]
    ) -> None:
        """Compare an FFN's dense output with its sparse one, if this forward is audited.

        Args:
            ffn: sparse.
            hidden_states: [..., H].
            output: of all neurons [..., H].
            choice: experts of each token and their weights, if there are experts.
        """
        call, size = self._now.call, hidden_states.shape[-1]
        if call is None or ffn.layer_index not in self.levels.errors:
            return
        if hidden_states.numel() != call.tokens * size or needs_gradient(hidden_states):
            return
        if ffn.hindrance(hidden_states) is not None:
            return
        rows = call.rows.to(hidden_states.device)
        own = [part.index_select(0, rows) for part in choice]
        expected = output.reshape(-1, size).index_select(0, rows)
        found = ffn.uncounted(hidden_states.reshape(-1, size).index_select(0, rows), *own)
        call.add(ffn.layer_index, (found.float() - expected.float()).square().sum(-1))

    def _begin(self, decoder: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._state.switch.depth > 0:
            return
        shape = _shape(args, kwargs)
        now = self._now
        now.call = None
        if shape is None:
            return
        if shape[1] >= _LEAST_TOKENS:
            now.call = _Call.of(shape, kwargs.get("attention_mask"))
            return
        rows = dense_rows(kwargs.get("past_key_values"))
        if any(rows):
            alike = all(rows) or len(rows) != shape[0]
            now.entered.enter_context(self._state.switch.by_guard(None if alike else rows))

    def _end(self, decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        now = self._now
        now.entered.close()
        call, now.call = now.call, None
        if call is None or call.errors.keys() != self.levels.errors.keys():
            return
        self.errors, self.scores = call.errors, self._scores(call)
        rows = tuple(score > self.limit for score in self.scores)
        self.audited += len(rows)
        cache = getattr(output, "past_key_values", None) or kwargs.get("past_key_values")
        if cache is None:
            return
        setattr(cache, _ATTRIBUTE, rows)
        self.dense += sum(rows)
        if any(rows):
            self._state.warn_once(
                "guard",
                f"a prompt is decoded by all neurons: its tokens lose {max(self.scores):.2f} times "
                f"what text of the build loses, and {self.limit:.2f} is the limit. Build clusters on "
                "text like it for speed, or sparsify with guard=False to decode sparse all the same",
            )

    def _scores(self, call: _Call) -> list[float]:
        ratios = [call.errors[layer] / level for layer, level in self.levels.errors.items()]
        scores: list[float] = torch.stack(ratios).mean(0).tolist()
        return scores


def dense_rows(cache: Any) -> Sequence[bool]:
    """Which sequences of a cache decode dense; none where nothing was audited."""
    rows: Sequence[bool] = getattr(cache, _ATTRIBUTE, ())
    return rows


def by_rows(ffn: Any, hidden_states: Tensor, *choice: Tensor) -> Tensor:
    """An FFN's output [..., H] where some sequences of a batch decode dense.

    Args:
        ffn: sparse, in a forward that the guard has split.
        hidden_states: [batch, length, H], or without its first dimensions.
        choice: see :meth:`Guard.audit`.
    """
    switch = ffn.state.switch
    rows = torch.tensor(switch.rows, device=hidden_states.device)
    x = hidden_states.reshape(len(rows), -1, hidden_states.shape[-1])
    output = torch.empty_like(x)
    experts = [part.reshape(len(rows), -1, part.shape[-1]) for part in choice]
    with switch.by_guard(None):
        output[rows] = _of(ffn, x[rows], [part[rows] for part in experts])
    with switch.sparse():
        output[~rows] = _of(ffn, x[~rows], [part[~rows] for part in experts])
    return output.reshape(hidden_states.shape)


def _of(ffn: Any, x: Tensor, choice: list[Tensor]) -> Tensor:
    if choice:  # experts take tokens without a batch
        output: Tensor = ffn(x.flatten(0, 1), *(part.flatten(0, 1) for part in choice))
        return output.reshape(x.shape)
    return ffn(x)


def _shape(args: Any, kwargs: Any) -> tuple[int, int] | None:
    """Sequences and tokens of each in a decoder's call."""
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    ids = next(
        (tensor for tensor in given if isinstance(tensor, Tensor) and tensor.dim() >= 2), None
    )
    return None if ids is None else (ids.shape[0], ids.shape[1])
