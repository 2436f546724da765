"""The whole path over model types other than Mistral's, from local folders, by the command line."""

import json

import pytest
from helpers import needs_library
from model_types import tiny_model_of_type

from sparse_runtime import ClusterSet

WINDOW = 32


@pytest.fixture(params=["qwen3", "gemma3", "phi3", "smollm3", "phi", "arcee", "opt", "gpt2"])
def folder(request, tiny_tokenizer, tmp_path):
    path = tmp_path / request.param
    tiny_model_of_type(request.param).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@needs_library
def test_build_to_bench(run, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a text\n" for number in range(400)))
    clusters, figures = tmp_path / "clusters", tmp_path / "figures.json"
    packable = folder.name not in ("phi", "arcee", "opt", "gpt2")
    code, _, err = run(
        *("build", folder, "-o", clusters, "--data", text, "--clusters", 4, "--window", WINDOW),
        *("--max-tokens", 1280, "--router", "4", "--distill", 2, "--dtype", "float32"),
    )
    assert code == 0, err
    assert ClusterSet.from_pretrained(clusters).layers
    judge = ("--clusters", clusters, "--dtype", "float32")
    window = ("--data", text, "--max-tokens", 256, "--window", WINDOW)
    baselines = "oracle,teal,wina,cats" + (",look-all,dense-8" if packable else "")
    sparse_eval = ("--budgets", "0.8", "--baselines", baselines, "--calibration", text)
    code, _, err = run("eval", folder, *judge, *window, *sparse_eval, "--json", figures)
    assert code == 0, err
    rows = json.loads(figures.read_text())["results"][0]["rows"]
    assert {"clusters", "oracle", "teal", "wina", "cats"} <= {row["method"] for row in rows}
    ours = next(row for row in rows if row["method"] == "clusters")
    assert 0.5 < ours["cost_share"] < 0.9
    code, out, err = run("generate", folder, *judge, "--prompt", "line", "--max-new-tokens", 6)
    assert code == 0, err
    assert "cost share" in out + err
    code, _, err = run(
        *("bench", folder, *judge, "--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1),
        *("--json", figures),
    )
    assert code == 0, err
    code, _, err = run("generate", folder, *judge, "--prompt", "line", "--weights", 6)
    if packable:
        assert code == 0, err
    else:
        assert code == 1
        assert "has no gate" in err or "is written out" in err or "weights [in, out]" in err
