"""lm-eval on a sparsified model, from local files, against scores computed here."""

import gzip
import json

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime import sparsify, unsparsify
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.eval.quality.downstream import evaluate_tasks

pytest.importorskip("lm_eval")

PASSAGES = ["the cat sat on the mat", "one two three four", "an apple a day keeps"]
CHOICES = [
    {"goal": "boil water", "sol1": "use a pan", "sol2": "use a sieve"},
    {"goal": "cut bread", "sol1": "take a spoon", "sol2": "take a knife"},
    {"goal": "read", "sol1": "open a book", "sol2": "close the book"},
]


@pytest.fixture
def files(tmp_path):
    lambada, piqa = tmp_path / "passages.jsonl", tmp_path / "piqa.jsonl"
    lambada.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    piqa.write_text("".join(json.dumps(line) + "\n" for line in CHOICES))
    (tmp_path / "piqa-labels.lst").write_text("0\n1\n0\n")
    return [f"lambada={lambada}", f"piqa={piqa}"]


def log_likelihood(model, tokenizer, context, continuation):
    """As the harness scores: the continuation's tokens given the context."""
    ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    count = len(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        logits = model(ids).logits[0, -count - 1 : -1].log_softmax(-1)
    return logits.gather(1, ids[0, -count:, None]).sum().item()


def check_errors(row, dense, sparse):
    """Standard errors of the sides, and the paired one of their difference."""
    dense, sparse = (torch.tensor(side, dtype=torch.float64) for side in (dense, sparse))
    assert row["difference"] == pytest.approx(row["sparse"] - row["dense"])
    for name, values in (("dense", dense), ("sparse", sparse), ("difference", sparse - dense)):
        error = values.std().item() / len(values) ** 0.5
        assert row[f"{name}_error"] == pytest.approx(error, rel=1e-3, abs=1e-9)


def test_agrees_with_own_scores(tiny_model, tiny_tokenizer, files):
    clusters = random_cluster_set(tiny_model, 0.3)
    result = evaluate_tasks(tiny_model, tiny_tokenizer, clusters, files)
    rows = {(row["task"], row["metric"]): row for row in result["rows"]}
    assert set(rows) == {
        ("lambada", "perplexity"), ("lambada", "acc"), ("piqa", "acc"), ("piqa", "acc_norm"),
    }  # fmt: skip
    expected, documents = {}, {}
    for side in ("dense", "sparse"):
        if side == "sparse":
            sparsify(tiny_model, clusters, config=EVALUATION)
        scores = []
        for text in PASSAGES:
            context, _, word = text.rpartition(" ")
            scores.append(log_likelihood(tiny_model, tiny_tokenizer, context, f" {word}"))
        hits = []
        for line, label in zip(CHOICES, (0, 1, 0), strict=True):
            pair = [
                log_likelihood(
                    tiny_model,
                    tiny_tokenizer,
                    f"Question: {line['goal']}\nAnswer:",
                    f" {line[key]}",
                )
                for key in ("sol1", "sol2")
            ]
            hits.append(pair.index(max(pair)) == label)
        documents[side] = scores, hits
        expected[side] = (torch.tensor(scores).mean().neg().exp().item(), sum(hits) / 3)
    unsparsify(tiny_model)
    for side, (perplexity, accuracy) in expected.items():
        assert rows["lambada", "perplexity"][side] == pytest.approx(perplexity, rel=1e-4)
        assert rows["piqa", "acc"][side] == pytest.approx(accuracy)
    assert expected["dense"][0] != pytest.approx(expected["sparse"][0], rel=1e-2)
    assert 0.2 < result["cost_share"] < 0.6
    assert rows["piqa", "acc"]["documents"] == 3
    check_errors(rows["piqa", "acc"], documents["dense"][1], documents["sparse"][1])
    # A perplexity's documents, to first order.
    by_derivative = [
        [-perplexity * score for score in documents[side][0]]
        for side, (perplexity, _) in expected.items()
    ]
    check_errors(rows["lambada", "perplexity"], *by_derivative)
    assert rows["lambada", "perplexity"]["higher_is_better"] is False


def test_limit_and_own_labels(tiny_model, tiny_tokenizer, files, tmp_path):
    lines = [{**line, "label": 1} for line in CHOICES]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clusters = random_cluster_set(tiny_model, 0.3)
    result = evaluate_tasks(
        tiny_model, tiny_tokenizer, clusters, [f"piqa={tmp_path / 'own.jsonl'}"], limit=2
    )
    assert {row["documents"] for row in result["rows"]} == {2}
    assert result["limit"] == 2


def test_bad_tasks(tiny_model, tiny_tokenizer, files, tmp_path):
    def run(*tasks):
        evaluate_tasks(tiny_model, tiny_tokenizer, random_cluster_set(tiny_model, 0.5), tasks)

    with pytest.raises(ConfigError, match="task 'squad' cannot be read from a file"):
        run(f"squad={tmp_path / 'x.jsonl'}")
    with pytest.raises(DataError, match=r"gone.jsonl': there is no such file"):
        run(f"lambada={tmp_path / 'gone.jsonl'}")
    with pytest.raises(
        DataError, match="line 1: there is no text under text; expected the keys text"
    ):
        run(files[1].replace("piqa=", "lambada="))
    (tmp_path / "piqa-labels.lst").write_text("0\n1\n")
    with pytest.raises(DataError, match="2 labels; expected 3"):
        run(files[1])
    (tmp_path / "piqa-labels.lst").unlink()
    with pytest.raises(DataError, match="record 1: the label is None; expected 0 or 1"):
        run(files[1])


def test_any_file_of_records_is_a_task_file(tiny_model, tiny_tokenizer, files, tmp_path):
    """A byte order mark, an array, compression: as text sources."""
    path = tmp_path / "passages.json.gz"
    records = json.dumps([{"text": text} for text in PASSAGES])
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + records.encode()))
    clusters = random_cluster_set(tiny_model, 0.3)
    plain = evaluate_tasks(tiny_model, tiny_tokenizer, clusters, files[:1])
    packed = evaluate_tasks(tiny_model, tiny_tokenizer, clusters, [f"lambada={path}"])
    assert packed == plain
    assert packed["rows"][0]["documents"] == 3


@pytest.mark.parametrize("labels", ["0\n2\n1\n", "0\nx\n1\n"])
def test_labels_out_of_range(tiny_model, tiny_tokenizer, files, tmp_path, labels):
    (tmp_path / "piqa-labels.lst").write_text(labels)
    with pytest.raises(DataError, match=r"labels.lst, record 2: the label is .; expected 0 or 1"):
        evaluate_tasks(tiny_model, tiny_tokenizer, random_cluster_set(tiny_model, 0.5), files[1:])
