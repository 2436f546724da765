"""Models and tokenizers that the tests share. Nothing here needs a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before anything imports torch: threads beyond the cores wait for each other, and a build of clusters
# in the neighboring process makes one of a second take fifty.
if int(workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from helpers import make_tiny_model, random_cluster_set

from sparse_runtime import sparsify

# `make test-lowest` goes without the server, which is for one version of transformers.
collect_ignore = [] if find_spec("fastapi") else ["serve"]


@pytest.fixture
def tiny_model():
    """A random Mistral: 3 layers, hidden 32, 44 neurons (not a multiple of 8), 260 tokens."""
    return make_tiny_model()


@pytest.fixture
def sparse_model(tiny_model):
    """The tiny model with random clusters of density 0.4, every call sparse."""
    return sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="sparse")


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token per byte, and a BOS in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    vocabulary |= {"<s>": 256, "</s>": 257, "<pad>": 258, "<unk>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(autouse=True)
def template_of_one_test(tiny_tokenizer):
    """A chat template that a test gives the tokenizer is gone after it."""
    yield
    tiny_tokenizer.chat_template = None


@pytest.fixture
def tiny_folder(tiny_model, tiny_tokenizer, tmp_path):
    """The tiny model and its tokenizer as a local model folder."""
    folder = tmp_path / "tiny-model"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line; return exit code, stdout and stderr."""

    def call(*arguments):
        from sparse_runtime import cli

        monkeypatch.setattr("sys.argv", ["sparse-runtime", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    from sparse_runtime.cli.console import out as console

    monkeypatch.setattr(console, "width", 200)
    return call


@pytest.fixture(scope="session")
def demo_model():
    """SmolLM2-135M as a Mistral in float32, with its tokenizer."""
    from sparse_runtime.models import load_model

    return load_model("demo", dtype=torch.float32)


@pytest.fixture(scope="session")
def corpora():
    """Folder of the real corpora; tests that need it are skipped where there is none."""
    folder = Path(
        os.environ.get("SPARSE_RUNTIME_DATA", Path(__file__).parents[2] / "shared" / "data")
    )
    if not folder.is_dir():
        pytest.skip("no corpora: set SPARSE_RUNTIME_DATA to a folder with wikitext-2/wiki.test.raw")
    return folder
