"""Makes ``from_pretrained`` know packed folders as soon as transformers is there, and not before.

transformers asks a table for the classes of a quantization method, and has no entry points to fill it.
Filling it means to import transformers, 0.8 seconds on top of 1.5 for this package and 1.2 for torch,
which a process that loads no model does without.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


class _WhenImported(MetaPathFinder):
    """Finds the table's module as others do, once, and has it filled after it was run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_fill(module: ModuleType) -> None:
            run(module)
            _fill()

        spec.loader.exec_module = run_and_fill  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register ``planes`` with transformers: now if it is imported already, else when it is."""
    if _TABLE in sys.modules:
        _fill()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _fill() -> None:
    try:
        import sparse_runtime.ffn.plane_quantizer  # noqa: F401
    except ImportError as error:
        # Whoever imports transformers here may have no packed model in mind.
        warnings.warn(
            f"models with packed weights cannot be loaded here ({error}); install a newer transformers",
            stacklevel=2,
        )


register()
