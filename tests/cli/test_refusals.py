"""What the commands refuse: in one line, with the exit code, before anything is loaded."""

import json
import sys
import typing

import pytest
import typer

from sparse_runtime import ClusterSet
from sparse_runtime.cli import app as app_module
from sparse_runtime.cli import (
    bench,
    build,
    console,
    evaluate,
    figures,
    generation,
    long,
    pack,
    plane_studies,
    serve,
    studies,
    texts,
    upcycle,
)
from sparse_runtime.cli.progress import RichProgress
from sparse_runtime.errors import ConfigError, DataError

# What each command needs besides the option under test; nothing of it exists.
NEEDED = {
    "build": ["model", "-o", "OUT"],
    "generate": ["model", "--clusters", "no", "--prompt", "x"],
    "chat": ["model", "--clusters", "no"],
    "serve": ["model", "--clusters", "no", "--port", "0"],
    "eval": ["model", "--clusters", "no"],
    "long": ["model", "--clusters", "no"],
    "paper": ["model"],
    "ablate": ["model"],
    "ingredients": ["model"],
    "pack": ["model", "-o", "OUT"],
    "upcycle": ["model", "-o", "OUT"],
    "rounding": ["model"],
    "ramp": ["model", "--clusters", "no"],
    "tasks": ["model", "--clusters", "no", "--task", "x"],
    "bench": ["model", "--clusters", "no"],
    "tune": ["--shape", "mistral-7b"],
    "inspect": ["no"],
    "report": ["no"],
    "demo": ["-o", "OUT"],
}


def commands():
    return typer.main.get_command(app_module.app).commands


def one_line(err):
    """The error, which is all there is on stderr."""
    bars = ("Writing model shards", "Loading weights")
    lines = [line for line in err.split("\n") if line and not any(bar in line for bar in bars)]
    assert len(lines) == 1, err
    return lines[0]


@pytest.fixture
def nothing_loads(monkeypatch):
    """Whatever is loaded raises: what is refused is to be refused before."""

    def loads(*arguments, **options):
        raise AssertionError("something was loaded")

    loading = (
        build,
        pack,
        upcycle,
        evaluate,
        long,
        generation,
        studies,
        plane_studies,
        serve,
        texts,
        bench,
    )
    for module in loading:
        monkeypatch.setattr(module, "load_model", loads)
    for name in ("random_model", "random_clusters"):
        monkeypatch.setattr(f"sparse_runtime.eval.latency.shapes.{name}", loads)
    monkeypatch.setattr(ClusterSet, "from_pretrained", loads)


def test_every_command_is_known_here():
    assert set(NEEDED) == set(commands())


@pytest.mark.parametrize("name", NEEDED)
def test_numbers_out_of_range_are_refused_before_the_work(run, nothing_loads, name, tmp_path):
    needed = [tmp_path / "out" if word == "OUT" else word for word in NEEDED[name]]
    function = next(
        c.callback
        for c in app_module.app.registered_commands
        if name in (c.name, c.callback.__name__)
    )
    types = typing.get_type_hints(function)
    for option in commands()[name].params:
        kinds = {types.get(option.name), *typing.get_args(types.get(option.name))}
        values = ["-5", "x"] if int in kinds else []
        values += ["nan", "-1", "inf", "x"] if float in kinds else []
        if option.opts[-1] == "--tau":
            values.remove("inf")  # refines no neuron
        for value in values:
            code, _, err = run(name, *needed, option.opts[-1], value)
            message = one_line(err)
            assert code == 2, (option.opts, value, err)
            assert option.opts[-1] in message
            assert "something was loaded" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("eval", "--budgets", "0.5,nan"),
        ("eval", "--budgets", "0.5,1.5"),
        ("eval", "--budgets", "0.5;0.6"),
        ("bench", "--batches", "0"),
        ("bench", "--batches", "1,-2"),
        ("paper", "--clusters", "4,0"),
        ("paper", "--densities", "nan"),
        ("paper", "--layers", "-1"),
        ("ablate", "--percentiles", "1.0"),
        ("ablate", "--sparsities", "0"),
        ("ablate", "--seeds", "-1"),
        ("ablate", "--clusters", "0"),
        ("ingredients", "--seeds", "1,x"),
        ("rounding", "--weights", "4,2"),
        ("long", "--lengths", "0"),
        ("long", "--depths", "0.5,1.5"),
        ("ramp", "--widths", "0,-1"),
    ],
)
def test_lists_out_of_range_are_refused_before_the_work(run, nothing_loads, command, option, value):
    code, _, err = run(command, *NEEDED[command], option, value)
    assert code == 2
    assert one_line(err).startswith(f"error: {option} is ")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4.0 bit", "is '4.0 bit'; expected a share above 0 and at most 1, or bits per FFN weight"),
        ("4.0 bits", "is '4.0 bits'; expected a share"),
        ("0.25bit", "is '0.25bit'; expected a share"),
        ("bits", "is 'bits'; expected a share"),
        ("4bits2", "is '4bits2'; expected a share"),
        ("nan", "is nan; expected a share"),
        ("4", "is 4.0; expected a share above 0 and at most 1, or bits"),
        ("0bits", "is 0bits; expected more than 0bits and at most 16bits"),
        ("-4bits", "is -4bits; expected more than"),
        ("20bits", "is 20bits; expected more than"),
        ("nanbits", "is nanbits; expected more than"),
        ("infbits", "is infbits; expected more than"),
    ],
)
def test_budgets_that_are_neither_shares_nor_bits(run, nothing_loads, tmp_path, value, expected):
    for name in ("build", "eval", "generate", "tasks", "bench", "ingredients"):
        needed = [tmp_path / "out" if word == "OUT" else word for word in NEEDED[name]]
        code, _, err = run(name, *needed, "--budget", value)
        assert code == 2
        assert f"--budget {expected}" in one_line(err)
    code, _, err = run("eval", *NEEDED["eval"], "--budgets", f"0.5,{value}")
    assert code == 2
    said = f"--budgets is '0.5,{value}'; expected numbers separated by commas, such as 0.25,4.0bits"
    assert (said if "is '" in expected else f"--budgets {expected}") in one_line(err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration-tokens", "640"], "--calibration-tokens is given without --baselines"),
        (["--calibration", "x.txt"], "--calibration is given without --baselines"),
        (["--budget", "0.5", "--budgets", "0.4"], "--budget and --budgets are both given"),
        (["--baselines", "teel"], "'teel'"),
        (["--stride", "600"], "stride is 600; expected 1 to the window, 512"),
        (["--prompt-tokens", "511"], "prompt_tokens is 511; expected 0 to 510"),
        (["--data", "x.txt,speed=1"], "option 'speed=1' is not known"),
    ],
    ids=str,
)
def test_eval_options_that_do_not_go_together(run, nothing_loads, options, message):
    code, _, err = run("eval", *NEEDED["eval"], *options)
    assert code == 2
    assert message in one_line(err)


