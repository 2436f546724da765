"""A sparse model that can be differentiated: what distillation trains.

Each FFN is computed in full and masked, so nothing is saved, by products of whole matrices in the
model's dtype, which is faster than the run time's own paths where calls are long. The masks are those
of the run time, from the values of look records; over planes all is computed as at run time, from their
values in float: by base planes, and by full values where refined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_runtime.artifact.layer_clusters import LayerClusters
from sparse_runtime.clusters.fisher import without_gradients
from sparse_runtime.clusters.sweep import Sweep
from sparse_runtime.clusters.tuning.masks import Masks, Rows
from sparse_runtime.kernels.operands import ExpertChoice
from sparse_runtime.models.ffn_layer import FFNLayer, layer_cost
from sparse_runtime.models.ffn_layers import decoder_of, find_ffn_layers
from sparse_runtime.models.inline_calls import calling, ffn_module
from sparse_runtime.models.output_head import output_head

#: Numbers of windows [n] -> the dense model's last hidden states on them [n, window, H].
DenseStates = Callable[[Tensor], Tensor]


class StudentFFN(nn.Module):
    """An FFN under its clusters' masks.

    What is tuned is kept in units of the layer itself, so that one learning rate serves layers and
    models of any scale: the shift and the correction's output in :attr:`output_scale`, its input in
    :attr:`input_scale` (1 until :func:`measure_scales`).

    Attributes:
        enabled: masked if true, else the original FFN.
        restored: if not None, a scalar: the share of what is left out that is given back all the same.
            At zero, its gradient tells what restoring the layer is worth.
        left_out: with ``restored``, the mean over the last call's tokens of Σ e² over the neurons
            left out.
        read: neurons computed, looked at and refined by calls without gradients, and their tokens.
        common: shift of all clusters' biases [H] float32.
        shift: of each cluster's bias beside it [K, H] float32.
        down: of the correction [c, H] float32.
        up: of the correction [c, H] float32.
        output_scale: a typical token's root mean square of what is left out and not in the bias.
        input_scale: of a hidden state's elements.
    """

    def __init__(
        self, layer: FFNLayer, clusters: LayerClusters, rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        # Not a submodule: the model's own parameters are not the student's.
        self._layer, self._dense = (layer,), (ffn_module(layer),)
        self.enabled = True
        self.restored: Tensor | None = None
        self.left_out = 0.0
        self.read = [0, 0, 0, 0]
        self._with_full = False
        self.output_scale = self.input_scale = 1.0
        #: Of each token, while scales are measured.
        self.measured: list[tuple[Tensor, Tensor]] | None = None
        hidden_size = layer.hidden_size
        self.down = nn.Parameter(torch.randn(rank, hidden_size, generator=generator))
        # Zero at first, so that the student starts from where the build left it.
        self.up = nn.Parameter(torch.zeros(rank, hidden_size))
        self.common = nn.Parameter(torch.zeros(hidden_size))
        self.shift = nn.Parameter(torch.zeros(clusters.num_clusters, hidden_size))
        self.to(layer.device)
        own = clusters.collapsed(layer.intermediate_size)
        self._cost = layer_cost(layer, own.extra_elements, verified=own.maybe_sets is not None)
        self._masks = Masks(clusters, layer)
        self._rows = Rows.of(layer, looked_at=self._masks.looks)

    @property
    def bytes_read(self) -> tuple[float, float]:
        """Bytes of :attr:`read`, as of bfloat16 weights, and those that a dense FFN would have read."""
        computed, looked, refined, tokens = self.read
        if tokens == 0:
            return 0.0, 0.0
        each = self._cost.sparse_bytes(computed / tokens, looked / tokens, refined / tokens)
        return tokens * each, float(tokens * self._cost.dense_bytes)

    @property
    def bias_shift(self) -> Tensor:
        """What is added to the clusters' biases [K, H]."""
        return (self.common + self.shift) * self.output_scale

    @property
    def correction_down(self) -> Tensor:
        """A of the correction Cᵀ(A·x) [c, H]: A·x is of the order of one at first."""
        return self.down / (self.input_scale * self.down.shape[1] ** 0.5)

    @property
    def correction_up(self) -> Tensor:
        """C of the correction [c, H]."""
        return self.up * (self.output_scale / max(1, self.up.shape[0]) ** 0.5)

    def forward(self, hidden_states: Tensor, *choice: Tensor) -> Tensor:
        """Map hidden states [..., H] to the FFN's output [..., H].

        Args:
            hidden_states: [..., H].
            choice: of experts, index and weights of each token's, [n, k].
        """
        layer, masks = self._layer[0], self._masks
        if not self.enabled and not layer.packed:
            output: Tensor = self._dense[0](hidden_states, *choice)
            return output
        x = hidden_states.reshape(-1, layer.hidden_size)
        if not torch.is_grad_enabled():
            self.read[3] += len(x)
        if not self.enabled or masks.everything:
            found = self._neurons(x, None, choice)
            return self.with_constant(found.output).reshape(hidden_states.shape)
        with torch.no_grad():
            ids = masks.route(x)
        found = self._neurons(x, ids, choice)
        y = found.output
        bias = (masks.cluster_bias + self.bias_shift).to(x.dtype)[ids]
        if self.restored is not None or self.measured is not None:
            missing = (found.full - y - bias).detach()
        if self.measured is not None:
            self.measured.append((_root_mean_square(missing), _root_mean_square(x)))
        if self.restored is not None:
            self.left_out = found.left_out / len(x)
            y = y + self.restored.to(x.dtype) * missing
        y = y + bias
        correction = F.linear(x, self.correction_down.to(x.dtype)) @ self.correction_up.to(x.dtype)
        return self.with_constant(y + correction).reshape(hidden_states.shape)

    @torch.no_grad()
    def compared(self, x: Tensor, *choice: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clusters [n], sparse output and what that lacks of the dense one, of hidden states [n, H].

        The latter two are float32 [n, H], without the bias of the down projection.
        """
        masks, read = self._masks, list(self.read)
        if masks.everything:
            output = self._neurons(x, None, choice).output.float()
            found = x.new_zeros(len(x), dtype=torch.int64), output, torch.zeros_like(output)
        else:
            self._with_full, ids = True, masks.route(x)
            both = self._neurons(x, ids, choice)
            self._with_full = False
            output = both.output.float() + (masks.cluster_bias + self.bias_shift)[ids]
            output += F.linear(x, self.correction_down.to(x.dtype)) @ self.correction_up.to(x.dtype)
            found = ids, output, both.full.float() - output
        self.read = read
        return found

    def with_constant(self, output: Tensor) -> Tensor:
        """An output with the bias of the down projection, if there is one."""
        constant = self._layer[0].down_bias
        return output if constant is None else output + constant

    def _neurons(self, x: Tensor, ids: Tensor | None, choice: tuple[Tensor, ...]) -> _Found:
        """What the neurons of hidden states [n, H] put out under the masks of clusters [n], or all."""
        layer = self._layer[0]
        if not layer.experts:
            return self._part(x, ids, slice(None), None)
        output, full, left_out = torch.zeros_like(x), torch.zeros_like(x), 0.0
        index, weights = choice
        parts = ExpertChoice(index, weights, layer.experts).parts(layer.intermediate_size)
        for rows, tokens, counts in parts:
            clusters = None if ids is None else ids[tokens]
            own = self._part(x[tokens], clusters, rows, counts.unsqueeze(-1).to(x.dtype))
            output.index_add_(0, tokens, own.output)
            full.index_add_(0, tokens, own.full.detach())
            left_out += own.left_out
        return _Found(output, full, left_out)

    def _part(self, x: Tensor, ids: Tensor | None, neurons: slice, counts: Tensor | None) -> _Found:
        """Of some neurons, whose h counts so many times [n, 1]."""
        layer, rows, masks = self._layer[0], self._rows.some(neurons), self._masks

        def activations_of(rows: Rows) -> Tensor:
            h = rows.activations(x)
            return h if counts is None else h * counts

        full = activations_of(rows)
        whole = full @ rows.down_t if ids is None or self._looks_at_full else full
        if ids is None:
            every = torch.ones_like(full, dtype=torch.bool)
            self._count(every, every if layer.packed else None, every)
            return _Found(whole, whole, 0.0)
        h = full if rows.base is None else activations_of(rows.base)
        with torch.no_grad():
            look = h if rows.look is None else activations_of(rows.look)
            chosen, looked_at = masks.chosen(ids, look, neurons)
            refined = masks.refined(chosen, ids, look, neurons)
            self._count(chosen, looked_at, refined)
        if rows.base is None:
            y = (h * chosen) @ rows.down_t
        else:
            used = torch.where(refined, full, h) * chosen
            y = used @ rows.base.down_t + (used * refined) @ (rows.down_t - rows.base.down_t)
        if not self._looks_at_full:
            return _Found(y, y, 0.0)
        left_out = 0.0
        if self.restored is not None:
            left_out = masks.left_out(chosen, refined, ids, full.detach(), neurons)
        return _Found(y, whole, left_out)

    def _count(self, computed: Tensor, looked_at: Tensor | None, refined: Tensor) -> None:
        """Count masks [n, i] of a call without gradients; float weights have nothing to refine."""
        if torch.is_grad_enabled():
            return
        # Not by sums, which make numbers of 64 bits of the masks first.
        self.read[0] += int(computed.count_nonzero())
        self.read[1] += 0 if looked_at is None else int(looked_at.count_nonzero())
        self.read[2] += int(refined.count_nonzero()) if self._layer[0].packed else 0

    @property
    def _looks_at_full(self) -> bool:
        """Whether what all neurons put out is asked for as well."""
        return self._with_full or self.restored is not None or self.measured is not None


@dataclass(frozen=True)
class _Found:
    """What neurons put out.

    Attributes:
        output: of those that are computed [n, H].
        full: of all [n, H], where it is asked for.
        left_out: Σ e² of the others, over all tokens.
    """

    output: Tensor
    full: Tensor
    left_out: float


def _root_mean_square(values: Tensor) -> Tensor:
    """Of each row of [n, H], float32 [n]."""
    return values.detach().float().square().mean(-1).sqrt()


@torch.no_grad()
def measure_scales(model: Any, modules: dict[int, StudentFFN], windows: Tensor) -> None:
    """Set every student's scales to the medians over the tokens of windows [W, window].

    A median, as the first tokens of a text have states a hundred times as large as others.
    """
    for module in modules.values():
        module.measured = []
    for window in windows.split(1):
        decoder_of(model)(input_ids=window.to(model.device), use_cache=False)
    for module in modules.values():
        if module.measured:
            outputs, inputs = (torch.cat(parts) for parts in zip(*module.measured, strict=True))
            module.output_scale = outputs.median().item()
            module.input_scale = max(inputs.median().item(), 1e-12)
        module.measured = None


@contextmanager
def students_of(
    layers: Sequence[FFNLayer],
    clusters: Mapping[int, LayerClusters],
    rank: int = 0,
    seed: int = 0,
) -> Iterator[dict[int, StudentFFN]]:
    """Patch FFNs whose weights are in memory with students inside the context.

    Args:
        layers: FFNs of a dense model.
        clusters: layer index -> clusters, of these at least.
        rank: of the correction.
        seed: of the correction's start.

    Yields:
        Layer index -> its student.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = {
        layer.index: StudentFFN(layer, clusters[layer.index], rank, generator) for layer in layers
    }
    with calling(layers, [*modules.values()]):
        yield modules


class SparseParts:
    """A sweep's FFNs as students, part by part; a context for :meth:`Sweep.forward` to run parts in.

    Args:
        sweep: of a dense model.
        layers: FFNs that have clusters.
        clusters: layer index -> clusters.

    Attributes:
        running: layer index -> student, of the part that runs.
    """

    def __init__(
        self, sweep: Sweep, layers: Sequence[FFNLayer], clusters: Mapping[int, LayerClusters]
    ) -> None:
        self._layers, self._clusters, self._owned = layers, clusters, sweep.owners(layers)
        self.running: dict[int, StudentFFN] = {}

    @contextmanager
    def __call__(self, number: int) -> Iterator[list[FFNLayer]]:
        """Run a part's FFNs as students inside the context, which gives them."""
        own = [self._layers[position] for position in self._owned[number]]
        with students_of(own, self._clusters) as self.running:
            yield own
        self.running = {}


@contextmanager
def students(
    model: Any, clusters: Mapping[int, LayerClusters], rank: int, seed: int
) -> Iterator[dict[int, StudentFFN]]:
    """Patch a dense model with students inside the context; its parameters need no gradient there.

    Args:
        model: a dense causal language model.
        clusters: layer index -> clusters, for the layers to patch.
        rank, seed: as of :func:`students_of`.

    Yields:
        Layer index -> its student.
    """
    layers = [layer for layer in find_ffn_layers(model, packed=True) if layer.index in clusters]
    with without_gradients(model), students_of(layers, clusters, rank, seed) as modules:
        yield modules


def divergence(
    model: Any,
    modules: dict[int, StudentFFN],
    windows: Tensor,
    dense_states: Tensor | None = None,
) -> Tensor:
    """Mean KL(dense ‖ sparse) over the tokens of windows [W, window], in nats; has a gradient.

    Args:
        model: patched with ``modules``.
        modules: its students, enabled; they are off while the dense model predicts.
        windows: token ids on the model's device.
        dense_states: the dense model's last hidden states [W, window, H]; if None, it runs.
    """
    with torch.no_grad():
        if dense_states is not None:
            own = dense_states.to(device=windows.device, dtype=model.dtype)
            target = output_head(model)(own).float().log_softmax(-1)
        else:
            with _off(modules):
                target = _log_probabilities(model, windows)
    found = _log_probabilities(model, windows)
    return F.kl_div(found, target, reduction="sum", log_target=True) / windows.numel()


def _log_probabilities(model: Any, windows: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    return logits.float().log_softmax(-1)


@contextmanager
def _off(modules: dict[int, StudentFFN]) -> Iterator[None]:
    before = {module: module.enabled for module in modules.values()}
    try:
        for module in before:
            module.enabled = False
        yield
    finally:
        for module, value in before.items():
            module.enabled = value
