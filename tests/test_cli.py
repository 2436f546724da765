"""The command line on a tiny model: the whole path, JSON files, and errors in one line."""

import json

import pytest
import torch

from sparse_runtime import ClusterSet
from sparse_runtime.clusters import build as build_module


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    words = ["alpha", "beta", "gamma", "delta"]
    g = torch.Generator().manual_seed(0)
    picks = torch.randint(0, 4, (1500,), generator=g).tolist()
    file.write_text(" ".join(words[pick] for pick in picks))
    return file


@pytest.fixture
def built(run, tiny_folder, text, tmp_path):
    folder = tmp_path / "clusters"
    code, _, err = run(*build_command(tiny_folder, text, folder))
    assert code == 0, err
    return folder


def build_command(model, text, folder, *options):
    command = ["build", model, "-o", folder, "--data", text, "--clusters", 8, "--window", 64]
    if "awc-paper" not in options:
        command += ["--distill", 4, "--correction-rank", 3]
    return [*command, "--router", 2, "--budget", 0.7, "--dtype", "float32", *options]


def test_build_inspect_eval_generate_bench(run, built, tiny_folder, text, tmp_path):
    file = tmp_path / "figures.json"
    assert not (built / ".build").exists()

    code, out, err = run("inspect", built, "--json", file)
    assert code == 0, err
    assert "method awc" in out
    summary = json.loads(file.read_text())
    assert [layer["router"] for layer in summary["layers"]] == ["rank 2"] * 3
    assert len(summary["build"]["tuning"]["divergence"]) == 4
    assert sorted(summary["build"]["loop_weights"]) == ["0", "1", "2"]

    code, out, err = run(
        "eval", tiny_folder, "--clusters", built, "--data", text, "--window", 64,
        "--max-tokens", 640, "--json", file, "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(file.read_text())
    assert set(result["perplexity"]) == {"dense", "sparse", "oracle_ids", "static"}
    assert result["ratio"] == pytest.approx(
        result["perplexity"]["sparse"] / result["perplexity"]["dense"]
    )
    assert result["perplexity"]["sparse"] != result["perplexity"]["dense"]
    assert result["kl"] > 0
    assert result["top1"] < 1
    assert result["static"]["kl"] > 0
    header = next(line for line in out.splitlines() if "neurons chosen" in line)
    places = [header.index(name) for name in ("KL", "top-1", "÷ dense", "cost share")]
    assert places == sorted(places)
    assert (result["tokens"], result["window"], len(result["layers"])) == (640, 64, 3)
    # The budget is met on the calibration tokens; held-out ones fall on other clusters.
    assert 0.62 < result["cost_share"] < 0.78
    for layer in result["layers"]:
        assert layer["coverage"] > layer["chance"] > 0.4
        assert 0 < layer["precision"] <= 1
        assert 0 <= layer["router_top1"] <= 1

    code, out, err = run(
        "generate", tiny_folder, "--clusters", built, "--prompt", "alpha beta", "--compare",
        "--max-new-tokens", 6, "--json", file, "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    runs = json.loads(file.read_text())
    assert runs["dense"]["cost_share"] == 1.0
    assert runs["dense"]["sparse_share_of_tokens"] == 0.0
    # Five decoded tokens fall on few clusters, whose sets differ in size around the budget.
    assert 0.4 < runs["sparse"]["cost_share"] < 0.95
    assert runs["sparse"]["sparse_share_of_tokens"] > 0.3
    assert "tokens/s after the first" in out
    assert "tokens ran sparse" in out

    check_bench(run, tiny_folder, built, file)


def check_bench(run, tiny_folder, built, file):
    code, out, err = run(
        "bench", tiny_folder, "--clusters", built, "--prompt-tokens", 20, "--new-tokens", 3,
        "--repeats", 1, "--batches", "2", "--json", file,
    )  # fmt: skip
    assert code == 0, err
    assert "F.linear" in out
    figures = json.loads(file.read_text())
    assert figures["read_gbps"] > 0
    decode, mlp = figures["decode"], figures["mlp"]
    assert decode["ceiling"] > 1
    assert decode["speedup"] == pytest.approx(decode["dense_ms"] / decode["sparse_ms"])
    assert decode["speedup_fast"] == pytest.approx(
        decode["dense_fast_ms"] / decode["sparse_fast_ms"]
    )
    assert mlp["bandwidth_share"] == pytest.approx(mlp["gbps"] / mlp["read_gbps"])
    assert mlp["looked_at"] > 0
    assert [row["tokens"] for row in mlp["tokens"]] == [1, 2, 4, 8, 16, 32, 64]
    assert all(row["path"] in ("sparse", "rows", "dense") for row in mlp["tokens"][1:])
    prediction = {row["name"]: row for row in figures["prediction"]["rows"]}
    assert list(prediction) == ["router", "per-neuron predictor", "dense gate"]
    assert prediction["dense gate"]["bytes"] == 2 * 32 * 44
    for row in prediction.values():
        assert row["share"] == pytest.approx(row["ms"] / figures["prediction"]["ffn_ms"])
    assert [row["batch"] for row in figures["batches"]] == [2]
    assert figures["memory"]["weights_mib"] > 0
    assert len(figures["runs"]) == 1
    assert figures["host"]["threads"] == torch.get_num_threads()

    code, _, err = run(
        "bench", tiny_folder, "--clusters", built, "--prompt-tokens", 20, "--new-tokens", 3,
        "--repeats", 1, "--no-verify", "--budget", 0.8, "--json", file,
    )  # fmt: skip
    assert code == 0, err
    cut = json.loads(file.read_text())["mlp"]
    assert cut["looked_at"] == 0
    assert cut["density"] > mlp["density"]


def test_paper_method(run, tiny_folder, text, tmp_path):
    for number, options in enumerate(([], ["--paper-pooled", "--paper-init", "kmeans++"])):
        folder = tmp_path / f"paper{number}"
        code, _, err = run(
            *build_command(tiny_folder, text, folder, "--method", "awc-paper", *options)
        )
        assert code == 0, err
        layers = ClusterSet.from_pretrained(folder).layers
        same = torch.equal(layers[0].active_sets, layers[1].active_sets)
        assert same == bool(options)


def test_paper_figures(run, tiny_folder, text, tmp_path):
    file = tmp_path / "paper.json"
    code, out, err = run(
        "paper", tiny_folder, "--data", text, "--clusters", "4,8", "--densities", "0.6",
        "--window", 64, "--test-tokens", 256, "--masks", "--dtype", "float32", "--json", file,
    )  # fmt: skip
    assert code == 0, err
    assert "thresholds only" in out
    result = json.loads(file.read_text())
    assert [row["clusters"] for row in result["coverage"]] == [4, 8]
    assert result["perplexity"]["masks"][0]["ratio"] > 0
    code, _, err = run("paper", tiny_folder, "--data", text, "--clusters", "4;8")
    assert code == 2
    assert "--clusters is '4;8'" in err


def test_version_and_help(run):
    assert run("--version")[1].strip() == "0.1.0"
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("build", "generate", "eval", "bench", "inspect", "demo"))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--budget", 0], 2, "--budget is 0.0"),
        (["--budget", 1.5], 2, "budget is 1.5"),
        (["--budget", 0.03], 2, "router of rank 2"),
        (["--clusters", 16385], 2, "num_clusters is 16385"),
        (["--clusters", 500, "--max-tokens", 448], 1, "500 clusters were asked for, but only"),
        (["--clusters", 9000], 2, "for 9000 clusters with a correction of rank 3 alone costs"),
        (["--method", "kmeans"], 2, "method is 'kmeans'"),
        (["--importance", "size"], 2, "importance is 'size'"),
        (["--router", "mlp"], 2, "router is 'mlp'"),
        (["--dtype", "int4"], 2, "dtype is 'int4'"),
        (["--data", "wikitext9"], 1, "'wikitext9' is not known"),
        (["--data", "wikitext2"], 1, "could not be read from the Hub"),
        (["--data", "x.txt,speed=1"], 2, "option 'speed=1' is not known"),
        (["--max-tokens", 70], 1, "1 window of 64 tokens"),
        (["--window", 20000, "--max-tokens", 0], 1, "fewer than one window of 20000"),
        (["--nonsense"], 2, "No such option"),
    ],
    ids=str,
)
def test_bad_input_to_build(run, tiny_folder, text, tmp_path, change, code, message):
    folder = tmp_path / "clusters"
    result, out, err = run(*build_command(tiny_folder, text, folder, *change))
    assert result == code
    assert message in " ".join(err.split())
    assert "Traceback" not in out + err
    assert not (folder / "config.json").exists()


