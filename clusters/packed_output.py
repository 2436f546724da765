"""The packed model that a build for planes leaves beside its artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_runtime.files import atomic_folder, check_new_folder


@dataclass(frozen=True)
class PackedOutput:
    """Where the packed model goes; a build that goes on leaves what it has saved there before.

    Attributes:
        tokenizer: saved beside it.
        folder: new.
    """

    tokenizer: Any
    folder: Path

    def check(self, work: Path) -> None:
        """Refuse a folder that is not new.

        Raises:
            OutputFolderError: see ``check_new_folder``.
        """
        if not self._saved(work).exists():
            check_new_folder(self.folder)

    def save(self, model: Any, work: Path) -> None:
        """Write the model, if that has not been done before."""
        if self._saved(work).exists():
            return
        with atomic_folder(self.folder) as temporary:
            model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
        self._saved(work).touch()

    def _saved(self, work: Path) -> Path:
        """There once the model is."""
        return work / "packed"
