"""What is written can be read, nothing is dropped without a word, and equal sets give equal bytes."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import cuttable_cluster_set, make_tiny_model, random_cluster_set
from torch import nn

import sparse_runtime.artifact.cluster_set as cluster_set_module
import sparse_runtime.artifact.folders as folders
from sparse_runtime import ClusterSet, recut, sparsify
from sparse_runtime.artifact.checks import _note_version_1
from sparse_runtime.artifact.format import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
)
from sparse_runtime.artifact.measured import MeasuredCut, MeasuredCuts
from sparse_runtime.errors import (
    ArtifactError,
    ConfigError,
    FingerprintMismatchError,
    OutputFolderError,
)


def read_files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read_config(folder):
    return json.loads((folder / CONFIG_FILE).read_text())


@pytest.fixture
def clusters(tiny_model):
    """With centroids, and distilled."""
    result = cuttable_cluster_set(tiny_model)
    for index, layer in result.layers.items():
        generator = torch.Generator().manual_seed(index)
        layer.cluster_bias = torch.randn(6, 32, generator=generator)
        layer.bias_shift = torch.randn(6, 32, generator=generator)
    return result


@pytest.fixture
def folder(clusters, tmp_path):
    clusters.save_pretrained(tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.mark.parametrize("budget", [1, 0.5, np.float32(0.5), np.int64(1), torch.tensor(0.25)])
def test_numbers_of_any_kind_are_read_back(tiny_model, tmp_path, clusters, budget):
    clusters.budget = budget
    clusters.measured = MeasuredCuts(("text",), (8,), (MeasuredCut(budget, (budget,)),))
    clusters.build = {"score": np.float64(0.5), "nothing": float("nan"), "pair": (1, 2)}
    clusters.save_pretrained(tmp_path / "a")
    loaded = ClusterSet.from_pretrained(tmp_path / "a")
    assert loaded.budget == float(budget)
    assert type(loaded.budget) is type(loaded.measured.cuts[0].aim) is float
    assert loaded.measured.cuts == (MeasuredCut(float(budget), (float(budget),)),)
    assert loaded.build == {"score": 0.5, "nothing": None, "pair": [1, 2]}


def test_a_cut_for_budget_1_is_read_back(tiny_model, tmp_path, clusters):
    recut(tiny_model, clusters, budget=1, verify=False).save_pretrained(tmp_path / "a")
    assert ClusterSet.from_pretrained(tmp_path / "a").budget == 1.0
    with pytest.raises(ConfigError, match="budget is True"):
        recut(tiny_model, clusters, budget=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "budget", float("nan")), "'budget' is nan"),
        (lambda c: setattr(c, "budget", True), "'budget' is True"),
        (lambda c: setattr(c, "budget", "half"), "'budget' is 'half'"),
        (lambda c: c.build.update(path=Path("x")), "cannot be written as JSON"),
        (lambda c: setattr(c.layers[1], "centroids", None), "mean_activations' is missing"),
        (lambda c: setattr(c.layers[1], "maybe_sets", c.layers[1].active_sets), "factors'"),
        (lambda c: c.layers[1].router_up.fill_(float("inf")), "router.up' holds NaN or inf"),
        (lambda c: setattr(c.layers[1], "router_bias", torch.zeros(5)), r"router.bias'.*\(5,\)"),
        (lambda c: c.layers.update({9: c.layers[1]}), r"index' is 9"),
        (lambda c: c.fingerprint.pop("hidden_size"), "hidden_size' is missing"),
    ],
)
def test_what_could_not_be_read_is_not_written(folder, clusters, change, message):
    before = read_files(folder)
    change(clusters)
    with pytest.raises(ArtifactError, match=message):
        clusters.save_pretrained(folder)
    assert read_files(folder) == before


def test_a_set_without_layers_is_not_written(tmp_path, clusters):
    clusters.layers.clear()
    with pytest.raises(ArtifactError, match=r"'layers' is \[\]"):
        clusters.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_changed_does_not_count_as_written(tmp_path, clusters, monkeypatch):
    original = cluster_set_module.write_tensors

    def faulty(path, tensors, metadata):
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        changed["layers.2.router.up"].view(-1)[3] += 1
        original(path, changed, metadata)

    monkeypatch.setattr(cluster_set_module, "write_tensors", faulty)
    with pytest.raises(ArtifactError, match=r"router\.up' was not written as it is in memory"):
        clusters.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a" / CONFIG_FILE).exists()


def test_layers_of_different_sizes(tmp_path):
    """Models that were pruned, or searched for, have FFNs of several sizes."""
    model = make_tiny_model()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, 52, bias=False), nn.Linear(32, 52, bias=False)
    mlp.down_proj = nn.Linear(52, 32, bias=False)
    clusters = random_cluster_set(model, 0.5)
    clusters.save_pretrained(tmp_path)
    loaded = ClusterSet.from_pretrained(tmp_path)
    assert [loaded.intermediate_size(index) for index in range(3)] == [44, 52, 44]
    assert loaded.layers[1].active_sets.shape == (6, 7)
    loaded.check_model(model)
    tokens = torch.tensor([[3, 5]])
    with torch.inference_mode():
        before = model(tokens).logits
        sparsify(model, loaded, backend="reference", prefill="sparse")
        assert (model(tokens).logits - before).abs().max() > 1e-3
    with pytest.raises(FingerprintMismatchError, match="layer 1 is 44 in this model, 52"):
        loaded.check_model(make_tiny_model(), weights=False)


def test_a_note_changed_in_place_keeps_the_centroids(tiny_model, folder):
    before = read_files(folder)
    loaded = ClusterSet.from_pretrained(folder)
    assert not loaded.has_centroids
    loaded.build["note"] = "mine"
    loaded.save_pretrained(folder)
    after = read_files(folder)
    assert after.keys() == before.keys()
    assert after[CENTROIDS_FILE] == before[CENTROIDS_FILE]
    assert [entry["distilled"] for entry in read_config(folder)["layers"]] == [True] * 3
    again = ClusterSet.from_pretrained(folder, centroids=True)
    assert again.build["note"] == "mine"
    assert again.layers[1].bias_shift.float().std() > 0.1
    recut(tiny_model, again, budget=0.4)


def test_saving_elsewhere_copies_the_centroids(folder, tmp_path):
    ClusterSet.from_pretrained(folder).save_pretrained(tmp_path / "other")
    assert read_files(tmp_path / "other") == read_files(folder)
    # And from there in place, by another name of the same folder.
    (tmp_path / "link").symlink_to(tmp_path / "other")
    ClusterSet.from_pretrained(tmp_path / "link").save_pretrained(tmp_path / "other")
    assert read_files(tmp_path / "other") == read_files(folder)


def test_centroids_are_left_out_where_that_is_asked_for(folder, tmp_path, clusters):
    ClusterSet.from_pretrained(folder).save_pretrained(tmp_path / "bare", centroids=False)
    assert sorted(read_files(tmp_path / "bare")) == [CLUSTERS_FILE, CONFIG_FILE]
    assert not any(entry["distilled"] for entry in read_config(tmp_path / "bare")["layers"])
    clusters.save_pretrained(folder, centroids=False)
    assert read_files(folder) == read_files(tmp_path / "bare")
    bare = ClusterSet.from_pretrained(folder, centroids=True)
    assert bare.layers[0].centroids is None
    bare.save_pretrained(folder)


@pytest.mark.parametrize("gone", [True, False])
def test_unread_centroids_that_are_gone_or_another_file(folder, tmp_path, gone):
    loaded = ClusterSet.from_pretrained(folder)
    file = folder / CENTROIDS_FILE
    file.unlink() if gone else file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match=r"not loaded.*centroids=True.*centroids=False"):
        loaded.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_unread_centroids_of_other_layers(folder, tiny_model):
    before = read_files(folder)
    loaded = ClusterSet.from_pretrained(folder)
    loaded.layers[1] = random_cluster_set(tiny_model, 0.9).layers[1]
    with pytest.raises(ArtifactError, match="layers are not those of"):
        loaded.save_pretrained(folder)
    del loaded.layers[1]
    with pytest.raises(ArtifactError, match="layers are not those of"):
        loaded.save_pretrained(folder)
    assert read_files(folder) == before


def test_centroids_of_an_artifact_are_not_lost_to_one_without(folder, tiny_model):
    before = read_files(folder)
    other = random_cluster_set(tiny_model, 0.9)
    with pytest.raises(OutputFolderError, match=r"centroids\.safetensors.*centroids=False"):
        other.save_pretrained(folder)
    assert read_files(folder) == before
    other.save_pretrained(folder, centroids=False)
    assert sorted(read_files(folder)) == [CLUSTERS_FILE, CONFIG_FILE]


class FakeHub:
    """Keeps what is uploaded."""

    uploads: ClassVar[list] = []

    def __init__(self, token):
        pass

    def create_repo(self, repo_id, private, exist_ok):
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        self.uploads.append((read_files(Path(folder_path)), delete_patterns))


def test_pushing_keeps_the_centroids(folder, monkeypatch):
    monkeypatch.setattr(cluster_set_module, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "uploads", [])
    loaded = ClusterSet.from_pretrained(folder)
    loaded.push_to_hub("me/tiny")
    loaded.push_to_hub("me/tiny", centroids=False)
    (whole, kept), (bare, deleted) = FakeHub.uploads
    assert whole == read_files(folder)
    assert kept is None
    assert sorted(bare) == [CLUSTERS_FILE, CONFIG_FILE]
    assert deleted == [CENTROIDS_FILE]
    (folder / CENTROIDS_FILE).unlink()
    with pytest.raises(ArtifactError, match="not loaded"):
        loaded.push_to_hub("me/tiny")


def test_equal_sets_give_equal_bytes_in_every_process(tmp_path):
    code = """
