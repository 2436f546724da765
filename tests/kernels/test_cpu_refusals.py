"""What the C++ library refuses, and what it says."""

import pytest
import torch
from kernels.cases import case
from kernels.library import ops

GOOD_X = torch.ones(3, 24)
GOOD_W = torch.ones(50, 24)


def routed_arguments(**changes):
    good = {
        "x": GOOD_X,
        "w_gate": GOOD_W,
        "w_up": GOOD_W,
        "w_down_t": GOOD_W,
        "sets": torch.zeros(4, 7, dtype=torch.uint8),
        "router_down": torch.ones(6, 24),
        "router_up": torch.ones(4, 6),
        "router_bias": torch.ones(4),
        "cluster_bias": torch.ones(4, 24),
        "cluster_counts": torch.zeros(4, dtype=torch.int64),
        "activation": "silu",
    }
    assert set(changes) <= set(good)
    return good | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"x": torch.ones(24)}, "x has 1 dimensions"),
        ({"x": torch.ones(3, 25)}, "w_gate has size 24 in dimension 1; expected H = 25"),
        ({"x": torch.ones(24, 3).t()}, "x has stride 3 in its last dimension"),
        ({"x": torch.ones(3, 24).double()}, "x has a dtype other than"),
        ({"w_up": torch.ones(50, 24).bfloat16()}, "w_up does not have dtype of x"),
        ({"w_up": torch.ones(51, 24)}, "w_up has size 51 in dimension 0; expected I = 50"),
        ({"w_down_t": torch.ones(24, 50).t()}, "w_down_t has stride 50 in its last dimension"),
        ({"w_gate": torch.ones(24).expand(50, 24)}, "w_gate has stride 0 between rows"),
        ({"sets": torch.zeros(4, 8, dtype=torch.uint8)}, "sets has size 8"),
        ({"sets": torch.zeros(4, 7)}, "sets does not have dtype uint8"),
        ({"sets": torch.zeros(5, 7, dtype=torch.uint8)}, "router_up has size 4.*expected K = 5"),
        ({"router_down": torch.ones(6, 23)}, "router_down has size 23"),
        ({"router_down": torch.ones(0, 24), "router_up": torch.ones(4, 0)}, "has no rows"),
        ({"router_down": None}, "router_up has size 6 in dimension 1; expected H = 24"),
        ({"router_up": torch.ones(4, 6).half()}, "router_up does not have dtype of x"),
        ({"router_bias": torch.ones(5)}, "router_bias has size 5"),
        ({"router_bias": torch.ones(8)[::2]}, "router_bias is not contiguous"),
        ({"cluster_bias": torch.ones(4, 25)}, "cluster_bias has size 25"),
        ({"cluster_bias": torch.ones(3, 24)}, "cluster_bias has size 3.*expected K = 4"),
        ({"cluster_counts": torch.zeros(4)}, "cluster_counts does not have dtype int64"),
        ({"cluster_counts": torch.zeros(3, dtype=torch.int64)}, "cluster_counts has size 3"),
        (
            {"sets": torch.zeros(0, 7, dtype=torch.uint8), "router_up": torch.ones(0, 6)},
            "there is no cluster",
        ),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    ops.cpu_routed_ffn(*routed_arguments().values())
    with pytest.raises(ValueError, match=message):
        ops.cpu_routed_ffn(*routed_arguments(**changes).values())


@pytest.mark.parametrize("bad_id", [-1, 4, 2**40, -(2**63)])
def test_ids_out_of_range(bad_id):
    sets = torch.zeros(4, 7, dtype=torch.uint8)
    ids = torch.tensor([0, bad_id, 1])
    with pytest.raises(IndexError, match=f"cluster_ids\\[1\\] is {bad_id}; expected 0 <= id < K"):
        ops.cpu_sparse_ffn(GOOD_X, GOOD_W, GOOD_W, GOOD_W, sets, ids, "silu")


def test_other_ops_reject():
    for bad in (torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(3, 1).long()):
        with pytest.raises(ValueError, match="cluster_ids"):
            ops.cpu_sparse_ffn(
                GOOD_X, GOOD_W, GOOD_W, GOOD_W, torch.zeros(4, 7, dtype=torch.uint8), bad, "silu"
            )
    with pytest.raises(ValueError, match="bias has size 3"):
        ops.cpu_linear(GOOD_X, GOOD_W, torch.ones(3))
    with pytest.raises(ValueError, match="weight has size 24"):
        ops.cpu_linear(torch.ones(3, 23), GOOD_W, None)
    with pytest.raises(ValueError, match="data does not have dtype int64"):
        ops.cpu_read(torch.ones(3))
    with pytest.raises(NotImplementedError):
        ops.cpu_linear(GOOD_X.to_sparse(), GOOD_W, None)
    misaligned = torch.frombuffer(bytearray(50 * 24 * 4 + 1), dtype=torch.float32, offset=1)
    with pytest.raises(ValueError, match="weight begins at an address"):
        ops.cpu_linear(GOOD_X, misaligned.view(50, 24), None)


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((3, 33), None, "both or neither"),
        ((3, 33), (4, 33), "correction_up"),
        ((3, 32), (3, 33), "correction_down"),
        ((3, 33), (3, 34), "correction_up"),
    ],
)
def test_corrections_that_do_not_fit(down, up, message):
    given = case(2, (33, 67, 5), torch.float32)
    tensors = [None if shape is None else torch.ones(shape) for shape in (down, up)]
    with pytest.raises(ValueError, match=message):
        ops.cpu_routed_ffn(
            given.x, *given.weights, given.sets, None, torch.ones(5, 33), None, None, None, "silu",
            correction_down=tensors[0], correction_up=tensors[1],
        )  # fmt: skip


def test_weights_not_yet_loaded_are_refused():
    """A meta tensor sends the call to the fakes, whose result is uninitialized memory."""
    given = case(2, (8, 4, 1), torch.float32)
    x, weights = given.x, given.weights
    with pytest.raises(ValueError, match="found cpu and meta"):
        ops.cpu_dense_ffn(x, *weights[:2], weights[2].to("meta"), "silu")
    with pytest.raises(ValueError, match="found cpu and meta"):
        ops.cpu_linear(x, weights[0].to("meta"), None)
    assert ops.cpu_linear(x.to("meta"), weights[0].to("meta"), None).is_meta
