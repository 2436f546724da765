"""Conversations through the chat template, and fields inside records."""

import copy

import pytest

from sparse_runtime.clusters.text.chat import record_text
from sparse_runtime.errors import DataError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
OPENAI = [
    {"role": "system", "content": "be brief", "name": None},
    {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]},
    {"role": "assistant", "content": None, "tool_calls": []},
]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    result = copy.deepcopy(tiny_tokenizer)
    result.chat_template = TEMPLATE
    return result


@pytest.mark.parametrize(
    ("record", "keys", "expected"),
    [
        ({"messages": OPENAI}, (), "<system>be brief<user>hi\nyou<assistant>"),
        ({"conversations": SHAREGPT, "id": 1}, (), "<user>hi<assistant>yes"),
        ({"prompt": "hi", "completion": "yes"}, (), "<user>hi<assistant>yes"),
        (
            {"prompt": [OPENAI[0]], "completion": [{"role": "assistant", "content": "x"}]}, (),
            "<system>be brief<assistant>x",
        ),
        ({"prompt": "hi", "completion": "yes"}, ("prompt", "completion"), "hi\nyes"),
        ({"text": "plain", "messages": OPENAI}, (), "plain"),
        ({"text": None, "conversations": SHAREGPT}, (), "<user>hi<assistant>yes"),
        ({"data": {"chat": SHAREGPT}}, ("data.chat",), "<user>hi<assistant>yes"),
        ({"pair": [SHAREGPT, SHAREGPT[:1]]}, ("pair.1",), "<user>hi"),
        ({"messages": OPENAI}, ("messages.content",), "be brief\nhi\nyou"),
        ({"messages": OPENAI}, ("messages.0.content",), "be brief"),
        ({"turns": ["a", "b"]}, ("turns",), "a\nb"),
        ({"turns": ["a", "b"]}, ("turns.-1",), "b"),
        ({"turns": ["a", "b"]}, ("turns.2",), None),
        ({"a": {"b": {"c": "deep"}}}, ("a.b.c",), "deep"),
        ({"a.b": "dotted", "a": {"b": "nested"}}, ("a.b",), "dotted"),
        ({"a": None}, ("a.b",), None),
        ({"a": None}, ("a",), ""),
        ({"q": "x", "a": None}, ("q", "a"), "x"),
        ({"messages": []}, ("messages",), ""),
        ({"messages": []}, (), ""),
        ({"conversations": [], "id": 1}, (), ""),
        ({"text": []}, (), ""),
        ({"text": [], "messages": SHAREGPT}, (), "<user>hi<assistant>yes"),
        ({"prompt": [], "completion": []}, (), ""),
        ({"prompt": "hi", "completion": []}, (), "<user>hi<assistant>"),
        ({"prompt": "alone"}, (), None),
        ({"other": "x"}, (), None),
    ],
)  # fmt: skip
def test_text_of_a_record(tokenizer, record, keys, expected):
    before = copy.deepcopy(record)
    assert record_text(record, keys, "here", tokenizer) == expected
    assert record == before


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"messages": OPENAI}, "messages.content"),
        ({"conversations": SHAREGPT}, "conversations.value"),
        ({"prompt": "hi", "completion": "yes"}, "prompt+completion"),
    ],
)
def test_without_a_template_the_remedy_works(tiny_tokenizer, record, key):
    with pytest.raises(DataError, match="has no chat template") as caught:
        record_text(record, (), "line 3", tiny_tokenizer)
    assert f",key={key}," in str(caught.value)
    assert "hi" in record_text(record, tuple(key.split("+")), "line 3", tiny_tokenizer)


@pytest.mark.parametrize(
    ("record", "keys", "message"),
    [
        ({"messages": [{"role": "critic", "content": "x"}]}, (), "line 3 .*template: no critics"),
        ({"messages": [{"role": "user", "content": [{"image": 1}]}]}, (), "that is not text"),
        ({"messages": "text"}, ("messages.content",), None),
        ({"text": {"a": 1}}, ("text",), "has a record under 'text'"),
        ({"text": [1]}, ("text",), "has a number under 'text'"),
        ({"prompt": 3, "completion": "x"}, (), "number as the user's part"),
    ],
)
def test_damaged_records(tokenizer, record, keys, message):
    if message is None:
        assert record_text(record, keys, "line 3", tokenizer) is None
        return
    with pytest.raises(DataError, match=message):
        record_text(record, keys, "line 3", tokenizer)


def test_the_demo_model_reads_conversations(demo_model):
    _, tokenizer = demo_model
    text = record_text({"conversations": SHAREGPT}, (), "here", tokenizer)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n")