import sys
sys.path.insert(0, "tests")
from helpers import cuttable_cluster_set, make_tiny_model
cuttable_cluster_set(make_tiny_model()).save_pretrained(sys.argv[1])
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    cuttable_cluster_set(make_tiny_model()).save_pretrained(tmp_path / "here")
    assert len(read_files(tmp_path / "here")) == 3
    assert read_files(tmp_path / "here") == read_files(tmp_path / "there")


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_have_the_modes_of_the_umask(tmp_path, clusters):
    before = os.umask(0o027)
    try:
        clusters.save_pretrained(tmp_path / "a")
        ClusterSet.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for name in "ab" for file in (tmp_path / name).iterdir()}
    assert modes == {0o640}


def test_what_a_killed_process_left_is_no_obstacle(tmp_path, clusters):
    left = tmp_path / f".{CLUSTERS_FILE}.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    clusters.save_pretrained(tmp_path)
    assert left.exists()  # it may be another process's, at work
    os.utime(left, (time.time() - 7200,) * 2)
    clusters.save_pretrained(tmp_path)
    assert sorted(read_files(tmp_path)) == [CENTROIDS_FILE, CLUSTERS_FILE, CONFIG_FILE]


class TestFormat1:
    @pytest.fixture
    def old(self, clusters, folder, tiny_model):
        """The artifact as version 1 wrote it."""
        for layer in clusters.layers.values():
            layer.cluster_weights = None
        clusters.save_pretrained(folder)
        config = read_config(folder)
        fingerprint = config["fingerprint"]
        _note_version_1.cache_clear()
        config["format_version"] = 1
        config["budget"] = 1  # written so by version 1, and refused by it
        config["excess"] = config.pop("measured") or 0.0
        config["fingerprint"] = {
            "model_type": fingerprint["model_type"],
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_layers": 3,
            "activation": fingerprint["activation"],
            "weights_sha256": self.digest(tiny_model),
        }
        for entry in config["layers"]:
            for name in ("left_out", "weights", "base_error", "tau", "weighted", "experts"):
                del entry[name]
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        return folder

    @staticmethod
    def digest(model):
        from sparse_runtime.models.ffn_layers import find_ffn_layers
        from sparse_runtime.models.fingerprint import _weights_sha256

        return _weights_sha256(find_ffn_layers(model))

    def test_is_read_with_one_note_and_checked_by_its_own_rule(self, old, tiny_model):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = ClusterSet.from_pretrained(old, centroids=True)
            ClusterSet.from_pretrained(old)
        assert [str(w.message) for w in caught] == [str(caught[0].message)]
        assert "is an artifact of format 1" in str(caught[0].message)
        assert caught[0].filename == __file__
        loaded.check_model(tiny_model)
        loaded.check_model(tiny_model.bfloat16())
        recut(tiny_model, loaded, budget=0.5)
        tiny_model.model.layers[0].mlp.gate_proj.weight.data.mul_(1.5)
        with pytest.raises(FingerprintMismatchError, match="sha256"):
            loaded.check_model(tiny_model)
        loaded.check_model(tiny_model, weights=False)

    @pytest.mark.filterwarnings("ignore:.*format 1")
    def test_is_written_in_the_newest_format_with_its_own_fingerprint(self, old, tiny_model):
        ClusterSet.from_pretrained(old).save_pretrained(old)
        config = read_config(old)
        assert config["format_version"] == FORMAT_VERSION
        assert CENTROIDS_FILE in config["files"]
        loaded = ClusterSet.from_pretrained(old, centroids=True)
        loaded.check_model(tiny_model)
        tiny_model.model.layers[0].mlp.gate_proj.weight.data.mul_(1.5)
        with pytest.raises(FingerprintMismatchError, match="sha256"):
            loaded.check_model(tiny_model)

    @pytest.mark.filterwarnings("ignore:.*format 1")
    @pytest.mark.parametrize(
        ("key", "value"),
        [("num_layers", 10**9), ("num_layers", 2), ("intermediate_size", 52), ("weights", "")],
    )
    def test_is_checked_too(self, old, key, value):
        config = read_config(old)
        config["fingerprint"][key] = value
        (old / CONFIG_FILE).write_text(json.dumps(config))
        with pytest.raises(ArtifactError):
            ClusterSet.from_pretrained(old)


