"""Stages of a build: timed, drawn as one bar, and what they say when memory runs out."""

import io
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.clusters.stages import Stages
from sparse_runtime.errors import NotEnoughMemoryError, SparseRuntimeError
from sparse_runtime.progress import SilentProgress


class Bars:
    """Keeps what each bar came to."""

    def __init__(self):
        self.bars = {}

    @contextmanager
    def task(self, description, total):
        bar = self.bars[description] = [0.0, total]

        def advance(units):
            bar[0] += units

        yield advance


def test_one_bar_over_all_stages():
    bars, seconds = Bars(), {}
    stages = Stages(bars, seconds, {"first": 3.0, "second": 5.0, "never": 2.0})
    with stages.all():
        with stages.stage("first"):
            assert bars.bars["build"] == [0.0, 10.0]
        assert bars.bars["build"][0] == pytest.approx(3)
        with stages.stage("unexpected"), stages.task("inner", 4) as advance:
            advance(4)
        assert bars.bars["inner"] == [4, 4]
        assert bars.bars["build"][0] == pytest.approx(3)
        with stages.stage("second"), stages.task("inner", 2) as advance:
            advance(1)
            assert 3 < bars.bars["build"][0] < 8
    assert bars.bars["build"][0] == pytest.approx(10)
    assert set(seconds) == {"first", "unexpected", "second"}
    assert all(value >= 0 for value in seconds.values())


def test_a_stage_moves_the_bar_no_further_than_its_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sparse_runtime.clusters.stages.time.perf_counter", lambda: now[0])
    bars = Bars()
    stages = Stages(bars, {}, {"first": 2.0, "second": 4.0})
    with stages.all():
        with stages.stage("first"):
            now[0] = 4.0  # twice as long as expected
        with stages.stage("second"), stages.task("inner", 2) as advance:
            now[0] = 8.0
            advance(1)
            assert bars.bars["build"][0] == pytest.approx(2 + 4 / 2)
            now[0] = 80.0
            advance(1)
            assert bars.bars["build"][0] == pytest.approx(6)


def test_without_an_estimate_there_is_no_bar_over_all():
    bars = Bars()
    stages = Stages(bars, {})
    with stages.all(), stages.stage("first"), stages.task("inner", 1) as advance:
        advance(1)
    assert set(bars.bars) == {"inner"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_memory_that_runs_out_names_the_stage_and_the_bound(error):
    stages = Stages(SilentProgress(), {})
    with (
        pytest.raises(NotEnoughMemoryError, match=r"'layers' ran out of memory.*memory_mib"),
        stages.stage("layers"),
    ):
        raise error
    assert issubclass(NotEnoughMemoryError, SparseRuntimeError)


def test_other_errors_stay_as_they_are():
    with (
        pytest.raises(RuntimeError, match="shapes"),
        Stages(SilentProgress(), {}).stage("layers"),
    ):
        raise RuntimeError("shapes")


def test_bars_inside_a_bar_leave_a_line():
    written = io.StringIO()
    progress = RichProgress(Console(file=written, force_terminal=False, width=100))
    with progress.task("build", 10) as whole:
        for name in ("one", "two"):
            with progress.task(name, 3) as advance:
                advance(3)
            whole(5)
    with progress.task("after", 1) as advance:
        advance(1)
    lines = [line.strip() for line in written.getvalue().splitlines() if line.strip()]
    assert [line.split()[0] for line in lines] == ["one", "two", "build", "after"]
    assert lines[0].startswith("one 3/3 ")
    assert "10/10" in lines[2]
