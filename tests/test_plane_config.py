"""``PlaneConfig``: its fields, and what ``from_pretrained`` makes of one beside a folder's own."""

import json
import warnings

import pytest
from helpers import assert_same_state
from helpers import make_tiny_model_of as tiny
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from sparse_runtime import PlaneConfig
from sparse_runtime.errors import ConfigError
from sparse_runtime.ffn.plane_packing import pack_model

load = AutoModelForCausalLM.from_pretrained


@pytest.fixture
def folder(tmp_path):
    """A packed model's."""
    pack_model(tiny(), 6, linears=8).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("leave", [["lm_head"], ["model.layers.0.mlp", "v_proj"]])
def test_the_base_model_of_a_folder_with_float_modules(tmp_path, leave):
    model = pack_model(tiny(), 6, linears=8, modules_to_not_convert=leave)
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), model)
    assert_same_state(AutoModel.from_pretrained(tmp_path), model.model)


class TestAnotherConfigThanTheFolders:
    @pytest.mark.parametrize(
        ("asked", "text"),
        [
            (PlaneConfig(4, 8), r"bits=6, linear_bits=8\), and .* asks for PlaneConfig\(bits=4, l"),
            (PlaneConfig(6, 6), r"bits=6, linear_bits=8\), and .* asks for .*linear_bits=6"),
            (PlaneConfig(6, None), r"asks for PlaneConfig\(bits=6, linear_bits=None\); leave"),
            (PlaneConfig(6, 8, ["lm_head"]), r"modules_to_not_convert=\['lm_head'\]\); leave"),
        ],
    )
    def test_is_refused(self, folder, asked, text):
        with pytest.raises(ConfigError, match=rf"packed already, by PlaneConfig\(.*{text}"):
            load(folder, quantization_config=asked)

    @pytest.mark.parametrize("asked", [PlaneConfig(6, 8), PlaneConfig(6)])
    def test_the_same_is_taken_without_a_warning(self, folder, asked):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load(folder, quantization_config=asked)
        assert_same_state(loaded, pack_model(tiny(), 6, linears=8))
        assert loaded.config.quantization_config.fingerprint is not None

    def test_configs_of_other_methods(self, folder, tmp_path):
        with pytest.raises(
            ValueError, match=r"quantized with PlaneConfig but .* BitsAndBytesConfig"
        ):
            load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
        floats = tmp_path / "float"
        tiny().save_pretrained(floats)
        fields = json.loads((floats / "config.json").read_text())
        fields["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (floats / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"quantized with GPTQConfig but .* PlaneConfig"):
            load(floats, quantization_config=PlaneConfig(6))


class TestConfig:
    def test_defaults(self):
        assert [PlaneConfig(bits).linear_bits for bits in (3, 4, 5, 6, 8)] == [6, 6, 6, 8, 8]
        config = PlaneConfig(5, None, ["lm_head"])
        assert PlaneConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
        assert config.linear_format is None
        assert str(config.format) == "3 + 2"

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"bits": 2}, "bits is 2: .*expected one of 3, 4"),
            ({"bits": "6"}, "bits is '6'; expected a whole number"),
            ({"bits": None, "linear_bits": None}, "both None"),
            ({"bits": True}, "bits is True"),
            ({"linear_bits": 16}, "linear_bits is 16"),
            ({"modules_to_not_convert": "lm_head"}, "expected a list of names"),
            ({"modules_to_not_convert": [1]}, "expected a list of names"),
            ({"group_size": 32}, "no field 'group_size'"),
            ({"quant_method": "gptq"}, "quant_method"),
            ({"format_version": 7}, "format version 7"),
        ],
    )
    def test_refusals(self, options, text):
        with pytest.raises(ConfigError, match=text):
            PlaneConfig(**options)
