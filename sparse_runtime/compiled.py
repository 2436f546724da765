"""Decode steps as one compiled graph: what ``model.generate`` has to be told for that.

transformers compiles a decode step where the cache is static, on a CPU only when asked; prompts run as
they did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._dynamo import config as dynamo
from torch._dynamo.exc import TorchDynamoException, Unsupported

from sparse_runtime.errors import CompilationError

# A graph is of one cache length and kept on disk: with few lengths a second process finds it there.
_LENGTH_STEP = 128


def compiled_decode(model: Any, length: int) -> dict[str, Any]:
    """Options with which ``model.generate`` compiles its decode steps; use them for one call.

    ``model.generate(**inputs, max_new_tokens=64, **compiled_decode(model, prompt_length + 64))``.
    The first call compiles, which takes some ten seconds up to minutes; later ones on the same model
    do not, and a new process finds most of it in torch's cache on disk. What runs sparse follows the
    same rule as without.

    The model's attention changes with this, in place, as by :func:`fast_attention`.

    Args:
        model: a causal language model, sparse or not.
        length: tokens of the prompt and new ones, at most; the static cache has room for so many.

    Returns:
        ``past_key_values``, a static cache of the model for one sequence, and ``compile_config``.

    Raises:
        CompilationError: the model cannot be used with a static cache, or says that it cannot be
            captured as one graph.
    """
    # They take a second to import.
    from transformers import CompileConfig, StaticCache

    from sparse_runtime.attention import fast_attention

    if not getattr(model, "_can_compile_fullgraph", False):
        raise CompilationError(
            f"{type(model).__name__} cannot be compiled whole: transformers marks it as one that does "
            "not work with a static cache and torch.compile(fullgraph=True); generate without compiling"
        )
    fast_attention(model)
    config = CompileConfig(fullgraph=True, dynamic=False)
    if model.device.type == "cpu":
        config.mode = "default"  # the other one is for CUDA graphs
        config._compile_all_devices = True
    steps = max(1, -(-length // _LENGTH_STEP))
    cache = StaticCache(config=model.config, max_cache_len=steps * _LENGTH_STEP)
    return {"past_key_values": cache, "compile_config": config}


@contextmanager
def compiling(model: Any) -> Iterator[None]:
    """Name what keeps a model from being compiled, and undo :func:`compiled_decode` then.

    For the calls that compile. Inside, torch learns to check whole modules at a time for changes before
    a compiled step, which it can do and by default does not (some 1 ms of 15 for 30 layers).

    Raises:
        CompilationError: there is no C++ compiler, or the model's forward cannot be captured whole.
    """
    attention = model.config._attn_implementation
    try:
        with dynamo.patch(use_recursive_dict_tags_for_guards=True):
            yield
    except TorchDynamoException as error:
        model.set_attn_implementation(attention)
        raise CompilationError(_reason(error)) from error


def _reason(error: TorchDynamoException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not isinstance(error, Unsupported):
        return f"torch.compile failed: {lines[0]}"
    place = next((line for line in reversed(lines) if line.startswith("File ")), "")
    named = f"the model's forward cannot be captured as one graph: {lines[0]}"
    return f"{named} ({place})" if place else named
