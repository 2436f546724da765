"""What a build is said to take: stages as they run, in amounts that grow as they should."""

import json
import re
from types import SimpleNamespace

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
        estimate_build(model, BuildConfig(**SMALL, max_tokens=tokens), ["stdlib"])
        for tokens in (2000, 200_000)
    )
    assert large.seconds > 4 * small.seconds
    assert large.disk > 50 * (small.disk - small.artifact)
    assert large.memory > small.memory
    assert large.artifact == small.artifact
    # Above the bound buffers go through files.
    bounded = estimate_build(model, BuildConfig(**SMALL, max_tokens=200_000, memory_mib=1))
    assert bounded.disk > large.disk
    assert bounded.memory < large.memory


def test_text_from_the_model_takes_its_time():
    model, config = make_tiny_model(), BuildConfig(**SMALL, max_tokens=20_000)
    half, none = (
        estimate_build(model, config, data).stages[0] for data in (["self", "stdlib"], ["stdlib"])
    )
    assert (half.name, none.name) == ("text", "text")
    assert half.seconds > none.seconds == 0


def test_processes_share_what_they_can():
    model, config = make_tiny_model(), BuildConfig(**SMALL, max_tokens=20_000)
    alone, shared = (
        {s.name: s.seconds for s in estimate_build(model, config, processes=n).stages}
        for n in (1, 8)
    )
    assert shared["layers"] < 0.5 * alone["layers"]
    assert shared["distill"] < 0.5 * alone["distill"]


def test_packing_is_a_stage_of_a_build_for_planes():
    config = BuildConfig(**SMALL | {"budget": None}, weights=6, max_tokens=2000)
    stages = {stage.name: stage for stage in estimate_build(make_tiny_model(), config).stages}
    assert stages["pack"].seconds > 0
    assert stages["pack"].memory > 12 * 44**2
    assert [*stages].index("fisher") < [*stages].index("pack") < [*stages].index("layers")


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
        assert [stage["name"] for stage in found["stages"]][:2] == ["text", "capture"]
        assert found["offloaded"] is (offload == "--offload")
        assert 0 < found["artifact"] < found["disk"] < found["disk_free"]


BUILD = ("--clusters", 6, "--window", 50, "--budget", 0.7, "--max-tokens", 2000, "--distill", 0)


def test_a_build_says_what_was_expected_of_it(run, tiny_folder, text, tmp_path):
    file = tmp_path / "build.json"
    command = ("build", tiny_folder, "-o", tmp_path / "x", "--data", text, *BUILD)
    code, out, err = run(*command, "--json", file)
    assert code == 0, err
    assert re.search(r"\d+ s in all, \d+ s expected", out)
    assert "--dry-run shows the stages" in err
    assert re.search(r"^build .*/", err, re.MULTILINE)  # the bar over the whole of it
    found = json.loads(file.read_text())
    expected = {stage["name"] for stage in found["estimate"]["stages"]}
    assert expected <= set(found["seconds"])
    assert found["estimate"]["seconds"] > 0


def test_too_small_a_disk_is_said_before_the_work(run, tiny_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sparse_runtime.files.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000)
    )
    code, _, err = run("build", tiny_folder, "-o", tmp_path / "x", "--data", text, *BUILD)
    assert code == 1
    assert "has 0 MiB of disk free, but the build needs about" in err
    assert not (tmp_path / "x").exists()


def test_too_little_memory_is_said_before_the_work(run, tiny_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sparse_runtime.cli.build.psutil.virtual_memory",
        lambda: SimpleNamespace(available=-(2**40)),
    )
    options = (*BUILD, "--no-offload")
    code, _, err = run("build", tiny_folder, "-o", tmp_path / "x", "--data", text, *options)
    assert code == 0, err
    assert "GiB of memory, and" in err
    assert "--memory-mib" in err
