"""The life of answers: clients that leave, chats that grow, figures, memory, the server's end."""

import threading

import httpx2 as httpx
import openai
import psutil
import pytest
import torch
from helpers import needs_library
from test_answers import ask, chat_text

from sparse_runtime.generation.kept_sequence import KeptSequence, common_length

LONG = 400


@pytest.fixture
def steps(monkeypatch):
    """Slow decode steps, counted, and shapes of the ids that the model was given."""

    def follow(served, seconds=0.005):
        seen, forward = [], served.model.forward

        def slow(*args, **kwargs):
            seen.append(kwargs["input_ids"].shape[1])
            threading.Event().wait(seconds)
            return forward(*args, **kwargs)

        monkeypatch.setattr(served.model, "forward", slow)
        return seen

    return follow


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(serving, make_served, steps, stream):
    served = make_served(answer=LONG)
    server = serving(served)
    seen = steps(served)
    body = {"model": "tiny", "prompt": "alpha", "max_tokens": LONG, "stream": stream}
    if stream:
        with httpx.stream("POST", server.url + "/v1/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: {")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/completions", json=body, timeout=0.3)
    server.wait_for(lambda: server.generator.jobs == 0)
    assert ask(server.client(), "beta", tokens=3).usage.completion_tokens == 3
    assert 2 < len(seen) < LONG / 2
    text = httpx.get(server.url + "/metrics").text
    assert 'endpoint="/v1/completions",model="tiny",outcome="left"} 1.0' in text


def test_one_that_leaves_while_waiting_is_never_begun(serving, make_served, steps):
    served = make_served(answer=LONG)
    server = serving(served)
    seen = steps(served)
    first = ask(server.client(), "alpha", tokens=150, stream=True)
    next(iter(first))
    with pytest.raises(openai.APITimeoutError):
        ask(server.client(timeout=0.2), "never begun", tokens=50)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in first)
    assert ask(server.client(), "beta", tokens=3).usage.completion_tokens == 3
    prompts = [length for length in seen if length > 1]
    assert prompts == [len(chat_text("alpha")), len(chat_text("beta"))]


def test_a_growing_chat_is_not_prefilled_again(serving, make_served, steps):
    """Only what is new runs through the model; the answer is that of ``generate`` from the cache."""
    served = make_served()
    server = serving(served)
    client, seen = server.client(), steps(served, 0)
    text = "alpha beta"
    texts, lengths = [], []
    for turn in range(3):
        answer = client.completions.create(model="tiny", prompt=text, max_tokens=10, temperature=0)
        lengths.append((answer.usage.prompt_tokens, seen[0]))
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached == answer.usage.prompt_tokens - seen[0]
        seen.clear()
        texts.append((text, answer.choices[0].text))
        # Token ids of random bytes do not survive being text: ASCII of the answer goes on.
        text = list(served._kept.tokens) + [ord("x") - 33 + turn] * 20
    assert lengths[0][0] == lengths[0][1]
    for prompt, computed in lengths[1:]:
        assert computed == 21  # the last token of the answer, and what is new
        assert prompt > computed
    # The same by hand.
    past = None
    for prompt, expected in texts:
        ids = prompt if isinstance(prompt, list) else served.tokenizer(prompt).input_ids
        ids = torch.tensor([ids])
        with torch.inference_mode():
            output = served.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=10,
                do_sample=False,
                past_key_values=past,
                return_dict_in_generate=True,
            )
        past = output.past_key_values
        new = output.sequences[0, ids.shape[1] :]
        assert served.tokenizer.decode(new, skip_special_tokens=True) == expected


def test_other_requests_leave_no_trace(serving, make_served, expected):
    """Prompts that begin alike, or are the same, are computed whole: nothing of others matters."""
    client = serving(make_served()).client()
    for prompt in ("alpha", "alpha", "alpha beta", "alpha bet", "alp", "alpha"):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert answer.choices[0].text == expected(prompt, 8)
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_without_reuse_a_growing_chat_is_a_prompt_like_others(serving, make_served, expected):
    served = make_served(reuse=False)
    client = serving(served).client()
    client.completions.create(model="tiny", prompt="alpha", max_tokens=8, temperature=0)
    assert served._kept is None


