"""What ``eval`` compares with --budgets, --baselines and --weights, and the text that takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_runtime.artifact.cluster_set import ClusterSet
from sparse_runtime.cli.console import note
from sparse_runtime.cli.tables import print_curves
from sparse_runtime.cli.texts import check_windows_fit, fit_sources, warn_of_overlap
from sparse_runtime.config import SparseConfig
from sparse_runtime.errors import ConfigError
from sparse_runtime.models.ffn_layers import packed_bits

if TYPE_CHECKING:
    from sparse_runtime.eval.quality.rows import Protocol

CALIBRATION_TOKENS = 16_384


class Comparison:
    """Several budgets, methods, formats, or ours over planes, beside one float model.

    Attributes:
        wanted: whether any of these is asked for.
        rounding: of the planes that ours runs over; None over what the model has.
        needs_text: something is fitted on calibration text.
    """

    def __init__(
        self,
        budget: float | None,
        budgets: list[float] | None,
        baselines: str | None,
        weights: int | None,
        rounding: str | None,
        calibration: list[str] | None,
        calibration_tokens: int | None,
        window: int,
    ) -> None:
        """Check the options of the same names, before anything is loaded.

        Raises:
            ConfigError, DataError: one is wrong, has no effect, or does not go with the others.
        """
        from sparse_runtime.eval.baselines.registry import named_baselines

        if budget is not None and budgets is not None:
            raise ConfigError("--budget and --budgets are both given; expected one of them")
        self._names = baselines.split(",") if baselines is not None else []
        methods, formats = named_baselines(self._names)
        self.wanted = budgets is not None or bool(self._names)
        self._budgets = budgets or (None if budget is None else [budget])
        self._weights, self._sources = weights, calibration or []
        self._limits = (calibration_tokens or CALIBRATION_TOKENS, window)
        fitted = bool(methods) or any(form.needs_text for form in formats)
        self.rounding = None
        if self.wanted and weights is not None:
            by_text = fitted or bool(calibration or calibration_tokens)
            self.rounding = rounding or ("gptq" if by_text else "plain")
        _check_rounding(rounding, self.rounding)
        self.needs_text = fitted or self.rounding not in (None, "plain")
        given = {"calibration": calibration, "calibration-tokens": calibration_tokens}
        for option, value in given.items():
            if value and not self.needs_text:
                raise ConfigError(
                    f"--{option} is given without --baselines that are fitted on text, or --weights "
                    "with --budgets, which alone it is for"
                )
        fit_sources(calibration)
        if self.needs_text:
            check_windows_fit(window, {"--calibration-tokens": self._limits[0]})

    def check_model(self, name: str, model: Any) -> None:
        """Refuse to pack a model that came packed. Raises ConfigError."""
        packed = packed_bits(model)
        if packed and self.rounding is not None:
            raise ConfigError(
                f"--weights is {self._weights} beside --budgets or --baselines, for which a float "
                f"model is packed, and {name} came packed in {packed} bits; leave --weights out, or "
                "name the float model"
            )

    def run(
        self,
        model: Any,
        tokenizer: Any,
        artifact: ClusterSet,
        texts: Sequence[tuple[str, Tensor]],
        *,
        planes: dict[str, Any],
        verify: bool | None,
        protocol: Protocol,
    ) -> dict[str, Any]:
        """Compare, and print the figures.

        Args:
            model: as it was loaded.
            tokenizer: of the model.
            artifact: with centroids.
            texts: names and tokens [n] int64 of held-out texts.
            planes: as ``plane_options`` gives them.
            verify: as on the command line.
            protocol: windows and prompts.

        Returns:
            The figures of ``evaluate_curves``, ``weights`` and ``rounding`` of the planes that ours
            ran over, and the record of the ``calibration`` text if there was one.
        """
        from sparse_runtime.eval.quality.curves import evaluate_curves

        record: dict[str, Any] = {"weights": self._weights, "rounding": self.rounding}
        windows = None
        if self.needs_text:
            windows, record["calibration"] = self._calibration(artifact, tokenizer, model)
            for source, tokens in texts if self._sources else []:
                warn_of_overlap(source, tokens, record["calibration"])
        curves = evaluate_curves(
            model,
            artifact,
            texts,
            budgets=self._budgets or [artifact.budget],
            baselines=self._names,
            calibration=windows,
            protocol=protocol,
            **self._how(model, planes, verify),
        )
        print_curves(curves)
        for sentence in curves["notes"]:
            note(sentence)
        return record | curves

    def _how(self, model: Any, planes: dict[str, Any], verify: bool | None) -> dict[str, Any]:
        """Options of ``evaluate_curves`` that say how the artifact runs."""
        from sparse_runtime.eval.baselines.dense_formats import DensePlanes

        if self.rounding is None and not packed_bits(model):
            return {"verify": [True, False] if verify is None else [verify]}
        stages = {name: value for name, value in planes.items() if name != "weights"}
        how: dict[str, Any] = {"verify": [verify]}
        how["config"] = SparseConfig(prefill="sparse", **stages)
        if self.rounding is not None and self._weights is not None:
            how["planes"] = DensePlanes(self._weights, self.rounding)
        return how

    def _calibration(
        self, artifact: ClusterSet, tokenizer: Any, model: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Windows of calibration text, and their record; says if they are not the artifact's."""
        from sparse_runtime.eval.quality.curves import baseline_calibration

        max_tokens, window = self._limits
        text, reason = baseline_calibration(
            artifact, self._sources, tokenizer, max_tokens=max_tokens, window=window, model=model
        )
        if reason is not None:
            note(f"calibration text is wikitext2: {reason}")
        return text.windows, text.record


def _check_rounding(given: str | None, used: str | None) -> None:
    from sparse_runtime.eval.baselines.dense_formats import ROUNDINGS

    if given is not None and given not in ROUNDINGS:
        raise ConfigError(f"--rounding is {given!r}; expected one of {', '.join(ROUNDINGS)}")
    if given is not None and used is None:
        raise ConfigError(
            f"--rounding is {given!r} without --weights beside --budgets or --baselines, for which "
            "alone it is; elsewhere --weights rounds plainly"
        )
