"""Calls of several threads and processes, and ``dense``, which is of one thread."""

from __future__ import annotations

import copy
import os
import threading
import warnings

import pytest
import torch
from helpers import logits, needs_library, random_cluster_set

from sparse_runtime import cost_report, dense, sparse_modules, sparsify
from sparse_runtime.eval.latency.shapes import random_clusters

pytestmark = needs_library


@pytest.mark.parametrize("looks", [False, True], ids=["without looks", "with looks"])
def test_two_threads_of_mixed_calls(tiny_model, looks):
    """200 calls each of every size and mode, padded or not, some in dense(): none wrong."""
    if looks:
        clusters = random_clusters(tiny_model, density=0.5, looked=0.5, num_clusters=6, rank=4)
    else:
        clusters = random_cluster_set(tiny_model, 0.4)
    sparsify(tiny_model, clusters)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(0, 256, (1 + n % 3, 1 + n % 9), generator=generator) for n in range(27)]

    def run(number):
        ids = inputs[number % 27]
        mask = torch.ones_like(ids)
        mask[0, : ids.shape[1] // 2] = number % 2
        if number % 5 == 0:
            with dense(tiny_model):
                return logits(tiny_model, ids, attention_mask=mask)
        if number % 7 == 0:
            return tiny_model.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
        return logits(tiny_model, ids, attention_mask=mask)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [run(number) for number in range(200)]
        wrong, ready = [], threading.Barrier(2)

        def work(order):
            torch.set_num_threads(1)
            ready.wait()
            for number in order:
                found = run(number)
                # A row of zeros in a mask gives NaN in some attention implementations.
                if not torch.equal(found.nan_to_num(), expected[number].nan_to_num()):
                    wrong.append(number)

        workers = [
            threading.Thread(target=work, args=(order,))
            for order in (range(200), range(199, -1, -1))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(threads)
    assert wrong == []


def test_dense_is_of_the_thread_that_enters_it(sparse_model):
    sparse = logits(sparse_model)
    inside, done = threading.Event(), threading.Event()

    def hold():
        with dense(sparse_model):
            inside.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(20)
    try:
        assert torch.equal(logits(sparse_model), sparse)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dense_contexts_end_in_any_order(sparse_model, compiled):
    call = torch.compile(sparse_model, backend="eager") if compiled else sparse_model
    sparse = logits(call)
    first, second = dense(sparse_model), dense(sparse_model)
    first.__enter__()
    second.__enter__()
    everything = logits(call)
    assert not torch.allclose(everything, sparse, atol=1e-3)
    first.__exit__(None, None, None)
    assert torch.equal(logits(call), everything)
    second.__exit__(None, None, None)
    assert torch.equal(logits(call), sparse)


def test_dense_may_end_in_another_thread(sparse_model):
    expected = logits(sparse_model)
    contexts = []

    def enter():
        contexts.append(dense(sparse_model))
        contexts[0].__enter__()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    contexts[0].__exit__(None, None, None)
    assert torch.equal(logits(sparse_model), expected)
    with dense(sparse_model):
        assert not torch.equal(logits(sparse_model), expected)


def test_dense_is_that_of_one_model(sparse_model):
    other = copy.deepcopy(sparse_model)
    sparse = logits(other)
    with dense(sparse_model):
        assert torch.equal(logits(other), sparse)
        assert not torch.equal(logits(sparse_model), sparse)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork(sparse_model):
    """As torch itself: a child may compute with one thread."""
    expected = logits(sparse_model)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has threads
        child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        same = torch.allclose(logits(sparse_model), expected, atol=1e-5)
        os.write(writing, b"y" if same else b"n")
        os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"y"
    finally:
        os.waitpid(child, 0)


def test_counts_of_dense_tokens_lose_nothing(sparse_model):
    (ffn, *_) = sparse_modules(sparse_model)

    def work():
        with torch.inference_mode():
            for _ in range(3000):
                ffn.count_dense("long call", 1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert cost_report(sparse_model).dense_reasons == {"long call": 9000}
