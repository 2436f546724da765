"""``--weights`` of the commands that run a model."""

import json
import shutil

import pytest
from helpers import cuttable_cluster_set, needs_library, random_cluster_set

from sparse_runtime.ffn.plane_packing import pack_model

pytestmark = needs_library


@pytest.fixture
def files(tiny_model, tiny_tokenizer, tmp_path):
    """A tiny model's folder and an artifact for it."""
    folder, clusters = tmp_path / "model", tmp_path / "clusters"
    tiny_tokenizer.save_pretrained(folder)
    tiny_model.generation_config.eos_token_id = None
    tiny_model.save_pretrained(folder)
    random_cluster_set(tiny_model, 0.5).save_pretrained(clusters)
    return folder, clusters


def test_generate_packs_and_runs_sparse(run, files, tmp_path):
    folder, clusters = files
    figures = tmp_path / "figures.json"
    code, _, err = run(
        *("generate", folder, "--clusters", clusters, "--prompt", "alpha", "--raw", "--compare"),
        *("--weights", 6, "--linear-weights", 8, "--max-new-tokens", 5, "--json", figures),
        *("--dtype", "float32"),
    )
    assert code == 0, err
    record = json.loads(figures.read_text())
    assert record["sparse"]["sparse_tokens"] == 4  # steps after the first token
    # Of float32: 6.25 bits of 32 for half of the neurons, and router and bias.
    assert record["sparse"]["cost_share"] < 0.35


def test_eval_shows_packed_and_sparse(run, files, tmp_path):
    folder, clusters = files
    text, figures = tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text("alpha beta gamma " * 400)
    code, out, err = run(
        *("eval", folder, "--clusters", clusters, "--data", text, "--window", 64),
        *("--max-tokens", 256, "--dtype", "float32", "--weights", 8, "--json", figures),
    )
    assert code == 0, err
    assert "all neurons" in out
    record = json.loads(figures.read_text())
    assert 0 < record["packed"]["kl"] < record["kl"]
    for row in (record, record["packed"]):
        assert row["bits_per_weight"] == pytest.approx(16 * row["cost_share"])
        assert row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1]
    assert record["packed"]["bits_per_weight"] == pytest.approx(
        8.25 * 64 / 32
    )  # H = 32 of a group of 64
    assert record["looked"] == record["counted"] == record["refined"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("options", "packed"), [(("--linear-weights", 6), False), (("--weights", 5), True)]
)
def test_generate_with_one_of_them(run, files, tmp_path, options, packed):
    folder, clusters = files
    figures = tmp_path / "figures.json"
    code, _, err = run(
        *(
            "generate",
            folder,
            "--clusters",
            clusters,
            "--prompt",
            "alpha",
            "--raw",
            "--json",
            figures,
        ),
        *("--max-new-tokens", 4, "--dtype", "float32", *options),
    )
    assert code == 0, err
    record = json.loads(figures.read_text())["sparse"]
    assert record["sparse_tokens"] == 3
    assert (record["cost_share"] < 0.3) == packed  # half of the neurons, in 5 bits or in 32


def test_tau_on_a_packed_folder(run, files, tmp_path, tiny_model):
    folder, clusters = files
    packed, text = tmp_path / "packed", tmp_path / "text.txt"
    shutil.copytree(folder, packed)
    pack_model(tiny_model, 5).save_pretrained(packed)
    text.write_text("alpha beta gamma " * 400)
    for command in (
        ("generate", packed, "--clusters", clusters, "--prompt", "alpha", "--max-new-tokens", 4),
        (
            "eval",
            packed,
            "--clusters",
            clusters,
            "--data",
            text,
            "--window",
            64,
            "--max-tokens",
            128,
        ),
    ):
        code, out, err = run(*command, "--tau", 3, "--ramp", 0.5, "--dtype", "float32")
        assert code == 0, err
    assert "5 bits" in out


def test_tasks_run_on_planes(run, files, tmp_path):
    pytest.importorskip("lm_eval")
    folder, clusters = files
    lines, figures = tmp_path / "passages.jsonl", tmp_path / "figures.json"
    texts = ("the cat sat on the mat", "one two three four", "an apple a day keeps")
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    records = []
    for options in ((), ("--weights", 3, "--linear-weights", 4, "--tau", 3, "--ramp", 0.5)):
        code, _, err = run(
            *("tasks", folder, "--clusters", clusters, "--task", f"lambada={lines}", *options),
            *("--dtype", "float32", "--json", figures),
        )
        assert code == 0, err
        assert "warning" not in err
        records.append(json.loads(figures.read_text()))
    floats, planes = (record["rows"][0] for record in records)
    assert floats["metric"] == planes["metric"] == "perplexity"
    assert planes["dense"] == floats["dense"]  # of the float model
    assert planes["sparse"] != floats["sparse"]
    assert records[1]["cost_share"] < 0.6 * records[0]["cost_share"]
    assert records[1]["planes"] == {"weights": 3, "linear_weights": 4, "tau": 3.0, "ramp": 0.5}


