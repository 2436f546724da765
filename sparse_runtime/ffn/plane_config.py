"""What a model's planes are, as its config.json says it and ``from_pretrained`` is asked for it."""

from __future__ import annotations

from typing import Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_runtime.errors import ConfigError
from sparse_runtime.ffn.plane_places import Places, find_places, names_in
from sparse_runtime.kernels.planes import PlaneFormat
from sparse_runtime.printable import printable

METHOD = "planes"
#: Of the planes on disk (``kernels/planes.py``).
FORMAT_VERSION = 1


class PlaneConfig(QuantizationConfigMixin):
    """Weights in planes, for ``from_pretrained(name, quantization_config=PlaneConfig(bits=6))``.

    Attributes:
        bits: of the FFNs' weights: 3, 4, 5, 6, 7 or 8; None leaves them in float.
        linear_bits: of attention and head; None leaves them in float. By default 6 where ``bits`` is
            less than that, else 8. A head that is tied to the embedding is packed, and the embedding
            stays.
        modules_to_not_convert: names of modules to leave in float: whole names, or some of their parts
            that follow each other (``lm_head``, ``layers.0``, ``self_attn.q_proj``).
        format_version: of the planes on disk.
        fingerprint: samples of the float weights that the FFNs were packed from, by which clusters are
            told whether they were built for this model (``models/fingerprint.py``); packing adds it.

    Raises:
        ConfigError: a field is unknown or has a value that cannot work.
    """

    def __init__(
        self,
        bits: int | None = 6,
        linear_bits: int | Literal["default"] | None = "default",
        modules_to_not_convert: list[str] | None = None,
        format_version: int = FORMAT_VERSION,
        fingerprint: str | None = None,
        **unknown: Any,
    ) -> None:
        method = unknown.pop("quant_method", METHOD)
        if unknown or method != METHOD:
            field = printable(next(iter(unknown), "quant_method"))
            raise ConfigError(
                f"PlaneConfig has no field {field!r} for {printable(str(method))!r}; expected bits, "
                f"linear_bits and modules_to_not_convert, of quant_method {METHOD!r}"
            )
        if format_version != FORMAT_VERSION:
            raise ConfigError(
                f"these planes are of format version {format_version!r}; this sparse_runtime reads "
                f"{FORMAT_VERSION}. Install the version that wrote them, or pack the float "
                "checkpoint again"
            )
        if linear_bits == "default":
            linear_bits = 6 if isinstance(bits, int) and bits < 6 else 8
        for name, value in (("bits", bits), ("linear_bits", linear_bits)):
            if value is not None:
                _check_bits(name, value)
        if bits is None and linear_bits is None:
            raise ConfigError("bits and linear_bits are both None; expected one of them, or both")
        leave = [] if modules_to_not_convert is None else modules_to_not_convert
        if isinstance(leave, str) or not all(isinstance(part, str) and part for part in leave):
            raise ConfigError(
                f"modules_to_not_convert is {printable(leave)}; expected a list of names, such as "
                "['lm_head']"
            )
        self.quant_method = METHOD
        self.bits = bits
        self.linear_bits = linear_bits
        self.modules_to_not_convert = list(leave)
        if not isinstance(fingerprint, str | None):
            raise ConfigError(
                f"fingerprint is {printable(repr(fingerprint))}; expected a string, or None"
            )
        self.format_version = format_version
        self.fingerprint = fingerprint

    @property
    def format(self) -> PlaneFormat | None:
        """Of the FFNs, or None."""
        return None if self.bits is None else PlaneFormat.of_bits(self.bits)

    @property
    def linear_format(self) -> PlaneFormat | None:
        """Of attention and head, or None."""
        return None if self.linear_bits is None else PlaneFormat.of_bits(self.linear_bits)

    def places(self, model: Any, *, saved: bool = False) -> Places:
        """What of a model is packed by it; errors as of ``find_places``.

        Args:
            model: a ``PreTrainedModel``.
            saved: the config is a packed folder's, of which the model may be the base model.
        """
        leave = self.modules_to_not_convert
        return find_places(
            model,
            ffns=self.bits is not None,
            linears=self.linear_bits is not None,
            leave=names_in(model, leave, model.base_model_prefix) if saved else leave,
        )


def check_same(found: PlaneConfig, asked: PlaneConfig) -> None:
    """Check that a folder is packed by the config that was asked for.

    Raises:
        ConfigError: the bits, or what is named to stay float, differ.
    """
    same = (found.bits, found.linear_bits) == (asked.bits, asked.linear_bits)
    left = set(asked.modules_to_not_convert)
    if not same or (left and left != set(found.modules_to_not_convert)):
        raise ConfigError(
            f"the model is packed already, by {_shown(found)}, and quantization_config asks for "
            f"{_shown(asked)}; leave quantization_config out to load it as it is, or pack the float "
            "checkpoint that it was made of"
        )


def _shown(config: PlaneConfig) -> str:
    left = config.modules_to_not_convert
    return printable(
        f"PlaneConfig(bits={config.bits}, linear_bits={config.linear_bits}"
        + (f", modules_to_not_convert={left})" if left else ")")
    )


def _check_bits(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {printable(repr(value))}; expected a whole number, such as 6")
    try:
        PlaneFormat.of_bits(value)
    except ConfigError as error:
        raise ConfigError(f"{name} is {value}: {error}") from None
