"""``pack``: a folder that other commands read, or nothing."""

import json

import pytest
import torch
from helpers import assert_same_state, logits, needs_library, random_cluster_set
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_runtime.clusters import pack_calibrated
from sparse_runtime.clusters.text import calibration_windows, parse_source
from sparse_runtime.ffn.plane_packing import pack_model


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"alpha {n * n} beta {n} gamma\n" for n in range(200)))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_plain(run, tiny_folder, tiny_model, tmp_path):
    packed, figures = tmp_path / "packed", tmp_path / "figures.json"
    code, out, err = run(
        *("pack", tiny_folder, "--weights", 5, "--linear-weights", 8, "-o", packed),
        *("--dtype", "float32", "--json", figures),
    )
    assert code == 0, err
    assert str(packed) in out
    loaded = AutoModelForCausalLM.from_pretrained(packed)
    expected = pack_model(tiny_model, 5, linears=8)
    assert_same_state(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))
    assert AutoTokenizer.from_pretrained(packed)("abc")["input_ids"]
    record = json.loads(figures.read_text())
    assert (record["weights"], record["linear_weights"]) == (5, 8)
    assert record["bytes"] == sum(path.stat().st_size for path in packed.iterdir())
    assert "calibration" not in record


@pytest.mark.parametrize("compensate", [None, True, False])
def test_by_calibration_text(run, tiny_folder, tiny_model, text, tmp_path, compensate):
    packed, figures = tmp_path / "packed", tmp_path / "figures.json"
    option = () if compensate is None else ("--compensate" if compensate else "--no-compensate",)
    code, _, err = run(
        *("pack", tiny_folder, "--weights", 4, "-o", packed, "--data", text, "--max-tokens", 640),
        *("--window", 64, "--dtype", "float32", "--json", figures, *option),
    )
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(packed)
    windows = calibration_windows(
        [parse_source(str(text))], tokenizer, max_tokens=640, window=64
    ).windows
    assert windows.shape == (10, 64)
    # What is better in the loop is the default.
    expected = pack_calibrated(tiny_model, windows, 4, compensate=compensate is not False)
    assert_same_state(AutoModelForCausalLM.from_pretrained(packed), expected)
    record = json.loads(figures.read_text())
    assert record["calibration"]["tokens"] == 640
    assert record["compensate"] == (compensate is not False)


@needs_library
def test_other_commands_read_it(run, tiny_folder, tiny_model, text, tmp_path):
    clusters, packed = tmp_path / "clusters", tmp_path / "packed"
    random_cluster_set(tiny_model, 0.5).save_pretrained(clusters)
    code, _, err = run("pack", tiny_folder, "-o", packed, "--dtype", "float32")
    assert code == 0, err
    options = ("--clusters", clusters, "--dtype", "float32")
    code, _, err = run(
        *("generate", packed, *options, "--prompt", "alpha", "--raw", "--max-new-tokens", 4)
    )
    assert code == 0, err
    command = ("eval", packed, *options, "--data", text, "--window", 64, "--max-tokens", 256)
    figures = tmp_path / "figures.json"
    records = []
    for against in ((), ("--against", tiny_folder)):
        code, _, err = run(*command, *against, "--json", figures)
        assert code == 0, err
        records.append(json.loads(figures.read_text()))
    own, to_float = records
    assert own["packed"]["kl"] == pytest.approx(0, abs=1e-6)
    assert to_float["packed"]["kl"] > 1e-5
    assert to_float["kl"] > own["kl"] > 0.01
    assert own["weights"] == to_float["weights"] == 6
    # As packing while evaluating, which rounds in the same way.
    code, _, err = run("eval", tiny_folder, *command[2:], "--weights", 6, "--json", figures)
    assert code == 0, err
    assert json.loads(figures.read_text())["packed"]["kl"] == pytest.approx(
        to_float["packed"]["kl"], rel=1e-3
    )


def test_clusters_are_built_from_the_float_model(run, tiny_folder, text, tmp_path):
    assert run("pack", tiny_folder, "-o", tmp_path / "packed")[0] == 0
    code, _, err = run(
        *("build", tmp_path / "packed", "-o", tmp_path / "clusters", "--data", text),
        *("--max-tokens", 640, "--window", 64, "--clusters", 2),
    )
    assert code == 1
    assert "packed in planes, and this needs float weights" in err


@needs_library
def test_against_has_its_place(run, tiny_folder, tiny_model, text, tmp_path):
    clusters = tmp_path / "clusters"
    random_cluster_set(tiny_model, 0.5).save_pretrained(clusters)
    command = ("eval", tiny_folder, "--clusters", clusters, "--data", text, "--window", 64)
    for options in ((), ("--weights", 6)):
        code, _, err = run(*command, "--against", tiny_folder, *options)
        assert code == 2
        assert "--against is for packed folders" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", 2), "--weights is 2; expected 3, 4, 5, 6, 7 or 8"),
        (("--linear-weights", 9), "--linear-weights is 9; expected 3, 4, 5, 6, 7 or 8"),
        (("--compensate",), "--compensate has no effect without calibration text; give --data"),
        (("--max-tokens", 600), "--max-tokens has no effect without calibration text"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
        (("--data", "pydoc", "--max-tokens", 5), "--max-tokens is 5; expected at least one window"),
    ],
)
def test_refusals_before_anything_is_loaded(run, tmp_path, options, words):
    code, _, err = run("pack", tmp_path / "no-model", "-o", tmp_path / "packed", *options)
    assert code != 0
    assert words in " ".join(err.split())
    assert names(tmp_path) == []


def test_a_folder_in_use_is_left_alone(run, tiny_folder, tmp_path):
    code, _, err = run("pack", tiny_folder, "-o", tiny_folder)
    assert code == 1
    assert "exists and holds chat_template" in err or "exists and holds config.json" in err
    file = tmp_path / "file"
    file.write_text("mine")
    code, _, err = run("pack", tiny_folder, "-o", file)
    assert code == 1
    assert file.read_text() == "mine"


def test_a_packed_model_is_refused(run, tiny_folder, tmp_path):
    assert run("pack", tiny_folder, "-o", tmp_path / "packed")[0] == 0
    before = names(tmp_path)
    code, _, err = run("pack", tmp_path / "packed", "-o", tmp_path / "again")
    assert code == 1
    assert "packed already" in err
    assert names(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written_stays(run, tiny_folder, tmp_path, monkeypatch, error):
    from transformers import MistralForCausalLM

    def save(self, folder, **_):
        (folder / "config.json").write_text("half")
        raise error

    monkeypatch.setattr(MistralForCausalLM, "save_pretrained", save)
    before = names(tmp_path)
    code, _, err = run("pack", tiny_folder, "-o", tmp_path / "packed")
    assert names(tmp_path) == before
    assert code == (130 if error is KeyboardInterrupt else 1)
    assert ("interrupted" if error is KeyboardInterrupt else "the disk is full") in err


def test_weights_that_are_not_finite(run, tiny_model, tiny_folder, tmp_path):
    tiny_model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    tiny_model.save_pretrained(tiny_folder)
    before = names(tmp_path)
    code, _, err = run("pack", tiny_folder, "-o", tmp_path / "packed")
    assert code == 1
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in err
    assert names(tmp_path) == before
