"""Needles: where they are hidden, and what a model is credited with."""

import re

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime import sparsify
from sparse_runtime.errors import ConfigError, DataError
from sparse_runtime.eval.long.needle import (
    Answer,
    Needle,
    compare_needles,
    find_needles,
    make_needles,
)
from sparse_runtime.eval.quality.artifact_quality import EVALUATION
from sparse_runtime.eval.quality.forwards import dense_prompts

CHAT = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }} [assistant] {% endfor %}"


@pytest.fixture
def filler(tiny_tokenizer):
    text = "".join(f"Line {number} of the text. " for number in range(300))
    return torch.tensor(tiny_tokenizer(text)["input_ids"])


def needles_of(tokenizer, filler, **changes):
    options = {"lengths": (300, 500), "depths": (0.0, 0.5, 1.0), "repeats": 2, "seed": 3}
    return make_needles(tokenizer, filler, **(options | changes))


@pytest.mark.parametrize("template", [None, CHAT])
def test_needles_are_where_they_should_be(tiny_tokenizer, filler, template, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    needles = needles_of(tiny_tokenizer, filler)
    assert [(n.length, n.depth) for n in needles] == [
        (length, depth) for length in (300, 500) for depth in (0.0, 0.5, 1.0) for _ in range(2)
    ]
    for needle in needles:
        total = len(needle.prompt) + len(needle.answer)
        assert needle.length - 8 <= total <= needle.length
        prompt = tiny_tokenizer.decode(needle.prompt)
        answer = tiny_tokenizer.decode(needle.answer)
        number = re.fullmatch(r" (\d{5})", answer).group(1)
        city = re.search(r"The secret number of (\w+) is$", prompt).group(1)
        told = f"The secret number of {city} is {number}."
        assert prompt.count(told) == 1
        assert f"What is the secret number of {city}?" in prompt
        assert prompt.count("<s>") == (template is not None)  # as the template writes it
        assert ("[assistant]" in prompt) == (template is not None)
        before, after = prompt.split(told)
        lines = [len(re.findall(r"ine \d", part)) for part in (before, after)]
        assert lines[0] / sum(lines) == pytest.approx(needle.depth, abs=0.15)
    assert len({tuple(needle.prompt.tolist()) for needle in needles}) == len(needles)
    again = needles_of(tiny_tokenizer, filler)
    assert all(torch.equal(a.prompt, b.prompt) for a, b in zip(needles, again, strict=True))


def test_what_does_not_fit(tiny_tokenizer, filler):
    with pytest.raises(ConfigError, match="a needle prompt of 100 tokens has no room"):
        needles_of(tiny_tokenizer, filler, lengths=(100,))
    with pytest.raises(DataError, match="has 50 tokens; expected the longest needle prompt, 500"):
        needles_of(tiny_tokenizer, filler[:50])


def test_credit_is_that_of_generate(tiny_model, tiny_tokenizer, filler):
    """Greedy answers are found, with a dense prompt and sparse decode steps as at run time."""
    (made,) = needles_of(tiny_tokenizer, filler, lengths=(300,), depths=(0.5,), repeats=1)
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), prefill="dense", max_sparse_tokens=1)
    prompt = made.prompt[None]
    written = tiny_model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False,
        min_new_tokens=4, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    answer = written.sequences[0, len(made.prompt) :]
    expected = sum(
        step[0].log_softmax(-1)[token].item()
        for step, token in zip(written.logits, answer, strict=True)
    )
    from sparse_runtime import unsparsify

    unsparsify(tiny_model)
    sparsify(tiny_model, random_cluster_set(tiny_model, 0.4), config=EVALUATION)
    right = Needle(300, 0.5, made.prompt, answer)
    wrong = Needle(300, 0.5, made.prompt, answer.flip(0) + 1)
    passes = []
    found = find_needles(
        tiny_model, [right, wrong], passes.append, lambda n: dense_prompts(tiny_model, n)
    )
    assert [one.found for one in found] == [True, False]
    assert found[0].log_probability == pytest.approx(expected, rel=1e-3)
    assert found[1].log_probability < found[0].log_probability
    assert passes == [1, 1]
    every = find_needles(tiny_model, [right], passes.append)
    assert every[0].log_probability != pytest.approx(expected, rel=1e-3)


def test_by_length_and_depth():
    needles = [Needle(n, d, torch.zeros(1), torch.zeros(1)) for n in (8, 16) for d in (0, 1)] * 2
    dense = [Answer(True, -1.0)] * 8
    sparse = [Answer(needle.length == 8, -2.0 - needle.depth) for needle in needles]
    rows = compare_needles(needles, dense, sparse)
    assert [(row["length"], row["depth"], row["prompts"]) for row in rows] == [
        (8, 0, 2), (8, 1, 2), (8, None, 4), (16, 0, 2), (16, 1, 2), (16, None, 4),
    ]  # fmt: skip
    assert [row["found"]["sparse"] for row in rows] == [1, 1, 1, 0, 0, 0]
    assert rows[5]["found"]["difference"] == -1
    assert rows[2]["log_probability"]["difference"] == -1.5
    assert rows[2]["log_probability"]["difference_error"] == pytest.approx((1 / 3) ** 0.5 / 2)
