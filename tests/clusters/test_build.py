"""Builds: equal ones are equal to the byte, an interrupted one goes on with what is its own."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers import make_tiny_model, make_tiny_model_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparse_runtime import ClusterSet, cost_report, sparsify
from sparse_runtime.clusters import BuildConfig, build, build_clusters
from sparse_runtime.cost import PlaneCost
from sparse_runtime.errors import (
    ConfigError,
    ModelError,
    OutputFolderError,
    UnsupportedArchitectureError,
)
from sparse_runtime.ffn.plane_packing import pack_model
from sparse_runtime.kernels.bitmaps import unpack_bits

CONFIG = BuildConfig(
    num_clusters=6, budget=0.7, window=50, max_tokens=2000, distill=4, correction_rank=2
)


def assert_equal(one, other, folder):
    """Two artifacts, by every tensor that they write."""
    tensors = []
    for number, clusters in enumerate((one, other)):
        clusters.save_pretrained(folder / f"written{number}")
        files = sorted((folder / f"written{number}").glob("*.safetensors"))
        assert len(files) == 2
        tensors.append(
            {
                f"{file.name} {key}": value
                for file in files
                for key, value in load_file(file).items()
            }
        )
    assert sorted(tensors[0]) == sorted(tensors[1])
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_equal_builds_are_equal(tiny_tokenizer, text, tmp_path):
    """Tensors and record, whatever was computed before and whatever the clock says."""
    built, times = [], []
    for number in range(3):
        torch.manual_seed(number)
        torch.randn(number * 7 + 1)
        times.append({})
        model = make_tiny_model()
        clusters = build_clusters(
            model, tiny_tokenizer, [text], CONFIG, output=tmp_path / str(number), times=times[-1]
        )
        built.append(clusters)
    for other in built[1:]:
        assert_equal(built[0], other, tmp_path)
        assert json.dumps(other.build) == json.dumps(built[0].build)
    stages = {"capture", "fisher", "router choice", "layers", "loop_weights", "distill", "measure"}
    stages |= {"text", "tune", "scores"}
    assert all(set(taken) == stages and min(taken.values()) >= 0 for taken in times)
    assert "seconds" not in (tmp_path / "0" / "config.json").read_text()


@pytest.mark.parametrize("bits", [4, 6])
def test_builds_for_planes(tiny_tokenizer, text, tmp_path, bits):
    """In a packed model, whose float weights come back; the artifact says what it is for."""
    model = make_tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost = PlaneCost(32, 44, 0, base=4, residual=bits - 4)
    budget = 0.8 * cost.whole_bytes / cost.dense_bytes
    config = replace(CONFIG, weights=bits, budget=budget)
    times = {}
    built = build_clusters(
        model,
        tiny_tokenizer,
        [text],
        config,
        output=tmp_path / "built",
        packed_output=tmp_path / "packed",
        times=times,
    )
    assert "pack" in times
    assert getattr(model.config, "quantization_config", None) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = ClusterSet.from_pretrained(tmp_path / "built")
    for index, layer in built.layers.items():
        found = loaded.layers[index]
        assert (found.weights, found.base_error) == (bits, layer.base_error)
        assert (0 < layer.base_error < 0.2) == (bits > 4)
        assert layer.maybe_sets is None or layer.tau >= 1
    assert loaded.build["config"]["weights"] == bits
    sparsify(model, loaded, weights=bits, prefill="sparse")
    with torch.inference_mode():
        model(input_ids=torch.tensor(tiny_tokenizer("gnmaeh" * 20)["input_ids"])[None])
    assert cost_report(model).bits_per_weight == pytest.approx(16 * budget, rel=0.15)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert packed.config.quantization_config.bits == bits
    sparsify(packed, loaded)  # its fingerprint is the float model's


def test_a_build_for_planes_that_fails_leaves_the_floats(tiny_tokenizer, text, monkeypatch):
    model = make_tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(build, "_fit_layers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_clusters(model, tiny_tokenizer, [text], replace(CONFIG, weights=6, budget=0.6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("options", [{"verify": False}, {"allocation": "uniform"}])
def test_planes_need_looks_and_a_price(options):
    with pytest.raises(ConfigError, match=r"^weights is 6, which has no effect with"):
        BuildConfig(weights=6, **options)


def test_a_packed_folder_that_cannot_be(tiny_model, tiny_tokenizer, text, tmp_path):
    with pytest.raises(ConfigError, match=r"packed_output is .* give weights"):
        build_clusters(tiny_model, tiny_tokenizer, [text], CONFIG, packed_output=tmp_path / "p")
    (tmp_path / "p").write_text("in the way")
    config = replace(CONFIG, weights=6, budget=0.6)
    with pytest.raises(OutputFolderError, match="is a file"):
        build_clusters(tiny_model, tiny_tokenizer, [text], config, packed_output=tmp_path / "p")


def test_a_packed_folder_stays_when_a_build_goes_on(
    tiny_model, tiny_tokenizer, text, tmp_path, monkeypatch
):
    """Interrupted after the model was saved, before the artifact was; for other settings, refused."""
    config = replace(CONFIG, weights=6, budget=0.6)
    folders = {"output": tmp_path / "built", "packed_output": tmp_path / "packed"}

    def built(config):
        return build_clusters(tiny_model, tiny_tokenizer, [text], config, **folders)

    with monkeypatch.context() as patch:
        patch.setattr(build.ClusterSet, "save_pretrained", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            built(config)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    built(config)
    assert ClusterSet.from_pretrained(tmp_path / "built")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    assert before == after
    with pytest.raises(OutputFolderError, match="exists and holds"):
        built(replace(config, seed=1))


def test_default_budgets():
    assert BuildConfig().resolved().budget == 0.5
    assert BuildConfig(weights=6).resolved().budget == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_other_model_types(tiny_tokenizer, text, kind):
    """Of tied embeddings, as small ones have them; sparse over floats and over planes."""
    model = make_tiny_model_of(kind, tie_word_embeddings=True)
    clusters = build_clusters(model, tiny_tokenizer, [text], CONFIG)
    assert clusters.fingerprint["model_type"] == kind
    ids = torch.tensor(tiny_tokenizer("gnmaeh" * 8)["input_ids"])[None]
    for weights in (None, 6):
        sparse = sparsify(copy.deepcopy(model), clusters, prefill="sparse", weights=weights)
        with torch.inference_mode():
            sparse(input_ids=ids)
        report = cost_report(sparse)
        assert report.dense_tokens == 0
        assert 0.2 < report.cost_share < 0.95


def interrupted(monkeypatch, *arguments, **options):
    """A build that stops before its second layer."""
    fit, calls = build.fit_layer, []

    def stop(*own):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return fit(*own)

    with monkeypatch.context() as patch:
        patch.setattr(build, "fit_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            build_clusters(*arguments, **options)


def count_fits(monkeypatch):
    fit, calls = build.fit_layer, []
    monkeypatch.setattr(build, "fit_layer", lambda *own: calls.append(own[1].index) or fit(*own))
    return calls


def test_an_interrupted_build_goes_on(tiny_model, tiny_tokenizer, text, tmp_path, monkeypatch):
    whole = build_clusters(tiny_model, tiny_tokenizer, [text], CONFIG)
    output = tmp_path / "clusters"
    interrupted(monkeypatch, tiny_model, tiny_tokenizer, [text], CONFIG, output=output)
    fits = count_fits(monkeypatch)
    resumed = build_clusters(tiny_model, tiny_tokenizer, [text], CONFIG, output=output)
    assert fits == [1, 2]
    assert_equal(whole, resumed, tmp_path)
    assert resumed.build == whole.build


@pytest.mark.parametrize("change", ["dtype", "version", "config"])
def test_what_another_build_left_is_not_used(
    tiny_model, tiny_tokenizer, text, tmp_path, monkeypatch, change
):
    output, config = tmp_path / "clusters", CONFIG
    interrupted(monkeypatch, tiny_model, tiny_tokenizer, [text], CONFIG, output=output)
    if change == "dtype":
        tiny_model = tiny_model.to(torch.bfloat16)
    elif change == "version":
        monkeypatch.setattr(build, "__version__", "99.0")
    else:
        config = BuildConfig(**(CONFIG.resolved().record() | {"verify": False}))
    fits = count_fits(monkeypatch)
    build_clusters(tiny_model, tiny_tokenizer, [text], config, output=output)
    assert fits == [0, 1, 2]


def test_layers_with_and_without_fisher_weights_do_not_mix(
    tiny_model, tiny_tokenizer, text, tmp_path, monkeypatch
):
    """More memory on the second try: the first one's layers were fitted by norms."""
    output = tmp_path / "clusters"

    def no_memory(*unused, **options):
        raise build.NoBackwardPassError("no memory")

    arguments = (monkeypatch, tiny_model, tiny_tokenizer, [text], CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(build, "fisher_weights", no_memory)
        with pytest.warns(UserWarning, match="no memory"):
            interrupted(*arguments, output=output)
    resumed = build_clusters(tiny_model, tiny_tokenizer, [text], CONFIG, output=output)
    whole = build_clusters(tiny_model, tiny_tokenizer, [text], CONFIG)
    assert_equal(whole, resumed, tmp_path)
    assert "fallback" not in resumed.build


@pytest.mark.parametrize("router", ["auto", "linear", "4"])
def test_a_budget_below_the_router_is_refused_before_the_text(
    tiny_tokenizer, text, monkeypatch, router
):
    """On any layer: here the last is the smallest."""
    monkeypatch.setattr(build, "calibration_windows", lambda *a, **k: pytest.fail("text was read"))
    models = [make_tiny_model(), make_tiny_model()]
    mlp = models[1].model.layers[2].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = torch.nn.Parameter(linear.weight[:4].clone())
        linear.out_features = 4
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :4].clone())
    mlp.down_proj.in_features = 4
    correction = BuildConfig(
        num_clusters=6, budget=0.4, router=router, distill=1, correction_rank=30
    )
    with pytest.raises(ConfigError, match="6 clusters with a correction of rank 30 alone costs"):
        build_clusters(models[0], tiny_tokenizer, [text], correction)
    for model, budget in zip(models, (0.03, 0.5), strict=True):
        config = BuildConfig(num_clusters=6, budget=budget, router=router)
        with pytest.raises(ConfigError, match=r"budget is .* router .*for 6 clusters alone costs"):
            build_clusters(model, tiny_tokenizer, [text], config)


