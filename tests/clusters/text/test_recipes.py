"""What a recipe stands for, texts that Python brings along, and windows of several domains."""

import sysconfig

import pytest
import torch

from sparse_runtime.clusters.text import (
    calibration_windows,
    expand_recipes,
    parse_source,
    recipes,
    token_stream,
)
from sparse_runtime.errors import ConfigError, DataError


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(recipes, "why_unreachable", lambda: "the Hub cannot be reached")


def test_general_is_of_what_a_machine_has_without_the_hub(unreachable):
    recipe = expand_recipes(["general,weight=3", "mine.txt"])
    assert [source.name for source in recipe.sources] == ["self", "stdlib", "pydoc", "mine.txt"]
    assert sum(source.weight for source in recipe.sources[:3]) == pytest.approx(3)
    assert "as the Hub cannot be reached" in recipe.note
    assert "stdlib" in recipe.note


def test_general_is_of_all_kinds_from_the_hub(monkeypatch):
    monkeypatch.setattr(recipes, "why_unreachable", lambda: None)
    recipe = expand_recipes(["general"])
    names = [source.name for source in recipe.sources]
    assert {"wikitext2", "c4", "self"} < set(names)
    assert len(names) == len(set(names)) > 5
    assert sum(source.weight for source in recipe.sources) == pytest.approx(1)


def test_without_a_recipe_sources_are_what_they_are(monkeypatch):
    def asked():
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(recipes, "why_unreachable", asked)
    recipe = expand_recipes(["pydoc", parse_source("self,weight=2")])
    assert [(source.name, source.weight) for source in recipe.sources] == [
        ("pydoc", 1),
        ("self", 2),
    ]
    assert recipe.note is None


@pytest.mark.parametrize("option", ["key=text", "split=train"])
def test_a_recipe_has_no_fields_and_no_splits(option):
    with pytest.raises(ConfigError, match="'general'"):
        parse_source(f"general,{option}")


def test_a_recipe_is_no_text_to_judge_by(tiny_tokenizer):
    with pytest.raises(DataError, match="'general' stands for several texts"):
        token_stream(parse_source("general"), tiny_tokenizer, max_tokens=10, split="test")


class TestStandardLibrary:
    def read(self, tokenizer, split="train", max_tokens=4000):
        source = parse_source("stdlib")
        return tokenizer.decode(
            token_stream(source, tokenizer, max_tokens=max_tokens, split=split),
            skip_special_tokens=True,
        )

    def test_is_source_code_and_always_the_same(self, tiny_tokenizer):
        text = self.read(tiny_tokenizer)
        assert text == self.read(tiny_tokenizer)
        assert text.count("def ") + text.count("import ") > 5

    def test_splits_are_apart(self, tiny_tokenizer):
        assert self.read(tiny_tokenizer)[:200] not in self.read(tiny_tokenizer, "test", 20_000)
        with pytest.raises(ConfigError, match="'stdlib' has no split 'valid'"):
            self.read(tiny_tokenizer, "valid")

    def test_may_not_have_been_installed(self, tiny_tokenizer, monkeypatch, tmp_path):
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(DataError, match=r"'stdlib'.*no source code.*Name some files"):
            self.read(tiny_tokenizer)


def test_windows_of_every_domain_are_spread_evenly(tmp_path, tiny_tokenizer):
    for letter, count in (("a", 800), ("b", 400)):
        text = "".join(f"{letter}{number:04}" for number in range(count))
        (tmp_path / f"{letter}.txt").write_text(text)
    sources = [parse_source(str(tmp_path / name)) for name in ("a.txt", "b.txt", "b.txt")]
    text = calibration_windows(sources, tiny_tokenizer, max_tokens=None, window=100)
    assert text.names == (sources[0].name, sources[1].name, f"{sources[1].name} (2)")
    assert len(text.domains) == len(text.windows)
    # The first and the last tenth alike: half of them a's, a quarter each of the others.
    tenth = len(text.windows) // 10
    for part in (slice(0, tenth), slice(-tenth, None)):
        counts = text.domains[part].bincount(minlength=3).tolist()
        assert counts == pytest.approx([tenth / 2, tenth / 4, tenth / 4], abs=1.01)
    letters = tiny_tokenizer("ab", add_special_tokens=False)["input_ids"]
    for window, domain in zip(text.windows, text.domains, strict=True):
        assert letters[min(int(domain), 1)] in window
    again = calibration_windows(sources, tiny_tokenizer, max_tokens=None, window=100, seed=1)
    assert not torch.equal(text.windows, again.windows)


def test_every_second_text_of_self_begins_with_given_words(tiny_model, tiny_tokenizer):
    ids = token_stream(
        parse_source("self"), tiny_tokenizer, max_tokens=9000, split="train", model=tiny_model
    )
    text = tiny_tokenizer.decode(ids, skip_special_tokens=True)
    assert sum(words in text for words in ("class ", "import ", "Problem: ", "Chapter 1")) >= 2
