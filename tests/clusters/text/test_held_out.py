"""Text that figures are reported on is not the text that was fitted on, and if it is, that is said."""

import json

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime import cli
from sparse_runtime.clusters.text import (
    DataSource,
    calibration_windows,
    hold_out,
    overlap,
    overlap_warning,
    parse_source,
    recorded_source,
    token_stream,
)
from sparse_runtime.clusters.text.overlap import sketch
from sparse_runtime.errors import DataError

WINDOW = 32


def distinct_text(first, count):
    return "".join(
        f"item {number:05d} is {number * number}\n" for number in range(first, first + count)
    )


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(distinct_text(0, 400))
    return file


def windows_of(tokens):
    whole = len(tokens) // WINDOW
    return {tuple(window) for window in tokens[: whole * WINDOW].view(whole, WINDOW).tolist()}


@pytest.mark.parametrize(
    ("name", "max_tokens", "test_tokens"),
    [("local", 640, 320), ("local", 64_000, 320), ("local", None, 320), ("self", 32, 32),
     ("pydoc", 64_000, 8000)],
)  # fmt: skip
def test_split_off_windows_are_disjoint(
    tiny_model, tiny_tokenizer, text, name, max_tokens, test_tokens
):
    options = {"max_tokens": max_tokens, "window": WINDOW, "model": tiny_model}
    given = [parse_source(str(text) if name == "local" else name)]
    sources, tokens = hold_out(given, tiny_tokenizer, test_tokens=test_tokens, **options)
    assert len(tokens) == test_tokens
    fitted = calibration_windows(sources, tiny_tokenizer, **options)
    assert len(fitted.windows) >= max_tokens // WINDOW if name == "self" else 20
    assert not windows_of(tokens) & windows_of(fitted.windows.flatten())
    assert overlap_warning(name, tokens, fitted.record) is None
    again = hold_out(given, tiny_tokenizer, test_tokens=test_tokens, **options)
    assert torch.equal(again[1], tokens)
    assert again[0] == sources


