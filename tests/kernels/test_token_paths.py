"""Choosing a path by measurement: buckets, memory of the answers, damaged files."""

import json
import time

import pytest

from sparse_runtime.kernels.token_paths import PathTable, bucket, fastest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_runtime.kernels.token_paths.cache_folder", lambda: tmp_path)
    return tmp_path / "token_paths.json"


def sleeping(seconds, calls=None):
    def call():
        if calls is not None:
            calls.append(seconds)
        time.sleep(seconds)

    return call


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(1, 1), (2, 2), (3, 4), (32, 32), (33, 64), (64, 64), (65, 256), (4096, 256)],
)
def test_bucket(tokens, size):
    assert bucket(tokens) == size


def test_fastest_wins():
    assert fastest(
        {"torch": sleeping(0.02), "rows": sleeping(0.002), "sparse": sleeping(0.01)}
    ) == ("rows")


def test_slow_calls_are_not_repeated():
    calls = []
    fastest({"torch": sleeping(0.25, calls), "rows": sleeping(0.0)})
    assert len(calls) == 1


def test_answers_are_kept_by_key(cache):
    measured = []

    def candidates(size):
        measured.append(size)
        return {"rows": sleeping(0.0), "torch": sleeping(0.01)}

    table = PathTable(["cpu", 2])
    assert [table.path(n, candidates) for n in (3, 4, 100)] == ["rows"] * 3
    assert measured == [4, 256]
    assert PathTable(["cpu", 2]).path(3, candidates) == "rows"
    assert measured == [4, 256]
    assert PathTable(["cpu", 1]).path(3, candidates) == "rows"
    assert measured == [4, 256, 4]
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("content", ["{", "[1]", '{"[\\"cpu\\", 2]": {"4": "warp"}}'])
def test_damaged_cache_is_measured_anew(cache, content):
    cache.write_text(content)
    table = PathTable(["cpu", 2])
    assert table.path(4, lambda size: {"rows": sleeping(0.0), "torch": sleeping(0.01)}) == "rows"


def test_no_cache_where_none_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    table = PathTable(["cpu", 2])
    assert table.path(4, lambda size: {"rows": sleeping(0.0), "torch": sleeping(0.01)}) == "rows"
