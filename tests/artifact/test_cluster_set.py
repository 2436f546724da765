"""The artifact on disk: round trip, every kind of damage, and what a crash leaves behind."""

import errno
import json

import pytest
import torch
from helpers import random_centroids, random_cluster_set
from safetensors.torch import load_file, save_file

import sparse_runtime.artifact.cluster_set as cluster_set_module
import sparse_runtime.files as atomic
from sparse_runtime import ClusterSet
from sparse_runtime.errors import ArtifactError, ArtifactVersionError, OutputFolderError


@pytest.fixture
def folder(tiny_model, tmp_path):
    path = tmp_path / "artifact"
    clusters = random_cluster_set(tiny_model, 0.4)
    for layer in clusters.layers.values():
        layer.centroids = random_centroids(6, 44, seed=0)
    clusters.save_pretrained(path)
    return path


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change, name="clusters.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def test_round_trip(tiny_model, folder):
    saved = random_cluster_set(tiny_model, 0.4)
    loaded = ClusterSet.from_pretrained(folder, centroids=True)
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.build == saved.build
    assert sorted(loaded.layers) == [0, 1, 2]
    for index, layer in saved.layers.items():
        other = loaded.layers[index]
        assert torch.equal(other.active_sets, layer.active_sets)
        assert torch.equal(other.static_set, layer.static_set)
        assert torch.equal(other.router_down, layer.router_down.bfloat16())
        assert torch.equal(other.router_up, layer.router_up.bfloat16())
        assert other.centroids.mean_squares.shape == (6, 44)
        assert other.router_rank == 4
    assert ClusterSet.from_pretrained(folder).layers[0].centroids is None


def test_linear_router_round_trip(tiny_model, tmp_path):
    clusters = random_cluster_set(tiny_model, 0.4)
    for layer in clusters.layers.values():
        layer.router_down, layer.router_up = None, torch.randn(6, 32)
    clusters.save_pretrained(tmp_path / "linear")
    assert ClusterSet.from_pretrained(tmp_path / "linear").layers[2].router_rank is None


KEY = "layers.1.router.up"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), f"'{KEY}' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra' is not expected"),
        (lambda t: t.update({KEY: t[KEY][:-1].clone()}), r"\(5, 4\), expected \(6, 4\)"),
        (lambda t: t.update({KEY: t[KEY].float()}), "is F32, expected BF16"),
        (lambda t: t[KEY].view(-1)[0].fill_(float("nan")), f"'{KEY}' holds NaN"),
        (lambda t: t["layers.0.active_sets"][:, -1].fill_(255), "neuron index ≥ 44"),
        (lambda t: t[KEY].mul_(2), "does not belong to config.json"),
    ],
    ids=["missing", "extra", "shape", "dtype", "nan", "index", "swapped"],
)
def test_damaged_tensors(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        ClusterSet.from_pretrained(folder)
    assert "clusters.safetensors" in str(caught.value)


def test_damaged_centroids(folder):
    edit_tensors(folder, lambda t: t.popitem(), "centroids.safetensors")
    ClusterSet.from_pretrained(folder)
    with pytest.raises(ArtifactError, match=r"centroids\.safetensors.*is missing"):
        ClusterSet.from_pretrained(folder, centroids=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=6), "'format_version' is 6"),
        (lambda c: c.update(format="something"), "'format' is 'something'"),
        (lambda c: c["fingerprint"].pop("hidden_size"), r"fingerprint\.hidden_size"),
        (lambda c: c["layers"][1].update(num_clusters="6"), r"layers\[1\]\.num_clusters' is '6'"),
        (lambda c: c.pop("layers"), "'layers'"),
        (lambda c: c.update(files={}), r"files\.clusters\.safetensors"),
    ],
)
def test_damaged_config(folder, change, message):
    edit_config(folder, change)
    with pytest.raises(ArtifactError, match=message):
        ClusterSet.from_pretrained(folder)


def test_newer_format_names_the_version_that_wrote_it(folder):
    edit_config(folder, lambda c: c.update(format_version=9, library_version="7.1"))
    with pytest.raises(ArtifactVersionError, match=r"sparse_runtime 7\.1"):
        ClusterSet.from_pretrained(folder)


def test_truncated_and_foreign_files(folder):
    file = folder / "clusters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        ClusterSet.from_pretrained(folder)
    file.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(ArtifactError, match="not a readable safetensors"):
        ClusterSet.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        ClusterSet.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        ClusterSet.from_pretrained(folder)


@pytest.mark.parametrize("name", ["nowhere", "./not/here", "owner/not-on-this-machine"])
def test_no_such_artifact(name):
    with pytest.raises(ArtifactError, match="no cluster artifact at") as caught:
        ClusterSet.from_pretrained(name)
    assert "sparse-runtime build" in str(caught.value)


def test_output_folder_that_is_not_ours(tiny_model, tmp_path):
    clusters = random_cluster_set(tiny_model, 0.4)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match=r"notes\.txt"):
        clusters.save_pretrained(tmp_path)
    with pytest.raises(OutputFolderError, match="is a file"):
        clusters.save_pretrained(tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    other = tmp_path / "model"
    tiny_model.save_pretrained(other)
    with pytest.raises(OutputFolderError, match="not a cluster artifact"):
        clusters.save_pretrained(other)


def test_disk_full_leaves_nothing_half_written(tiny_model, tmp_path, monkeypatch):
    def no_space(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "save_file", no_space)
    with pytest.raises(OutputFolderError, match="disk is full"):
        random_cluster_set(tiny_model, 0.4).save_pretrained(tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []


def test_interrupted_overwrite_never_loads_a_mixture(tiny_model, folder, monkeypatch):
    def interrupted(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster_set_module, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_cluster_set(tiny_model, 0.8).save_pretrained(folder, centroids=False)
    with pytest.raises(ArtifactError, match="does not belong"):
        ClusterSet.from_pretrained(folder)


def test_push_to_hub_uploads_what_from_pretrained_reads(tiny_model, monkeypatch):
    uploaded = {}

    class FakeHub:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            uploaded["loaded"] = ClusterSet.from_pretrained(folder_path)

    monkeypatch.setattr(cluster_set_module, "HfApi", FakeHub)
    clusters = random_cluster_set(tiny_model, 0.4)
    assert clusters.push_to_hub("me/tiny", token="t") == "https://hub/me/tiny"
    assert uploaded["token"] == "t"
    assert torch.equal(uploaded["loaded"].layers[1].active_sets, clusters.layers[1].active_sets)


def test_push_to_hub_failure_is_one_error(tiny_model):
    # HF_HUB_OFFLINE is set for the tests.
    with pytest.raises(OutputFolderError, match="could not be uploaded"):
        random_cluster_set(tiny_model, 0.4).push_to_hub("me/tiny")
