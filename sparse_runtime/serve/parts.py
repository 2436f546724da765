"""The parts of ``transformers serve`` that this server stands on: the one place that knows them.

They hold what is particular to a model: how OpenAI's messages become those of its chat template, and
how reasoning and tool calls are found in its answer. They are internal to transformers, so that they
are used in the version that they were tested with, and refused in any other.

The rest of transformers 5.23's server was found unfit, and is plain FastAPI here. Its app answers
``/load_model`` and ``/reset`` to everyone; its model manager loads, dense, whatever Hub model a request
names, and lists the Hub's cache in place of what is served. Its handlers have no key, no limits and no
OpenAI error bodies, leave no room for more usage figures, prefill a growing chat anew, do not sample
when a temperature is given, show the stop string as part of the text, set the seed while another answer
is drawn, and go on generating for a client that has left a request without a stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparse_runtime.errors import SparseRuntimeError

#: Of transformers, major and minor version.
TESTED = "5.23"


@dataclass(frozen=True)
class Piece:
    """Some of an answer.

    Attributes:
        text: of the answer itself.
        reasoning: text that the model has marked as its reasoning.
        tool_call: a whole call, as OpenAI's ``function``: its name, and its arguments as JSON text.
    """

    text: str = ""
    reasoning: str = ""
    tool_call: dict[str, str] | None = None


def check_version() -> None:
    """Refuse a transformers whose serving parts have not been tested.

    Raises:
        SparseRuntimeError: it is another one than ``TESTED``.
    """
    import transformers

    found = transformers.__version__
    if not f"{found}.".startswith(f"{TESTED}."):
        raise SparseRuntimeError(
            f"serve stands on internal parts of transformers {TESTED}, and transformers {found} is "
            f"installed; pip install 'transformers=={TESTED}.*'"
        )


def template_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages as a chat template takes them: contents as text, tool arguments as objects.

    Raises:
        ValueError: arguments of a tool call are no JSON.
    """
    from transformers.cli.serving.utils import BaseHandler, Modality

    converted: list[dict[str, Any]] = BaseHandler.get_processor_inputs_from_messages(
        list(messages), Modality.LLM
    )
    return converted


class AnswerParser:
    """Tells text, reasoning and tool calls of an answer apart while it comes.

    Args:
        parser: of transformers, as :func:`answer_parser` makes it.
    """

    def __init__(self, parser: Any) -> None:
        # What it has found in the prompt (its initial events) is not part of the answer.
        self._parser = parser

    def feed(self, text: str) -> list[Piece]:
        """The pieces that some more text, special tokens included, completes."""
        return _pieces(self._parser.feed(text))

    def end(self) -> list[Piece]:
        """The pieces that the end of the answer completes."""
        try:
            _, events = self._parser.finalize()
        except (ValueError, RuntimeError):  # cut off inside a tool call: there is none
            return []
        return _pieces(events)


def answer_parser(
    model: Any, tokenizer: Any, prompt: Sequence[int], tools: Any
) -> AnswerParser | None:
    """The parser for an answer to a prompt; None where nothing is known about the model's answers.

    Args:
        model: of transformers.
        tokenizer: of the model.
        prompt: token ids.
        tools: as the request names them, or None.
    """
    from transformers.cli.serving.utils import build_response_parser

    parser = build_response_parser(tokenizer, model, list(prompt), tools=tools)
    return None if parser is None else AnswerParser(parser)


def _pieces(events: Sequence[dict[str, Any]]) -> list[Piece]:
    from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

    pieces = []
    for chunk in response_events_to_chunks(list(events)):
        if isinstance(chunk, ToolCall):
            arguments = chunk.arguments
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments)
            pieces.append(Piece(tool_call={"name": chunk.name, "arguments": arguments}))
        elif isinstance(chunk, ReasoningText):
            pieces.append(Piece(reasoning=str(chunk)))
        else:
            pieces.append(Piece(text=chunk))
    return pieces
