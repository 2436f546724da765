"""lm-eval's own command line with a model type ``sparse_runtime``, whose every token runs sparse.

    python -m sparse_runtime.eval.lm_eval run --model sparse_runtime \\
        --model_args pretrained=demo,clusters=runs/demo/clusters --tasks piqa

A sparsified model given to the harness's ``hf`` type would score the dense one: a question is a prompt,
and prompts run dense. lm-eval (0.4.13) has no entry points for models, so that a type is known once its
module is imported, which this one does before it hands over; in Python ``import
sparse_runtime.eval.lm_eval`` does, too, for ``lm_eval.simple_evaluate(model="sparse_runtime", …)``.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sparse_runtime.api import cost_report, reset_cost, sparse_modules, sparsify
from sparse_runtime.config import SparseConfig
from sparse_runtime.errors import ConfigError, SparseRuntimeError
from sparse_runtime.ffn.counts import bytes_per_token
from sparse_runtime.models import load_model, parse_dtype


@register_model("sparse_runtime")
class SparseLM(HFLM):
    """The harness's ``hf`` with clusters.

    What was read goes into ``config`` of the harness's results, and is printed when it ends: the cost
    share, bits per FFN weight, the share of tokens that ran sparse and bytes of weights per token.
    Padding is counted where ``batch_size`` is above 1.

    Args:
        pretrained: Hub id, local folder, or ``demo``.
        clusters: the artifact; folder or Hub id.
        dtype: of the weights.
        device: where the model runs; the CPU if None, and where CUDA is asked for, as lm-eval does
            on its own, and there is none.
        options: fields of :class:`SparseConfig` by name (``prefill`` is ``sparse`` unless given), and
            what ``hf`` takes beside a model that is loaded (``batch_size``, ``max_length``, …).

    Raises:
        ConfigError: an option is out of range, or ``clusters`` is missing.
        SparseRuntimeError: as ``load_model`` and ``sparsify``.
    """

    def __init__(
        self,
        pretrained: str,
        clusters: str | None = None,
        *,
        dtype: str = "bfloat16",
        device: str | None = None,
        **options: Any,
    ) -> None:
        if clusters is None:
            raise ConfigError(
                "model_args has no clusters; expected pretrained=MODEL,clusters=DIR. --model hf runs "
                "the model without any"
            )
        names = {field.name for field in fields(SparseConfig)} & options.keys()
        sparse = {"prefill": "sparse"} | {name: options.pop(name) for name in names}
        config = SparseConfig(**sparse)
        if (device or "").startswith("cuda") and not torch.cuda.is_available():
            device = None
        model, tokenizer = load_model(pretrained, dtype=parse_dtype(dtype), device=device)
        sparsify(model, clusters, config=config)
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self._clusters, self._prefill = clusters, config.prefill
        reset_cost(model)

    def _detect_batch_size(self, *arguments: Any, **options: Any) -> int:
        size: int = super()._detect_batch_size(*arguments, **options)
        reset_cost(self.model)  # what was tried is no document
        return size

    def get_model_info(self) -> dict[str, Any]:
        """What the harness records of a model when it has run; printed as well."""
        report = cost_report(self.model)
        info = {
            "clusters": self._clusters,
            "prefill": self._prefill,
            "cost_share": report.cost_share,
            "bits_per_weight": report.bits_per_weight,
            "sparse_share_of_tokens": report.sparse_share_of_tokens,
            "bytes_per_token": bytes_per_token(self.model),
        }
        print(
            f"{len(sparse_modules(self.model))} sparse FFNs: cost share {info['cost_share']:.3f} "
            f"({info['bits_per_weight']:.2f} bits per FFN weight); "
            f"{info['sparse_share_of_tokens']:.1%} of the tokens ran sparse"
        )
        return {**super().get_model_info(), **info}


def main() -> None:
    """lm-eval's command line; an error of ours is one line."""
    try:
        cli_evaluate()
    except SparseRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


if __name__ == "__main__":
    main()
