"""Text sources, offline."""

import copy
import json

import pytest
import torch

from sparse_runtime.clusters.text import (
    DataSource,
    calibration_windows,
    parse_source,
    token_stream,
)
from sparse_runtime.errors import ConfigError, DataError


def stream(source, tokenizer, max_tokens=None, split="train", **options):
    return token_stream(
        parse_source(source), tokenizer, max_tokens=max_tokens, split=split, **options
    )


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {number} äö\n" for number in range(3000)), encoding="utf-8")
    return file


def test_source_options():
    assert parse_source("c4,weight=0.25,key=a+b,split=train") == DataSource(
        "c4", 0.25, ("a", "b"), "train"
    )


@pytest.mark.parametrize(
    "spec",
    [
        "c4,weight=0",
        "c4,weight=x",
        "c4,weight=nan",
        "c4,weight=inf",
        "c4,weight=-1",
        "c4,speed=2",
        "c4,key=",
        "c4,key=a+",
        ",weight=1",
        "c4,weight=1,weight=2",
        "c4,split",
    ],
)
def test_source_options_that_cannot_work(spec):
    with pytest.raises(ConfigError, match="data source"):
        parse_source(spec)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("self", {"keys": ("text",)}, "'self' has no fields, but key="),
        ("pydoc", {"keys": ("text",)}, "'pydoc' has no fields, but key="),
        ("self", {"split": "test"}, "'self' has no splits, but split=test"),
        ("a.txt", {"split": "test"}, "'a.txt' has no splits, but split=test"),
        (
            "pydoc",
            {"split": "validation"},
            "'pydoc' has no split 'validation'; expected train or test",
        ),
        ("a.jsonl", {"keys": "text"}, "'a.jsonl': keys is 'text'; expected a tuple"),
        ("a.jsonl", {"keys": ["text"]}, "keys is .*; expected a tuple"),
        ("a.jsonl", {"keys": ("a", "")}, "keys is"),
        ("a.jsonl", {"keys": (1,)}, "keys is"),
        ("a.txt", {"max_tokens": -5}, "'a.txt': max_tokens is -5; expected 1 or more"),
        ("a.txt", {"max_tokens": 0}, "max_tokens is 0"),
        ("a.txt", {"max_tokens": 2.5}, "max_tokens is 2.5"),
        ("a.txt", {"max_tokens": True}, "max_tokens is True"),
        ("a.txt", {"weight": "2"}, "weight is '2'"),
        ("a.txt", {"weight": True}, "weight is True"),
        ("a.txt", {"weight": float("nan")}, "weight is nan"),
        ("c4", {"split": ""}, "split is ''"),
        ("c4", {"split": 3}, "split is 3"),
        ("", {}, "name is ''"),
        (None, {}, "name is None"),
    ],
    ids=str,
)
def test_a_source_says_what_cannot_work(name, options, message):
    with pytest.raises(ConfigError, match=message):
        DataSource(name, **options)


def test_a_file_name_with_a_comma_is_a_file(tmp_path):
    file = tmp_path / "a,weight=2.txt"
    file.write_text("x")
    assert parse_source(str(file)) == DataSource(str(file))
    assert parse_source(f"{file},weight=3") == DataSource(str(file), 3.0)
    with pytest.raises(ConfigError, match="weight is -1"):
        DataSource("c4", -1)


@pytest.mark.parametrize("max_tokens", [5, 500, 20_000, None])
def test_prefix_of_the_whole_text(text_file, tiny_tokenizer, max_tokens):
    whole = tiny_tokenizer(text_file.read_text(encoding="utf-8"))["input_ids"]
    ids = stream(str(text_file), tiny_tokenizer, max_tokens)
    assert ids.tolist() == whole[:max_tokens]
    assert len(whole) > 20_000