def test_packed_folders_are_not_packed_again(run, files, tmp_path, tiny_model):
    folder, _ = files
    packed, clusters, text = tmp_path / "packed", tmp_path / "cut", tmp_path / "text.txt"
    shutil.copytree(folder, packed)
    cuttable_cluster_set(tiny_model).save_pretrained(clusters)
    pack_model(tiny_model, 5).save_pretrained(packed)
    text.write_text("alpha beta gamma " * 40)
    command = ("eval", packed, "--clusters", clusters, "--data", text, "--budgets", "0.3")
    options = ("--window", 32, "--max-tokens", 128, "--dtype", "float32")
    code, _, err = run(*command, *options, "--weights", 6)
    assert code == 2
    assert f"{packed} came packed in 5 bits; leave --weights out" in " ".join(err.split())
    figures = tmp_path / "figures.json"
    code, out, err = run(*command, *options, "--verify", "--tau", 3, "--json", figures)
    assert code == 0, err
    assert "clusters, 5 bits" in out
    (row,) = json.loads(figures.read_text())["results"][0]["rows"]
    assert (row["weights"], row["rounding"]) == (5, None)
    assert 0 < row["refined"] <= row["counted"] <= row["looked"] < 1


@pytest.mark.parametrize(
    "options", [("--weights", 6), ("--linear-weights", 4), ("--weights", 4) * 2]
)
def test_bench_runs_on_planes_beside_floats(run, files, tmp_path, options):
    folder, clusters = files
    figures = tmp_path / "figures.json"
    if len(options) == 4:
        options = (*options[:2], "--linear-weights", 8, "--tau", 3, "--batches", 2)
    code, out, err = run(
        *("bench", folder, "--clusters", clusters, "--prompt-tokens", 12, "--new-tokens", 3),
        *("--repeats", 1, "--json", figures, *options),
    )
    assert code == 0, err
    record = json.loads(figures.read_text())
    decode, memory = record["decode"], record["memory"]
    assert set(decode["gbps"]) == {"dense", "dense_fast", "packed", "sparse", "sparse_fast"}
    assert "packed" in out
    assert memory["sparse_weights_mib"] < memory["weights_mib"]
    assert ("mlp" in record) == ("--weights" not in options)
    read = {name: gbps * decode[f"{name}_ms"] for name, gbps in decode["gbps"].items()}
    assert read["sparse"] < read["packed"] < read["dense"]
    assert decode["ceiling"] == pytest.approx(read["dense"] / read["sparse"])
    if "--batches" in options:
        assert record["batches"][0]["batch"] == 2


def test_bench_of_a_packed_folder(run, files, tmp_path, tiny_model):
    folder, clusters = files
    packed, figures = tmp_path / "packed", tmp_path / "figures.json"
    shutil.copytree(folder, packed)
    pack_model(tiny_model, 5).save_pretrained(packed)
    code, _, err = run(
        *("bench", packed, "--clusters", clusters, "--prompt-tokens", 12, "--new-tokens", 3),
        *("--repeats", 1, "--json", figures),
    )
    assert code == 0, err
    record = json.loads(figures.read_text())
    assert set(record["decode"]["gbps"]) == {"dense", "dense_fast", "sparse", "sparse_fast"}
    assert "mlp" not in record


def test_bench_on_a_gpu_takes_none(run, files):
    folder, clusters = files
    code, _, err = run(
        *("bench", folder, "--clusters", clusters, "--device", "cuda", "--linear-weights", 6)
    )
    assert code == 2
    assert "--linear-weights is timed on the CPU, and --device is 'cuda'" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", 2), "--weights is 2; expected 3, 4, 5, 6, 7 or 8"),
        (("--tau", 3), "--tau has no effect on float weights; give --weights as well"),
        (("--weights", 6, "--tau", 0.5), "--tau is 0.5; expected 1 or more"),
        (("--weights", 6, "--rounding", "gptq"), "--rounding is 'gptq' without --weights beside"),
        (("--budgets", "0.5", "--rounding", "mse"), "--rounding is 'mse' without --weights beside"),
        (
            ("--weights", 6, "--budgets", "0.5", "--rounding", "best"),
            "--rounding is 'best'; expected one of plain, mse, gptq",
        ),
        (
            ("--baselines", "dense", "--calibration", "x.txt"),
            "--calibration is given without --baselines that are fitted on text",
        ),
        (("--baselines", "dense-9"), "baseline is 'dense-9'; expected all, or some of"),
    ],
)
def test_refusals(run, files, tmp_path, options, words):
    folder, clusters = files
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma " * 400)
    code, _, err = run("eval", folder, "--clusters", clusters, "--data", text, *options)
    assert code != 0
    assert words in " ".join(err.split())
