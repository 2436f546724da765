"""Ingredients of a build: that each row has what its name says, and nothing else."""

import json
from dataclasses import fields
from itertools import count

import pytest
import torch

from sparse_runtime import cli
from sparse_runtime.clusters import BuildConfig
from sparse_runtime.clusters.text import DataSource
from sparse_runtime.clusters.tuning import distill
from sparse_runtime.eval.studies import ingredients
from sparse_runtime.eval.studies.ingredients import ROWS, Ingredients, measure_ingredients

CONFIG = BuildConfig(
    num_clusters=4, router="linear", budget=0.6, distill=2, correction_rank=2, window=32,
    max_tokens=640,
)  # fmt: skip


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    picks = torch.randint(0, 4, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text(" ".join(("alpha", "beta", "gamma", "delta")[pick] for pick in picks))
    return file


def test_what_an_artifact_is_made_of(tiny_model, tiny_tokenizer, text, monkeypatch):
    # Two steps on random text need not help; here they are kept all the same.
    falling = count(1e3, -1.0)
    monkeypatch.setattr(distill, "_mean_divergence", lambda *unused: next(falling))
    base = ingredients._Base.of_seed(
        tiny_model, tiny_tokenizer, [DataSource(str(text))], CONFIG, 64, None
    )
    made = {name: base.with_ingredients(parts) for name, parts in ROWS.items()}
    for name, parts in ROWS.items():
        sparse = [one for one in made[name].layers.values() if one.num_clusters > 1]
        assert sparse, name
        for layer in sparse:
            assert (layer.cluster_bias is not None) == parts.bias
            assert (layer.maybe_sets is not None) == parts.looks
            assert (layer.bias_shift is not None) == parts.distill
            assert (layer.correction_up is not None) == parts.correction
    # The weights of layers move the cut, and what they are measured in is kept.
    assert set(base._weights) == {(False, False), (True, True), (False, True), (True, False)}
    cut, weighed = (
        torch.cat([layer.active_sets for layer in made[name].layers.values()])
        for name in ("one price", "one price, loop weights")
    )
    assert not torch.equal(cut, weighed)


def test_a_row_without_each_ingredient():
    names = {field.name for field in fields(Ingredients)}
    all_but = [parts for name, parts in ROWS.items() if name.startswith("all but")]
    assert {name for name in names if any(not getattr(parts, name) for parts in all_but)} == names
    assert all(getattr(ROWS["all"], name) for name in names)
    assert not any(getattr(ROWS["none"], name) for name in names)


def test_means(tiny_model, tiny_tokenizer, text):
    tokens = torch.randint(0, 250, (128,), generator=torch.Generator().manual_seed(1))
    figures = measure_ingredients(
        tiny_model, tiny_tokenizer, [DataSource(str(text))], tokens, config=CONFIG, seeds=[0, 1],
        step_tokens=64,
    )  # fmt: skip
    assert [run["seed"] for run in figures["runs"]] == [0, 1]
    first, second = (run["rows"] for run in figures["runs"])
    assert first != second
    for row, a, b in zip(figures["rows"], first, second, strict=True):
        assert row["name"] == a["name"] == b["name"]
        assert row["ratio"] == pytest.approx((a["ratio"] + b["ratio"]) / 2)
        assert (row["least"], row["most"]) == tuple(sorted((a["ratio"], b["ratio"])))
        assert row["cost_share"] == pytest.approx(0.6, abs=0.1)
        assert row["bits_per_weight"] == pytest.approx(16 * row["cost_share"])
        assert 0 < row["top1"] < 1
        low, high = a["kl_interval"]
        assert low < a["kl"] < high
    # All ingredients are nearer to the dense model than none.
    assert figures["rows"][0]["kl"] > next(
        row["kl"] for row in figures["rows"] if row["name"] == "all"
    )


def test_command(monkeypatch, capsys, tiny_folder, tmp_path, text):
    file = tmp_path / "rows.json"
    monkeypatch.setattr("sparse_runtime.cli.console.out.width", 200)
    arguments = [
        "ingredients", tiny_folder, "--data", text, "--test", text, "--clusters", "4", "--seeds", "0",
        "--router", "linear", "--budget", "0.6", "--distill", "1", "--step-tokens", 64,
        "--max-tokens", 640, "--test-tokens", 128, "--window", 32, "--dtype", "float32",
        "--json", file,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["sparse-runtime", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code, capsys.readouterr().err
    assert "all but looks" in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert [row["name"] for row in figures["rows"]] == list(ROWS)
    assert figures["host"]["threads"] == torch.get_num_threads()
