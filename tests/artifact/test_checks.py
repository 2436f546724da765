"""Nothing that is read from an artifact's folder is trusted."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import cuttable_cluster_set, make_tiny_model, measured_cuts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sparse_runtime.cli.tables as tables
from sparse_runtime import ClusterSet, recut
from sparse_runtime.artifact.checks import file_record
from sparse_runtime.artifact.format import (
    CENTROIDS_FILE,
    CLUSTERS_FILE,
    CONFIG_KEYS,
    FILE_KEYS,
    FINGERPRINT_KEYS,
    LAYER_KEYS,
    TENSORS,
)
from sparse_runtime.artifact.measured import MeasuredCut, MeasuredCuts
from sparse_runtime.cli.tables import artifact_summary, print_summary
from sparse_runtime.errors import ArtifactError, ArtifactVersionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact")
    model = make_tiny_model()
    clusters = recut(model, cuttable_cluster_set(model), budget=0.5, verify=True)
    clusters.measured = measured_cuts((0.4, 0.42, 0.2), (0.5, 0.53, 0.1))
    clusters.save_pretrained(path)
    return path


@pytest.fixture
def config(folder):
    """``config.json``, put back after the test."""
    text = (folder / "config.json").read_text()
    yield json.loads(text)
    (folder / "config.json").write_text(text)


def load(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return ClusterSet.from_pretrained(folder, centroids=True)


def test_every_row_of_the_tables_is_written(folder, config):
    """The verified, cuttable artifact here has all there is but biases and corrections."""
    names = {key.partition(".")[2].partition(".")[2] for key in load_file(folder / CLUSTERS_FILE)}
    names |= {key.split(".", 2)[2] for key in load_file(folder / CENTROIDS_FILE)}
    optional = {"cluster_bias", "correction.down", "correction.up", "bias_shift", "expert_shares"}
    assert names == {key.name for key in TENSORS} - optional
    assert list(config["layers"][0]) == ["index", *LAYER_KEYS]
    assert load(folder, config).layers[1].factors is not None


def test_docs_name_every_key():
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    names = [key.name for key in TENSORS] + [*LAYER_KEYS, *FILE_KEYS]
    names += [f"fingerprint.{key}" for key in FINGERPRINT_KEYS] + [*CONFIG_KEYS]
    loose = {"fingerprint", "fingerprint.weights"}
    assert [name for name in names if f"`{name}`" not in text and name not in loose] == []


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], True, "'format_version' is True"),
        (["format_version"], 0, "'format_version' is 0"),
        (["format_version"], "2", "'format_version' is '2'"),
        (["budget"], NAN, "'budget' is nan, expected a cost share"),
        (["budget"], -5, "'budget' is -5"),
        (["budget"], INF, "'budget' is inf"),
        (["budget"], True, "'budget' is True"),
        (["budget"], 10**40, "'budget' is 1000"),
        (["measured"], 0.02, "'measured' is 0.02, expected an object of domains"),
        (["measured", "cuts", 0, "aim"], NAN, "'measured' is {"),
        (["measured", "cuts", 0, "shares"], [0.5], "'measured' is {"),
        (["measured", "cuts", 0, "kl"], None, "'measured' is {"),
        (["measured", "cuts", 1, "aim"], 0.2, "'measured' is {"),
        (["measured", "domains"], ["prose", "prose"], "'measured' is {"),
        (["measured", "tokens"], [1024, -1], "'measured' is {"),
        (["excess"], 0.02, "'excess' is not expected"),
        (["library_version"], 5, "'library_version' is 5"),
        (["build"], [], r"'build' is \[\], expected an object"),
        (["layers"], [], r"'layers' is \[\]"),
        (["layers"], {}, "'layers' is {}"),
        (["layers", 1], "x", "'layers' is .*each an object"),
        (["layers", 1, "index"], 0, r"layers\[1\]\.index' is 0, expected each layer once"),
        (["layers", 1, "index"], -1, r"layers\[1\]\.index' is -1"),
        (["layers", 1, "index"], 7, r"layers\[1\]\.index' is 7, expected a layer that the finger"),
        (["layers", 1, "num_clusters"], 0, "num_clusters' is 0"),
        (["layers", 1, "num_clusters"], True, "num_clusters' is True"),
        (["layers", 1, "num_clusters"], 10**9, r"shape \(6, 6\), expected \(1000000000, 6\)"),
        (["layers", 1, "num_clusters"], 10**4000, "num_clusters' is 1000"),
        (["layers", 1, "router_rank"], 0, "router_rank' is 0"),
        (["layers", 1, "router_rank"], 2**30, r"expected \(1073741824, 32\)"),
        (["layers", 1, "router_rank"], None, "router.down' is not expected"),
        (["layers", 1, "correction_rank"], -3, "correction_rank' is -3"),
        (["layers", 1, "correction_rank"], 3, "correction.down' is missing"),
        (["layers", 1, "verified"], 1, "verified' is 1, expected true or false"),
        (["layers", 1, "surplus"], 1, r"layers\[1\]\.surplus' is not expected"),
        (["surplus"], 1, "'surplus' is not expected"),
        (["files", CLUSTERS_FILE, "bytes"], 3, r"files\.clusters\.safetensors\.bytes' is 3"),
        (["files", CLUSTERS_FILE, "bytes"], -3, r"files\.clusters\.safetensors\.bytes' is -3"),
        (["files", CLUSTERS_FILE, "sha256"], "0" * 64, "does not belong to config.json"),
        (["files", CLUSTERS_FILE, "sha256"], "abc", "expected a sha256"),
        (["files", CLUSTERS_FILE], None, r"files\.clusters\.safetensors' is None"),
        (["files", "../secret"], {"bytes": 1, "sha256": "0" * 64}, "'files' is '../secret'"),
        (["fingerprint", "hidden_size"], 33, r"expected \(4, 33\)"),
        (["fingerprint", "hidden_size"], -32, "hidden_size' is -32"),
        (["fingerprint", "layers"], [0, 1, 1], "expected each layer once"),
        (["fingerprint", "intermediate_sizes"], [44], "expected 3 sizes"),
        (["fingerprint", "intermediate_sizes"], [44, 46, 44], r"expected \(46,\)|\(6, 46\)"),
        (["fingerprint", "intermediate_sizes"], [44, True, 44], "intermediate_sizes' is"),
        (["fingerprint", "weights"], "AAAA", "samples of 9 matrices"),
        (["fingerprint", "weights"], "\x1b[2J", "samples of 9 matrices"),
        (["fingerprint", "weights_sha256"], None, "weights_sha256' is None"),
    ],
)
def test_values_that_cannot_be(folder, config, path, value, message):
    target = config
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ArtifactError, match=message) as caught:
        load(folder, config)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_numbers_of_a_build_record_that_json_has_not(folder, config, run, tmp_path):
    config["build"] = {"model": "m", "seed": 1, "layers": [{"index": 0, "x": NAN}]}
    text = json.dumps(config).replace('"seed": 1', '"seed": 1e999, "a": -Infinity')
    (folder / "config.json").write_text(text)
    code, _, err = run("inspect", folder, "--json", tmp_path / "figures.json")
    assert code == 0, err
    written = (tmp_path / "figures.json").read_text()
    strict = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict["build"] == {
        "model": "m", "seed": None, "a": None, "layers": [{"index": 0, "x": None}],
    }  # fmt: skip


def test_a_build_record_too_deep_is_refused(folder, config, run, tmp_path):
    config["build"] = {"x": 0}
    for depth in (100, 600, 900):
        deep = "[" * depth + "]" * depth
        (folder / "config.json").write_text(json.dumps(config).replace('"x": 0', f'"x": {deep}'))
        code, _, err = run("inspect", folder, "--json", tmp_path / "figures.json")
        assert code == 0 or "cannot be read as JSON" in err


def test_keys_that_are_missing(folder, config):
    def every_key(value, path):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from [(*path, key)] if isinstance(value, dict) else []
            if isinstance(inner, dict | list):
                yield from every_key(inner, (*path, key))

    keys = [path for path in every_key(config, ()) if path != ("files", CENTROIDS_FILE)]
    checked = [path for path in keys if path[0] != "build"]
    assert len(checked) > 30
    for path in checked:
        damaged = copy.deepcopy(config)
        target = damaged
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]
        named = path[0] if path[0] == "measured" else path[-1]  # which is checked as one
        with pytest.raises(ArtifactError, match=f"'?{named}'?"):
            load(folder, damaged)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"format": 1, "format": 2}', "key 'format' is there twice"),
        ("[]", "'format' is 'list'"),
        ("\x1b]8;;http://x\x07", "cannot be read as JSON"),
        ('{"budget": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
    ids=["deep", "twice", "list", "escape", "digits"],
)
def test_text_that_is_no_config(folder, config, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=message) as caught:
        ClusterSet.from_pretrained(folder)
    assert "\x1b" not in str(caught.value)


def test_bytes_that_are_no_text(folder, config):
    (folder / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ArtifactError, match="cannot be read as JSON"):
        ClusterSet.from_pretrained(folder)


def test_version_strings_are_stripped(folder, config):
    config |= {"format_version": 9, "library_version": "\x1b]8;;http://x\x1b\\7.1\x1b]8;;\x1b\\"}
    with pytest.raises(ArtifactVersionError, match=r"written by sparse_runtime 7\.1: install"):
        load(folder, config)


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("maybe_sets", CLUSTERS_FILE, lambda t: t.fill_(0x0F), "neurons of active_sets too"),
        ("factors", CLUSTERS_FILE, lambda t: t.neg_(), "holds -.*, expected 0 or more"),
        ("shares", CENTROIDS_FILE, lambda t: t.neg_(), "holds -.*, expected 0 or more"),
        ("mean_squares", CENTROIDS_FILE, lambda t: t.fill_(INF), "NaN or infinity"),
    ],
)
def test_tensor_values_that_cannot_be(folder, config, name, file, damage, message):
    whole = (folder / file).read_bytes()
    try:
        tensors = load_file(folder / file)
        damage(tensors[f"layers.1.{name}"])
        save_file(tensors, folder / file)
        config["files"][file] = file_record(folder / file)
        with pytest.raises(ArtifactError, match=message):
            load(folder, config)
    finally:
        (folder / file).write_bytes(whole)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutations(draw):
    """A function that replaces, deletes, doubles or adds something anywhere in a JSON value."""
    turns = draw(st.lists(st.integers(0, 50), min_size=1, max_size=4))
    what = draw(st.sampled_from(["replace", "delete", "double", "add"]))
    value = draw(JSON)

    def mutate(config):
        target = config
        for turn in turns[:-1]:
            keys = list(target) if isinstance(target, dict) else range(len(target))
            inner = target[keys[turn % len(keys)]] if keys else None
            if not isinstance(inner, dict | list) or not inner:
                break
            target = inner
        keys = list(target) if isinstance(target, dict) else range(len(target))
        key = keys[turns[-1] % len(keys)]
        if what == "replace":
            target[key] = value
        elif what == "delete":
            del target[key]
        elif isinstance(target, list):
            target.append(copy.deepcopy(target[key]) if what == "double" else value)
        else:
            target[str(value)[:9]] = value

    return mutate


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutations())
def test_any_config_loads_or_is_refused(folder, config, mutate):
    changed = copy.deepcopy(config)
    mutate(changed)
    try:
        loaded = load(folder, changed)
    except ArtifactError as error:
        assert str(folder) in str(error)  # noqa: PT017
        return
    assert 0 < loaded.budget <= 1
    summary = artifact_summary(loaded)
    with tables.out.capture() as printed:
        print_summary("name", summary)
    assert "intermediate 44" in printed.get()


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "model": JSON,
            "config": JSON
            | st.fixed_dictionaries({}, optional=dict.fromkeys(("method", "seed"), JSON)),
            "data": JSON | st.fixed_dictionaries({"tokens": JSON}),
            "layers": JSON
            | st.lists(
                st.fixed_dictionaries(
                    {"index": JSON | st.just(0)},
                    optional={"held_out": JSON | st.fixed_dictionaries({"coverage": JSON})},
                )
            ),
        },
    )
)
def test_any_record_of_a_build_can_be_inspected(build):
    model = _MODEL
    summary = {
        "fingerprint": model,
        "budget": 0.5,
        "verified": False,
        "measured": None,
        "layers": [
            {"index": 0, "clusters": 2, "density": 0.5, "looked_at": 0.0, "router": "linear"}
        ],
        "build": build,
    }
    with tables.out.capture() as printed:
        print_summary("name", summary)
    text = printed.get()
    assert "0.500" in text
    assert not [symbol for symbol in text if not (symbol.isprintable() or symbol == "\n")]


_MODEL = {
    "model_type": "mistral",
    "hidden_size": 8,
    "layers": [0],
    "intermediate_sizes": [16],
}


def test_strings_from_strangers_are_stripped_and_escaped():
    hostile = (
        "\x1b]8;;http://evil.example\x1b\\[bold red]Mistral[/bold red]"
        "\x1b]8;;\x1b\\\x1b[2J\x07\u202e"
    )
    build = {
        "model": hostile,
        "config": {"method": hostile, "importance": ["[link=x]"], "seed": hostile},
        "data": {"tokens": hostile},
        "layers": [{"index": 0, "held_out": {"coverage": hostile, "chance": 0.25}}],
    }
    summary = {
        "fingerprint": _MODEL | {"model_type": hostile},
        "budget": 0.5,
        "verified": False,
        "measured": MeasuredCuts((hostile,), (8,), (MeasuredCut(0.4, (0.5,)),)).record(),
        "layers": [
            {"index": 0, "clusters": 2, "density": 0.5, "looked_at": 0.0, "router": "linear"}
        ],
        "build": build,
    }
    with tables.out.capture() as printed:
        print_summary(hostile, summary)
    text = printed.get()
    assert " ".join(text.split()).count("[bold red]Mistral[/bold red]") == 7
    assert "evil" not in text
    assert "['[link=x]']" in text
    assert "0.250" in text
    assert not [symbol for symbol in text if not (symbol.isprintable() or symbol == "\n")]


def test_in_memory_shapes_are_checked_against_the_model(tiny_model):
    clusters = cuttable_cluster_set(tiny_model)
    clusters.check_model(tiny_model)
    clusters.layers[1].router_bias = torch.zeros(5)
    with pytest.raises(ArtifactError, match=r"layers\.1\.router\.bias' has shape \(5,\)"):
        clusters.check_model(tiny_model, weights=False)
