"""What a model writes after a prompt: whether sparsity makes it repeat itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_runtime.errors import DataError
from sparse_runtime.eval.quality.standard_errors import beside

#: Tokens of the groups whose repetition is counted.
GROUP = 4


def spread_passages(tokens: Tensor, count: int, size: int) -> Tensor:
    """Passages of a text, evenly spread over it.

    Args:
        tokens: [n] int64.
        count: passages.
        size: tokens of each.

    Returns:
        [count, size] int64.

    Raises:
        DataError: the text is too short for passages that do not overlap.
    """
    if len(tokens) < count * size:
        raise DataError(
            f"the text has {len(tokens)} tokens, too few for {count} prompts with their continuations "
            f"of {size} tokens together; expected {count * size} or more"
        )
    step = len(tokens) // count
    return torch.stack([tokens[start : start + size] for start in range(0, count * step, step)])


@torch.inference_mode()
def continue_prompts(
    model: Any, prompts: Tensor, new_tokens: int, *, temperature: float = 0.0, seed: int = 0
) -> Tensor:
    """Let a model write on, as one batch; an end token does not end a text.

    Args:
        model: a causal language model. A sparse one must run as many tokens in a call sparsely as
            there are prompts (``max_sparse_tokens``), and not as many as the prompts have together.
        prompts: token ids [n, p] int64.
        new_tokens: of each continuation.
        temperature: 0 is greedy.
        seed: of sampling.

    Returns:
        The continuations [n, new_tokens] int64, on the CPU.
    """
    # All of the model's distribution: the cuts of a model's own generation config are left aside.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    ids = prompts.to(model.device)
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        **sampling,
    )
    return written[:, prompts.shape[1] :].cpu()


def repeated_share(tokens: Sequence[int], group: int = GROUP) -> float:
    """Share of a text's groups of tokens that stood in it before: 0 if none does."""
    groups = [tuple(tokens[i : i + group]) for i in range(len(tokens) - group + 1)]
    return 1 - len(set(groups)) / len(groups)


def distinct_share(tokens: Sequence[int]) -> float:
    """Different tokens ÷ tokens."""
    return len(set(tokens)) / len(tokens)


#: Name of a figure -> figure of one continuation.
FIGURES = {"repeated_4grams": repeated_share, "distinct_tokens": distinct_share}


def compare_continuations(dense: Tensor, sparse: Tensor, text: Tensor) -> list[dict[str, Any]]:
    """Compare continuations of the same prompts.

    Args:
        dense: of the dense model [n, t] int64.
        sparse: of the sparse one [n, t] int64.
        text: how the text itself goes on [n, t] int64.

    Returns:
        Of each of ``FIGURES``: ``figure``, ``text`` (its mean over the text's own passages), and means
        with errors as :func:`sparse_runtime.eval.quality.standard_errors.beside` gives them.
    """
    return [
        {
            "figure": name,
            "text": sum(map(figure, text.tolist())) / len(text),
            **beside([*map(figure, dense.tolist())], [*map(figure, sparse.tolist())]),
        }
        for name, figure in FIGURES.items()
    ]


def same_tokens(dense: Tensor, sparse: Tensor) -> float:
    """Tokens before the first difference of two batches [n, t], mean over the batch."""
    return (dense == sparse).long().cumprod(1).sum(1).double().mean().item()
