"""Whether a loaded model is what its checkpoint holds."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from sparse_runtime.errors import ModelError
from sparse_runtime.printable import printable


def check_loaded(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Check that all weights of a model came out of its checkpoint; warn of what it did not take.

    Args:
        name: of the model.
        model: as loaded.
        info: as ``from_pretrained(output_loading_info=True)`` gives it.

    Raises:
        ModelError: weights are missing or have other sizes: transformers has put random ones there.
    """
    remedy = "Download or save the checkpoint again, or load it as the model it was made of"
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, found, expected = mismatched[0]
        raise ModelError(
            f"model {name!r} does not fit its checkpoint: {key} is {list(found)}, expected "
            f"{list(expected)} by config.json{_others(mismatched)}. {remedy}"
        )
    # Buffers that are not in the checkpoint are computed; tied weights are not missing.
    missing = sorted({key for key, _ in model.named_parameters()} & set(info["missing_keys"]))
    if missing:
        raise ModelError(
            f"model {name!r} lacks {missing[0]}{_others(missing)} in its checkpoint, where random "
            f"weights would be run. {remedy}"
        )
    if info.get("error_msgs"):
        raise ModelError(
            f"model {name!r} could not be loaded whole: {printable(str(info['error_msgs'][0]))}. "
            f"{remedy}"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        warnings.warn(
            f"model {name!r} leaves {unexpected[0]}{_others(unexpected)} of its checkpoint out: "
            f"{type(model).__name__} has no such weights",
            stacklevel=4,
        )


def _others(names: Collection[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