def test_unknown_model(run, text, tmp_path):
    code, _, err = run(*build_command("nobody/nothing", text, tmp_path / "out"))
    assert code == 1
    assert err.startswith("error: model 'nobody/nothing' could not be loaded")
    assert not (tmp_path / "out").exists()


def test_empty_text_and_foreign_folder(run, tiny_folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    code, _, err = run(*build_command(tiny_folder, empty, tmp_path / "out"))
    assert code == 1
    assert "holds no text" in err
    code, _, err = run(*build_command(tiny_folder, empty, tiny_folder))
    assert code == 1
    assert "not a cluster artifact" in err


def test_artifact_that_does_not_load(run, tiny_folder, tmp_path):
    for command in (
        ["inspect", tmp_path],
        ["generate", tiny_folder, "--clusters", tmp_path / "no", "--prompt", "x"],
        ["eval", tiny_folder, "--clusters", tmp_path],
    ):
        code, _, err = run(*command)
        assert code == 1
        assert "artifact" in err
        assert "Traceback" not in err


def test_bench_usage(run):
    assert run("bench")[0] == 2
    assert run("bench", "demo", "--shape", "mistral-7b")[0] == 2
    assert run("bench", "--shape", "mistral-7b", "--budget", 0.4)[0] == 2
    for command in ("bench", "tune"):
        code, _, err = run(command, "--shape", "mistral-7b", "--revision", "main")
        assert code == 2
        assert "--revision" in err
    for option, value in (("--layers", 1), ("--density", 0.3)):
        code, _, err = run("bench", "demo", "--clusters", "a folder", option, value)
        assert code == 2
        assert f"{option} is for --shape" in err
    code, _, err = run("bench", "--shape", "gpt5")
    assert code == 2
    assert "mistral-7b" in err


def test_interrupted_build_resumes_to_the_same_artifact(
    run, built, tiny_folder, text, tmp_path, monkeypatch
):
    folder = tmp_path / "interrupted"
    calls = []
    original = build_module.fit_layer

    def interrupt_at_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(build_module, "fit_layer", interrupt_at_second)
    code, _, err = run(*build_command(tiny_folder, text, folder))
    assert code == 130
    assert "run the same command again" in err
    assert [p.name for p in folder.iterdir()] == [".build"]
    assert run("inspect", folder)[0] == 1

    code, _, err = run(*build_command(tiny_folder, text, folder))
    assert code == 0, err
    assert len(calls) == 4
    whole, resumed = (ClusterSet.from_pretrained(path) for path in (built, folder))
    for index, layer in whole.layers.items():
        assert torch.equal(layer.active_sets, resumed.layers[index].active_sets)
        assert torch.equal(layer.router_up, resumed.layers[index].router_up)


def test_unexpected_error_is_one_line(run, monkeypatch, tmp_path):
    def broken(*arguments, **options):
        raise ZeroDivisionError("somewhere deep")

    monkeypatch.setattr(ClusterSet, "from_pretrained", broken)
    code, _, err = run("inspect", tmp_path)
    assert code == 1
    assert "ZeroDivisionError: somewhere deep" in err
    assert "Traceback" not in err


def test_build_for_planes_of_a_model_on_the_disk(run, tiny_folder, text, tmp_path):
    """The same artifact and the same packed model as of one in memory."""
    command = ["--data", text, "--clusters", 8, "--window", 64, "--router", 2, "--weights", 5]
    command += ["--distill", 0, "--max-tokens", 3000]
    made = {}
    for where in ("--no-offload", "--offload"):
        folders = [tmp_path / f"{name}{where}" for name in ("clusters", "packed")]
        options = [*command, "--packed", folders[1], where]
        code, _, err = run("build", tiny_folder, "-o", folders[0], *options)
        assert code == 0, err
        assert (folders[1] / "config.json").exists()
        made[where] = {
            file.name: file.read_bytes()
            for folder in folders
            for file in folder.iterdir()
            if file.suffix == ".safetensors"
        }
    assert len(made["--offload"]) == 3
    assert made["--offload"] == made["--no-offload"]


def test_build_of_a_model_on_the_disk(run, tiny_folder, text, tmp_path):
    """The same artifact, tensors and all, as of one in memory."""
    folders = [tmp_path / name for name in ("memory", "disk")]
    command = ["--data", text, "--clusters", 8, "--window", 64, "--router", 2, "--budget", 0.7]
    command += ["--distill", 0]
    for folder, offload in zip(folders, ("--no-offload", "--offload"), strict=True):
        code, out, err = run("build", tiny_folder, "-o", folder, *command, offload)
        assert code == 0, err
        assert "tuning, layer by layer" in out
    for name in ("clusters.safetensors", "centroids.safetensors", "config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    command[1] = "self"
    code, _, err = run("build", tiny_folder, "-o", tmp_path / "x", *command, "--offload")
    assert code != 0
    assert "'self' samples text from the model" in err
    code, _, err = run("build", "demo", "-o", tmp_path / "x", "--offload")
    assert code != 0
    assert "neither for 'demo'" in err
