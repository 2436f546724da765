"""Files on disk: whole or not there, whoever writes at the same time, with modes by the umask."""

import json
import math
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_runtime.errors import OutputFolderError
from sparse_runtime.files import (
    atomic_folder,
    atomic_path,
    cache_folder,
    copy_file,
    is_temporary,
    remove_leftovers,
    write_json,
    write_output,
    write_tensors,
    write_text,
)


def test_threads_that_write_one_path_never_tear_it(tmp_path):
    path, errors, stop = tmp_path / "shared.txt", [], threading.Event()
    write_text(path, "0" * 50_000)

    def write(digit):
        try:
            for _ in range(100):
                write_text(path, digit * 50_000)
        except Exception as error:
            errors.append(error)

    def read():
        while not stop.is_set():
            text = path.read_text()
            if len(text) != 50_000 or len(set(text)) != 1:
                errors.append(f"torn: {len(text)} characters, {set(text)}")

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=write, args=(str(n),)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert errors == []
    assert [file.name for file in tmp_path.iterdir()] == ["shared.txt"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "text")
        write_json(tmp_path / "json", {})
        write_tensors(tmp_path / "tensors", {"a": torch.ones(2)}, {"one": "key"})
        copy_file(tmp_path / "tensors", tmp_path / "copy")
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == mode, file.name
    assert torch.equal(load_file(tmp_path / "copy")["a"], torch.ones(2))


def test_an_error_inside_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")

    def interrupted():
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    with pytest.raises(OutputFolderError, match="could not be written"):
        write_text(tmp_path / "a" / "below-a-file", "text")


def test_leftovers_of_killed_processes_go_and_files_in_use_stay(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        left = tmp_path / ".a.0123456789abcdef.tmp"
        left.write_text("half")
        long_ago = time.time() - 7200
        os.utime(left, (long_ago, long_ago))
        users = tmp_path / ".notes.tmp"
        users.write_text("mine")
        os.utime(users, (long_ago, long_ago))
        assert is_temporary(temporary)
        remove_leftovers(tmp_path)
        assert not left.exists()
        assert users.exists()
        temporary.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole"


def test_output_goes_through_symlinks(tmp_path):
    file, link, dangling = (tmp_path / name for name in ("file", "link", "dangling"))
    file.write_text("old")
    link.symlink_to(file)
    dangling.symlink_to(tmp_path / "deep" / "new")
    for path in (link, dangling):
        write_output(path, "text")
        assert path.is_symlink()
        assert path.read_text() == "text"
    assert file.read_text() == (tmp_path / "deep" / "new").read_text() == "text"
    # An artifact's files stand for themselves: those of the Hub's cache are links to what others use.
    write_text(link, "own")
    assert not link.is_symlink()
    assert file.read_text() == "text"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_output_into_pipes_and_devices(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
        reader.start()
        write_output(path, "text")
        reader.join()
    assert got == ["text"] * 2
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    # A terminal of our own: no test may put a file in the place of the machine's devices.
    master, terminal = os.openpty()
    write_output(Path(os.ttyname(terminal)), "text")
    assert os.read(master, 99) == b"text"
    assert stat.S_ISCHR(os.stat(os.ttyname(terminal)).st_mode)
    os.close(master)
    os.close(terminal)
    source, sink = os.pipe()
    os.close(source)
    with pytest.raises(OutputFolderError, match="Broken pipe"):
        write_output(Path(f"/dev/fd/{sink}"), "text")
    os.close(sink)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc here")
@pytest.mark.parametrize("place", ["file", "pipe"])
def test_output_to_what_is_printed_to(tmp_path, place):
    """Between what is printed before and after, in a file too."""
    link = tmp_path / "stdout"
    link.symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    code = (
        "import sys; from pathlib import Path; from sparse_runtime.files import write_output\n"
        "print('before'); write_output(Path(sys.argv[1]), 'text\\n'); print('after')"
    )
    command = [sys.executable, "-c", code, str(link)]
    if place == "pipe":
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        with open(tmp_path / "out", "w") as file:
            subprocess.run(command, stdout=file, check=True)
        text = (tmp_path / "out").read_text()
    assert text == "before\ntext\nafter\n"
    assert link.is_symlink()


def test_json_is_json(tmp_path):
    value = {"a": [math.nan, -math.inf, (1.5, {"b": math.inf})]}
    write_json(tmp_path / "a", value)
    text = (tmp_path / "a").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == {"a": [None, None, [1.5, {"b": None}]]}


def test_metadata_that_would_be_written_in_random_order(tmp_path):
    with pytest.raises(AssertionError, match="random order"):
        write_tensors(tmp_path / "t", {"a": torch.ones(2)}, {"b": "1", "c": "2"})


def test_cache_folder(monkeypatch, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("other platforms have other rules")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sparse_runtime"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sparse_runtime"
    assert not cache_folder().exists()


def test_writers_in_several_processes(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sparse_runtime.files import write_text\n"
        "for n in range(50): write_text(Path(sys.argv[1]), sys.argv[2] * 9999)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "shared")]
    processes = [subprocess.Popen([*command, digit]) for digit in "12"]
    assert [process.wait() for process in processes] == [0, 0]
    text = (tmp_path / "shared").read_text()
    assert (len(text), len(set(text))) == (9999, 1)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "file").write_text("whole")
        (temporary / "inside" / "file").chmod(0o600)  # as safetensors leaves it
        assert not path.exists()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((path / "inside" / "file").stat().st_mode) == 0o666 & ~umask
    assert (path / "inside" / "file").read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ZeroDivisionError), atomic_folder(empty) as temporary:
        (temporary / "file").write_text(str(1 / 0))
    assert not any(empty.iterdir())
    with atomic_folder(empty) as temporary:
        (temporary / "file").write_text("whole")
    assert (empty / "file").read_text() == "whole"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "new"]


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, words in (
        (tmp_path / "file", "is a file; expected a new or empty folder"),
        (tmp_path, "exists and holds file; choose a new or empty folder"),
    ):
        with pytest.raises(OutputFolderError, match=words), atomic_folder(path):
            raise AssertionError("not reached")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    below = tmp_path / "file" / "below"
    with pytest.raises(OutputFolderError, match="could not be written"), atomic_folder(below):
        raise AssertionError("not reached")
