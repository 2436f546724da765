"""Conversations that go on: what is kept changes the time, not the text."""

import pytest
import torch
from helpers import make_tiny_model, random_cluster_set

from sparse_runtime import cost_report, dense, reset_cost, sparsify
from sparse_runtime.errors import ConfigError
from sparse_runtime.generation import (
    Prompt,
    Sampling,
    Session,
    context_length,
    encode_messages,
    encode_text,
)


@pytest.fixture
def model(tiny_model):
    tiny_model.generation_config.eos_token_id = None
    return sparsify(tiny_model, random_cluster_set(tiny_model, 0.4))


@pytest.fixture
def session(model, tiny_tokenizer):
    return Session(model, tiny_tokenizer)


def prompt(*ids):
    return Prompt(torch.tensor([ids]), chat=True)


def tokens(tokenizer, answer):
    return tokenizer(answer.text, add_special_tokens=False)["input_ids"]


def generated(model, prompt, new, **options):
    with torch.inference_mode():
        ids = model.generate(
            prompt.ids, attention_mask=torch.ones_like(prompt.ids), max_new_tokens=new, **options
        )
    return ids[0, prompt.length :].tolist()


def test_answers_are_those_of_generate(model, session, tiny_tokenizer):
    asked = prompt(5, 9, 2, 7, 1, 3)
    shown = []
    answer = session.answer(asked, max_new_tokens=8, show=shown.append)
    expected = generated(model, asked, 8, do_sample=False)
    assert answer.text == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(shown) == answer.text
    assert (answer.prompt_tokens, answer.reused_tokens, answer.new_tokens) == (6, 0, 8)
    assert answer.ended == "length"
    assert len(answer.step_seconds) == 7
    assert answer.tokens_per_second == pytest.approx(7 / sum(answer.step_seconds))


