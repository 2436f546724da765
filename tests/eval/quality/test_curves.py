"""Curves over budgets: their rows against single runs, one dense run, and the command."""

import copy
import json

import pytest
import torch
from helpers import assert_same_state, cuttable_cluster_set, make_tiny_model

from sparse_runtime import SparseConfig, cli, recut, sparsify, unsparsify
from sparse_runtime.clusters.calibrated_packing import pack_calibrated
from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.baselines.deja_vu import DejaVu
from sparse_runtime.eval.baselines.dense_formats import FORMATS, GGUF_NAMES, DensePlanes
from sparse_runtime.eval.baselines.look_all import without_clusters
from sparse_runtime.eval.baselines.registry import BASELINES
from sparse_runtime.eval.paper.clusters import AwcPaper
from sparse_runtime.eval.quality import rows as rows_module
from sparse_runtime.eval.quality.artifact_quality import evaluate_quality
from sparse_runtime.eval.quality.curves import evaluate_curves
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.eval.quality.rows import Protocol
from sparse_runtime.eval.report.run_folder import method_label

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
            for value, interval in (("ratio", "interval"), ("kl", "kl_interval")):
                low, high = row[interval]
                assert low < row[value] < high
            assert row["kl"] == pytest.approx(single["kl"], rel=1e-4)
            assert row["top1"] == pytest.approx(single["top1"])
            assert row["bits_per_weight"] == pytest.approx(16 * row["cost_share"])
            assert row["weights"] is row["rounding"] is None
            assert (row["looked"] > 0) == verify
            assert 0 < row["counted"] < 1
        assert rows[0.5, False]["counted"] < rows[0.8, False]["counted"]
    with torch.inference_mode():
        assert torch.equal(tiny_model(IDS[None]).logits, before)


@pytest.mark.parametrize("planes", [None, DensePlanes(6)])
def test_looking_at_all_is_one_set_for_all_tokens(tiny_model, clusters, planes):
    """With looks at the same budgets; without them there is nothing to look with."""
    result = evaluate_curves(
        tiny_model,
        clusters,
        [("text", IDS)],
        budgets=[0.5],
        verify=[True, False] if planes is None else [True],
        baselines=["look-all"],
        planes=planes,
        protocol=Protocol(window=32),
    )
    rows = {(row["method"], row["verify"]): row for row in result["results"][0]["rows"]}
    assert ("look-all", False) not in rows
    alone = rows["look-all", True]
    merged = without_clusters(clusters)
    assert {layer.num_clusters for layer in merged.layers.values()} == {1}
    assert clusters.layers[0].num_clusters == 6
    assert alone["weights"] == (None if planes is None else 6)
    assert alone["cost_share"] == pytest.approx(rows["clusters", True]["cost_share"], abs=0.15)
    assert method_label(alone).startswith("looking at all")
    assert not result["left_out"]
    without = evaluate_curves(
        tiny_model,
        clusters,
        [("text", IDS)],
        budgets=[0.5],
        verify=[False],
        baselines=["look-all"],
        protocol=Protocol(window=32),
    )
    assert [row["reason"] for row in without["left_out"]] == ["it is nothing without looks"]


def test_dense_runs_once_and_baselines_stand_beside(tiny_model, clusters, monkeypatch):
    runs = []

    def counted(*arguments, description, **options):
        runs.append(description)
        return score_text(*arguments, description=description, **options)

    monkeypatch.setattr(rows_module, "score_text", counted)
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
        assert row["verify"] is row["looked"] is row["refined"] is None
        assert row["bits_per_weight"] == pytest.approx(16 * row["cost_share"])
        assert row["ratio"] == pytest.approx(row["perplexity"] / dense)
        assert row["perplexity"] != pytest.approx(dense, rel=1e-4)
        assert (row["counted"] is None) == (row["method"] == "teal")


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
        # Rows of 44 neurons are no whole blocks of 32.
        alone = ["look-all", *GGUF_NAMES, *([] if prompt_tokens else ["griffin"])]
        assert list(left_out) == alone
        assert left_out["q8_0"] == "its blocks hold 32 weights, and rows have 44"
        if not prompt_tokens:
            assert "takes its neurons from a prompt" in left_out["griffin"]
        rows = {row["method"]: row for row in result["results"][0]["rows"]}
        dense = {name for name in FORMATS if "mse" not in name}
        expected = {"clusters", *BASELINES, *dense, "awc-paper, oracle ids"} - set(left_out)
        assert set(rows) == expected
        skipping = {name: row["kl"] for name, row in rows.items() if row["budget"] is not None}
        assert min(skipping, key=lambda name: skipping[name]) == "oracle"
        assert set(skipping) == expected - dense


