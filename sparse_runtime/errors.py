"""Every error this package raises on purpose.

A message names the thing, what was found, what was expected and the remedy. The command line prints
it as one line; :class:`ConfigError` exits with code 2 (usage), every other one with code 1.
"""

from __future__ import annotations


class SparseRuntimeError(Exception):
    """Base class of all errors raised on purpose by sparse_runtime."""


class ConfigError(SparseRuntimeError, ValueError):
    """An option has a value that cannot work, whatever the model and the data."""


class ModelError(SparseRuntimeError):
    """A model could not be loaded."""


class DataError(SparseRuntimeError):
    """A text source could not be read, or holds too little text."""


class UnsupportedArchitectureError(SparseRuntimeError):
    """An FFN computes what this package does not, or its weights are not what it can read."""


class NothingMatchedError(SparseRuntimeError):
    """No module of the model, or no layer of the artifact, matched what was looked for."""


class AlreadySparseError(SparseRuntimeError):
    """``sparsify`` was called on a model that is sparse already."""


class NotSparseError(SparseRuntimeError):
    """The model holds no sparse FFN."""


class ArtifactError(SparseRuntimeError):
    """A cluster artifact is missing, incomplete, damaged or inconsistent."""


class ArtifactVersionError(ArtifactError):
    """The artifact was written in a format that this version cannot read."""


class FingerprintMismatchError(ArtifactError):
    """The artifact was built for another model."""


class OutputFolderError(SparseRuntimeError):
    """The output folder cannot be used, or could not be written."""


class NotEnoughMemoryError(SparseRuntimeError, MemoryError):
    """Memory ran out during a build."""


class BackendUnavailableError(SparseRuntimeError):
    """A kernel backend was asked for by name, or ``strict``, and cannot run here."""


class CompilationError(SparseRuntimeError):
    """A model's decode steps cannot be compiled here, or not as one graph."""