def offloaded(folder, tmp_path):
    """A model of a folder with its decoder layers on the disk."""
    places = dict.fromkeys(("embed_tokens", "norm", "rotary_emb"), "cpu") | {"layers": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        device_map={f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    ).eval()


@pytest.mark.parametrize("memory_mib", [1024, 1])
def test_a_model_on_the_disk_gives_the_same_artifact(
    tiny_model, tiny_tokenizer, tiny_folder, text, tmp_path, memory_mib
):
    config = BuildConfig(
        **(
            CONFIG.resolved().record()
            | {"distill": 0, "correction_rank": 0, "memory_mib": memory_mib}
        )
    )
    expected = build_clusters(tiny_model, tiny_tokenizer, [text], config)
    model = offloaded(tiny_folder, tmp_path)
    output = tmp_path / "clusters"
    found = build_clusters(model, tiny_tokenizer, [text], config, output=output)
    assert_equal(expected, found, tmp_path)
    # Nothing of it stays in memory, and accelerate still runs it.
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert not (output / ".build").exists()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_model(ids).logits)


def test_a_model_on_the_disk_is_packed(tiny_model, tiny_folder, tmp_path):
    """Its FFNs come to memory in planes; what is left on the disk stays there."""
    model, ids = offloaded(tiny_folder, tmp_path), torch.arange(20)[None]
    pack_model(model, 6)
    assert [layer.mlp.format.bits for layer in model.model.layers] == [6, 6, 6]
    assert all(layer.self_attn.q_proj.weight.is_meta for layer in model.model.layers)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, pack_model(tiny_model, 6)(ids).logits)
    with pytest.raises(UnsupportedArchitectureError, match=r"q_proj has its weights offloaded"):
        pack_model(offloaded(tiny_folder, tmp_path), 6, linears=8)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_does_not_matter(tiny_model, tiny_tokenizer, text, tmp_path, mode):
    config = BuildConfig(num_clusters=6, budget=0.7, window=50, max_tokens=1000, router="2")
    expected = build_clusters(tiny_model, tiny_tokenizer, [text], config)
    with mode():
        found = build_clusters(tiny_model, tiny_tokenizer, [text], config)
    assert_equal(expected, found, tmp_path)