def test_jsonl_joins_documents_and_fields(tmp_path, tiny_tokenizer):
    file = tmp_path / "data.jsonl"
    records = [{"q": "one", "a": "two"}, {"q": "three", "a": "four"}]
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    ids = stream(f"{file},key=q+a", tiny_tokenizer)
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == "one\ntwo\n\nthree\nfour"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ('{"body": "a", "id": "b"}', "none of the 1 records.*text under text.*they have body, id"),
        ("[1]", "record 1 is of type int"),
    ],
)
def test_damaged_jsonl(tmp_path, tiny_tokenizer, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=message):
        stream(str(file), tiny_tokenizer)


def test_pydoc_splits_are_disjoint_and_stable(tiny_tokenizer):
    train, test = (stream("pydoc", tiny_tokenizer, split=split) for split in ("train", "test"))
    assert len(train) > 5 * len(test) > 5000
    texts = [tiny_tokenizer.decode(ids, skip_special_tokens=True) for ids in (train, test)]
    assert texts[1][:200] not in texts[0]
    assert torch.equal(train, stream("pydoc", tiny_tokenizer))


def test_pydoc_has_two_splits(tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"no split 'validation'.*train or test"):
        stream("pydoc,split=validation", tiny_tokenizer)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitext3", "'wikitext3' is not known.*wikitext2, c4, pydoc, stdlib, self, general"),
        ("missing.txt", "there is no such file"),
        ("/", "is a folder"),
        ("wikitext2", "HF_HUB_OFFLINE is set.*local .txt"),
        ("nobody/nothing", "could not be read from the Hub.*local .txt"),
    ],
)
def test_sources_that_cannot_be_read(source, message, tiny_tokenizer):
    with pytest.raises(DataError, match=message):
        stream(source, tiny_tokenizer, 10)


def test_empty_and_undecodable_text(tmp_path, tiny_tokenizer):
    file = tmp_path / "text.txt"
    file.write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        stream(str(file), tiny_tokenizer)
    file.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="byte 3 is 0xff"):
        stream(str(file), tiny_tokenizer)


