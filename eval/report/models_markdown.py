"""docs/models.md: the model types of the installed transformers, and whether their FFNs can run sparse.

python -m sparse_runtime.eval.report.models_markdown MODELS.md
"""

from __future__ import annotations

import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_runtime.errors import SparseRuntimeError
from sparse_runtime.eval.report.markdown import escaped, markdown_table
from sparse_runtime.models.ffn_layer import FFNLayer
from sparse_runtime.models.ffn_layers import find_ffn_layers

# Characters of a reason.
_REASON = 240
# Layers are alike, and some models have hundreds.
_LAYERS = 4

_INTRODUCTION = """# Model types

Written by `python -m sparse_runtime.eval.report.models_markdown docs/models.md` for transformers
{version}: each type that `AutoModelForCausalLM` or `AutoModelForImageTextToText` knows, made of its
default config, without memory for weights. FFNs are found in the decoder's layers by the shapes of
their linear layers, and proven: the module's own forward, run on small matrices, equals
down(act(gate·x) ⊙ (up·x)) or down(act(up·x)), biases added. *Inline* ones have no module for
themselves: up and down are called in the forward of a larger one, such as OPT's decoder layer, which is
proven to give the same where the FFN is computed apart. *Transposed* ones have weights [in, out], as
GPT-2's. *Experts* are those of transformers' experts interface, y = Σ_j w_j·down_e(act(gate_e·x) ⊙
(up_e·x)) over the experts that the model's own router chose, proven likewise; an FFN that runs beside
them for every token is one of its own. These three run over float weights; all others in planes
(`weights=6`), too.

{supported} of {all} types can run sparse; tests/models/test_model_types.py runs tiny models of them.
"""


@dataclass(frozen=True)
class ModelType:
    """What became of a model type.

    Attributes:
        name: ``model_type`` of its config.
        form: how its FFNs are made, or None.
        reason: why they cannot run sparse.
    """

    name: str
    form: str | None
    reason: str = ""


def model_classes() -> dict[str, str]:
    """Model types of the installed transformers that generate text, with the class of each."""
    from transformers.models.auto import modeling_auto

    names: dict[str, Any] = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names |= modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {
        kind: found if isinstance(found, str) else found[0] for kind, found in sorted(names.items())
    }


def judged(kind: str, class_name: str) -> ModelType:
    """Look for the FFNs of a model type."""
    import transformers

    try:
        config = transformers.CONFIG_MAPPING[kind]()
        _shorten(config.get_text_config())
        with torch.device("meta"):
            model_class = getattr(transformers, class_name)
            model = model_class._from_config(config)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return ModelType(kind, None, f"its default config makes no model ({first or repr(error)})")
    try:
        layers = find_ffn_layers(model)
    except SparseRuntimeError as error:
        reason = str(error).partition(". Put the model")[0]
        return ModelType(kind, None, textwrap.shorten(reason, _REASON, placeholder=" …"))
    return ModelType(kind, "; ".join(dict.fromkeys(map(_form, layers))))


def _form(layer: FFNLayer) -> str:
    biased = any(linear.bias is not None for linear in layer.linears().values())
    names = ", ".join(f"`{name}`" for name in layer.projections)
    form = f"{layer.form.kind}: {names}; {layer.activation}{', biases' if biased else ''}"
    form += ", inline" if layer.form.inline is not None else ""
    return form + (", transposed" if layer.form.transposed else "")


def models_markdown(types: list[ModelType], version: str) -> str:
    """The whole document."""
    supported = [kind for kind in types if kind.form is not None]
    others = [kind for kind in types if kind.form is None]
    return "\n".join(
        [
            _INTRODUCTION.format(version=version, supported=len(supported), all=len(types)),
            "## Sparse\n",
            markdown_table(
                ["model type", "FFN"], [[kind.name, str(kind.form)] for kind in supported]
            ),
            "## Not sparse\n",
            markdown_table(
                ["model type", "why"], [[kind.name, escaped(kind.reason)] for kind in others]
            ),
        ]
    )


def _shorten(config: Any) -> None:
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), _LAYERS))
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:_LAYERS]


def main() -> None:
    """Write the document named on the command line."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    types = [judged(kind, name) for kind, name in model_classes().items()]
    text = models_markdown(types, transformers.__version__)
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
