"""What commands take and say in bits per weight and bytes per token."""

import json

import pytest
from helpers import cuttable_cluster_set, measured_cuts, needs_library

from sparse_runtime.cli.ranges import SHARE, parse_numbers

pytestmark = needs_library
WEIGHTS = (
    3 * (3 * 32 * 44 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32) + 32 + 260 * 32
)  # the embedding not


@pytest.fixture
def files(tiny_model, tiny_tokenizer, tmp_path):
    """A tiny model's folder and an artifact that can be cut."""
    folder, clusters = tmp_path / "model", tmp_path / "clusters"
    tiny_tokenizer.save_pretrained(folder)
    tiny_model.generation_config.eos_token_id = None
    tiny_model.bfloat16().save_pretrained(folder)
    artifact = cuttable_cluster_set(tiny_model.float())
    artifact.measured = measured_cuts((0.5, 0.5, 0.2), (0.7, 0.69, 0.1))
    artifact.save_pretrained(clusters)
    return folder, clusters


@pytest.fixture
def figures(run, files, tmp_path):
    """Figures of a command, and what it prints."""

    def call(name, *options):
        folder, clusters = files
        file = tmp_path / "figures.json"
        where = (folder, "--clusters", clusters) if name != "inspect" else (clusters,)
        code, out, err = run(name, *where, *options, "--json", file)
        assert code == 0, err
        return json.loads(file.read_text()), out

    return call


GENERATE = ("generate", "--prompt", "alpha", "--raw", "--max-new-tokens", 5, "--compare")
BENCH = ("bench", "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1)


@pytest.mark.parametrize(
    ("text", "share"),
    [("0.25", 0.25), ("4.0bits", 0.25), ("4bits", 0.25), ("1", 1), ("16bits", 1), ("1e-1", 0.1)],
)
def test_a_budget_is_a_share_or_bits(text, share):
    assert SHARE.parse("--budget", text) == share
    assert parse_numbers("--budgets", f"0.5,{text}", float, SHARE) == [0.5, share]


def test_generate_in_bits_as_in_shares(figures):
    bits, _ = figures(*GENERATE, "--budget", "11.2bits")
    share, out = figures(*GENERATE, "--budget", 0.7)
    assert bits["sparse"]["text"] == share["sparse"]["text"]
    assert bits["sparse"]["cost_share"] == share["sparse"]["cost_share"] < 1
    for variant, own in share.items():
        if variant in ("sparse", "dense"):
            assert own["bits_per_weight"] == pytest.approx(16 * own["cost_share"])
            ffns = 3 * 3 * 32 * 44
            expected = 2 * (WEIGHTS - ffns * (1 - own["cost_share"]))
            assert own["bytes_per_token"] == pytest.approx(expected)
            assert f"({own['bits_per_weight']:.2f} bits per FFN weight)" in out
            assert f"{own['bytes_per_token'] / 1e6:.1f} MB of weights per token" in out
    assert share["dense"]["bits_per_weight"] == 16


def test_bench_in_bits(figures):
    record, out = figures(*BENCH, "--budget", "11.2bits")
    assert record["budget"] == pytest.approx(0.7)
    assert record["bits_per_weight"] == pytest.approx(16 * record["cost_share"])
    assert f"({record['bits_per_weight']:.2f} bits per FFN weight)" in out
    assert "MB per token" in out
    read = record["decode"]["bytes_per_token"]
    assert read["dense"] == read["dense_fast"] == 2 * WEIGHTS
    assert read["sparse"] == read["sparse_fast"] < 0.95 * read["dense"]
    assert record["decode"]["ceiling"] == pytest.approx(read["dense"] / read["sparse"])


def test_bench_of_planes(figures):
    record, _ = figures(*BENCH, "--weights", 6, "--linear-weights", 8)
    read = record["decode"]["bytes_per_token"]
    assert list(read) == list(record["decode"]["gbps"])
    assert read["sparse"] < read["packed"] < read["dense"] == 2 * WEIGHTS


def test_curves_take_bits(figures, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma " * 20)
    options = ("--data", text, "--window", 32, "--max-tokens", 64, "--dtype", "float32")
    record, _ = figures("eval", *options, "--budgets", "8bits,0.7")
    assert {row["budget"] for row in record["results"][0]["rows"]} >= {0.5, 0.7}


def test_a_loss_in_place_of_a_budget(figures):
    """The budget is that of the cut which lost as much on the text that loses most."""
    by_loss, _ = figures(*GENERATE, "--max-loss", 0.2)
    by_budget, _ = figures(*GENERATE, "--budget", 0.7)
    assert by_loss["sparse"]["cost_share"] == by_budget["sparse"]["cost_share"]
    prose, _ = figures(*GENERATE, "--max-loss", 0.2, "--max-loss-domain", "prose")
    assert prose["sparse"]["cost_share"] < by_loss["sparse"]["cost_share"]


def test_inspect_shows_what_cuts_read_and_lose(figures):
    record, out = figures("inspect")
    assert record["measured"]["domains"] == ["prose", "code"]
    for part in ("prose (1024", "code (512", "0.510", "0.500, 0.2000 ± 0.0200", "0.710, 0.2000"):
        assert part in " ".join(out.split()), part


def test_inspect_in_bits(figures):
    record, out = figures("inspect")
    assert (record["budget"], record["bits_per_weight"]) == (0.5, 8)
    assert "budget 0.5 (8 bits per FFN weight)" in out


def test_tasks_in_bits(figures, monkeypatch):
    rows = [{"task": "x", "metric": "acc", "documents": 2}]
    rows[0] |= dict.fromkeys(("dense", "sparse", "difference"), 0.5)
    rows[0] |= dict.fromkeys(("dense_error", "sparse_error", "difference_error"))
    monkeypatch.setattr(
        "sparse_runtime.eval.quality.downstream.evaluate_tasks",
        lambda *given, **options: {"rows": rows, "cost_share": 0.25, "bytes_per_token": 2e9},
    )
    record, out = figures("tasks", "--task", "x", "--budget", "8bits")
    assert record["bits_per_weight"] == 4
    assert record["bytes_per_token"] == 2e9
    assert "(4.00 bits per FFN weight, 2.000 GB of weights per token)" in out
