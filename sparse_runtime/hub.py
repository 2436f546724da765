"""The Hub: which names are asked of it, and why it did not answer."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

# A small repository that has always been there, and how long to wait for it.
_ASKED_FOR = "openai-community/gpt2"
_PATIENCE_SECONDS = 5.0


def why_a_path(name: str, *, bare_ids: bool = False) -> str | None:
    """Say why a name that nothing local has is a path all the same, not to be asked of the Hub.

    A path is what begins with ``.``, ``/`` or ``~`` or holds a backslash, ends with a slash or holds
    more than one, is no valid Hub id, or begins with the name of a folder that is here: with a folder
    ``clusters`` in the working directory, ``clusters/mistral-7b-50`` is looked for in it alone.

    Args:
        name: folder or Hub id.
        bare_ids: whether an id without an owner (``gpt2``) exists.

    Returns:
        The reason, as a clause that follows the name; None for a Hub id.
    """
    if name.startswith((".", "/", "~")) or "\\" in name or Path(name).is_absolute():
        return "which is written as a path"
    owner, slash, _ = name.partition("/")
    if name.endswith("/") or name.count("/") > 1 or not (slash or bare_ids):
        return "which is no Hub id owner/name"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return "which is no valid Hub id"
    if slash and Path(owner).is_dir():
        return f"taken for a path since there is a folder {owner!r} here"
    return None


def hub_failure(error: BaseException) -> str | None:
    """Say why the Hub could not be reached, if that is what an exception comes from.

    Args:
        error: as raised by transformers, datasets or huggingface_hub.

    Returns:
        The reason in words; None if the Hub answered or was not asked.
    """
    # Not the HTTP library's own errors: which library that is depends on huggingface_hub's version.
    offline = (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, offline):
            if is_offline_mode():
                return "the Hub was not asked, as HF_HUB_OFFLINE is set, and the cache has no copy"
            return "the Hub could not be reached, and the cache has no copy"
        cause = cause.__cause__ or cause.__context__
    return None


def why_unreachable() -> str | None:
    """Ask the Hub whether it is there; the reason in words if it is not, None if it is."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(_ASKED_FOR, timeout=_PATIENCE_SECONDS)
    except Exception:  # of whatever HTTP library huggingface_hub uses
        return "the Hub cannot be reached"
    return None