def test_sampling_is_transformers_own(model, session, tiny_tokenizer):
    asked = prompt(5, 9, 2, 7, 1, 3)
    options = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    sampling = Sampling(**options, repetition_penalty=1.2, seed=3)
    torch.manual_seed(3)
    expected = generated(model, asked, 8, do_sample=True, repetition_penalty=1.2, **options)
    text = session.answer(asked, max_new_tokens=8, sampling=sampling).text
    assert text == tiny_tokenizer.decode(expected, skip_special_tokens=True)
    greedy = session.answer(asked, max_new_tokens=8).text
    assert text != greedy
    # What is not given is as the model's generation config says.
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    torch.manual_seed(0)
    expected = generated(model, asked, 8)
    text = session.answer(asked, max_new_tokens=8).text
    assert text == tiny_tokenizer.decode(expected, skip_special_tokens=True) != greedy
    off = session.answer(asked, max_new_tokens=8, sampling=Sampling(temperature=0)).text
    assert off == session.answer(asked, max_new_tokens=8, sampling=Sampling(do_sample=False)).text
    assert off == greedy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_sample": True, "temperature": 0}, "do_sample is on, and temperature is 0"),
        ({"do_sample": False, "top_p": 0.5}, "top_p is 0.5, but do_sample is off"),
        ({"do_sample": False, "temperature": 0.5}, "temperature is 0.5, but do_sample is off"),
        ({"temperature": 0, "top_k": 5}, "top_k is 5, but temperature is 0"),
    ],
)
def test_sampling_that_contradicts_itself(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


def test_a_conversation_runs_new_tokens_only(model, session, tiny_tokenizer):
    first = prompt(*range(20, 40))
    reset_cost(model)
    answer = session.answer(first, max_new_tokens=6)
    said = generated(model, first, 6)
    longer = prompt(*range(20, 40), *said, 11, 12, 13, 14)
    reset_cost(model)
    again = session.answer(longer, max_new_tokens=5)
    assert again.reused_tokens == 25  # the last token of an answer is not run
    report, layers = cost_report(model), 3
    assert (report.sparse_tokens + report.dense_tokens) / layers == 5 + 4
    assert (answer.reused_tokens, again.new_tokens) == (0, 5)
    # Where all is dense, keeping changes nothing.
    with dense(model):
        fresh = Session(model, tiny_tokenizer)
        fresh.answer(first, max_new_tokens=6)
        longer = prompt(*range(20, 40), *generated(model, first, 6), 11, 12, 13, 14)
        kept = fresh.answer(longer, max_new_tokens=5)
        assert kept.reused_tokens == 25
        assert kept.text == Session(model, tiny_tokenizer).answer(longer, max_new_tokens=5).text


def test_a_prompt_that_differs_keeps_what_is_common(model, session, tiny_tokenizer):
    session.answer(prompt(*range(20, 40)), max_new_tokens=6)
    other = prompt(*range(20, 30), *range(60, 70))
    with dense(model):
        kept = session.answer(other, max_new_tokens=6)
        fresh = Session(model, tiny_tokenizer).answer(other, max_new_tokens=6)
    assert kept.reused_tokens == 10
    assert kept.text == fresh.text
    assert session.answer(prompt(*range(70, 90)), max_new_tokens=6).reused_tokens == 0
    # The same again: its end is run as a prompt, not as a decode step.
    assert session.answer(prompt(*range(70, 90)), max_new_tokens=6).reused_tokens == 17
    session.forget()
    assert session.answer(prompt(*range(70, 90)), max_new_tokens=6).reused_tokens == 0


@pytest.mark.parametrize("window", [8, 64])
def test_sliding_windows_are_kept_where_they_can_be(tiny_tokenizer, window):
    model = make_tiny_model(sliding_window=window)
    model.generation_config.eos_token_id = None
    session = Session(model, tiny_tokenizer)
    session.answer(prompt(*range(20, 40)), max_new_tokens=6)
    said = generated(model, prompt(*range(20, 40)), 6)
    # Longer: as it is. Other: cut, which a full window cannot be.
    for asked, reused in (
        (prompt(*range(20, 40), *said, 11, 12, 13), 25),
        (prompt(*range(20, 30), *range(60, 80)), 0 if window == 8 else 10),
    ):
        answer = session.answer(asked, max_new_tokens=6)
        assert answer.reused_tokens == reused
        assert answer.text == Session(model, tiny_tokenizer).answer(asked, max_new_tokens=6).text


def test_an_answer_ends_by_stop_strings_end_tokens_and_from_outside(model, session, tiny_tokenizer):
    asked = encode_text(tiny_tokenizer, "alpha beta")
    whole = session.answer(asked, max_new_tokens=12)
    stop = next(symbol for symbol in whole.text if symbol.isprintable() and symbol != "�")
    stopped = session.answer(asked, max_new_tokens=12, stop=[stop])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.ended == "end"
    assert stopped.new_tokens < 12
    calls = iter([False, False, True])
    cut = session.answer(asked, max_new_tokens=12, interrupted=lambda: next(calls))
    assert (cut.ended, cut.new_tokens) == ("interrupted", 3)
    model.generation_config.eos_token_id = list(range(260))
    at_once = session.answer(asked, max_new_tokens=12)
    assert (at_once.ended, at_once.new_tokens, at_once.text) == ("end", 0, "")
    assert at_once.tokens_per_second is None


def test_an_error_on_the_way_drops_what_is_kept(model, session, tiny_tokenizer):
    asked = prompt(*range(20, 40))
    expected = session.answer(asked, max_new_tokens=6).text

    def broken(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.answer(asked, max_new_tokens=6, show=broken)
    answer = session.answer(asked, max_new_tokens=6)
    assert (answer.reused_tokens, answer.text) == (0, expected)


def test_the_context_is_the_most(model, session, tiny_tokenizer):
    assert context_length(model) == 512
    answer = session.answer(prompt(*[7] * 509), max_new_tokens=100)
    assert answer.new_tokens == 3
    with pytest.raises(
        ConfigError, match="the prompt has 512 tokens, and the model's context holds"
    ):
        session.answer(prompt(*[7] * 512), max_new_tokens=100)


def test_prompts_that_are_none(tiny_tokenizer):
    for text in ("a\udcff", "\ud800"):
        with pytest.raises(ConfigError, match="no text at character"):
            encode_text(tiny_tokenizer, text)
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        encode_messages(tiny_tokenizer, [{"role": "user", "content": "x"}])
