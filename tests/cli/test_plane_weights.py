"""``--weights`` of the commands that run a model."""

import json

import pytest
from helpers import needs_library, random_cluster_set

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
    assert record["packed"]["bits_per_weight"] == pytest.approx(
        8.25 * 64 / 32
    )  # H = 32 of a group of 64
    assert record["looked"] == record["counted"] == record["refined"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", 2), "--weights is 2; expected 3, 4, 5, 6, 7 or 8"),
        (("--tau", 3), "--tau has no effect on float weights; give --weights as well"),
        (("--weights", 6, "--tau", 0.5), "--tau is 0.5; expected 1 or more"),
        (("--weights", 6, "--budgets", "0.5"), "--weights is given with --budgets"),
    ],
)
def test_refusals(run, files, tmp_path, options, words):
    folder, clusters = files
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma " * 400)
    code, _, err = run("eval", folder, "--clusters", clusters, "--data", text, *options)
    assert code != 0
    assert words in " ".join(err.split())