def test_weights_that_are_nowhere_are_named(tiny_model, tiny_tokenizer, text):
    tiny_model.model.layers[1].mlp.up_proj.to("meta")
    config = BuildConfig(num_clusters=6, budget=0.7, window=50, max_tokens=2000)
    with pytest.raises(ModelError, match=r"up_proj\.weight.*meta device.*from_pretrained"):
        build_clusters(tiny_model, tiny_tokenizer, [text], config)


def test_distillation_needs_the_model_in_memory(tiny_tokenizer, tiny_folder, text, tmp_path):
    model = offloaded(tiny_folder, tmp_path)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp.*offloaded\. Distillation.*distill 0"):
        build_clusters(model, tiny_tokenizer, [text], BuildConfig(num_clusters=6, distill=2))


def test_work_is_kept_until_the_artifact_is_whole(
    tiny_model, tiny_tokenizer, text, tmp_path, monkeypatch
):
    output = tmp_path / "clusters"

    def fail(self, folder, **options):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(ClusterSet, "save_pretrained", fail)
        with pytest.raises(OSError, match="no room"):
            build_clusters(tiny_model, tiny_tokenizer, [text], CONFIG, output=output)
    fits = count_fits(monkeypatch)
    build_clusters(tiny_model, tiny_tokenizer, [text], CONFIG, output=output)
    assert fits == []
    assert not (output / ".build").exists()
    assert len(ClusterSet.from_pretrained(output).layers) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_build_on_a_gpu(tiny_tokenizer, text):
    """Clusters and routers are fitted there, and the artifact is on the CPU and runs on either."""
    on_gpu = build_clusters(make_tiny_model().cuda(), tiny_tokenizer, [text], CONFIG)
    on_cpu = build_clusters(make_tiny_model(), tiny_tokenizer, [text], CONFIG)
    for index, layer in on_gpu.layers.items():
        other = on_cpu.layers[index]
        assert layer.active_sets.device.type == layer.router_up.device.type == "cpu"
        assert layer.active_sets.shape == other.active_sets.shape
        sizes = [unpack_bits(one.active_sets, 44).float().mean().item() for one in (layer, other)]
        assert sizes[0] == pytest.approx(sizes[1], abs=0.1)


def test_an_interrupted_build_does_not_sample_again(tiny_tokenizer, text, tmp_path, monkeypatch):
    model = make_tiny_model()
    data, whole = [text, "self"], tmp_path / "whole"
    build_clusters(model, tiny_tokenizer, data, CONFIG, output=whole)
    interrupted(monkeypatch, model, tiny_tokenizer, data, CONFIG, output=tmp_path / "other")

    def again(*unused, **options):
        raise AssertionError("sampled again")

    monkeypatch.setattr(model, "generate", again)
    build_clusters(model, tiny_tokenizer, data, CONFIG, output=tmp_path / "other")
    for file in whole.iterdir():
        assert (tmp_path / "other" / file.name).read_bytes() == file.read_bytes()