def test_short_text_keeps_its_last_fifth(tiny_tokenizer, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text(distinct_text(0, 20))
    whole = token_stream(DataSource(str(file)), tiny_tokenizer, max_tokens=None, split="test")
    options = {"max_tokens": 10_000, "window": WINDOW}
    sources, tokens = hold_out([DataSource(str(file))], tiny_tokenizer, test_tokens=5000, **options)
    assert torch.equal(tokens, whole[-len(tokens) :])
    assert len(tokens) == len(whole) // 5
    assert sources[0].max_tokens == len(whole) - len(tokens)
    file.write_text("few words, for one window only, or two")
    with pytest.raises(DataError, match=r"too few for a window of 32.*name a text to test on"):
        hold_out([DataSource(str(file))], tiny_tokenizer, test_tokens=64, **options)


def test_a_split_that_the_user_names_is_not_its_own_test_split():
    assert DataSource("c4").has_test_split
    assert not DataSource("c4", split="train").has_test_split
    assert not DataSource("notes.txt").has_test_split


@pytest.mark.parametrize("start", [0, 7])
def test_overlap_sees_the_text_under_any_name_and_cut(tiny_tokenizer, text, tmp_path, start):
    options = {"max_tokens": 8000, "window": WINDOW}
    record = calibration_windows([DataSource(str(text))], tiny_tokenizer, **options).record
    record = json.loads(json.dumps(record))
    other = tmp_path / "renamed.txt"
    other.write_text(text.read_text()[start:])
    tokens = token_stream(DataSource(str(other)), tiny_tokenizer, max_tokens=4000, split="test")
    assert overlap(tokens, record)[str(text)] > 0.95
    assert "renamed.txt is no held-out text: about" in overlap_warning(
        "renamed.txt", tokens, record
    )
    other.write_text(distinct_text(5000, 200) + text.read_text()[:4000])
    mixed = token_stream(DataSource(str(other)), tiny_tokenizer, max_tokens=None, split="test")
    assert 0.2 < overlap(mixed, record)[str(text)] < 0.6
    other.write_text(distinct_text(50_000, 300))
    fresh = token_stream(DataSource(str(other)), tiny_tokenizer, max_tokens=4000, split="test")
    assert overlap(fresh, record)[str(text)] < 0.02
    assert overlap_warning("renamed.txt", fresh, record) is None
    assert overlap_warning("renamed.txt", fresh, {}) is None


@pytest.mark.parametrize(
    "record",
    [
        None, [], "x", {"sources": None}, {"sources": "x"}, {"sources": ["x", 3, None, []]},
        *({"sources": [{"name": "a", "sketch": sketch}]} for sketch in (
            "zz", "-111111111111111", "0" * 15, "0" * 17, "F" * 16, "0" * 16 * 129, "\u0661" * 16,
            "0" * 16 + "\n", 5, ["0" * 16], {}, None, "",
        )),
    ],
    ids=str,
)  # fmt: skip
def test_any_record_has_an_overlap_or_none(record):
    assert overlap(torch.arange(500), record) == {}
    assert overlap_warning("a", torch.arange(500), record) is None


def test_a_damaged_source_hides_no_other(tiny_tokenizer, text):
    options = {"max_tokens": 640, "window": WINDOW}
    record = calibration_windows([DataSource(str(text))], tiny_tokenizer, **options).record
    tokens = token_stream(DataSource(str(text)), tiny_tokenizer, max_tokens=640, split="test")
    record["sources"] = ["x", {"name": "b", "sketch": "zz"}, *record["sources"]]
    assert list(overlap(tokens, record)) == [str(text)]


def test_sketch_is_small_and_the_same_everywhere():
    tokens = torch.arange(5000) % 977
    assert len(sketch(tokens)) == 128 * 16
    assert sketch(tokens) == sketch(tokens.clone())
    assert sketch(tokens)[:32] == "000159e0adfb289300679b10dfa0daf7"
    assert sketch(tokens[:15]) == ""


def test_record_is_json_and_reads_the_same_text_again(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [json.dumps({"a": {"b": f"text {n} " * 9}}) + "\n" for n in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    sources = [parse_source("~/a.jsonl,key=a.b,weight=2"), parse_source("pydoc")]
    options = {"max_tokens": 640, "window": WINDOW}
    record = calibration_windows(sources, tiny_tokenizer, **options).record
    text = json.dumps(record)
    assert str(tmp_path) not in text
    assert [entry["name"] for entry in record["sources"]] == ["~/a.jsonl", "pydoc"]
    assert [entry.get("split") for entry in record["sources"]] == [None, "train"]
    again = [recorded_source(entry) for entry in json.loads(text)["sources"]]
    assert calibration_windows(again, tiny_tokenizer, **options).record == record
    # As format version 1 recorded it.
    old = {"name": "~/a.jsonl", "split": "train", "weight": 1.0, "tokens": 640}
    assert recorded_source(old) == DataSource("~/a.jsonl")
    values = {
        "weight": ("x", True, float("inf")), "keys": (3, "text"), "split": (3,), "name": (3, ""),
    }  # fmt: skip
    wrong = [{"name": "c4", name: value} for name in values for value in values[name]]
    for damaged in ({}, *wrong):
        with pytest.raises(DataError, match="damaged data source"):
            recorded_source(damaged)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["sparse-runtime", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_eval_warns_of_text_that_was_built_on(
    monkeypatch, capsys, tiny_folder, tiny_model, tiny_tokenizer, tmp_path, text
):
    def stop(*arguments, **options):
        raise DataError("as far as this test goes")

    monkeypatch.setattr("sparse_runtime.eval.quality.artifact_quality.evaluate_quality", stop)
    clusters = random_cluster_set(tiny_model, 0.5)
    sources = [DataSource(str(text))]
    data = calibration_windows(sources, tiny_tokenizer, max_tokens=2048, window=WINDOW).record
    clusters.build["data"] = data
    clusters.save_pretrained(tmp_path / "clusters")
    renamed, fresh = tmp_path / "renamed.txt", tmp_path / "fresh.txt"
    renamed.write_text(text.read_text())
    fresh.write_text(distinct_text(50_000, 300))
    common = ("eval", tiny_folder, "--clusters", tmp_path / "clusters", "--dtype", "float32",
              "--max-tokens", 512, "--window", WINDOW)  # fmt: skip
    assert run(monkeypatch, *common, "--data", renamed) == 1
    assert "renamed.txt is no held-out text: about 100%" in capsys.readouterr().err
    assert run(monkeypatch, *common, "--data", fresh) == 1
    assert "held-out" not in capsys.readouterr().err


def test_ablate_judges_on_other_windows(monkeypatch, capsys, tiny_folder, text):
    seen = {}

    def ablate(model, fitted, windows, **options):
        seen["fitted"], seen["windows"] = fitted, windows
        raise DataError("seen")

    monkeypatch.setattr("sparse_runtime.eval.studies.ablation.ablate", ablate)
    common = ("ablate", tiny_folder, "--data", text, "--window", WINDOW, "--max-tokens", 1024,
              "--test-tokens", 320, "--dtype", "float32")  # fmt: skip
    assert run(monkeypatch, *common) == 1
    assert seen["windows"].shape == (10, WINDOW)
    assert not windows_of(seen["fitted"].flatten()) & windows_of(seen["windows"].flatten())
    assert "no held-out text" not in capsys.readouterr().err
    assert run(monkeypatch, *common, "--test", text) == 1
    assert "no held-out text" in capsys.readouterr().err
