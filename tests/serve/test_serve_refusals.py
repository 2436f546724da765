"""What is wrong with a request is said in OpenAI's words, and the server goes on."""

import json

import httpx2 as httpx
import openai
import pytest


@pytest.fixture
def server(serving, make_served):
    return serving(make_served(prompt=40, answer=32))


def post(server, body, path="/v1/chat/completions", **options):
    content = json.dumps(body) if isinstance(body, dict) else body
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    return httpx.post(server.url + path, content=content, headers=headers, timeout=60)


def chat(**changes):
    fields = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    return {name: value for name, value in (fields | changes).items() if value is not None}


def refused(response, status, *words, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    if param:
        assert error["param"] == param
    return error


@pytest.mark.parametrize(
    ("changes", "param", "word"),
    [
        ({"messages": None}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            None,
            "text",
        ),
        ({"model": None}, "model", "required"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "many"}, "max_tokens", "integer"),
        ({"max_tokens": 33}, "max_tokens", "at most 32"),
        ({"max_completion_tokens": 33}, None, "at most 32"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 2}, "n", "1"),
        ({"logprobs": True}, "logprobs", "False"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "at most 0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "not known"),
        ({"messages": [{"role": "user", "content": "a" * 60}]}, None, "at most 40"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"arguments": "{"}]}]},
            None,
            "",
        ),
    ],
)
def test_a_wrong_field_is_named(server, changes, param, word):
    refused(post(server, chat(**changes)), 400, word, param=param)
    assert post(server, chat()).status_code == 200


def test_what_changes_nothing_is_taken(server):
    plain = post(server, chat()).json()["choices"]
    fields = {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}}
    fields |= {"user": "somebody", "metadata": {}, "logprobs": False, "tools": []}
    assert post(server, chat(**fields)).json()["choices"] == plain


def test_bodies_that_are_no_requests(server):
    for body in ("{", b"\xff\xfe", "", "[]", "3", '{"model": "tiny"', "null"):
        refused(post(server, body), 400)
        refused(post(server, body, "/v1/completions"), 400)
    assert "not valid JSON" in refused(post(server, "{"), 400)["message"]
    refused(post(server, {}, "/v1/nothing"), 404, "/v1/nothing")
    refused(httpx.get(server.url + "/v1/completions"), 405)
    assert post(server, chat()).status_code == 200


def test_a_body_is_read_up_to_a_size(server, monkeypatch):
    monkeypatch.setattr("sparse_runtime.serve.app._MOST_BODY_BYTES", 1000)
    refused(post(server, " " * 1001), 413, "1000 bytes")
    refused(post(server, iter([b"  "] * 501)), 413)  # without a length in the header
    assert post(server, chat()).status_code == 200


def test_an_unknown_model_is_not_found(server):
    error = refused(post(server, chat(model="gpt-5")), 404, "'gpt-5'", "tiny", param="model")
    assert error["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'"):
        server.client().models.retrieve("gpt-5")


def test_lengths_are_limited(server, make_served, serving):
    client = server.client()
    with pytest.raises(openai.BadRequestError, match=r"61 tokens; .* at most 40") as error:
        client.completions.create(model="tiny", prompt="a" * 61)
    assert error.value.code == "context_length_exceeded"
    # An answer whose length is not named is as long as the server lets it be, and fits the context.
    answer = client.completions.create(model="tiny", prompt="a")
    assert answer.usage.completion_tokens == 32
    roomy = serving(make_served(answer=600)).client()  # the model's context is 512
    with pytest.raises(openai.BadRequestError, match="context length is 512"):
        roomy.completions.create(model="tiny", prompt="a" * 500, max_tokens=20)
    answer = roomy.completions.create(model="tiny", prompt="a" * 500)
    assert answer.usage.total_tokens == 512
    for prompt in ("", [], [1, 260], [-1]):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt=prompt)


def test_the_key_is_asked_for(serving, make_served):
    server = serving(make_served(), api_key="secret")
    assert post(server, chat(), headers={"authorization": "Bearer secret"}).status_code == 200
    assert len(server.client().models.list().data) == 1
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        error = refused(post(server, chat(), headers=header), 401, "API key")
        assert error["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()
    # Probes have none.
    assert httpx.get(server.url + "/health").status_code == 200
    assert httpx.get(server.url + "/metrics").status_code == 200


def test_a_model_without_a_template_has_completions_only(serving, make_served, tiny_tokenizer):
    served = make_served()
    served.tokenizer = tiny_tokenizer
    server = serving(served)
    refused(post(server, chat()), 400, "no chat template", "/v1/completions")
    assert server.client().completions.create(model="tiny", prompt="a", max_tokens=2)
    served.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        refused(post(server, chat()), 400, "roles must alternate")
    finally:
        served.tokenizer.chat_template = None


def test_a_failing_answer_does_not_end_the_server(server, monkeypatch, caplog):
    model = server.served.model

    def broken(*args, **kwargs):
        raise RuntimeError("out of something")

    generate = model.generate
    monkeypatch.setattr(model, "generate", broken)
    refused(post(server, chat()), 500, "RuntimeError")
    assert "out of something" in caplog.text
    with pytest.raises(openai.APIError, match="RuntimeError"):
        list(server.client().chat.completions.create(**chat(stream=True)))
    monkeypatch.setattr(model, "generate", generate)
    assert post(server, chat()).status_code == 200
    outcomes = httpx.get(server.url + "/metrics").text
    assert 'endpoint="/v1/chat/completions",model="tiny",outcome="failed"} 2.0' in outcomes
