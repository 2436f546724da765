"""How the next token is drawn, under transformers' names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_runtime.errors import ConfigError

#: What has a meaning only where tokens are drawn.
_OF_DRAWING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Sampling:
    """Settings that differ from the model's generation config; None keeps what that says.

    Any of ``temperature`` (above 0), ``top_p``, ``top_k`` and ``min_p`` turns drawing on, a
    ``temperature`` of 0 turns it off.

    Args:
        do_sample: draw tokens, or take the likeliest.
        temperature: divides the logits; 0 or more.
        top_p: draw from the likeliest tokens of this summed probability, 0 to 1.
        top_k: draw from so many tokens.
        min_p: draw from tokens of at least this share of the likeliest one's probability, 0 to 1.
        repetition_penalty: of tokens that the text has already, above 0; 1 is none.
        seed: of drawing.

    Raises:
        ConfigError: some contradict each other.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.do_sample and self.temperature == 0:
            raise ConfigError(
                "do_sample is on, and temperature is 0, which takes the likeliest token; leave one out"
            )
        if self.do_sample is False or self.temperature == 0:
            why = "temperature is 0" if self.temperature == 0 else "do_sample is off"
            for name in _OF_DRAWING:
                value = getattr(self, name)
                if value is not None and (name, value) != ("temperature", 0):
                    raise ConfigError(
                        f"{name} is {value}, but {why}, so no token is drawn; leave one of them out"
                    )

    def options(self) -> dict[str, Any]:
        """Options of ``model.generate``."""
        given = {name: value for name in _OF_DRAWING if (value := getattr(self, name)) is not None}
        draws = self.do_sample
        if self.temperature == 0:
            draws, given = False, {}
        elif given:
            draws = True
        if draws is not None:
            given["do_sample"] = draws
        if self.repetition_penalty is not None:
            given["repetition_penalty"] = self.repetition_penalty
        return given
