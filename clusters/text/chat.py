"""The text of a record: fields, nested fields, and conversations by the model's chat template."""

from __future__ import annotations

from typing import Any

from sparse_runtime.errors import DataError

#: Fields of which the first that a record has is its text, if no key is given.
DEFAULT_KEYS = ("text", "messages", "conversations", "prompt")
# ShareGPT's names of the roles.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "observation": "tool",
    "function": "tool",
}


def record_text(
    record: dict[str, Any], keys: tuple[str, ...], where: str, tokenizer: Any
) -> str | None:
    """The text of one record.

    A key may lead into nested records (``a.b``), into one element of a list (``turns.0``), or through a
    list to a field of all its elements (``turns.text``). A conversation, wherever it is, becomes the
    text that the model's chat template makes of it. Strings of a list are joined by newlines if the
    list's key is given.

    Args:
        record: of a file or data set.
        keys: as of :class:`DataSource`.
        where: the record's place, for messages.
        tokenizer: has the chat template.

    Returns:
        The text; empty where it is null or an empty list, None if the record has none of the fields.

    Raises:
        DataError: a field holds something else, a conversation without a chat template, or text that
            is no Unicode.
    """
    text = (
        _chosen(record, where, tokenizer) if not keys else _joined(record, keys, where, tokenizer)
    )
    if text is not None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} holds half of a surrogate pair, U+{ord(text[error.start]):04X}, as character "
                f"{error.start + 1} of its text; write the file with the whole character"
            ) from error
    return text


def _chosen(record: dict[str, Any], where: str, tokenizer: Any) -> str | None:
    present = [key for key in DEFAULT_KEYS if key in record]
    key = next((key for key in present if not _is_empty(record[key])), None)
    if key is None:
        return "" if present else None
    value = record[key]
    if key == "prompt":
        if "completion" not in record:
            return None
        return _rendered(_dialogue(value, record["completion"], where), where, tokenizer, key)
    if isinstance(value, str):
        return value
    messages = _messages(value, where)
    if messages is None:
        raise DataError(
            f"{where} has a {_kind(value)} under {key!r}; expected text or a conversation. Name the "
            f"field of its text: ,key={key} joins the strings of a list, ,key=A.B is a field inside"
        )
    return _rendered(messages, where, tokenizer, key)


def _is_empty(value: Any) -> bool:
    """Whether a field is there and says nothing: null, or a conversation without turns."""
    return value is None or value == []


def _joined(
    record: dict[str, Any], keys: tuple[str, ...], where: str, tokenizer: Any
) -> str | None:
    parts, found = [], False
    for key in keys:
        there, value = _field(record, key)
        found |= there
        part = _value_text(value, key, where, tokenizer)
        if part:
            parts.append(part)
    return "\n".join(parts) if found else None


def _field(value: Any, key: str) -> tuple[bool, Any]:
    """Whether the field is there, and its value; values found through a list, as a list."""
    if isinstance(value, dict):
        if key in value:  # a name with dots in it, too
            return True, value[key]
        first, dot, rest = key.partition(".")
        return _field(value[first], rest) if dot and first in value else (False, None)
    if isinstance(value, list):
        first, dot, rest = key.partition(".")
        if first.lstrip("-").isdigit():
            index = int(first)
            if not -len(value) <= index < len(value):
                return False, None
            return _field(value[index], rest) if dot else (True, value[index])
        found = [_field(item, key) for item in value]
        return any(there for there, _ in found), [item for there, item in found if there]
    return False, None


def _value_text(value: Any, key: str, where: str, tokenizer: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    messages = _messages(value, where)
    if messages is not None:
        return _rendered(messages, where, tokenizer, key)
    if isinstance(value, dict) and value.get("type") == "text":
        return _value_text(value.get("text"), key, where, tokenizer)  # a part of a message
    if isinstance(value, list):
        return "\n".join(
            part for item in value if (part := _value_text(item, key, where, tokenizer))
        )
    raise DataError(
        f"{where} has a {_kind(value)} under {key!r}; expected text, or a list of texts"
    )


def _kind(value: Any) -> str:
    return {"dict": "record", "int": "number", "float": "number", "bool": "truth value"}.get(
        type(value).__name__, type(value).__name__
    )


def _messages(value: Any, where: str) -> list[dict[str, Any]] | None:
    """A conversation as messages with ``role`` and ``content``; None if it is none."""
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value):
        return None
    messages = []
    for turn in value:
        # Columnar files give every turn every field, null where it has none.
        message = {name: item for name, item in turn.items() if item is not None}
        role = message.pop("from", None) or message.get("role")
        content = message.pop("value", None) or message.get("content")
        message |= {"role": _ROLES.get(str(role), role), "content": _content(content, where)}
        messages.append(message)
    return messages


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    only_texts = [text for text in texts if isinstance(text, str)]
    if len(only_texts) < len(texts):
        raise DataError(f"{where} has a message that is not text; expected text in every message")
    return "\n".join(only_texts)


def _dialogue(prompt: Any, completion: Any, where: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for role, value in (("user", prompt), ("assistant", completion)):
        if _is_empty(value) or isinstance(value, str):
            messages.append({"role": role, "content": value or ""})
            continue
        turns = _messages(value, where)
        if turns is None:
            raise DataError(
                f"{where} has a {_kind(value)} as the {role}'s part of prompt and completion; expected "
                "text or messages"
            )
        messages += turns
    return messages


def _rendered(messages: list[dict[str, Any]], where: str, tokenizer: Any, key: str) -> str:
    if not any(message["content"] or len(message) > 2 for message in messages):
        return ""
    if getattr(tokenizer, "chat_template", None) is None:
        field = "value" if key == "conversations" else "content"
        remedy = "prompt+completion" if key == "prompt" else f"{key}.{field}"
        raise DataError(
            f"{where} is a conversation, and the model's tokenizer has no chat template; take the text "
            f"of its turns with ,key={remedy}, or use a model that has one"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        # A template is a program of the model's authors: it raises what it likes.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{where} does not fit the model's chat template: {reason}. Mend or drop the record"
        ) from error
    return str(text)
