"""``long`` from the command line: figures, tables, and the runs that are compared."""

import json

import pytest
from helpers import cuttable_cluster_set, needs_library, random_cluster_set

SMALL = (
    *("--window", 300, "--max-tokens", 1300, "--lengths", "250,400", "--depths", "0,1"),
    *("--needles", 2, "--prompts", 3, "--prompt-length", 8, "--new-tokens", 12),
    *("--dtype", "float32"),
)


@pytest.fixture
def files(tiny_model, tiny_folder, tmp_path):
    cuttable_cluster_set(tiny_model).save_pretrained(tmp_path / "clusters")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Line {number} of a text." for number in range(200)))
    return tiny_folder, tmp_path / "clusters", text


@pytest.fixture
def long(run, files, tmp_path):
    def call(*options, model=None, expected=0):
        folder, clusters, text = files
        figures = tmp_path / "long.json"
        arguments = ("--clusters", clusters, "--data", text, *SMALL, "--json", figures, *options)
        code, out, err = run("long", model or folder, *arguments)
        assert code == expected, err
        return (json.loads(figures.read_text()) if code == 0 else None), out, err

    return call


def test_all_parts(long):
    figures, out, _ = long()
    positions, needle = figures["positions"], figures["needle"]
    assert [(row["from"], row["to"]) for row in positions["rows"]] == [(1, 256), (256, 300)]
    for row in positions["rows"]:
        assert row["windows"] == 4
        assert row["kl"] > 0.01
        assert 0 < row["kl_error"] < row["kl"]
        assert f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}" in out
    assert 0.2 < positions["cost_share"] < 0.9
    runs = {"prompt dense": [], "every token sparse": []}
    for row in needle["rows"]:
        runs[row["run"]].append(row["log_probability"])
    for rows in runs.values():
        assert len(rows) == 6  # two lengths, two depths and both together
        assert [row["dense"] for row in rows] == [row["dense"] for row in runs["prompt dense"]]
    # The answer's first token is a prompt's, so that a dense prompt changes less.
    assert [row["sparse"] for row in runs["prompt dense"]] != [
        row["sparse"] for row in runs["every token sparse"]
    ]
    rows = figures["continuations"]["rows"]
    assert [(row["sampling"], row["figure"]) for row in rows] == [
        (sampling, figure)
        for sampling in ("greedy", "sampled")
        for figure in ("repeated_4grams", "distinct_tokens")
    ]
    assert any(row["difference"] != 0 for row in rows)
    assert 0.2 < figures["continuations"]["cost_share"] < 0.9
    assert 1 <= figures["continuations"]["same_tokens"] <= 12
    for title in ("perplexity by position", "needles", "3 continuations of 12 tokens after 8"):
        assert title in out


def test_all_neurons_change_nothing(long, files, tiny_model):
    whole = files[1].with_name("whole")
    random_cluster_set(tiny_model, 1.0).save_pretrained(whole)
    figures, _, _ = long("--clusters", whole)
    for row in figures["positions"]["rows"]:
        assert row["kl"] == pytest.approx(0, abs=1e-4)
        assert row["ratio"] == pytest.approx(1, abs=1e-3)
    for row in figures["needle"]["rows"]:
        assert row["log_probability"]["difference"] == pytest.approx(0, abs=1e-2)
        assert row["found"]["difference"] == 0
    greedy = figures["continuations"]["rows"][:2]
    assert [row["difference"] for row in greedy] == [0, 0]
    assert figures["continuations"]["same_tokens"] == 12


def test_one_part_and_a_cut(long):
    wide, _, _ = long("--parts", "positions", "--budget", 0.7, "--prompt-tokens", 270)
    assert {"needle", "continuations"}.isdisjoint(wide)
    (row,) = wide["positions"]["rows"]
    assert (row["from"], row["to"]) == (270, 300)
    narrow, _, _ = long("--parts", "positions", "--budget", 0.4)
    assert narrow["positions"]["cost_share"] < 0.55 < wide["positions"]["cost_share"]


@needs_library
def test_over_planes(long, run, files, tmp_path):
    figures, _, _ = long("--weights", 4)
    assert figures["weights"] == 4
    assert figures["positions"]["rows"][0]["kl"] > 0.001
    assert figures["positions"]["refined"] > 0
    assert run("pack", files[0], "--weights", 6, "-o", tmp_path / "packed")[0] == 0
    of_packed, _, _ = long("--budget", "3bits", model=tmp_path / "packed")
    assert of_packed["positions"]["refined"] > 0
    # The cut is at the planes' prices, whenever they were packed.
    packed_here, _, _ = long("--budget", "3bits", "--weights", 6)
    bits = [figures["positions"]["bits_per_weight"] for figures in (of_packed, packed_here)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-3)


def test_beyond_the_context(long):
    _, _, err = long("--window", 600, expected=2)
    assert "window is 600; expected at most the model's context, 512" in err
    _, _, err = long("--lengths", "250,513", expected=2)
    assert "needle length is 513" in err
    _, _, err = long("--prompt-length", 64, "--new-tokens", 449, "--max-tokens", 1600, expected=2)
    assert "prompt and continuation is 513" in err
    _, _, err = long("--lengths", "60", expected=2)
    assert "a needle prompt of 60 tokens has no room for its question" in err
