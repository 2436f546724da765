"""Curves over budgets: their rows against single runs, one dense run, and the command."""

import json

import pytest
import torch
from helpers import cuttable_cluster_set

from sparse_runtime import cli, recut
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.baselines.deja_vu import DejaVu
from sparse_runtime.eval.baselines.registry import BASELINES
from sparse_runtime.eval.paper.clusters import AwcPaper
from sparse_runtime.eval.quality import curves as curves_module
from sparse_runtime.eval.quality.artifact_quality import evaluate_quality
from sparse_runtime.eval.quality.curves import Protocol, evaluate_curves
from sparse_runtime.eval.quality.perplexity import score_text

IDS = torch.randint(0, 250, (96,), generator=torch.Generator().manual_seed(0))
WINDOWS = torch.randint(0, 250, (12, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def clusters(tiny_model):
    return cuttable_cluster_set(tiny_model)


def test_rows_agree_with_single_runs(tiny_model, clusters):
    with torch.inference_mode():
        before = tiny_model(IDS[None]).logits
    result = evaluate_curves(
        tiny_model,
        clusters,
        [("first", IDS), ("second", IDS.flip(0))],
        budgets=[0.5, 0.8],
        protocol=Protocol(window=32, prompt_tokens=10),
    )
    assert [entry["data"] for entry in result["results"]] == ["first", "second"]
    assert (result["window"], result["stride"], result["prompt_tokens"]) == (32, 32, 10)
    for tokens, entry in zip((IDS, IDS.flip(0)), result["results"], strict=True):
        rows = {(row["budget"], row["verify"]): row for row in entry["rows"]}
        assert list(rows) == [(0.5, True), (0.5, False), (0.8, True), (0.8, False)]
        for (budget, verify), row in rows.items():
            single = evaluate_quality(
                tiny_model,
                recut(tiny_model, clusters, budget=budget, verify=verify),
                tokens,
                window=32,
                prompt_tokens=10,
            )
            assert row["perplexity"] == pytest.approx(single["perplexity"]["sparse"], rel=1e-6)
            assert row["ratio"] == pytest.approx(single["ratio"], rel=1e-5)
            assert row["cost_share"] == pytest.approx(single["cost_share"])
            assert row["nll"] == pytest.approx(single["nll"]["sparse"], rel=1e-6)
            assert entry["scored"] == single["scored"] == [22] * 3
            low, high = row["interval"]
            assert low < row["ratio"] < high
            assert 0 < row["divergence"] < 5
            assert 0 < row["agreement"] < 1
            assert (row["looked_at"] > 0) == verify
            assert 0 < row["computed"] < 1
        assert rows[0.5, False]["computed"] < rows[0.8, False]["computed"]
    with torch.inference_mode():
        assert torch.equal(tiny_model(IDS[None]).logits, before)


def test_dense_runs_once_and_baselines_stand_beside(tiny_model, clusters, monkeypatch):
    runs = []

    def counted(*arguments, description, **options):
        runs.append(description)
        return score_text(*arguments, description=description, **options)

    monkeypatch.setattr(curves_module, "score_text", counted)
    result = evaluate_curves(
        tiny_model,
        clusters,
        [("text", IDS)],
        budgets=[0.3, 0.8],
        verify=[False],
        baselines=["teal", "cats", "deja-vu"],
        calibration=WINDOWS,
        protocol=Protocol(window=32),
    )
    rows = result["results"][0]["rows"]
    names = [(row["method"], row["budget"]) for row in rows]
    assert names == [
        ("clusters", 0.3), ("clusters", 0.8), ("teal", 0.3), ("teal", 0.8), ("cats", 0.8),
        ("deja-vu", 0.8),
    ]  # fmt: skip
    assert len(runs) == len(set(runs)) == 1 + len(rows)
    assert [(row["method"], row["budget"]) for row in result["left_out"]] == [
        ("cats", 0.3),
        ("deja-vu", 0.3),
    ]
    assert result["left_out"][0]["reason"] == "it reads 0.333 of the FFN whatever it skips"
    assert set(result["fit_seconds"]) == {"teal", "cats", "deja-vu"}
    dense = result["results"][0]["dense"]["perplexity"]
    assert dense == pytest.approx(score_text(tiny_model, IDS, window=32).perplexity)
    for row in rows[2:]:
        assert row["cost_share"] == pytest.approx(row["budget"], abs=0.1)
        assert row["verify"] is row["looked_at"] is None
        assert row["ratio"] == pytest.approx(row["perplexity"] / dense)
        assert row["perplexity"] != pytest.approx(dense, rel=1e-4)
        assert (row["computed"] is None) == (row["method"] == "teal")


def test_all_baselines(tiny_model, clusters, monkeypatch):
    monkeypatch.setitem(BASELINES, "deja-vu", lambda: DejaVu(rank=2, steps=2))
    monkeypatch.setitem(BASELINES, "awc-paper", lambda: AwcPaper(num_clusters=4, rank=2))
    options = {"budgets": [0.6], "verify": [False], "baselines": ["all"], "calibration": WINDOWS}
    for prompt_tokens in (0, 8):
        result = evaluate_curves(
            tiny_model,
            clusters,
            [("text", IDS)],
            **options,
            protocol=Protocol(window=32, prompt_tokens=prompt_tokens),
        )
        left_out = {row["method"]: row["reason"] for row in result["left_out"]}
        assert list(left_out) == ([] if prompt_tokens else ["griffin"])
        if not prompt_tokens:
            assert "takes its neurons from a prompt" in left_out["griffin"]
        rows = {row["method"]: row for row in result["results"][0]["rows"]}
        expected = {"clusters", *BASELINES, "awc-paper, oracle ids"} - set(left_out)
        assert set(rows) == expected
        assert min(rows, key=lambda name: rows[name]["divergence"]) == "oracle"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0.5, 1.5]}, "budget is 1.5"),
        ({"budgets": [0.5], "baselines": ["teal"]}, "without calibration"),
        ({"budgets": [0.5], "baselines": ["magic"]}, "baseline is 'magic'"),
        ({"budgets": [0.5], "protocol": Protocol(window=32, prompt_tokens=31)}, "is 31"),
    ],
)
def test_bad_options(tiny_model, clusters, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_curves(tiny_model, clusters, [("text", IDS)], **options)


@pytest.fixture
def run(monkeypatch, capsys, tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    picks = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(" ".join(("alpha", "beta", "gamma", "delta")[pick] for pick in picks))

    def call(*options):
        file = tmp_path / "figures.json"
        arguments = ["eval", tiny_folder, "--clusters", tmp_path / "clusters", "--data", text]
        arguments += ["--window", 64, "--max-tokens", 256, "--dtype", "float32", *options]
        monkeypatch.setattr(
            "sys.argv", ["sparse-runtime", *map(str, arguments), "--json", str(file)]
        )
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        figures = json.loads(file.read_text()) if file.exists() else None
        return exit_.value.code or 0, captured.out, " ".join(captured.err.split()), figures

    call.text = text
    monkeypatch.setattr("sparse_runtime.cli.console.out.width", 200)
    return call


def test_command(run, clusters, tmp_path, monkeypatch):
    clusters.build["data"] = {
        "sources": [{"name": str(run.text), "split": "train", "weight": 1.0, "tokens": 640}]
    }
    clusters.save_pretrained(tmp_path / "clusters")
    code, out, err, figures = run(
        "--budgets", "0.5,0.8", "--no-verify", "--prompt-tokens", 16, "--baselines", "teal,cats",
        "--calibration-tokens", 640,
    )  # fmt: skip
    assert code == 0, err
    assert "after a dense prompt of 16" in " ".join(out.split())
    labels = {line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")}
    assert "clusters" in labels
    assert "clusters + looks" not in labels
    assert figures["calibration"]["tokens"] == 640
    assert figures["calibration"]["sources"][0]["name"] == str(run.text)
    rows = figures["results"][0]["rows"]
    assert [row["method"] for row in rows] == ["clusters"] * 2 + ["teal"] * 2 + ["cats"] * 2
    assert figures["host"]["threads"] == torch.get_num_threads()

    # In a narrow terminal no column is squeezed away; some are left to --json.
    monkeypatch.setattr("sparse_runtime.cli.console.out.width", 80)
    code, out, err, _ = run("--budgets", "0.5", "--no-verify")
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("│ clusters"))
    assert all(cell.strip() for cell in line.strip("│").split("│"))
    assert "…" not in out
    monkeypatch.setattr("sparse_runtime.cli.console.out.width", 200)

    code, out, err, figures = run("--baselines", "cats", "--budget", 0.3, "--calibration", run.text)
    assert code == 0, err
    assert "cats is left out at budget 0.3: it reads 0.333" in out
    assert [row["verify"] for row in figures["results"][0]["rows"]] == [True, False]

    code, _, err, figures = run("--prompt-tokens", 16)
    assert code == 0, err
    assert figures["prompt_tokens"] == 16
    assert set(figures["perplexity"]) == {"dense", "sparse", "oracle_ids", "static"}


def test_calibration_that_cannot_be_read(run, clusters, tmp_path):
    clusters.build["data"] = {"sources": [{"name": "gone.txt", "split": "train", "weight": 1.0}]}
    clusters.save_pretrained(tmp_path / "clusters")
    code, _, err, _ = run("--baselines", "teal")
    # No network in tests, so the default cannot be read either.
    assert code == 1
    assert "is out of reach (data source 'gone.txt': there is no such file)" in err
    assert "name some with --calibration" in err
    assert "could not be read from the Hub" in err


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (["x"], "its build record names no sources"),
        ("x", "its build record names no sources"),
        ({"sources": "x"}, "its build record names no sources"),
        ({"sources": None}, "its build record names no sources"),
        ({"sources": ["x"]}, "its build record names no sources"),
        ({"sources": [{"name": 3}]}, "the build record has a damaged data source"),
        ({"sources": [{"name": "a.txt", "sketch": "zz"}]}, "there is no such file"),
    ],
    ids=str,
)
def test_a_build_record_of_any_kind(run, clusters, tmp_path, data, reason):
    clusters.build["data"] = data
    clusters.save_pretrained(tmp_path / "clusters")
    code, out, err, _ = run()
    assert code == 0, err
    assert "by the router (sparse)" in out
    code, _, err, _ = run("--baselines", "teal")
    assert code == 1
    assert reason in err
    assert "name some with --calibration" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", 0.5, "--budgets", "0.5"], "--budget and --budgets are both given"),
        (["--calibration", "x.txt"], "--calibration is given without --baselines"),
        (["--budgets", "0.5;0.4"], "--budgets is '0.5;0.4'"),
        (["--baselines", "teel"], "baseline is 'teel'"),
        (["--prompt-tokens", 63], "prompt_tokens is 63; expected 0 to 62"),
    ],
    ids=str,
)
def test_usage(run, clusters, tmp_path, options, message):
    clusters.save_pretrained(tmp_path / "clusters")
    code, _, err, figures = run(*options)
    assert code == 2
    assert message in err
    assert figures is None
