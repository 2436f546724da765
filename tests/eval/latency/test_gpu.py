"""The GPU benchmark's and the tuner's logic, on a GPU or by Triton's interpreter without graphs."""

import json
from functools import partial

import pytest
import torch
from helpers import cuttable_cluster_set, make_tiny_model, random_cluster_set

from sparse_runtime import cli, recut, sparse_modules, sparsify
from sparse_runtime.errors import ConfigError, SparseRuntimeError
from sparse_runtime.kernels.triton import config as triton_config
from sparse_runtime.kernels.triton.config import TritonConfig, config_for, remember

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_ffn = pytest.importorskip("sparse_runtime.kernels.triton.ffn")
if DEVICE == "cpu" and not triton_ffn.INTERPRETED:
    pytest.skip("no GPU, and TRITON_INTERPRET was not set", allow_module_level=True)

from sparse_runtime.eval.latency import gpu as gpu_latency  # noqa: E402
from sparse_runtime.eval.latency import gpu_planes, gpu_tuning  # noqa: E402
from sparse_runtime.eval.latency.ffn_checks import verify_outputs  # noqa: E402
from sparse_runtime.eval.report import gpu_markdown as gpu_report  # noqa: E402


@pytest.fixture
def model(tiny_model):
    return tiny_model.to(DEVICE)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(triton_config, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_benchmark_and_its_report(model, tmp_path, monkeypatch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(gpu_latency, "_LAYERS", 1)
    clusters = [random_cluster_set(model, 0.3)]
    result = gpu_latency.bench_gpu(
        model,
        clusters,
        batches=[1, 2],
        decode_batches=[1, 2],
        prompt_tokens=4,
        new_tokens=1,
        repeats=1,
    )
    assert [row["batch"] for row in result["ffn"]] == [1, 2]
    for row in result["ffn"]:
        assert 0.3 < row["cost_share"] < 0.5
        assert row["bytes"] == pytest.approx(row["cost_share"] * 3 * 32 * 44 * 4)
        assert row["speedup"] == pytest.approx(row["dense_graph"] / row["sparse_graph"])
        assert ("gbps" in row) == (row["batch"] == 1)
    assert [row["batch"] for row in result["decode"]] == [1, 2]
    for row in result["decode"]:
        assert row["speedup"] == pytest.approx(row["dense_compiled"] / row["sparse_compiled"])
    assert 0.3 < result["decode"][0]["cost_share"] < 0.5
    assert result["decode"][1]["cost_share"] == 1  # more tokens than run sparse
    assert len(result["route"]) == 1
    assert result["inputs"] == "noise"  # of random clusters
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])

    file, document = tmp_path / "gpu.json", tmp_path / "docs" / "gpu.md"
    result["host"] |= {"gpu": "a card", "cuda": "13.0"}
    file.write_text(json.dumps(result))
    monkeypatch.setattr("sys.argv", ["gpu_report", str(document), str(file)])
    gpu_report.main()
    text, _, planes = document.read_text().partition("## Weights in planes")
    assert "\nNot measured.\n" in planes
    row = result["ffn"][0]
    assert f"| {row['cost_share']:.3f} | 1 | {row['dense_eager']:.1f} |" in text
    assert "a card, CUDA 13.0" in text
    assert "not measured" not in text.lower()


@pytest.fixture
def small_routers(monkeypatch):
    small = partial(gpu_planes.staged_clusters, num_clusters=6, rank=4)
    monkeypatch.setattr(gpu_planes, "staged_clusters", small)


def test_planes_and_their_report(tmp_path, monkeypatch, small_routers):
    monkeypatch.setattr(gpu_planes, "_LAYERS", 1)
    result = gpu_planes.bench_gpu_planes(
        lambda: make_tiny_model(num_hidden_layers=1),
        torch.device(DEVICE),
        bits=[5, 4],
        batches=[1, 3],
        prompt_tokens=4,
        new_tokens=1,
        repeats=1,
    )
    assert [(row["bits"], row["batch"]) for row in result["ffn"]] == [
        (5, 1), (5, 3), (4, 1), (4, 3)
    ]  # fmt: skip
    for row in result["ffn"]:
        assert 0 < row["refined"] < row["counted"] < row["looked_at"] < 1
        assert ("sparse_gbps" in row) == ("rows_gbps" in row) == (row["batch"] == 1)
    five = result["ffn"][0]
    # Of H = 32 a look has 52 bytes, a count 26, a refinement 48; an FFN has 44 neurons.
    assert five["rows_gbps"] == pytest.approx(44 * (52 + 26 + 48) / five["rows_graph"] / 1e3)
    assert [row["bits"] for row in result["decode"]] == [5, 4]
    names = ("dense_compiled", "rows_eager", "rows_compiled", "sparse_eager", "sparse_compiled")
    assert all(row[name] > 0 for row in result["decode"] for name in names)

    paths = [tmp_path / name for name in ("gpu.md", "gpu.json", "planes.json")]
    result["host"] |= {"gpu": "a card", "cuda": "13.0"}
    floats = {"copy_gbps": 1.0, "inputs": "noise", "route": [], "ffn": [], "host": result["host"]}
    paths[1].write_text(json.dumps(floats))
    paths[2].write_text(json.dumps(result))
    monkeypatch.setattr("sys.argv", ["gpu_report", *map(str, paths)])
    gpu_report.main()
    text = paths[0].read_text()
    assert f"| 5 | 1 | {five['looked_at']:.2f} | {five['counted']:.2f} |" in text
    assert "not measured" not in text.lower()