@pytest.mark.parametrize(
    ("command", "options", "code", "message"),
    [
        ("build", ["--data", "d/none.txt"], 1, "data source 'd/none.txt': there is no such file"),
        ("build", ["--data", "d/e/f"], 1, "which is no Hub id owner/name: there is no such file"),
        ("build", ["--data", "wikitext9"], 1, "'wikitext9' is not known"),
        ("build", ["--seed", 2**40], 2, "--seed is 1099511627776"),
        ("build", ["--max-tokens", 100], 2, "max_tokens is 100; expected at least one window, 512"),
        ("eval", ["--data", "pydoc", "--data", "none.txt"], 1, "there is no such file"),
        ("eval", ["--baselines", "cats", "--calibration", "none.txt"], 1, "there is no such file"),
        (
            "eval",
            ["--max-tokens", 100],
            2,
            "--max-tokens is 100; expected at least one window, 512",
        ),
        (
            "eval",
            ["--baselines", "cats", "--calibration-tokens", 9],
            2,
            "--calibration-tokens is 9",
        ),
        ("eval", ["--data", "pydoc,weight=0.25"], 2, "'pydoc': weight is 0.25, but each text is"),
        ("paper", ["--data", "none.txt"], 1, "there is no such file"),
        ("paper", ["--test", "none.txt"], 1, "there is no such file"),
        ("paper", ["--test", "x.txt,speed=1"], 2, "option 'speed=1' is not known"),
        ("paper", ["--init", "bogus"], 2, "init is 'bogus'; expected one of random, kmeans++"),
        ("paper", ["--densities", "0.5,1"], 2, "--densities is 1.0"),
        ("paper", ["--clusters", "16,20000"], 2, "num_clusters is 20000"),
        (
            "ablate",
            ["--test", "pydoc,weight=2"],
            2,
            "'pydoc': weight is 2.0, but each text is judged",
        ),
        ("ablate", ["--max-tokens", 100], 2, "--max-tokens is 100; expected at least one window"),
        ("ablate", ["--test-tokens", 100], 2, "--test-tokens is 100; expected at least one window"),
        ("ingredients", ["--test", "none.txt"], 1, "there is no such file"),
        ("ingredients", ["--test-tokens", 100], 2, "--test-tokens is 100"),
        ("ingredients", ["--test", "pydoc,weight=2"], 2, "weight is 2.0"),
        (
            "rounding",
            ["--roundings", "plain,best"],
            2,
            "--roundings has 'best'; expected some of plain",
        ),
        ("rounding", ["--test", "none.txt"], 1, "there is no such file"),
        ("ramp", ["--backends", "cpu,gpu"], 2, "--backends has 'gpu'"),
        ("ramp", ["--max-tokens", 100], 2, "--max-tokens is 100; expected at least one window"),
        ("generate", ["--stop", "x", "--stop", ""], 2, "a stop string is empty"),
        ("generate", ["--prompt", ""], 2, "--prompt is empty"),
        ("generate", ["--raw", "--system", "x"], 2, "--system is given with --raw"),
        (
            "generate",
            ["--do-sample", "--temperature", 0],
            2,
            "do_sample is on, and temperature is 0",
        ),
        ("generate", ["--no-do-sample", "--top-p", 0.5], 2, "top_p is 0.5, but do_sample is off"),
        ("chat", ["--stop", ""], 2, "a stop string is empty"),
        ("chat", ["--budget", 0.5, "--max-loss", 0.1], 2, "--max-loss 0.1 chooses a budget"),
        (
            "tasks",
            ["--task", "piqa", "--max-loss", 0],
            2,
            "--max-loss is 0.0; expected a number above",
        ),
        ("eval", ["--max-loss-domain", "c4"], 2, "--max-loss-domain c4 is without --max-loss"),
        ("eval", ["--max-loss", 0.1, "--budgets", "0.5"], 2, "--max-loss chooses one budget"),
        ("tasks", ["--task", "lambada=missing"], 1, "task file 'missing': there is no such file"),
        ("long", ["--data", "none.txt"], 1, "there is no such file"),
        ("long", ["--parts", "needle,haystack"], 2, "--parts has 'haystack'; expected some of"),
        ("long", ["--max-tokens", 100], 2, "--max-tokens is 100; expected at least one window"),
        ("long", ["--prompts", 500], 2, "--max-tokens is 65536; expected at least 160000"),
        ("long", ["--prompt-tokens", 8191], 2, "prompt_tokens is 8191; expected 0 to 8190"),
        ("tasks", ["--task", "squad=x"], 2, "task 'squad' cannot be read from a file"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_the_work(
    run, nothing_loads, tmp_path, monkeypatch, command, options, code, message
):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(command, *NEEDED[command], *options)
    assert found == code, err
    assert message in one_line(err)


@pytest.mark.parametrize("name", NEEDED)
def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    run, nothing_loads, name, tmp_path
):
    file = tmp_path / "file"
    file.write_text("")
    outputs = [
        option for option in commands()[name].params if option.name in ("json_file", "output")
    ]
    assert outputs or name == "serve"  # which writes nothing
    for option in outputs:
        needed = NEEDED[name]
        if option.name == "output" and "-o" in needed:
            needed = needed[: needed.index("-o")]
        needed = [tmp_path / "out" if word == "OUT" else word for word in needed]
        for place in (
            file / "deep" / "x.json",
            *([tmp_path] if option.name == "json_file" else []),
        ):
            code, _, err = run(name, *needed, option.opts[-1], place)
            message = one_line(err)
            assert code == 1
            assert str(place) in message
            assert "something was loaded" not in message
    assert list(tmp_path.iterdir()) == [file]


def test_usage_errors_are_one_line(run):
    code, out, err = run("eval", "demo")
    assert (code, out) == (2, "")
    assert one_line(err) == "error: Missing option '--clusters'; see sparse-runtime eval --help"
    code, _, err = run("nonsense")
    assert code == 2
    assert "No such command 'nonsense'" in one_line(err)
    code, out, err = run()
    assert code == 2
    assert "generate" in out
    assert err == ""


HOSTILE = "\x1b]8;;http://evil.example\x1b\\[bold]x[/bold]\x1b]8;;\x1b\\\x1b[2J\x9b1m\x07\u202e"


@pytest.fixture
def hostile(tmp_path):
    """Files whose names of fields, or whose template, hold commands of a terminal."""
    (tmp_path / "keys.jsonl").write_text(json.dumps({HOSTILE: "text"}))
    (tmp_path / "names.csv").write_text(f"{HOSTILE},b\n1,2,3\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "found"),
    [("keys.jsonl", "they have [bold]x[/bold]"), ("names.csv", "first line: [bold]x[/bold]")],
)
def test_errors_hold_no_commands_of_a_terminal(run, tiny_folder, hostile, name, found):
    code, _, err = run("ablate", tiny_folder, "--data", hostile / name)
    assert code == 1
    assert found in one_line(err)
    assert one_line(err).isprintable()


@pytest.mark.parametrize("kind", [ZeroDivisionError, DataError, ConfigError])
def test_errors_of_any_kind_are_printable(run, monkeypatch, kind):
    def broken(*arguments, **options):
        raise kind(f"{HOSTILE}\nsecond line")

    monkeypatch.setattr(ClusterSet, "from_pretrained", broken)
    code, _, err = run("inspect", "x")
    assert code == (2 if kind is ConfigError else 1)
    assert "[bold]x[/bold]" in one_line(err)
    assert one_line(err).isprintable()
    assert one_line(run("inspect", "--" + HOSTILE)[2]).isprintable()


def test_notes_and_bars_are_printable(capsys):
    console.note(f"baselines: {HOSTILE}")
    assert capsys.readouterr().err == "baselines: [bold]x[/bold]��\n"
    with RichProgress(console.err).task(f"dense, {HOSTILE}", 1):
        pass
    assert "[bold]x[/bold]" in capsys.readouterr().err


def test_peak_memory_without_the_module_for_it(monkeypatch):
    """As on Windows."""
    assert figures.peak_memory_mib() > 1
    monkeypatch.setitem(sys.modules, "resource", None)
    assert figures.peak_memory_mib() is None
