"""Token ids of a conversation, by the tokenizer's chat template, or of a text to continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_runtime.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        ids: token ids [1, n] int64, n of 1 or more.
        chat: a chat template was applied; otherwise the text is to be continued.
    """

    ids: Tensor
    chat: bool

    @property
    def length(self) -> int:
        """Tokens."""
        return self.ids.shape[1]


def has_chat_template(tokenizer: Any) -> bool:
    """Whether conversations can be put to a tokenizer's model."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_text(tokenizer: Any, text: str) -> Prompt:
    """A text to continue.

    Raises:
        ConfigError: it has no tokens, or is no text (a lone surrogate, out of bytes that are no UTF-8).
    """
    _check_text("the prompt", text)
    return _prompt(tokenizer(text, return_tensors="pt")["input_ids"], chat=False)


def encode_messages(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Prompt:
    """A conversation that the model is to answer.

    Args:
        tokenizer: with a chat template.
        messages: each with ``role`` and ``content``, as chat templates take them.

    Raises:
        ConfigError: there is no template, or it fails on these messages; a message is no text.
    """
    if not has_chat_template(tokenizer):
        raise ConfigError(
            "the tokenizer has no chat template, so the model cannot be told messages and a system "
            "prompt apart; take a model that was tuned for conversations, or continue a plain text"
        )
    for message in messages:
        _check_text(f"the {message['role']}'s message", message["content"])
    try:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    except Exception as error:  # a template is code that came with the model
        remedy = "generate --raw continues a text without it"
        if any(message["role"] == "system" for message in messages):
            remedy = f"it may know no system prompt, so leave that out, or {remedy}"
        raise ConfigError(
            "the tokenizer's chat template cannot be applied to the prompt "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    return _prompt(ids, chat=True)


def context_length(model: Any) -> int | None:
    """Tokens that a model can hold, prompt and answer together; None where its config has no limit."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def room_for_answer(model: Any, prompt: Prompt) -> int | None:
    """New tokens that there is room for after a prompt; None where the model has no limit.

    Raises:
        ConfigError: there is none.
    """
    context = context_length(model)
    if context is None:
        return None
    if prompt.length >= context:
        raise ConfigError(
            f"the prompt has {prompt.length} tokens, and the model's context holds {context}, those of "
            "the answer included; shorten it, or take a model with a longer context"
        )
    return context - prompt.length


def _prompt(ids: Tensor, *, chat: bool) -> Prompt:
    if ids.shape[1] == 0:
        raise ConfigError("the prompt has no tokens; expected some text")
    return Prompt(ids, chat)


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} is no text at character {error.start} (a lone surrogate, as bytes leave that are "
            "no UTF-8); expected UTF-8"
        ) from error
