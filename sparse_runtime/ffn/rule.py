"""What a call of n tokens does: a fixed rule, the same on every CPU and when compiled.

    n ≤ sparse tokens      each token's cluster only
    n ≤ dense-row tokens   all neurons, by the same kernels (CPU only)
    more                   all neurons, by the original module

Several tokens read the union of their sets, so the more there are the less is skipped: with half of the
neurons in each set, four tokens read nearly all. From there on a sparse call gains no time over a dense
one by the same kernels, and loses quality (docs/benchmarks/cpu.md, *tokens in a call*). torch's own
matrix products are faster than those kernels from some 16 tokens on. On a GPU the bound is a fixed one
for the card and shape until ``tune``, run by the user ahead of time, has measured another.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Why tokens ran dense, in the order of the counters: the call had more tokens than the rule runs
#: sparsely; inside ``dense(model)``; gradients were recorded; a projection or the FFN is no longer
#: what the kernels read (adapter, hook, offload, other weights); dtype or device of the call are not
#: those of the weights (autocast); no backend can run here; dropout is at work in the FFN, or may be in
#: the larger module that it is written out in; the guard found that clusters do not fit the sequence.
DENSE_REASONS = (
    "long call",
    "dense()",
    "gradients",
    "patched",
    "autocast",
    "no backend",
    "dropout",
    "guard",
)

#: The warning about the third of them.
NO_DERIVATIVE = (
    "FFNs run dense where gradients are recorded, or gradient checkpointing will: the sparse kernels "
    "have no derivative. Generate and score with model.eval(), under torch.no_grad() or "
    "torch.inference_mode()"
)

_SPARSE_TOKENS = {"cpu": 2, "reference": 16}
_ROW_TOKENS = {"cpu": 16}


@dataclass(frozen=True)
class TokenRule:
    """What calls do by their number of tokens (batch times sequence).

    Attributes:
        sparse: most tokens of a sparse call; None for any number.
        rows: most tokens of a call that runs all neurons by the project's kernels.
    """

    sparse: int | None
    rows: int = 0

    def path(self, num_tokens: int) -> str:
        """``sparse``, ``rows`` or ``dense``."""
        if self.sparse is None or num_tokens <= self.sparse:
            return "sparse"
        return "rows" if num_tokens <= self.rows else "dense"

    def __str__(self) -> str:
        if self.sparse is None:
            return "every call sparse"
        if self.sparse == 0:
            return "every call dense"
        calls = "1 token" if self.sparse == 1 else f"≤ {self.sparse} tokens"
        return f"calls of {calls} sparse, longer ones dense"


def token_rule(backend: str, *, sparse_tokens: int | None, every_call: bool) -> TokenRule:
    """The rule of a backend.

    Args:
        backend: ``cpu``, ``reference``, or another one, whose own bound is 0.
        sparse_tokens: instead of the backend's own bound.
        every_call: run every call sparsely.
    """
    if every_call:
        return TokenRule(None)
    if sparse_tokens is None:
        sparse_tokens = _SPARSE_TOKENS.get(backend, 0)
    return TokenRule(sparse_tokens, _ROW_TOKENS.get(backend, 0))
