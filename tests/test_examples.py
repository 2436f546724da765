"""The examples run as they stand; lm-eval's is run by tests/eval/test_lm_eval.py."""

import copy
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import needs_library, random_cluster_set
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = needs_library


@pytest.fixture
def folders(tiny_model, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tiny_model.generation_config.eos_token_id = None
    tiny_model.bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    random_cluster_set(tiny_model, 0.4).save_pretrained(tmp_path / "clusters")
    return tmp_path / "model", tmp_path / "clusters"


@pytest.fixture
def example(monkeypatch, capsys):
    """Run an example with arguments; what it printed."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def sparse_tokens(out):
    return int(re.search(r"over (\d+) sparse tokens", out)[1])


def test_a_pipeline(example, folders):
    out = example("pipeline.py", *folders)
    assert sparse_tokens(out) == 3 * 23  # every decode step, in each of three layers
    assert "What is the capital" not in out


def test_a_merged_adapter(example, folders, tmp_path):
    peft = pytest.importorskip("peft")
    outputs = []
    for scale in (0.0, 0.5):
        model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.bfloat16)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=["gate_proj", "down_proj", "q_proj"])
        )
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=scale)
        adapted.save_pretrained(tmp_path / f"adapter-{scale}")
        outputs.append(example("lora.py", *folders, tmp_path / f"adapter-{scale}"))
        assert sparse_tokens(outputs[-1]) == 3 * 23
        assert "The capital of France is" in outputs[-1]
    texts = [out.split("cost share")[0] for out in outputs]
    assert texts[0] != texts[1]  # what is read has the adapter in it
