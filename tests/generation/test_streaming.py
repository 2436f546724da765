"""Text as its tokens come: the same as decoded at once, whole characters, no stop strings."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparse_runtime.errors import ConfigError
from sparse_runtime.generation import StopStrings, TextStream


@pytest.fixture(scope="module")
def metaspace():
    """A tokenizer of words with their leading space, as SentencePiece's; a text's first has none."""
    words = ["▁The", "▁cat", "▁sat", ".", "<unk>", "<|end|>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|end|>"
    )


def streamed(tokenizer, tokens, **options):
    pieces = []
    stream = TextStream(tokenizer, pieces.append, **options)
    for token in tokens:
        stream.put(token)
        if stream.stopped:
            break
    stream.end()
    assert "".join(pieces) == stream.text
    assert "" not in pieces
    return pieces, stream


@pytest.mark.parametrize("text", ["alpha beta", "naïve — ½ 😀 語", "a\n\n b\t", "�", ""])
def test_pieces_are_whole_characters_of_the_text(tiny_tokenizer, text):
    tokens = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(text.encode())  # one token per byte
    pieces, _ = streamed(tiny_tokenizer, tokens)
    assert pieces == list(text)


def test_bytes_that_are_no_character_are_shown_in_the_end(tiny_tokenizer):
    tokens = tiny_tokenizer("a😀", add_special_tokens=False)["input_ids"]
    pieces, _ = streamed(tiny_tokenizer, tokens[:-1])
    assert pieces[0] == "a"
    assert set("".join(pieces[1:])) == {"�"}
    # And do not hold up what follows.
    pieces, stream = streamed(tiny_tokenizer, [tokens[1]] * 9 + tokens[:1])
    assert stream.text.endswith("�a")
    assert len(pieces) > 2


def test_words_keep_the_spaces_in_front(metaspace):
    pieces, _ = streamed(metaspace, [0, 1, 2, 3])
    assert pieces == ["The", " cat", " sat", "."]
    pieces, _ = streamed(metaspace, [1, 5, 2], context=[0])
    assert "".join(pieces).startswith(" cat")  # it continues a text
    pieces, _ = streamed(metaspace, [5])
    assert pieces == []


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("beta",), "alpha "),
        (("a b", "ha"), "alp"),  # the one that comes first
        (("nothing", "gammb"), "alpha beta gamma"),
        (("gamma!",), "alpha beta gamma"),  # begun, and not ended
        (("a",), ""),
        (("ph", "pha"), "al"),
        ((), "alpha beta gamma"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_strings_are_cut_off(stop, expected, size):
    text = "alpha beta gamma"
    stops = StopStrings(stop)
    shown = ""
    for start in range(0, len(text), size):
        shown += stops.feed(text[start : start + size])
        assert expected.startswith(shown)
    assert shown + stops.rest() == expected
    assert (stops.found is None) == (expected == text)


def test_a_stop_string_ends_a_stream(tiny_tokenizer):
    tokens = tiny_tokenizer("alpha beta", add_special_tokens=False)["input_ids"]
    _, stream = streamed(tiny_tokenizer, tokens, stop=["a b"])
    assert stream.stopped
    assert stream.text == "alph"
    with pytest.raises(ConfigError, match="a stop string is empty"):
        TextStream(tiny_tokenizer, stop=["x", ""])
