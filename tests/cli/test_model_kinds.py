"""The whole path over model types other than Mistral's, from local folders, by the command line."""

import json
from importlib.util import find_spec

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
    code, _, err = run(
        *("build", folder, "-o", clusters, "--data", text, "--clusters", 4, "--window", WINDOW),
        *("--max-tokens", 1280, "--router", "4", "--distill", 2, "--dtype", "float32"),
    )
    assert code == 0, err
    assert ClusterSet.from_pretrained(clusters).layers
    judge = ("--clusters", clusters, "--dtype", "float32")
    window = ("--data", text, "--max-tokens", 256, "--window", WINDOW)
    packable = folder.name not in ("opt", "gpt2")
    methods = "oracle,teal,wina,cats,look-all" + (",dense-8" if packable else "")
    sparse_eval = ("--budgets", "0.8", "--baselines", methods)
    sparse_eval += ("--calibration", text)
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
    if find_spec("lm_eval") and folder.name in ("qwen3", "gemma3", "phi3", "opt"):
        lines = tmp_path / "lines.jsonl"
        lines.write_text("".join(f'{{"text": "line {number} of a text"}}\n' for number in range(4)))
        code, out, err = run("tasks", folder, *judge, "--task", f"lambada={lines}")
        assert code == 0, err
        assert "cost share" in out
    code, _, err = run("generate", folder, *judge, "--prompt", "line", "--weights", 6)
    if packable:
        assert code == 0, err
    else:
        assert code == 1
        assert "is written out" in err or "weights [in, out]" in err


@needs_library
def test_planes_of_ffns_without_a_gate(run, tiny_tokenizer, tmp_path):
    """Built for planes, judged over them beside all neurons in fewer bits, packed and run."""
    folder, text = tmp_path / "phi", tmp_path / "text.txt"
    tiny_model_of_type("phi").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    text.write_text("".join(f"line {number} of a text\n" for number in range(400)))
    clusters, figures = tmp_path / "clusters", tmp_path / "figures.json"
    code, _, err = run(
        *("build", folder, "-o", clusters, "--data", text, "--clusters", 4, "--window", WINDOW),
        *("--max-tokens", 1280, "--router", "4", "--distill", 2, "--dtype", "float32"),
        *("--weights", 6),
    )
    assert code == 0, err
    layers = ClusterSet.from_pretrained(clusters).layers.values()
    assert {layer.weights for layer in layers} == {6}
    assert all(0 < layer.base_error < 0.3 for layer in layers)
    code, _, err = run(
        *("eval", folder, "--clusters", clusters, "--dtype", "float32", "--data", text),
        *("--max-tokens", 256, "--window", WINDOW, "--weights", 6, "--budgets", "0.3"),
        *("--baselines", "look-all,dense,dense-gptq", "--calibration", text, "--json", figures),
    )
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads(figures.read_text())["results"][0]["rows"]}
    assert {"clusters", "look-all", "dense-6", "dense-6-gptq", "dense-3"} <= rows.keys()
    # A group of 32 weights takes one of 64: 2 · 34 + 2 · 16 bytes of 2 · 2 · 32.
    assert rows["dense-6"]["cost_share"] == pytest.approx(100 / 128, abs=1e-3)
    assert rows["clusters"]["cost_share"] < 0.45
    packed = tmp_path / "packed"
    code, _, err = run("pack", folder, "-o", packed, "--weights", 6, "--data", text)
    assert code == 0, err
    for model, weights in ((folder, ("--weights", 6)), (packed, ())):
        code, out, err = run(
            *("generate", model, "--clusters", clusters, "--dtype", "float32", *weights),
            *("--prompt", "line", "--max-new-tokens", 6),
        )
        assert code == 0, err
        assert "cost share" in out + err


@needs_library
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_mixtures_of_experts(run, kind, tiny_tokenizer, tmp_path):
    """Built, judged, run and timed, over floats and planes; qwen2_moe has an FFN beside experts."""
    folder, text, lines = tmp_path / kind, tmp_path / "text.txt", tmp_path / "lines.jsonl"
    tiny_model_of_type(kind).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    text.write_text("".join(f"line {number} of a text\n" for number in range(400)))
    lines.write_text("".join(f'{{"text": "line {number} of a text"}}\n' for number in range(4)))
    figures = tmp_path / "figures.json"
    build = ("--data", text, "--clusters", 4, "--window", WINDOW, "--max-tokens", 1280)
    build += ("--router", "4", "--distill", 2, "--dtype", "float32")
    for weights, budget in (((), "0.8"), (("--weights", 6), "0.25")):
        clusters = tmp_path / f"clusters{len(weights)}"
        code, _, err = run("build", folder, "-o", clusters, *build, *weights)
        assert code == 0, err
        layers = ClusterSet.from_pretrained(clusters).layers
        assert sorted(layers) == ([0, 1] if kind == "mixtral" else [0, 1, 2, 3])
        assert [layers[index].experts for index in (0, 1)] == [4, 4]
        judge = ("--clusters", clusters, "--dtype", "float32", *weights)
        window = ("--data", text, "--max-tokens", 256, "--window", WINDOW)
        code, out, err = run(
            *("eval", folder, *judge, *window, "--budgets", budget, "--calibration", text),
            *("--baselines", "look-all,dense-6,oracle,q8_0", "--json", figures),
        )
        assert code == 0, err
        assert "oracle is left out" in out
        assert "this one has experts" in " ".join(out.split())
        rows = {row["method"]: row for row in json.loads(figures.read_text())["results"][0]["rows"]}
        assert {"clusters", "look-all", "dense-6"} <= rows.keys()
        assert rows["clusters"]["cost_share"] == pytest.approx(float(budget), abs=0.08)
        task = ("tasks", folder, *judge, "--task", f"lambada={lines}")
        for command in (
            ("generate", folder, *judge, "--prompt", "line", "--max-new-tokens", 4),
            *((task,) if find_spec("lm_eval") else ()),
            ("bench", folder, *judge, "--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1),
        ):
            code, out, err = run(*command)
            assert code == 0, (command[0], err)
            assert "cost share" in out + err
        if not weights:  # of what was run last
            assert "one layer's experts, one token" in " ".join(out.split())
