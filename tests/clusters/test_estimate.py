"""What a build is said to take: stages as they run, in amounts that grow as they should."""

import json

import pytest
from helpers import backwards, make_tiny_model

from sparse_runtime.clusters import BuildConfig, build_clusters, estimate_build
from sparse_runtime.errors import ConfigError

SMALL = {"num_clusters": 6, "window": 50, "budget": 0.7}


@pytest.mark.parametrize(
    "options",
    [{}, {"distill": 10}, {"router": "2"}, {"method": "awc-paper"}, {"importance": "norm"}],
    ids=str,
)
def test_stages_are_those_of_a_build(tiny_tokenizer, text, options):
    config = BuildConfig(**SMALL, max_tokens=2000, **options)
    estimate = estimate_build(make_tiny_model(), config)
    times = {}
    build_clusters(make_tiny_model(), tiny_tokenizer, [text], config, times=times)
    # Without a choice of routers reading that takes no time; and stages that are not asked for.
    asked_for = {name for name, seconds in times.items() if seconds > 0.01} - {"router choice"}
    assert asked_for <= {stage.name for stage in estimate.stages} <= set(times)
    assert all(stage.seconds > 0 for stage in estimate.stages)
    assert estimate.tokens == 2000


def test_it_grows_with_the_text():
    model = make_tiny_model()
    small, large = (
        estimate_build(model, BuildConfig(**SMALL, max_tokens=tokens)) for tokens in (2000, 200_000)
    )
    assert large.seconds > 4 * small.seconds
    assert large.disk > 50 * (small.disk - small.artifact)
    assert large.memory > small.memory
    assert large.artifact == small.artifact
    # Above the bound buffers go through files.
    bounded = estimate_build(model, BuildConfig(**SMALL, max_tokens=200_000, memory_mib=1))
    assert bounded.disk > large.disk
    assert bounded.memory < large.memory


def test_a_decoder_that_runs_whole():
    assert estimate_build(backwards(make_tiny_model()), BuildConfig(**SMALL)).seconds > 0


def test_settings_are_checked_first():
    with pytest.raises(ConfigError, match="alone costs"):
        estimate_build(make_tiny_model(), BuildConfig(num_clusters=6, budget=0.03))


def test_dry_run(run, tiny_folder, tmp_path):
    file = tmp_path / "estimate.json"
    command = ["--clusters", 6, "--window", 50, "--budget", 0.7, "--dry-run", "--json", file]
    for offload in ("--no-offload", "--offload"):
        code, out, err = run("build", tiny_folder, "-o", tmp_path / "x", *command, offload)
        assert code == 0, err
        assert "Nothing was built" in out
        assert not (tmp_path / "x").exists()
        found = json.loads(file.read_text())
        assert [stage["name"] for stage in found["stages"]][:2] == ["capture", "fisher"]
        assert found["offloaded"] is (offload == "--offload")
        assert 0 < found["artifact"] < found["disk"] < found["disk_free"]
