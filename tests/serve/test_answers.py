"""OpenAI's client: what it is answered is what ``generate`` says, whoever asks at the same time."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import needs_library

PROMPTS = ["alpha", "beta beta", "gamma?", "delta is the fourth", "e", "zeta (6)"]


def chat_text(prompt):
    return f"[user]{prompt}[assistant]"


def ask(client, prompt, tokens=12, **options):
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": prompt}],
        max_completion_tokens=tokens,
        temperature=0,
        **options,
    )


def test_chat_completion_and_stream_say_what_generate_says(serving, make_served, expected):
    client = serving(make_served()).client()
    text = expected(chat_text("alpha"), 12)
    answer = ask(client, "alpha")
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    chunks = list(ask(client, "alpha", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == text
    assert sum(map(bool, pieces)) > 3  # it came in pieces
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] == "length"
    assert chunks[-1].usage == answer.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(client, "alpha", stream=True))


def test_completion_continues_text_and_token_ids(serving, make_served, expected, chat_tokenizer):
    client = serving(make_served()).client()
    ids = chat_tokenizer("beta").input_ids
    text = expected("beta", 9)
    for prompt in ("beta", ["beta"], ids):
        options = {"model": "tiny", "prompt": prompt, "max_tokens": 9, "temperature": 0}
        answer = client.completions.create(**options)
        assert answer.choices[0].text == text
        assert answer.usage.prompt_tokens == len(ids)
        stream = client.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == text


@needs_library
def test_usage_has_the_cost_share(serving, make_served):
    server = serving(make_served())
    usage = ask(server.client(), "alpha", tokens=20).usage
    prompt = len(chat_text("alpha"))
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 20)
    assert usage.total_tokens == prompt + 20
    assert 0.3 < usage.cost_share < 0.95
    # The last of 20 tokens is not fed to the model any more.
    assert usage.dense_share == pytest.approx(prompt / (prompt + 19), abs=1e-5)
    # Each request is counted by itself.
    assert ask(server.client(), "alpha", tokens=20).usage == usage


def test_a_stop_string_ends_the_answer_before_it(serving, make_served, expected):
    server = serving(make_served())
    client, text = server.client(), expected(chat_text("alpha"), 40)
    stop = text[6:9]
    until = text[: text.index(stop)]
    answer = ask(client, "alpha", tokens=40, stop=["no such text", stop])
    assert answer.choices[0].message.content == until
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
    chunks = list(ask(client, "alpha", tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == until
    # What begins like one and is none is shown in the end.
    unfinished = text[-2:] + "\0"
    assert ask(client, "alpha", tokens=40, stop=unfinished).choices[0].message.content == text


def test_an_end_token_ends_the_answer(serving, make_served, expected, chat_tokenizer):
    served = make_served()
    text = expected(chat_text("alpha"), 12)
    letter = next(character for character in text if character.isascii())
    end = chat_tokenizer.convert_tokens_to_ids(letter)
    served.model.generation_config.eos_token_id = end
    served.end_tokens = frozenset([end])
    answer = ask(serving(served).client(), "alpha")
    assert answer.choices[0].message.content == text[: text.index(letter)]
    assert answer.choices[0].finish_reason == "stop"
    assert 1 < answer.usage.completion_tokens < 12


def test_sampling_follows_its_seed(serving, make_served, expected):
    client = serving(make_served()).client()

    def drawn(**options):
        answer = client.completions.create(
            model="tiny", prompt="alpha", max_tokens=24, temperature=1.5, **options
        )
        return answer.choices[0].text

    assert drawn(seed=7) == drawn(seed=7)
    assert len({drawn(seed=7), drawn(seed=8), drawn(), drawn()}) == 4
    assert drawn(seed=7, top_p=1e-6) == expected("alpha", 24)  # nothing left to draw from
    # A seed does not outlast its request, and greedy ones draw nothing.
    greedy = {"model": "tiny", "prompt": "alpha", "max_tokens": 24, "temperature": 0}
    assert client.completions.create(**greedy).choices[0].text == expected("alpha", 24)


def test_eight_clients_at_once_are_answered_as_one_by_one(serving, make_served, expected):
    """200 requests of both kinds, half of them streamed."""
    server = serving(make_served())
    texts = {prompt: expected(chat_text(prompt), 12) for prompt in PROMPTS}
    plain = {prompt: expected(prompt, 12) for prompt in PROMPTS}

    def one(number):
        client, prompt = clients[number % 8], PROMPTS[number % len(PROMPTS)]
        stream = number % 2 == 0
        if number % 5 == 0:
            answer = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=12, temperature=0, stream=stream
            )
            parts = answer if stream else [answer]
            return "".join(part.choices[0].text for part in parts) == plain[prompt]
        answer = ask(client, prompt, stream=stream)
        if not stream:
            return answer.choices[0].message.content == texts[prompt]
        return "".join(c.choices[0].delta.content or "" for c in answer) == texts[prompt]

    clients = [server.client() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(200))) == [True] * 200
    assert server.generator.jobs == 0


def test_two_models_are_served_by_name(serving, make_served):
    server = serving(make_served(), make_served("other", density=0.9))
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    options = {"prompt": "alpha", "max_tokens": 16, "temperature": 0}
    tiny = client.completions.create(model="tiny", **options)
    other = client.completions.create(model="other", **options)
    assert tiny.model == "tiny"
    assert other.model == "other"
    assert tiny.choices[0].text != other.choices[0].text
