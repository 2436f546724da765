"""One factor at a time: which rows there are, and what must follow from a factor."""

import json
import math

import pytest
import torch

from sparse_runtime import cli
from sparse_runtime.clusters.awc import Clustering
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.studies import ablation
from sparse_runtime.eval.studies.ablation import Grid, Setting, ablate

WINDOWS = torch.randint(0, 250, (20, 32), generator=torch.Generator().manual_seed(0))
SMALL = Grid(clusters=(4, 16), tokens=(1.0,), seeds=(0, 1))


@pytest.fixture
def small_base(monkeypatch):
    monkeypatch.setattr(ablation, "Setting", lambda method: Setting(method, clusters=8))


def test_rows(tiny_model, small_base):
    rows = ablate(tiny_model, WINDOWS[:16], WINDOWS[16:], layers=[0, 2], grid=SMALL)
    common = [
        ("clusters", 4), ("clusters", 16), ("top_percentile", 0.2), ("top_percentile", 0.4),
        ("top_percentile", 0.6), ("top_percentile", 0.8), ("tokens", 1.0), ("seed", 0), ("seed", 1),
    ]  # fmt: skip
    paper = [
        ("sparsity", 0.3), ("sparsity", 0.5), ("sparsity", 0.7),
        ("init", "random"), ("init", "kmeans++"),
    ]  # fmt: skip
    by_method = {
        method: {(row["factor"], row["value"]): row for row in rows if row["method"] == method}
        for method in ("awc", "awc-paper")
    }
    assert list(by_method["awc"]) == common
    assert list(by_method["awc-paper"]) == common + paper
    for found in by_method.values():
        covered = [found["top_percentile", p]["oracle_coverage"] for p in (0.2, 0.4, 0.6, 0.8)]
        assert covered == sorted(covered, reverse=True)
        # The base shows in every factor's rows, and is the same in all.
        same = [found["tokens", 1.0], found["seed", 0]]
        assert same[0]["coverage"] == same[1]["coverage"]
        assert found["seed", 1]["coverage"] != same[0]["coverage"]
    for row in rows:
        assert row["chance"] == pytest.approx(1 - row["top_percentile"], abs=0.15)
        assert row["chance"] < row["coverage"] <= row["oracle_coverage"] <= 1
        assert sum(row["sizes"]) == 16 * 32
        assert row["sizes"] == sorted(row["sizes"], reverse=True)
        assert len(row["sizes"]) == row["clusters"]
        assert 0 < row["effective"] <= 1
    history = by_method["awc"]["clusters", 16]["history"]
    assert history[0] < history[-1]
    history = by_method["awc-paper"]["clusters", 16]["history"]
    assert history[0] > history[-1]


def test_balance_by_hand(tiny_model, monkeypatch):
    """Four sets of which two are never the best: half empty, and as even as the rest."""

    def fit(importance, setting, generator):
        sets = torch.zeros(4, 44, dtype=torch.bool)
        sets[0, :22] = sets[1, 22:] = True
        return Clustering(sets, sets.float(), torch.zeros(len(importance), dtype=torch.int64))

    monkeypatch.setattr(ablation, "_fit", fit)
    grid = Grid(clusters=(4,), tokens=(), seeds=(), top_percentiles=(), sparsities=(), inits=())
    row = ablate(tiny_model, WINDOWS[:16], WINDOWS[16:], layers=[1], grid=grid)[0]
    assert row["empty"] == 0.5
    assert row["sizes"][2:] == [0, 0]
    shares = [size / 512 for size in row["sizes"][:2]]
    entropy = -sum(share * math.log(share) for share in shares)
    assert row["effective"] == pytest.approx(math.exp(entropy) / 4)


def test_bad_settings(tiny_model):
    with pytest.raises(ConfigError, match=r"layers are \[7\]; expected some of 0 to 2"):
        ablate(tiny_model, WINDOWS[:16], WINDOWS[16:], layers=[7])
    with pytest.raises(DataError, match="1024 clusters were asked for, but only 512"):
        ablate(tiny_model, WINDOWS[:16], WINDOWS[16:])


def test_command(monkeypatch, capsys, tiny_folder, tmp_path, small_base):
    text = tmp_path / "text.txt"
    picks = torch.randint(0, 4, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(" ".join(("alpha", "beta", "gamma", "delta")[pick] for pick in picks))
    file = tmp_path / "rows.json"
    monkeypatch.setattr("sparse_runtime.cli.console.out.width", 200)
    arguments = [
        "ablate", tiny_folder, "--data", text, "--test", text, "--clusters", "4", "--layers", "1",
        "--percentiles", "0.5", "--sparsities", "0.5", "--seeds", "0", "--max-tokens", 1024,
        "--test-tokens", 256, "--window", 64, "--dtype", "float32", "--json", file,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["sparse-runtime", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code, capsys.readouterr().err
    assert "top_percentile" in capsys.readouterr().out
    figures = json.loads(file.read_text())
    assert {row["factor"] for row in figures["rows"]} == {
        "clusters", "top_percentile", "tokens", "seed", "sparsity", "init",
    }  # fmt: skip
    assert figures["host"]["threads"] == torch.get_num_threads()
