"""``chat`` on a tiny model: commands, history, Ctrl-C, and what is run again."""

import copy
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from helpers import random_cluster_set

from sparse_runtime.cli import chat as chat_module
from sparse_runtime.generation import encode_messages
from sparse_runtime.models import load_model

CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def folders(tiny_model, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    tiny_model.generation_config.eos_token_id = 257
    # Answers of letters: what is decoded and encoded again has the same tokens.
    with torch.no_grad():
        tiny_model.lm_head.weight[64:] = 0
        tiny_model.lm_head.weight[:32] = 0
    tiny_model.save_pretrained(tmp_path / "chat")
    random_cluster_set(tiny_model, 0.4).save_pretrained(tmp_path / "clusters")
    return tmp_path / "chat", tmp_path / "clusters"


@pytest.fixture
def talk(run, folders, tmp_path, monkeypatch):
    """Have lines said; exit code, output, errors and turns."""

    def call(*lines, options=(), data=None):
        data = "".join(f"{line}\n" for line in lines).encode() if data is None else data
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        file = tmp_path / "turns.json"
        file.unlink(missing_ok=True)
        command = ["chat", folders[0], "--clusters", folders[1], "--json", file]
        code, out, err = run(*command, "--dtype", "float32", "--max-new-tokens", 6, *options)
        return code, out, err, json.loads(file.read_text())["turns"] if file.exists() else None

    return call


def test_a_conversation_goes_on(talk, folders):
    code, out, err, turns = talk("alpha", "beta", "gamma")
    assert code == 0, err
    tokenizer = load_model(str(folders[0]), dtype=torch.float32)[1]
    messages = []
    for text, turn in zip(("alpha", "beta", "gamma"), turns, strict=True):
        messages.append({"role": "user", "content": text})
        assert turn["prompt_tokens"] == encode_messages(tokenizer, messages).length
        assert turn["text"] in out
        messages.append({"role": "assistant", "content": turn["text"]})
    # All that was run before is kept: the prompt and the answer but its last token.
    assert turns[0]["reused_tokens"] == 0
    for before, turn in pairwise(turns):
        assert turn["reused_tokens"] == before["prompt_tokens"] + before["new_tokens"] - 1
    for turn in turns:
        run_here = turn["prompt_tokens"] - turn["reused_tokens"] + turn["new_tokens"] - 1
        assert turn["sparse_tokens"] + turn["dense_tokens"] == run_here
        assert f"of {turn['prompt_tokens']} prompt tokens run" in out
        assert turn["sparse_tokens"] > 0
    assert out.count("tokens/s after the first") == 3


def test_dense_and_sparse_by_the_turn(talk):
    code, out, err, turns = talk("alpha", "/dense", "beta", "/sparse", "gamma")
    assert code == 0, err
    assert [turn["variant"] for turn in turns] == ["sparse", "dense", "sparse"]
    assert turns[1]["sparse_tokens"] == 0
    assert turns[1]["dense_reasons"] == {"dense()": turns[1]["dense_tokens"]}
    assert turns[1]["reused_tokens"] > 0
    assert "dense from now on; sparse " in out
    assert "dense not timed yet" in out
    last = out.strip().split("\n")[-1]
    assert last.count("tokens/s over") == 2
    assert "tokens/s over 10 tokens, dense " in last


def test_reset_begins_anew(talk):
    code, _, err, turns = talk("alpha", "/reset", "alpha", options=("--system", "be brief"))
    assert code == 0, err
    assert turns[1]["reused_tokens"] == 0
    assert turns[1]["text"] == turns[0]["text"]
    assert turns[1]["prompt_tokens"] == turns[0]["prompt_tokens"]
    without = talk("alpha")[3]
    assert without[0]["prompt_tokens"] < turns[0]["prompt_tokens"]


def test_each_answer_is_drawn_anew(talk):
    options = ("--temperature", 5)
    turns = talk("alpha", "/reset", "alpha", options=options)[3]
    assert turns[0]["text"] != turns[1]["text"]
    again = talk("alpha", "/reset", "alpha", options=options)[3]
    assert [turn["text"] for turn in again] == [turn["text"] for turn in turns]


def test_commands(talk, tiny_tokenizer):
    code, out, err, turns = talk("/help", "", "  ", "/nothing", "//x", "/quit", "never said")
    assert code == 0
    assert chat_module.HELP in out
    assert "there is no command /nothing; /help lists them" in err
    (turn,) = turns
    expected = len(tiny_tokenizer("[user]/x</s>[assistant]", add_special_tokens=False)["input_ids"])
    assert turn["prompt_tokens"] == expected


def test_ctrl_c_stops_an_answer_and_not_the_chat(talk, monkeypatch):
    whole = talk("alpha", "beta")[3]
    shown = chat_module.show_text
    presses = iter([signal.SIGINT])

    def press(text):
        shown(text)
        if (number := next(presses, None)) is not None:
            signal.raise_signal(number)

    monkeypatch.setattr(chat_module, "show_text", press)
    before = signal.getsignal(signal.SIGINT)
    code, out, err, turns = talk("alpha", "beta")
    assert signal.getsignal(signal.SIGINT) is before
    assert code == 0, err
    assert (turns[0]["ended"], turns[0]["new_tokens"]) == ("interrupted", 1)
    assert whole[0]["text"].startswith(turns[0]["text"])
    assert "stopped; sparse: one token, so no rate" in out
    assert turns[1]["ended"] == "length"
    assert turns[1]["reused_tokens"] == turns[0]["prompt_tokens"]

    # A second one does not wait for the token.
    def press_twice(text):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat_module, "show_text", press_twice)
    code, out, err, turns = talk("alpha", "/help")
    assert code == 0
    assert "the answer that was stopped is not part of the conversation" in err
    assert chat_module.HELP in out
    assert turns == []


def test_messages_that_cannot_be_answered(talk):
    code, _, err, turns = talk("alpha", "b" * 600, "gamma")
    assert code == 0
    assert "and the model's context holds 512" in err
    assert "/reset begins anew" in err
    assert len(turns) == 2
    assert turns[1]["prompt_tokens"] < 100  # without what was refused
    code, _, err, turns = talk(data=b"al\xffpha\n")
    assert code == 2
    assert "standard input is no UTF-8: byte 0xff at 2" in err
    assert turns is None


def test_what_cannot_chat_is_refused(talk, folders):
    (folders[0] / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    code, _, err, turns = talk("alpha")
    assert code == 0
    assert "chat template cannot be applied to the prompt (TemplateError: no users)" in err
    assert turns == []
    (folders[0] / "chat_template.jinja").unlink()
    code, _, err, _ = talk("alpha")
    assert code == 2
    assert "has no chat template, so the model knows no conversations" in err


def test_what_is_typed_in_a_terminal(folders):
    """Through a pseudo-terminal: a prompt, Ctrl-C while nothing runs, and Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-P", "-m", "sparse_runtime", "chat", str(folders[0])]
    command += ["--clusters", str(folders[1]), "--dtype", "float32", "--max-new-tokens", "6"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = b""

    def wait_for(text, meanwhile=lambda: None):
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096)
            else:
                meanwhile()
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait_for(b"> ")
        # The prompt is printed a moment before the line is read, and what comes in between is lost.
        wait_for(b"> ", lambda: process.send_signal(signal.SIGINT))
        os.write(ours, b"alpha\n")
        wait_for(b"tokens/s after the first")
        wait_for(b"> ")
        os.write(ours, b"\x04")
        process.wait(timeout=30)
    finally:
        process.kill()
        os.close(ours)
    assert process.returncode == 0
