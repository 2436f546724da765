"""Texts by a model, sparse or not: prompts, sampling, streaming, and conversations that go on."""

from sparse_runtime.generation.prompts import (
    Prompt,
    context_length,
    encode_messages,
    encode_text,
    has_chat_template,
    room_for_answer,
)
from sparse_runtime.generation.sampling import Sampling
from sparse_runtime.generation.session import Answer, Session
from sparse_runtime.generation.streaming import StopStrings, TextStream

__all__ = [
    "Answer",
    "Prompt",
    "Sampling",
    "Session",
    "StopStrings",
    "TextStream",
    "context_length",
    "encode_messages",
    "encode_text",
    "has_chat_template",
    "room_for_answer",
]
