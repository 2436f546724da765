"""Random model folders that are never held in memory: they load, whole or layer by layer."""

import pytest
import torch

from sparse_runtime.errors import ConfigError, OutputFolderError
from sparse_runtime.eval.latency.shape_folder import write_shape_folder
from sparse_runtime.models import load_model


def test_a_folder_loads_in_memory_and_from_the_disk(tmp_path):
    folder = tmp_path / "model"
    write_shape_folder("smollm2-135m", folder, layers=2)
    assert len(list(folder.glob("*.safetensors"))) == 3
    found = []
    for offload in (False, True):
        model, tokenizer = load_model(str(folder), offload=offload)
        ids = tokenizer("a text", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(model(ids).logits)
    assert found[0].isfinite().all()
    assert found[0].std() > 0
    assert torch.equal(*found)
    assert tokenizer.decode(ids[0]) == "a text"
    with pytest.raises(OutputFolderError):
        write_shape_folder("smollm2-135m", folder, layers=1)


def test_an_unknown_shape(tmp_path):
    with pytest.raises(ConfigError, match="shape is 'x'"):
        write_shape_folder("x", tmp_path / "model")
    assert not (tmp_path / "model").exists()