class TestHubOrPath:
    @pytest.fixture
    def asked(self, folder, tmp_path, monkeypatch):
        """Calls of the Hub, which has one artifact under every id; in an empty working directory."""
        calls = []

        def snapshot_download(name, **options):
            calls.append((name, options))
            return str(folder)

        monkeypatch.setattr(folders, "snapshot_download", snapshot_download)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        return calls

    @pytest.mark.parametrize(
        "name",
        [
            "./clusters/mistral",
            "../mistral",
            "/clusters/mistral",
            "~/mistral",
            "~nobody/mistral",
            "clusters/mistral/",
            "runs/clusters/mistral",
            "clusters\\mistral",
            "mistral",
            "clusters/my mistral",
            "clusters/a..b",
            Path("clusters/mistral"),
        ],
    )
    def test_what_looks_like_a_path_is_one(self, asked, name):
        with pytest.raises(ArtifactError, match=r"no cluster artifact at.*which is"):
            ClusterSet.from_pretrained(name)
        assert asked == []

    def test_a_folder_named_as_the_owner_makes_it_a_path(self, asked):
        ClusterSet.from_pretrained("clusters/mistral-7b-50")
        Path("clusters").mkdir()
        with pytest.raises(
            ArtifactError, match=r"taken for a path since .* folder 'clusters' here"
        ):
            ClusterSet.from_pretrained("clusters/mistral-7b-50")
        assert len(asked) == 1

    def test_a_file_is_no_artifact(self, asked, folder):
        Path("config").mkdir()
        Path("config/file").write_text("{}")
        with pytest.raises(ArtifactError, match="which is a file"):
            ClusterSet.from_pretrained("config/file")
        assert asked == []

    def test_the_home_folder_is_found(self, asked, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder.parent))
        assert len(ClusterSet.from_pretrained(f"~/{folder.name}").layers) == 3
        assert asked == []

    def test_only_what_is_asked_for_is_downloaded(self, asked):
        ClusterSet.from_pretrained("owner/name", revision="v2")
        ClusterSet.from_pretrained("owner/name", centroids=True, local_files_only=True)
        (first, options), (second, others) = asked
        assert first == second == "owner/name"
        assert options["allow_patterns"] == [CONFIG_FILE, CLUSTERS_FILE]
        assert options["revision"] == "v2"
        assert others["allow_patterns"] == [CONFIG_FILE, CLUSTERS_FILE, CENTROIDS_FILE]
        assert others["local_files_only"] is True

    def test_a_revision_of_a_folder_is_an_error(self, asked, folder):
        with pytest.raises(ConfigError, match=r"revision is 'v2'.*local folder"):
            ClusterSet.from_pretrained(folder, revision="v2")


def test_representations_are_one_short_line(clusters, tiny_model, tmp_path):
    assert repr(clusters) == "ClusterSet(3 layers of mistral, budget 0.5, centroids)"
    assert repr(clusters.layers[0]) == (
        "LayerClusters(6 clusters, router rank 4, cluster_bias, centroids)"
    )
    assert repr(clusters.layers[0].centroids) == "LayerCentroids(6 clusters, 44 neurons)"
    cut = recut(tiny_model, clusters, budget=0.5, verify=True)
    assert "verified" in repr(cut)
    clusters.save_pretrained(tmp_path / "a")
    assert len(repr(ClusterSet.from_pretrained(tmp_path / "a").unread_centroids)) < 400


def test_recut_is_a_function_and_no_module():
    import sparse_runtime

    assert sparse_runtime.recut is recut
    with pytest.raises(ModuleNotFoundError):
        __import__("sparse_runtime.recut")
