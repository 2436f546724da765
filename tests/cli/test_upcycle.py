"""``upcycle``: a folder that stock transformers loads, or nothing."""

import copy
import json

import pytest
import torch
from helpers import logits, make_tiny_model_of
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

from sparse_runtime.eval.upcycling import routing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(routing, "_STEPS", 60)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"alpha {n * n} beta {n} gamma\n" for n in range(300)))
    return path


@pytest.fixture
def folder(tiny_tokenizer, tmp_path):
    path = tmp_path / "dense"
    model = make_tiny_model_of("llama", intermediate_size=64)
    model.generation_config.temperature = 0.625
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    tokenizer = copy.deepcopy(tiny_tokenizer)  # which other tests have, too
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def upcycle(run, folder, text, tmp_path):
    def call(*options, output="mixture"):
        return run(
            *("upcycle", folder, "-o", tmp_path / output, "--data", text, "--experts", 4),
            *("--window", 64, "--max-tokens", 2048, "--test-tokens", 512, "--distill", 1, *options),
        )

    return call


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_transformers_loads(upcycle, folder, tmp_path):
    figures = tmp_path / "figures.json"
    code, out, err = upcycle("--active", 2, "--distill", 3, "--json", figures)
    assert code == 0, err
    record = json.loads(figures.read_text())
    assert "KL " in out
    assert "experts take" in out
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", dtype=torch.float32)
    assert type(made) is MixtralForCausalLM
    assert made.model.layers[0].mlp.gate.weight.shape == (4, 32)
    assert made.config.num_experts_per_tok == 2
    assert made.generation_config.temperature == 0.625
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mixture")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert chat == "<x>"
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(made.model.embed_tokens.weight, dense.model.embed_tokens.weight.bfloat16())
    assert (record["experts"], record["active"], record["distill"]) == (4, 2, 3)
    assert record["calibration"]["tokens"] == 2048
    assert record["test_tokens"] == 512
    assert record["kl"] > 0
    assert record["kl_interval"][0] <= record["kl"] <= record["kl_interval"][1]
    assert [layer["layer"] for layer in record["layers"]] == [0, 1, 2]
    assert names(tmp_path) == ["dense", "figures.json", "mixture", "text.txt"]
    assert "work" not in names(tmp_path / "mixture")


def test_all_experts_active(upcycle, folder, tmp_path):
    code, _, err = upcycle("--active", 4, "--dtype", "float32", "--json", tmp_path / "f.json")
    assert code == 0, err
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    dense = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(made), logits(dense), atol=1e-4)
    assert json.loads((tmp_path / "f.json").read_text())["kl"] < 1e-6
    assert made.generate(torch.tensor([[5, 9, 2]]), max_new_tokens=4, do_sample=False).shape[1] == 7


def test_the_same_again(upcycle, tmp_path):
    for number in ("1", "2"):
        assert upcycle("--active", 2, "--distill", 2, output=number)[0] == 0
    files = [(tmp_path / number / "model.safetensors").read_bytes() for number in ("1", "2")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--experts", 16, "--active", 2), 2, "has 64 neurons, of which 16 experts cannot have"),
        (("--active", 5), 2, "--active is 5; expected at most the number of --experts, 4"),
        (("--experts", 1), 2, "--experts is 1; expected 2 or more"),
        (("--data", "nowhere.txt"), 1, "nowhere.txt"),
        (("--test", "nowhere.txt"), 1, "nowhere.txt"),
        (("--test-tokens", 5), 2, "--test-tokens is 5; expected at least one window"),
        (("--dtype", "int3"), 2, "dtype is 'int3'"),
    ],
)
def test_refusals_leave_nothing(upcycle, tmp_path, options, code, words):
    before = names(tmp_path)
    found, _, err = upcycle(*options)
    assert found == code, err
    assert words in " ".join(err.split())
    assert names(tmp_path) == before


def test_a_mixture_is_refused(upcycle, run, text, tmp_path):
    assert upcycle("--active", 2)[0] == 0
    code, _, err = run("upcycle", tmp_path / "mixture", "-o", tmp_path / "again", "--data", text)
    assert code == 1
    assert "is a mixture of 4 experts" in " ".join(err.split())
    assert not (tmp_path / "again").exists()


def test_a_folder_in_use_is_left_alone(upcycle, tmp_path):
    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture" / "mine").write_text("kept")
    code, _, err = upcycle("--active", 2)
    assert code == 1
    assert "exists and holds mine" in err
    assert names(tmp_path / "mixture") == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written_stays(upcycle, tmp_path, monkeypatch, error):
    def save(self, folder, **_):
        (folder / "config.json").write_text("half")
        raise error

    monkeypatch.setattr(MixtralForCausalLM, "save_pretrained", save)
    before = names(tmp_path)
    code, _, err = upcycle("--active", 2)
    assert names(tmp_path) == before
    assert code == (130 if error is KeyboardInterrupt else 1)
    assert ("interrupted" if error is KeyboardInterrupt else "the disk is full") in err
