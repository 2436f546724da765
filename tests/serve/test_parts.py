"""What transformers' serving parts do for a model whose answers they know: reasoning, tool calls."""

import json

import torch
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from sparse_runtime.serve.answer import Answer, Cut
from sparse_runtime.serve.parts import Piece, answer_parser, template_messages
from sparse_runtime.serve.responses import ChatResponses

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n</tool_call>'


def follow(answer, tokenizer, text):
    """Feed a text token by token, as generate would; the number of tokens that were taken."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    for number in range(1, len(ids) + 1):
        if bool(answer(torch.tensor([ids[:number]]), None)):
            break
    answer.end()
    return number


def test_reasoning_and_tool_calls_are_told_apart(tiny_model, tiny_tokenizer):
    tiny_model.config.model_type = "qwen3"
    prompt = tiny_tokenizer("<|im_start|>assistant\n").input_ids
    pieces = []
    answer = Answer(
        tiny_tokenizer,
        pieces.append,
        parser=answer_parser(tiny_model, tiny_tokenizer, prompt, None),
    )
    follow(answer, tiny_tokenizer, f"<think>Hm.</think>I look.{CALL}{CALL}")
    assert "".join(piece.reasoning for piece in pieces) == "Hm."
    assert "".join(piece.text for piece in pieces) == "I look."
    calls = [piece.tool_call for piece in pieces if piece.tool_call]
    assert [call["name"] for call in calls] == ["weather", "weather"]
    assert json.loads(calls[0]["arguments"]) == {"place": "Bern"}
    assert answer.finish_reason == "tool_calls"
    # In OpenAI's objects, of which the last part of a stream and its usage are tested elsewhere.
    responses = ChatResponses("tiny")
    chunks = [ChatCompletionChunk.model_validate(responses.chunk(piece)) for piece in pieces]
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
    assert [(part.index, part.function.name) for part in parts] == [(0, "weather"), (1, "weather")]
    assert len({part.id for part in parts}) == 2
    content = ChatResponses("tiny")._content(pieces)
    choice = {**content, "index": 0, "finish_reason": "tool_calls"}
    head = {"id": "1", "created": 1, "model": "tiny", "object": "chat.completion"}
    message = ChatCompletion.model_validate({**head, "choices": [choice]}).choices[0].message
    assert message.content == "I look."
    assert message.reasoning_content == "Hm."
    assert message.tool_calls[1].function.arguments == calls[1]["arguments"]


def test_a_tool_call_that_is_cut_off_is_none(tiny_model, tiny_tokenizer):
    tiny_model.config.model_type = "qwen3"
    pieces = []
    parser = answer_parser(tiny_model, tiny_tokenizer, [1], None)
    answer = Answer(tiny_tokenizer, pieces.append, parser=parser)
    follow(answer, tiny_tokenizer, "Well." + CALL[:30])
    assert "".join(piece.text for piece in pieces) == "Well."
    assert not any(piece.tool_call for piece in pieces)
    assert answer.finish_reason == "length"


def test_models_without_a_template_of_answers_have_no_parser(tiny_model, tiny_tokenizer):
    assert answer_parser(tiny_model, tiny_tokenizer, [1], None) is None


def test_messages_are_as_a_chat_template_takes_them():
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = template_messages(
        [
            {"role": "user", "content": text},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ]
    )
    assert messages[0] == {"role": "user", "content": "a b"}
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert messages[2] == {"role": "tool", "tool_call_id": "1", "content": "done"}


def test_an_answer_is_whole_characters_up_to_its_stop(tiny_tokenizer):
    pieces = []
    answer = Answer(tiny_tokenizer, pieces.append, stops=["STOP"])
    taken = follow(answer, tiny_tokenizer, "grün STO STOP and more")
    assert taken == len("grün STO STOP".encode())
    assert "".join(piece.text for piece in pieces) == "grün STO "
    assert Piece("ü") in pieces
    assert answer.finish_reason == "stop"
    # Bytes of a character that does not come are shown in the end.
    pieces.clear()
    answer = Answer(tiny_tokenizer, pieces.append)
    answer(torch.tensor([tiny_tokenizer("ü", add_special_tokens=False).input_ids[:1]]), None)
    assert pieces == []
    answer.end()
    assert pieces == [Piece("�")]


def test_a_cut_holds_back_what_may_become_a_stop():
    cut = Cut(["aab", "xy", ""])
    assert [cut.feed(text) for text in ("ca", "a", "a", "c", "x", "z")] == [
        "c",
        "",
        "a",
        "aac",
        "",
        "xz",
    ]
    assert cut.end() == ""
    assert cut.feed("x") + cut.end() == "x"
    assert (cut.feed("yaab"), cut.found, cut.feed("more"), cut.end()) == ("", True, "", "")
