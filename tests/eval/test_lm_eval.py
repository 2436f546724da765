"""lm-eval's own command line on a sparsified model."""

import json
from functools import partial
from pathlib import Path

import pytest
from helpers import random_cluster_set

from sparse_runtime.errors import ConfigError
from sparse_runtime.eval.quality.downstream import evaluate_tasks

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lm_eval(monkeypatch, capsys, tmp_path):
    """Run the command line with the example's task; exit code, output and errors."""
    from lm_eval.tasks import TaskManager

    from sparse_runtime.eval.lm_eval import main

    # Its own tasks are some ten thousand files.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))

    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        command = ["lm-eval", "run", "--model", "sparse_runtime", "--tasks", "capitals"]
        command += ["--include_path", "examples/tasks", *arguments]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_every_token_runs_sparse_and_the_cost_is_printed(
    lm_eval, tiny_model, tiny_tokenizer, tiny_folder, tmp_path
):
    clusters = random_cluster_set(tiny_model, 0.3)
    clusters.save_pretrained(tmp_path / "clusters")
    settings = f"pretrained={tiny_folder},clusters={tmp_path / 'clusters'},dtype=float32"
    code, out, err = lm_eval(
        *("--model_args", settings, "--batch_size", 1),
        *("--output_path", tmp_path / "out.json"),
    )
    assert code == 0, err
    (file,) = tmp_path.glob("out_*.json")
    record = json.loads(file.read_text())
    source = f"lambada={ROOT / 'examples' / 'tasks' / 'capitals.jsonl'}"
    expected = evaluate_tasks(tiny_model, tiny_tokenizer, clusters, [source])
    perplexity = next(row for row in expected["rows"] if row["metric"] == "perplexity")
    found = record["results"]["capitals"]["perplexity,none"]
    assert found == pytest.approx(perplexity["sparse"], rel=1e-4)
    assert found != pytest.approx(perplexity["dense"], rel=1e-2)
    assert record["config"]["sparse_share_of_tokens"] == 1
    assert record["config"]["prefill"] == "sparse"
    share = record["config"]["cost_share"]
    assert 0.2 < share < 0.6
    assert f"3 sparse FFNs: cost share {share:.3f}" in out
    assert "100.0% of the tokens ran sparse" in out


def test_errors_are_one_line(lm_eval, tiny_folder, tmp_path):
    settings = f"pretrained={tiny_folder},clusters={tmp_path / 'no'}"
    code, _, err = lm_eval("--model_args", settings)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    code, _, err = lm_eval("--model_args", f"pretrained={tiny_folder}")
    assert code == 2
    assert "error: model_args has no clusters" in err


def test_options_are_those_of_a_sparse_config(tiny_model, tiny_folder, tmp_path):
    from lm_eval.api.registry import get_model

    import sparse_runtime.eval.lm_eval  # noqa: F401  registers it

    kind = get_model("sparse_runtime")
    random_cluster_set(tiny_model, 0.3).save_pretrained(tmp_path / "clusters")
    options = {"pretrained": str(tiny_folder), "clusters": str(tmp_path / "clusters")}
    model = kind(**options, dtype="float32", prefill="dense", batch_size=2)
    assert model.get_model_info()["prefill"] == "dense"
    assert model.batch_size == 2
    with pytest.raises(ConfigError, match="prefill is 'none'"):
        kind(**options, prefill="none")
    with pytest.raises(ConfigError, match="model_args has no clusters"):
        kind(pretrained=str(tiny_folder))