@pytest.mark.parametrize("sparse", [False, True], ids=["rows", "sparse"])
def test_wrong_outputs_of_planes_are_found(sparse, monkeypatch, small_routers):
    name = "plane_ffn_reference" if not sparse else "routed_plane_ffn"
    real = getattr(gpu_planes, name)
    monkeypatch.setattr(gpu_planes, name, lambda *args, **options: 1.1 * real(*args, **options))
    with pytest.raises(SparseRuntimeError, match="layer 0, 1 tokens: the sparse FFN is"):
        gpu_planes.bench_gpu_planes(
            lambda: make_tiny_model(num_hidden_layers=1),
            torch.device(DEVICE),
            prompt_tokens=4,
            new_tokens=1,
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_planes_without_a_gpu(tmp_path):
    with pytest.raises(SparseRuntimeError, match="torch finds no GPU; expected one"):
        gpu_planes.main(str(tmp_path / "planes.json"))


def test_report_without_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_report", str(tmp_path / "gpu.md")])
    gpu_report.main()
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    # 3 · 4096 · 14336 weights of 2 bytes.
    assert "| dense | 352 | 3–4 | 82 | 1.00× |" in lines
    (half,) = (line for line in lines if line.startswith("| density 0.5 |"))
    assert half.split("|")[2:5] == [" 177 ", " 3 ", " 41 "]
    # 14336 · (3328 + 1664 + 3072) bytes.
    (packed,) = (line for line in lines if line.startswith("| 5 bits, all rows |"))
    assert packed.split("|")[2:4] == [" 116 ", " 3 "]
    assert sum("not measured" in line for line in lines) >= 4 * (7 + 2)
    assert any("make bench-gpu" in line for line in lines)


def test_wrong_outputs_are_found(model):
    sparsify(model, random_cluster_set(model, 0.5), backend="triton", prefill="sparse")
    modules = sparse_modules(model)
    verify_outputs(modules)
    with pytest.raises(SparseRuntimeError, match="layer 0, 1 tokens: the sparse FFN is"):
        verify_outputs(modules, lambda module, x: 1.1 * module(x))


def test_tuning(model, cache, monkeypatch):
    sparsify(
        model,
        recut(model, cuttable_cluster_set(model), budget=0.5, verify=True),
        backend="triton",
        prefill="sparse",
    )
    modules = sparse_modules(model)
    for name, values in (
        ("ONE_TOKEN", {"gate_rows": (2, 4), "down_splits": (2, 8)}),
        ("LOOKS", {"look_rows": (8, 16)}),
        ("SEVERAL", {"many_splits": (2,)}),
        ("_TOKEN_COUNTS", (1, 2)),
    ):
        monkeypatch.setattr(gpu_tuning, name, values)
    # As if these settings took so long, by what each call was made under.
    seconds = []

    def fake(modules, configs, tokens, repeats):
        found = [
            1.0 + (c.gate_rows != 2) + (c.down_splits != 8) + 0.005 * (c.look_rows != 8)
            for c in configs
        ]
        seconds.append(found)
        return found

    real = gpu_tuning._seconds
    assert len(real(modules, [TritonConfig(), TritonConfig(gate_rows=2)], 1, 1)) == 2
    monkeypatch.setattr(gpu_tuning, "_seconds", fake)
    monkeypatch.setattr(gpu_tuning, "_switch_over", lambda *arguments: 2)
    result = gpu_tuning.tune(modules, repeats=1)
    # A gain of half a percent is noise, so look_rows stays.
    best = TritonConfig(gate_rows=2, down_splits=8, max_tokens=2)
    assert result["config"] == vars(best)
    assert result["after_us"] < result["before_us"]
    kept = json.loads((cache / "triton_configs.json").read_text())
    assert list(kept.values()) == [vars(best)]
    assert triton_ffn._FORCED == []

    for module in modules:
        module.backend = "reference"
    with pytest.raises(ConfigError, match="backend 'reference'; expected 'triton'"):
        gpu_tuning.tune(modules)


def test_configurations_by_card(cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card X")
    device, shape = torch.device("cuda", 0), (4096, 14336, torch.bfloat16)
    triton_config._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"not tuned for Card X and FFNs of 4096 x 14336; .* tune"):
        assert config_for(device, *shape) == TritonConfig()
    best = TritonConfig(gate_rows=8, max_tokens=16)
    remember("Card X", *shape, best)
    remember("Card Y", *shape, TritonConfig(gate_rows=16))
    assert config_for(device, *shape) == best
    file = cache / "triton_configs.json"
    for broken in (
        "{",
        "[]",
        json.dumps({"Card X, 4096 x 14336, bfloat16": {"gate_rows": "many"}}),
    ):
        file.write_text(broken)
        assert config_for(device, *shape) == TritonConfig()
    assert config_for(torch.device("cpu"), *shape) == TritonConfig()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_tune_command_without_a_gpu(monkeypatch, capsys):
    for arguments, message in (
        (["--shape", "mistral-7b"], "--device is 'cuda'; expected a GPU, and torch finds 0"),
        ([], "give MODEL and --clusters DIR, or --shape"),
    ):
        monkeypatch.setattr("sys.argv", ["sparse-runtime", "tune", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