def test_self_samples_without_touching_the_global_state(tiny_model, tiny_tokenizer):
    state = torch.random.get_rng_state()
    options = {"max_tokens": 40, "model": tiny_model}
    one = stream("self", tiny_tokenizer, seed=1, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(one) == 40
    assert len(one.unique()) > 5
    assert torch.equal(one, stream("self", tiny_tokenizer, seed=1, **options))
    assert not torch.equal(one, stream("self", tiny_tokenizer, seed=2, **options))
    with pytest.raises(ConfigError, match="max_tokens"):
        stream("self", tiny_tokenizer, model=tiny_model)
    with pytest.raises(ConfigError, match="pass model"):
        stream("self", tiny_tokenizer, 40)


_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_half_of_self_are_conversations(tiny_model, tiny_tokenizer):
    """Where the model has a template: what a user says is sampled, and answered."""
    tiny_tokenizer.chat_template = _TEMPLATE
    options = {"max_tokens": 15_000, "model": tiny_model}
    ids = stream("self", tiny_tokenizer, **options)
    assert len(ids) == 15_000
    assert torch.equal(ids, stream("self", tiny_tokenizer, **options))
    text = tiny_tokenizer.decode(ids)
    assert text.startswith("<user>")
    turns = text.split("<user>")[1:]
    assert len(turns) > 10
    assert all("</s><assistant>" in turn for turn in turns[:-1])
    messages = {turn.partition("</s>")[0] for turn in turns}
    assert len(messages) > len(turns) // 2
    assert 0.3 < text.rindex("<user>") / len(text) < 0.7  # the rest are texts from their beginning


def test_conversations_go_on_after_texts(tiny_model, tiny_tokenizer):
    tiny_tokenizer.chat_template = _TEMPLATE
    ids = stream("self", tiny_tokenizer, 28_000, model=tiny_model)
    text = tiny_tokenizer.decode(ids)
    assert text.count("<user>") > 32  # those of one batch


def test_a_model_that_says_nothing_gives_texts(tiny_model, tiny_tokenizer):
    tiny_tokenizer.chat_template = _TEMPLATE
    with torch.no_grad():  # after "<user>" comes the end
        tiny_model.lm_head.weight.zero_()
        tiny_model.lm_head.weight[257] = 1.0
        tiny_model.model.norm.weight.fill_(1.0)
    tiny_model.generation_config.eos_token_id = list(range(259))  # all but one
    ids = stream("self", tiny_tokenizer, 300, model=tiny_model)
    assert len(ids) == 300


def test_what_was_sampled_is_kept_for_the_same_call(tiny_model, tiny_tokenizer, tmp_path):
    keep = tmp_path / "work" / "sampled.safetensors"
    options = {"model": tiny_model, "keep": keep}
    first = stream("self", tiny_tokenizer, 600, **options)
    generate, calls = tiny_model.generate, []
    tiny_model.generate = lambda *given, **named: calls.append(1) or generate(*given, **named)
    assert torch.equal(stream("self", tiny_tokenizer, 600, **options), first)
    assert not calls
    other = stream("self", tiny_tokenizer, 600, **options, seed=1)
    assert calls
    assert not torch.equal(other, first)
    # Another model, another text.
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.up_proj.weight.mul_(2)
    calls.clear()
    stream("self", tiny_tokenizer, 600, **options, seed=1)
    assert calls


def test_no_room_for_a_conversation(tiny_model, tiny_tokenizer):
    tiny_tokenizer.chat_template = _TEMPLATE
    tiny_model.config.max_position_embeddings = 16
    ids = stream("self", tiny_tokenizer, 200, model=tiny_model)
    assert len(ids) == 200
    assert "<user>" not in tiny_tokenizer.decode(ids)


def test_windows_are_mixed_by_weight(text_file, tmp_path, tiny_tokenizer):
    other = tmp_path / "other.txt"
    other.write_text("z" * 20_000)
    sources = [DataSource(str(text_file), 3.0), DataSource(str(other), 1.0)]
    text = calibration_windows(sources, tiny_tokenizer, max_tokens=4000, window=50)
    assert text.windows.shape == (80, 50)
    is_other = (text.windows == tiny_tokenizer("z")["input_ids"][-1]).float().mean(1) > 0.9
    assert int(is_other.sum()) == 20
    assert is_other[:40].any()
    assert is_other[40:].any()
    assert [entry["tokens"] for entry in text.record["sources"]] == [3000, 1000]
    again = calibration_windows(sources, tiny_tokenizer, max_tokens=4000, window=50)
    assert again.record == text.record
    shuffled = calibration_windows(sources, tiny_tokenizer, max_tokens=4000, window=50, seed=1)
    assert shuffled.record["sha256"] != text.record["sha256"]


def test_too_little_text(tmp_path, tiny_tokenizer):
    file = tmp_path / "short.txt"
    file.write_text("just a few words")
    with pytest.raises(DataError, match="fewer than one window of 64"):
        calibration_windows([DataSource(str(file))], tiny_tokenizer, max_tokens=640, window=64)
    with pytest.raises(ConfigError, match="at least one window"):
        calibration_windows([DataSource(str(file))], tiny_tokenizer, max_tokens=10, window=64)
    with pytest.raises(ConfigError, match="at least one --data"):
        calibration_windows([], tiny_tokenizer, max_tokens=100, window=64)


def test_self_without_bos_and_without_warnings(tiny_model, tiny_tokenizer, recwarn):
    """Neither a token to begin with, nor one to end with, nor room for a whole sequence."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    for name in ("bos_token_id", "eos_token_id"):
        setattr(tiny_model.config, name, None)
        setattr(tiny_model.generation_config, name, None)
    tiny_model.generation_config.max_length = 20
    tiny_model.config.max_position_embeddings = 8
    assert len(stream("self", tokenizer, 150, model=tiny_model).unique()) > 5
    assert not recwarn.list
    other = stream("self", tokenizer, 150, split="test", model=tiny_model)
    assert not torch.equal(other, stream("self", tokenizer, 150, model=tiny_model))