def test_what_a_kept_sequence_is_of_use_for(make_served):
    assert common_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_length([1, 2], [1, 2, 3]) == common_length([1, 2, 3], [1, 2]) == 2
    assert common_length([], [1]) == 0
    model = make_served().model

    def kept():
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.inference_mode():
            output = model.generate(
                ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
            )
        tokens = output.sequences[0].tolist()
        return tokens, KeptSequence(tokens, output.past_key_values, least=4)

    tokens, sequence = kept()
    assert sequence.cache.get_seq_length() == 7  # the last token has not been fed
    assert sequence.fit([*tokens, 9, 9]) == 7
    assert sequence.fit([*tokens[:6], 259 - tokens[6], 9, 9]) == 6  # goes on otherwise: cut
    assert sequence.cache.get_seq_length() == 6
    tokens, sequence = kept()
    for prompt in ([1, 2, 3, 4], [1, 2, 3, 4, 259 - tokens[4]], [9], [1, 2, 3]):
        assert sequence.fit(prompt) == 0
    assert KeptSequence(tokens, None, least=4).fit([*tokens, 9, 9]) == 0


@needs_library
def test_health_and_metrics_tell_what_ran_sparse(serving, make_served):
    server = serving(make_served())
    for _ in range(2):
        usage = ask(server.client(), "alpha", tokens=11).usage
    health = httpx.get(server.url + "/health").json()
    assert health["status"] == "ok"
    assert health["models"]["tiny"]["layers"] == health["models"]["tiny"]["sparse_layers"] == 3
    assert health["models"]["tiny"]["backends"] == ["cpu"]
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"
    }
    prompt = usage.prompt_tokens
    assert values['sparse_runtime_tokens_total{kind="prompt",model="tiny"}'] == 2 * prompt
    assert values['sparse_runtime_tokens_total{kind="answer",model="tiny"}'] == 22
    # Three layers; the last token of an answer is not fed.
    assert values['sparse_runtime_ffn_tokens_total{model="tiny",way="sparse"}'] == 2 * 3 * 10
    assert values['sparse_runtime_ffn_tokens_total{model="tiny",way="dense"}'] == 2 * 3 * prompt
    share = values['sparse_runtime_cost_share{model="tiny"}']
    assert share == pytest.approx(usage.cost_share, abs=1e-5)
    assert values['sparse_runtime_dense_share{model="tiny"}'] == pytest.approx(
        usage.dense_share, abs=1e-5
    )
    assert values['sparse_runtime_tokens_per_second_count{model="tiny"}'] == 2
    assert values['sparse_runtime_audited_prompts_total{model="tiny",way="sparse"}'] == 0


@pytest.mark.filterwarnings("ignore:a prompt is decoded by all neurons")
def test_metrics_tell_what_the_guard_does(serving, make_served):
    served = make_served(error=1e-12)
    server = serving(served)
    ask(server.client(), "alpha beta", tokens=5)
    text = httpx.get(server.url + "/metrics").text
    assert 'sparse_runtime_audited_prompts_total{model="tiny",way="dense"} 1.0' in text
    assert 'sparse_runtime_audited_prompts_total{model="tiny",way="sparse"} 0.0' in text


def test_the_end_of_the_server_ends_open_answers(serving, make_served, steps):
    served = make_served(answer=LONG)
    server = serving(served)
    steps(served)
    stream = iter(ask(server.client(), "alpha", tokens=LONG, stream=True))
    for _ in range(4):
        next(stream)
    failures = []

    def whole():
        with pytest.raises(openai.InternalServerError, match="stopping") as error:
            ask(server.client(), "beta", tokens=LONG)
        failures.append(error.value.status_code)

    waiting = threading.Thread(target=whole)
    waiting.start()
    server.wait_for(lambda: server.generator.jobs == 2)
    server.server.handle_exit(15, None)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(stream)
    waiting.join(20)
    assert failures == [503]


def test_memory_is_flat(serving, make_served):
    """Resident memory of 200 requests: after half of them it does not grow by 2 %."""
    server = serving(make_served())
    client, process, sizes = server.client(), psutil.Process(), []
    for number in range(200):
        ask(client, f"request {number}" * (1 + number % 3), tokens=4, stream=number % 2 == 0)
        if number % 20 == 19:
            sizes.append(process.memory_info().rss)
    assert max(sizes[5:]) < 1.02 * sizes[4]
