"""The command on the demo model: 200 answers of eight clients, memory, and the rate."""

import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import torch

from sparse_runtime import fast_attention, sparsify
from sparse_runtime.cli.generation import generate_text
from sparse_runtime.eval.latency.shapes import random_clusters
from sparse_runtime.generation import Sampling, Session, encode_messages
from sparse_runtime.models import load_model

pytestmark = pytest.mark.slow

QUESTIONS = [f"Tell me about the number {number} in a few words." for number in range(25)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo model with random sets of density 0.4, and the folder of these."""
    folder = tmp_path_factory.mktemp("demo") / "clusters"
    model, tokenizer = load_model("demo", dtype=torch.bfloat16)
    clusters = random_clusters(model, density=0.4)
    clusters.save_pretrained(folder)
    return fast_attention(sparsify(model, clusters)), tokenizer, folder


@pytest.fixture(scope="module")
def server(demo):
    """Its client and its process."""
    command = (
        sys.executable,
        "-P",
        "-m",
        "sparse_runtime",
        "serve",
        "demo",
        "--port",
        "0",
        "--strict",
    )
    with subprocess.Popen(
        (*command, "--clusters", demo[2]), stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+/v1", lines)):
                lines += process.stderr.readline()
                assert process.poll() is None, lines
            assert "30 of 30 FFN layers run sparse on cpu" in lines
            client = openai.OpenAI(base_url=found[0], api_key="none", max_retries=0, timeout=600)
            yield client, psutil.Process(process.pid)
        finally:
            process.kill()


def generated(model, tokenizer, question, tokens):
    """What ``generate`` does, from the prompt's first token."""
    return generate_text(
        model,
        Session(model, tokenizer),
        encode_messages(tokenizer, [{"role": "user", "content": question}]),
        "sparse",
        max_new_tokens=tokens,
        sampling=Sampling(do_sample=False),
    )


def ask(client, question, tokens, **options):
    return client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": question}],
        max_completion_tokens=tokens,
        temperature=0,
        **options,
    )


def test_answers_are_those_of_one_by_one_and_memory_is_flat(demo, server):
    model, tokenizer, _ = demo
    client, process = server
    expected = {}
    for question in QUESTIONS:
        expected[question] = generated(model, tokenizer, question, 12)
    for question in QUESTIONS[:5]:
        ask(client, question, 12)

    def one(number):
        question = QUESTIONS[number % len(QUESTIONS)]
        answer = ask(client, question, 12)
        text = answer.choices[0].message.content
        same_cost = abs(answer.usage.cost_share - expected[question]["cost_share"]) < 1e-5
        return text == expected[question]["text"] and same_cost, process.memory_info().rss

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(200)))
    assert [same for same, _ in results] == [True] * 200
    sizes = [size for _, size in results]
    print(f"resident memory {sizes[0] / 2**20:.1f} to {max(sizes) / 2**20:.1f} MiB")
    assert max(sizes) < 1.02 * sizes[0]


def test_the_server_decodes_as_fast_as_generate(demo, server):
    """Tokens/s after the first, interleaved."""
    model, tokenizer, _ = demo
    client, _ = server
    rates = {"generate": [], "server": []}
    for question in QUESTIONS[:9]:
        run = generated(model, tokenizer, question, 48)
        rates["generate"].append(run["tokens_per_second"])
        times, usage = [], None
        for chunk in ask(client, question, 48, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                times.append(time.perf_counter())
        rates["server"].append((usage.completion_tokens - 1) / (times[-1] - times[0]))
    medians = {name: statistics.median(found[1:]) for name, found in rates.items()}
    print({name: [round(rate, 1) for rate in found] for name, found in rates.items()}, medians)
    assert medians["server"] >= 0.95 * medians["generate"]
