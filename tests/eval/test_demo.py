"""The demo's path on a tiny model: built once, three models side by side."""

import pytest
import torch
from helpers import make_tiny_model
from rich.console import Console

from sparse_runtime.clusters import BuildConfig
from sparse_runtime.errors import OutputFolderError
from sparse_runtime.eval import demo
from sparse_runtime.models import load_model
from sparse_runtime.progress import SilentProgress

BUILD = BuildConfig(
    weights=6, budget=0.6, num_clusters=6, router="2", window=50, max_tokens=2000, distill=0
)


@pytest.fixture
def small(monkeypatch, tiny_tokenizer):
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"

    def load(name, **options):
        if name == "demo":
            return make_tiny_model(), tiny_tokenizer
        return load_model(name, **options)

    monkeypatch.setattr(demo, "load_model", load)
    monkeypatch.setattr(demo, "BUILD", BUILD)
    monkeypatch.setattr(demo, "_EVALUATION_TOKENS", 1100)
    monkeypatch.setattr(demo, "_NEW_TOKENS", 5)


def run(folder):
    console = Console(record=True, width=120)
    result = demo.run_demo(folder, console, SilentProgress(), torch.float32)
    return result, console.export_text()


def test_three_models_side_by_side(small, tmp_path, monkeypatch):
    result, text = run(tmp_path)
    [curve] = result["curves"]["results"]
    four, ours = curve["rows"]
    assert [four["method"], ours["method"]] == ["dense-4-gptq", "clusters"]
    assert four["kl"] > 0
    assert ours["kl"] > 0
    assert 0 < ours["counted"] < 1
    for answer in result["answers"]:
        assert list(answer["models"]) == ["float", "dense, 4 bits", "sparse"]
        sizes = [own["bytes_per_token"] for own in answer["models"].values()]
        assert sizes[0] > max(sizes[1:])
        assert answer["models"]["sparse"]["sparse_tokens"] > 0
        assert answer["prompt"] in text
    monkeypatch.setattr(demo, "build_clusters", lambda *_, **__: pytest.fail("built again"))
    again, _ = run(tmp_path)
    assert again["curves"]["results"][0]["rows"][1]["kl"] == ours["kl"]


def test_a_folder_that_holds_something_else_stays(small, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("kept")
    with pytest.raises(OutputFolderError, match="exists and holds mine"):
        run(tmp_path)
    assert (tmp_path / "model" / "mine").read_text() == "kept"
