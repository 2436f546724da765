"""The C++ library in many threads: torch's pool, Python's threads, and forked processes."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from kernels.cases import TOLERANCE, assert_close, case
from kernels.library import LIBRARY, forced, ops


def in_threads(*works):
    """Run at the same time; raise what any of them raised."""
    errors = []
    start = threading.Barrier(len(works))

    def guarded(work):
        try:
            start.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 3, 64])
def test_results_do_not_depend_on_chance(threads, n):
    """Equal bits in each call: what a part of the work computes does not depend on when it runs."""
    given = case(n, (600, 1000, 9), torch.float32, density=0.3, looks=n == 3)
    with forced(threads=threads):
        results = [ops.cpu_sparse_ffn(*given.arguments) for _ in range(6)]
    assert_close(results[0], given.exact(), 2 * TOLERANCE[torch.float32])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_threads_call_at_once(threads):
    """Scratch memory belongs to the calling thread, counters take what both add."""
    cases = [
        case(n, (70, 131, 4), torch.float32, looks=looks, seed=n)
        for n in range(1, 10)
        for looks in (False, True)
    ]
    router = torch.randn(4, 70, generator=torch.Generator().manual_seed(1))
    weights = cases[0].weights  # the same for all calls

    def calls(given, cluster_counts, row_counts):
        x, _, _, _, sets, ids, activation, *band = given.arguments
        yield ops.cpu_sparse_ffn(x, *weights, sets, ids, activation, *band, row_counts)
        yield ops.cpu_routed_ffn(
            x, *weights, sets, None, router, None, None, cluster_counts, activation, *band,
            row_counts,
        )  # fmt: skip
        yield ops.cpu_dense_ffn(x, *weights, activation)
        yield ops.cpu_linear(x, weights[0], None)

    def counters():
        return torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)

    with forced(threads=threads):
        once, shared = counters(), counters()
        expected = [list(calls(given, *once)) for given in cases]
        wrong = []

        def work(order):
            for i in order:
                for result, single in zip(calls(cases[i], *shared), expected[i], strict=True):
                    if not torch.equal(result, single):
                        wrong.append(i)

        forward = [*range(len(cases))] * 12  # 18 · 12 · 4 calls
        in_threads(lambda: work(forward), lambda: work(forward[::-1]))
    assert not wrong
    for found, single in zip(shared, once, strict=True):
        assert single.all()
        assert torch.equal(found, 24 * single)


def test_counters_lose_nothing():
    """Calls that do little but count."""
    n, calls = 5000, 150
    one, x = torch.ones(1, 1), torch.ones(n, 1)
    cluster_counts, row_counts = torch.zeros(1, dtype=torch.int64), torch.zeros(2).long()
    sets = torch.ones(1, 1, dtype=torch.uint8)

    def work():
        for _ in range(calls):
            ops.cpu_routed_ffn(
                x, one, one, one, sets, None, one, None, None, cluster_counts, "relu", None, None,
                None, row_counts,
            )  # fmt: skip

    with forced(threads=1):
        in_threads(work, work, work)
    assert cluster_counts.tolist() == [3 * calls * n]
    assert row_counts.tolist() == [3 * calls * n, 0]


FORK = """
import os, torch
torch.ops.load_library({library!r})
w = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
ffn = lambda: torch.ops.sparse_runtime.cpu_dense_ffn(w[:3], w, w, w, "silu")
torch.set_num_threads(1)
expected = ffn()
torch.set_num_threads(2)
assert torch.allclose(ffn(), expected, atol=1e-3)  # the pool's threads are running
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(ffn(), expected) and expected.any() else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_the_same_on_one_thread():
    """As with torch's own operations: the pool's threads do not outlive a fork, so it takes one."""
    program = FORK.format(library=str(LIBRARY))
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.split() == ["0"], result.stderr


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_one_openmp_runtime_and_its_threads():
    """The kernels run on torch's own pool, and on as many threads as torch was told to use."""
    program = textwrap.dedent(
        f"""
        import os, re, torch
        torch.set_num_threads(1)
        torch.ops.load_library({str(LIBRARY)!r})
        w = torch.arange(2000 * 50).remainder_(3).sub_(1).float().view(2000, 50)
        data = torch.ones(100_000, dtype=torch.int64)
        results = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            before = len(os.listdir("/proc/self/task"))
            y = torch.ops.sparse_runtime.cpu_dense_ffn(w[:1], w, w, w, "relu")
            torch.ops.sparse_runtime.cpu_read(data)
            print(len(os.listdir("/proc/self/task")) - before)
            results.add(tuple(y[0].tolist()))
            assert y.count_nonzero()
        print(len(results))
        maps = open("/proc/self/maps").read()
        print(len(set(re.findall(r"\\S*/lib(?:g|i)?omp\\d*[^/\\s]*\\.so\\S*", maps))))
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *started_threads, different_results, runtimes = map(int, result.stdout.split())
    assert runtimes == 1
    # One thread: none started. Two: one more. Three: again one more than the pool has.
    assert started_threads == [0, 1, 1]
    assert different_results == 1
