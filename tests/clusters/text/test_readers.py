"""Files as people bring them: read by what they hold, or refused in one line that says what to do."""

import bz2
import gzip
import json
import lzma
import os
import threading
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from sparse_runtime.clusters.text import parse_source, token_stream
from sparse_runtime.errors import ConfigError, DataError

RECORDS = [{"text": "one, ä", "id": 1}, {"text": 'two "2"\nlines', "id": 2}]
EXPECTED = 'one, ä\n\ntwo "2"\nlines'
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def read(tmp_path, tiny_tokenizer, monkeypatch):
    """Write a file and read it as a source, in its folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, content=None, options="", max_tokens=None, **further):
        if content is not None:
            (tmp_path / name).write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        source = parse_source(f"{name}{options}")
        ids = token_stream(source, tiny_tokenizer, max_tokens=max_tokens, split="train", **further)
        return tiny_tokenizer.decode(ids, skip_special_tokens=True)

    return run


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def zstandard(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


FORMS = {
    "lines.jsonl": lines(*RECORDS),
    "lines.JSONL": lines(*RECORDS),
    "lines.ndjson": "\n" + lines(*RECORDS).replace("\n", "\r\n\r\n"),
    "lines.json": lines(*RECORDS),
    "array.json": json.dumps(RECORDS),
    "array.jsonl": "\n" + json.dumps(RECORDS, indent=2) + "\n",
    "table.csv": 'text,id\n"one, ä",1\n"two ""2""\nlines",2\n',
    "table.tsv": 'text\tid\none, ä\t1\n"two ""2""\nlines"\t2\n',
    "plain.txt": EXPECTED,
    "plain.RAW": EXPECTED.replace("\n", "\r\n"),
    "plain": EXPECTED,
    "lines": lines(*RECORDS),
    "array": json.dumps(RECORDS),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "bom"])
def test_form_is_told_by_extension_or_content(read, name, mark):
    assert read(name, mark + FORMS[name].encode()) == EXPECTED


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard)],
)
@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "table.csv", "plain.txt"])
def test_compressed(read, name, suffix, pack):
    packed = pack(FORMS[name].encode())
    assert read(name + suffix, packed) == EXPECTED
    assert read(name, packed) == EXPECTED  # the suffix is lost
    with pytest.raises(DataError, match=r"is damaged: .*fetch or compress it anew"):
        read(name + suffix, packed[:-9])


def test_columnar_files_and_folders_of_shards(read, tmp_path):
    table = pyarrow.Table.from_pylist(RECORDS)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "README.md").write_text("about")
    for number in range(2):
        part = table.slice(number, 1)
        pyarrow.parquet.write_table(part, tmp_path / "shards" / f"{number} [a].parquet")
    pyarrow.parquet.write_table(table, tmp_path / "renamed")
    with pyarrow.ipc.new_stream("stream.arrow", table.schema) as writer:
        writer.write_table(table)
    before = sorted(tmp_path.rglob("*"))
    for name in ("shards", "shards/0 [a].parquet", "renamed", "stream.arrow"):
        assert EXPECTED.startswith(read(name))
        assert "one" in read(name)
    assert read("shards") == read("renamed") == read("stream.arrow") == EXPECTED
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "shards" / "more.csv").write_text("text\nx\n")
    with pytest.raises(
        DataError, match="folder with csv, parquet files; expected files of one kind"
    ):
        read("shards")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder with no files"):
        read("empty")
    with pytest.raises(DataError, match=r"gzip around parquet.*decompress it"):
        read("x.parquet.gz", gzip.compress((tmp_path / "renamed").read_bytes()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.html", "<p>x", r"a.html is a .html file; .*extract its text"),
        ("page", "<!DOCTYPE html><p>x", "page is HTML"),
        ("a.PDF", b"%PDF-1.7", "convert it to text"),
        ("a.txt", b"%PDF-1.7", "is a PDF document"),
        ("a.docx", b"PK\3\4", "convert it to text"),
        ("a.md", b"PK\3\4", "zip archive or an office document"),
        ("a.pkl", b"\x80\x04x", "export the text"),
        ("a", b"\x80\x04x", "is a pickle"),
        ("a.tar.gz", gzip.compress(b"x", mtime=0), "is a .tar file.*unpack it"),
        ("a.txt", b"abc\0", r"binary data \(byte 3 is 0\)"),
        ("a.txt", "text".encode("utf-16"), "UTF-16 text.*convert it to UTF-8"),
        ("a.txt", b"line\nab\xff", "line 2 is not UTF-8 text: byte 7 is 0xff"),
        ("a.txt", BOM + b"x" * 70_000 + b"\n\xe4", "line 2 is not UTF-8 text: byte 70004 is 0xe4"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1 is not UTF-8 text: byte 10"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', "line 3 is not JSON: Expecting value at column"),
        ("a.json", '{"text":\n "a",}', "line 2 is not JSON"),
        ("a.json", '[{"text": "a"}, {"text"', "record 2 is not JSON"),
        ("a.json", '[{"text": "a"}] x', "more text after its array: 'x'"),
        ("a.json", "[" * 50_000, "record 1 is not JSON"),
        ("a.jsonl", '"a"', "line 1 is of type str; expected an object"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', r"line 2 .*surrogate pair, U\+D800"),
        ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}', "line 2 has a list under 'text'.*,key=text"),
        ("a.jsonl", '{"text": 3}', "line 1 has a number under 'text'"),
        ("a.jsonl", '{"a": 1}\n{"b": null}', "none of the 2 records.*they have a, b: .*,key=A"),
        ("a.csv", "text,id\na,1\na,b,c\n", "line 3 has 3 fields; expected 2.*text, id"),
        ("a.csv", 'text,id\na,1\n"b,2\nc,3\n', "line 3 is not CSV: a quote of the record that begins"),
        ("a.csv", 'text,id\n"a"b,1\n', "line 2 is not CSV: ',' expected after '\"'; quote the whole"),
        ("a.tsv", 'text\tid\n"a\t1\nb\t2\n', "line 2 is not CSV: a quote of the record that begins"),
        ("a.csv", '"text,id\na,1\n', "line 1 is not CSV: a quote of the record that begins"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "'{' follows after record 1; expected a comma"),
        ("a.json", '[{"text": "a"},,{"text": "b"}]', "record 2 is not JSON"),
        ("a.json", '[,{"text": "a"}]', "record 1 is not JSON"),
        ("a.json", '[{"text": "a"},]', "record 2 is not JSON"),
        ("a.json", '[{"text": "a"}', "the file ends after record 1; expected a comma or the array's"),
        ("a.json", '[{"text": "a"}]]', "more text after its array: ']'"),
        ("a.json", "[", "record 1 is not JSON"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.arrow", b"x" * 99, "cannot be read as arrow"),
        ("a.csv", "", "holds no text"),
        ("a.jsonl", "\n", "holds no text"),
    ],
)  # fmt: skip
def test_refused_in_one_line(read, name, content, message, capfd):
    with pytest.raises(DataError, match=message) as caught:
        read(name, content)
    assert "\n" not in str(caught.value)
    assert name.partition(".tar")[0] in str(caught.value)
    assert not capfd.readouterr().err  # datasets' own logs


@pytest.mark.parametrize("between", [",", " ,\n", "\n" * 70_000 + ","], ids=["", "space", "far"])
def test_arrays_in_any_layout(read, between):
    records = [{"text": "x" * 40_000}, {"text": "b"}, {"text": "c" * 200_000}]
    text = "[" + between.join(map(json.dumps, records)) + " " * 70_000 + "]\n" + " " * 70_000
    assert read("a.json", text) == "\n\n".join(record["text"] for record in records)
    with pytest.raises(DataError, match="holds no text"):
        read("a.json", "[" + " " * 70_000 + "]")


def test_missing_text_counts_as_empty_and_is_said_once(read):
    records = [{"text": None}, {"text": "one"}, {"id": 3}, {"text": ""}, {"text": "two"}]
    records += [{"messages": []}, {"text": []}]
    with pytest.warns(UserWarning, match="5 of the 7 records.*count as empty") as caught:
        assert read("a.jsonl", lines(*records)) == "one\n\ntwo"
    assert len(caught) == 1
    with (
        pytest.raises(DataError, match="holds no text"),
        pytest.warns(UserWarning, match="2 of the 2"),
    ):
        read("a.jsonl", lines({"text": None}, {"text": ""}))


def test_a_field_that_never_comes_ends_early(read):
    many = lines(*[{"body": "x"}] * 3000)
    with pytest.raises(DataError, match="none of the 1000 records"):
        read("a.jsonl", many + "no JSON")


def test_words_that_mean_null_elsewhere_are_text_in_csv(read):
    assert read("a.csv", "text\nNA\n007\nnull\n" + "x" * 200_000 + "\n") == (
        "NA\n\n007\n\nnull\n\n" + "x" * 200_000
    )


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.csv", "big.txt", "big.jsonl.gz"])
def test_no_more_is_read_than_is_asked_for(read, tmp_path, name):
    record = {"text": "word " * 400}
    content = {
        "big.jsonl": lambda: lines(record) * 10_000,
        "big.jsonl.gz": lambda: gzip.compress((lines(record) * 10_000).encode(), 1),
        "big.json": lambda: "[" + ", ".join([json.dumps(record)] * 10_000) + "]",
        "big.csv": lambda: "text\n" + (record["text"] + "\n") * 10_000,
        "big.txt": lambda: record["text"] * 10_000,
    }[name]()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    del content
    tracemalloc.start()
    assert read(name, max_tokens=1000).startswith("word word")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # of 20 MB


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lines(*RECORDS).encode(), EXPECTED),
        (EXPECTED.encode(), EXPECTED),
        (gzip.compress(lines(*RECORDS).encode(), mtime=0), EXPECTED),
        (b"", "A pipe is read once"),
        (b"PAR1", "in a pipe; expected a file"),
    ],
)
def test_pipes_are_read_as_they_come(read, tmp_path, content, expected):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    writer.start()
    try:
        if len(content) > 9:
            assert read("pipe") == expected
        else:
            with pytest.raises(DataError, match=expected):
                read("pipe")
    finally:
        writer.join()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.csv", ""), ("x.html", ""), ("./gone", ", which is written as a path"),
        ("/gone/too", ", which is written as a path"), ("~/gone.d", ", which is written as a path"),
        ("..", None), ("here/gone", ", taken for a path since there is a folder 'here' here"),
        ("here/gone:x", ", taken for a path since there is a folder 'here' here"),
        ("corpora/wiki/train", ", which is no Hub id owner/name"),
        ("corpora/wiki/", ", which is no Hub id owner/name"),
        ("corpora/", ", which is no Hub id owner/name"),
        ("corpora//wiki", ", which is no Hub id owner/name"),
        ("runs/12:30/train", ", which is no Hub id owner/name"),
        ("corpora\\wiki", ", which is written as a path"), ("my notes", ", which is no valid Hub id"),
    ],
)  # fmt: skip
def test_evident_paths_never_go_to_the_hub(read, tmp_path, name, reason, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    (tmp_path / "here").mkdir()
    match = "is a folder" if reason is None else rf"'{reason}: there is no such file$"
    with pytest.raises(DataError, match=match):
        read(name)


@pytest.mark.parametrize("name", ["owner/name", "owner/name:config", "c4", "wikitext2"])
def test_data_sets_are_asked_of_the_hub(read, name, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append(a) or RECORDS)
    assert read(name) == EXPECTED
    assert asked[0][0].count("/") == 1


@pytest.mark.parametrize("text", ["A text,\nwith lines", "word, " * 900, "x" * 5000, "a\0b"])
def test_a_text_in_place_of_a_name(read, text):
    with pytest.raises(DataError, match=r"is a text of .* Write the text to a file") as caught:
        read(text)
    assert len(str(caught.value)) < 250


def test_options_that_cannot_apply(read, tmp_path):
    with pytest.raises(ConfigError, match="plain text, but key=a is given"):
        read("a.txt", "x", ",key=a")
    for name in ("a.txt", "self"):
        with pytest.raises(ConfigError, match="has no splits, but split=test"):
            read(name, None, ",split=test")
    for name in ("pydoc", "self"):
        with pytest.raises(ConfigError, match="has no fields, but key="):
            read(name, None, ",key=text")


def test_tokens_that_the_model_does_not_know(read, tiny_model):
    assert read("a.txt", "xyz", model=tiny_model) == "xyz"
    tiny_model.resize_token_embeddings(80)
    with pytest.raises(DataError, match=r"has token 89 \('z'\).*embedding has 80 rows.*260 tokens"):
        read("a.txt", "xyz", model=tiny_model)