def test_over_planes(tiny_model, clusters):
    """Ours on a packed copy, cut for each budget, and the same planes with all neurons."""
    before = copy.deepcopy(tiny_model)
    stages = SparseConfig(prefill="sparse", backend="reference", tau=3.0)
    result = evaluate_curves(
        tiny_model,
        clusters,
        [("first", IDS), ("second", IDS.flip(0))],
        budgets=[0.3, 0.5],
        verify=[None],
        baselines=["dense-5", "dense-5-gptq"],
        calibration=WINDOWS,
        planes=DensePlanes(5, "gptq"),
        config=stages,
        protocol=Protocol(window=32),
    )
    assert_same_state(tiny_model, before)
    packed = pack_calibrated(make_tiny_model(), WINDOWS, 5)
    for tokens, entry in zip((IDS, IDS.flip(0)), result["results"], strict=True):
        rows = entry["rows"]
        assert [(row["method"], row["budget"], row["rounding"]) for row in rows] == [
            ("clusters", 0.3, "gptq"),
            ("clusters", 0.5, "gptq"),
            ("dense-5-gptq", None, "gptq"),
            ("dense-5", None, "plain"),
        ]
        assert {row["weights"] for row in rows} == {5}
        reference = score_text(tiny_model, tokens, window=32, keep=True)
        for row in rows[:2]:
            cut = recut(packed, clusters, budget=row["budget"])
            sparsify(packed, cut, config=stages)
            score = score_text(packed, tokens, window=32, reference=reference)
            unsparsify(packed)
            assert row["kl"] == pytest.approx(score.kl, rel=1e-4)
            assert row["top1"] == pytest.approx(score.top1)
            assert row["verify"] == clusters.verified
            assert row["bits_per_weight"] == pytest.approx(16 * row["cost_share"])
            assert 0 < row["refined"] <= row["counted"] <= row["looked"] < 1
        full = score_text(packed, tokens, window=32, reference=reference)
        assert rows[2]["kl"] == pytest.approx(full.kl, rel=1e-4)
        assert rows[2]["kl"] != pytest.approx(rows[3]["kl"], rel=1e-3)
        assert rows[0]["bits_per_weight"] < rows[1]["bits_per_weight"] < rows[2]["bits_per_weight"]
    assert result["fit_seconds"].keys() == {"dense-5-gptq", "dense-5"}
    assert result["notes"] == []


def test_planes_add_their_dense_row_once(tiny_model, clusters):
    result = evaluate_curves(
        tiny_model,
        clusters,
        [("text", IDS)],
        budgets=[0.4],
        verify=[False],
        planes=DensePlanes(6),
        protocol=Protocol(window=32, prompt_tokens=10),
    )
    rows = result["results"][0]["rows"]
    assert [row["method"] for row in rows] == ["clusters", "dense-6"]
    # Without factors candidates are refined whole.
    assert rows[0]["verify"] is False
    assert rows[0]["looked"] == rows[0]["counted"] == rows[0]["refined"]


def test_what_is_wrong_over_planes_shows_before_they_are_packed(tiny_model, clusters, monkeypatch):
    def packs(*arguments, **options):
        raise AssertionError("the model was packed")

    monkeypatch.setattr("sparse_runtime.eval.baselines.dense_formats.pack_model", packs)
    planes = {"planes": DensePlanes(6), "protocol": Protocol(window=32)}
    with pytest.raises(ConfigError, match="budget is 2"):
        evaluate_curves(tiny_model, clusters, [("text", IDS)], budgets=[0.3, 2], **planes)
    planes["planes"] = DensePlanes(6, "gptq")
    with pytest.raises(ConfigError, match="without calibration text"):
        evaluate_curves(tiny_model, clusters, [("text", IDS)], budgets=[0.3], **planes)
    planes["planes"] = DensePlanes(6)
    for layer in clusters.layers.values():
        layer.centroids = None
    with pytest.raises(ConfigError, match="loaded without centroids"):
        evaluate_curves(tiny_model, clusters, [("text", IDS)], budgets=[0.3], **planes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0.5, 1.5]}, "budget is 1.5"),
        ({"budgets": [0.5], "baselines": ["teal"]}, "without calibration"),
        (
            {"budgets": [0.5], "baselines": ["dense-4-gptq"]},
            "dense-4-gptq given without calibration",
        ),
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


def test_command_over_planes(run, clusters, tmp_path, monkeypatch):
    clusters.save_pretrained(tmp_path / "clusters")
    command = ("--weights", 6, "--budgets", "0.3,0.4", "--tau", 3, "--verify")
    code, out, err, figures = run(*command, "--baselines", "dense-8,dense-4")
    assert code == 0, err
    assert (figures["weights"], figures["rounding"]) == (6, "plain")
    assert "calibration" not in figures
    rows = {(row["method"], row["budget"]): row for row in figures["results"][0]["rows"]}
    assert list(rows) == [
        ("clusters", 0.3), ("clusters", 0.4), ("dense-6", None), ("dense-8", None), ("dense-4", None),
    ]  # fmt: skip
    assert "clusters, 6 bits" in out
    monkeypatch.setattr("sparse_runtime.cli.console.out.width", 80)
    code, out, err, _ = run(*command, "--no-verify", "--baselines", "dense-4")
    assert code == 0, err
    assert "clusters, 6 bits, refined whole" in out
    assert "…" not in out
    code, _, err, figures = run(*command, "--calibration", run.text, "--calibration-tokens", 640)
    assert code == 0, err
    assert (figures["rounding"], figures["calibration"]["tokens"]) == ("gptq", 640)
    assert [row["method"] for row in figures["results"][0]["rows"]][2:] == ["dense-6-gptq"]
    code, _, err, figures = run(
        *command, "--baselines", "teal", "--rounding", "plain", "--calibration", run.text,
        "--calibration-tokens", 640,
    )  # fmt: skip
    assert code == 0, err
    assert figures["rounding"] == "plain"


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
