"""Ranges of numeric options, checked before anything is loaded. NaN is in none of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer

from sparse_runtime.cost import DENSE_BITS
from sparse_runtime.errors import ConfigError
from sparse_runtime.kernels import planes


@dataclass(frozen=True)
class Range:
    """Values that an option may have.

    Args:
        words: what is expected.
        holds: whether a value is one of them.
        example: of several, separated by commas.
    """

    words: str
    holds: Callable[[float], bool]
    example: str = "0.6,0.7"

    def check(self, option: str, value: float) -> None:
        """Refuse a value outside. Raises ConfigError."""
        if not self.holds(value):
            raise ConfigError(f"{option} is {value}; expected {self.words}")

    def parse(self, option: str, text: str, kind: type = float) -> Any:
        """The number that a text says. Raises ValueError where there is none, or ConfigError."""
        value = kind(text)
        self.check(option, value)
        return value

    def callback(self, param: typer.CallbackParam, value: float | None) -> float | None:
        """Check an option's value; for ``typer.Option(callback=…)``."""
        if value is not None:
            self.check(param.opts[0], value)
        return value


class CostShares(Range):
    """Cost shares, also in bits per FFN weight and token: ``4.0bits`` is 0.25, of bfloat16's 16."""

    def parse(self, option: str, text: str, kind: type = float) -> Any:
        """The share that a text says, in either unit. Raises ValueError or ConfigError."""
        if not text.endswith("bits"):
            return super().parse(option, text, kind)
        number = text.removesuffix("bits")
        if number != number.strip():
            raise ValueError
        bits = float(number)
        if not 0 < bits <= DENSE_BITS:
            raise ConfigError(
                f"{option} is {text}; expected more than 0bits and at most {DENSE_BITS}bits, those of "
                "a dense weight in bfloat16"
            )
        return bits / DENSE_BITS

    def read(self, param: typer.CallbackParam, text: str | None) -> float | None:
        """An option's value, for ``typer.Option(parser=str, callback=…)``."""
        if text is None:
            return None
        try:
            share: float = self.parse(param.opts[0], text)
        except ConfigError:
            raise
        except ValueError:
            raise ConfigError(f"{param.opts[0]} is {text!r}; expected {self.words}") from None
        return share


SHARE = CostShares(
    "a share above 0 and at most 1, or bits per FFN weight and token, such as 4.0bits",
    lambda value: 0 < value <= 1,
    "0.25,4.0bits",
)
DENSITY = Range("a share above 0 and at most 1", lambda value: 0 < value <= 1)
DEPTH = Range("a share, 0 to 1", lambda value: 0 <= value <= 1, "0,0.5,1")
INNER_SHARE = Range("a share between 0 and 1", lambda value: 0 < value < 1)
PERCENTAGE = Range("a percentage between 0 and 100", lambda value: 0 < value < 100)
POSITIVE = Range("1 or more", lambda value: value >= 1)
SEED = Range("0 to 2³² − 1", lambda value: 0 <= value < 2**32)
PLANE_BITS = Range("3, 4, 5, 6, 7 or 8", lambda value: value in planes.PLANE_BITS)
ONE_OR_MORE = Range("1 or more", lambda value: value >= 1)
TWO_OR_MORE = Range("2 or more", lambda value: value >= 2)
ABOVE_ZERO = Range("a number above 0", lambda value: 0 < value < math.inf)
FROM_ZERO_TO_ONE = Range("0 to 1", lambda value: 0 <= value <= 1)
NOT_NEGATIVE = Range("0 or more", lambda value: 0 <= value < math.inf)


def parse_numbers(option: str, text: str, kind: type, range_: Range) -> list[Any]:
    """Numbers separated by commas.

    Raises:
        ConfigError: they are none, or one is out of range.
    """
    try:
        return [range_.parse(option, part, kind) for part in text.split(",")]
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; expected numbers separated by commas, such as "
            + ("256,1024" if kind is int else range_.example)
        ) from None
