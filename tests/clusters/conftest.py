"""Calibration text that the builds share."""

import pytest
import torch


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    picks = torch.randint(97, 110, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text("".join(map(chr, picks)))
    return str(file)
