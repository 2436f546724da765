"""A server in this process, on a free port, and OpenAI's client for it."""

import copy
import threading
import time
from contextlib import ExitStack, contextmanager

import openai
import pytest
import torch
from helpers import audited, random_cluster_set

from sparse_runtime import sparsify
from sparse_runtime.serve.app import build_app
from sparse_runtime.serve.generation import Generator
from sparse_runtime.serve.served_model import Limits, ServedModel
from sparse_runtime.serve.server import Server, claim_port

CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Running:
    """A server that runs; ``client()`` is OpenAI's, for it."""

    def __init__(self, served, generator, server, url, key):
        self.served, self.generator, self.server, self.url = served, generator, server, url
        self._key = key

    def client(self, **options):
        options = {"api_key": self._key or "none", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def wait_for(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)


@contextmanager
def running(*served, api_key=None):
    generator = Generator()
    for model in served:
        generator.call(model.warm_up)
    bound = claim_port("127.0.0.1", 0)
    app = build_app({model.name: model for model in served}, generator, api_key=api_key)
    started = threading.Event()
    server = Server(app, started=started.set, stop=generator.stop)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    result = Running(served[0], generator, server, url, api_key)
    try:
        assert started.wait(20)
        yield result
    finally:
        server.handle_exit(2, None)
        thread.join(20)
        generator.close()
    assert not thread.is_alive()


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def make_served(tiny_model, chat_tokenizer):
    """A tiny served model; what it generates has no end but its length."""

    def make(name="tiny", *, prompt=None, answer=64, reuse=True, density=0.4, error=None):
        model = copy.deepcopy(tiny_model)
        model.generation_config.eos_token_id = None
        clusters = random_cluster_set(model, density)
        if error is not None:  # what a build found of each layer
            clusters.measured = audited(error)
        sparsify(model, clusters)
        limits = Limits.of(model, prompt=prompt, answer=answer)
        return ServedModel(name, model, chat_tokenizer, limits, reuse=reuse)

    return make


@pytest.fixture
def serving():
    """Start servers that end with the test."""
    with ExitStack() as stack:
        yield lambda *served, **options: stack.enter_context(running(*served, **options))


@pytest.fixture
def expected(tiny_model, chat_tokenizer):
    """The greedy answer to a prompt by ``generate`` itself, of the same sparse model."""
    model = copy.deepcopy(tiny_model)
    model.generation_config.eos_token_id = None
    sparsify(model, random_cluster_set(model, 0.4))

    def answer(prompt, tokens):
        ids = chat_tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        return chat_tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    return answer
