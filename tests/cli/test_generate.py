"""``generate`` on a tiny chat model: templates, rates, and what ran sparse."""

import copy
import io
import json
import shutil

import pytest
import torch
from helpers import cuttable_cluster_set, needs_library, random_cluster_set
from torch._inductor import config as inductor

from sparse_runtime.cli import generate, generation

CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def answer(run, tiny_model, tiny_tokenizer, tmp_path):
    """Generate from a tiny chat model; exit code, output, errors and figures."""

    def call(*options, template=CHAT, end=257):
        folder, clusters, file = (tmp_path / name for name in ("chat", "clusters", "figures.json"))
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        tiny_model.generation_config.eos_token_id = end
        tiny_model.save_pretrained(folder)
        random_cluster_set(tiny_model, 0.4).save_pretrained(clusters)
        command = ["generate", folder, "--clusters", clusters, "--prompt", "alpha", "--json", file]
        file.unlink(missing_ok=True)
        code, out, err = run(*command, "--dtype", "float32", "--max-new-tokens", 6, *options)
        return code, out, err, json.loads(file.read_text()) if file.exists() else None

    return call


def test_generate_applies_the_chat_template(answer, tiny_tokenizer):
    code, out, err, chat = answer()
    assert code == 0, err
    assert chat["chat"]
    assert "alpha" not in out  # an answer stands alone
    code, out, err, raw = answer("--raw")
    assert code == 0, err
    assert not raw["chat"]
    assert "alpha" in out
    for record, text in ((chat, "[user]alpha[assistant]"), (raw, "alpha")):
        expected = len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
        assert record["sparse"]["prompt_tokens"] == expected
    assert chat["sparse"]["text"] != raw["sparse"]["text"]
    # A tokenizer without a template has nothing to apply.
    code, out, err, plain = answer(template=None)
    assert code == 0, err
    assert not plain["chat"]
    assert plain["sparse"]["text"] == raw["sparse"]["text"]


def test_a_template_that_refuses_is_named_with_the_remedy(answer):
    for template in (
        "{{ raise_exception('no users') }}",
        "{% for",
        "{{ messages.nothing.at_all }}",
        "{{ raise_exception('no users \x1b]8;;http://x\x07[b]\x1b[2J') }}",
    ):
        code, _, err, figures = answer(template=template)
        assert code == 2
        assert "chat template cannot be applied" in err
        assert "generate --raw continues a text without it" in err
        assert "\x1b" not in err
        assert figures is None
    assert answer("--raw", template="{% for")[0] == 0


def test_rates_are_of_decode_steps(answer):
    code, out, err, figures = answer("--max-new-tokens", 1)
    assert code == 0, err
    assert "one token, so no rate" in out
    assert figures["sparse"]["tokens_per_second"] is None
    assert "nothing ran sparse: nothing was decoded" in err or figures["sparse"]["sparse_tokens"]
    code, out, err, figures = answer(end=list(range(260)))
    assert code == 0, err
    assert "ended at once" in out
    assert "tokens/s" not in out
    assert figures["sparse"]["new_tokens"] == 0
    code, out, err, figures = answer()
    assert code == 0, err
    assert figures["sparse"]["tokens_per_second"] > 0
    assert figures["sparse"]["prompt_seconds"] > 0
    counted = figures["sparse"]["sparse_tokens"] + figures["sparse"]["dense_tokens"]
    # The last token is not run.
    assert counted == figures["sparse"]["prompt_tokens"] + figures["sparse"]["new_tokens"] - 1
    assert "tokens/s after the first" in out


def test_a_comparison_warms_up(answer, monkeypatch):
    calls = []
    original = generate.generate_text

    def noted(*arguments, **options):
        calls.append((arguments[3], options.get("show") is not None))
        return original(*arguments, **options)

    for module in (generate, generation):
        monkeypatch.setattr(module, "generate_text", noted)
    assert answer("--compare")[0] == 0
    assert calls == [("dense", False), ("sparse", False), ("dense", True), ("sparse", True)]


@needs_library
def test_compiled_text_is_the_eager_one(answer):
    code, out, err, eager = answer("--compare", "--fast-linear")
    assert code == 0, err
    assert eager["sparse"]["compile_seconds"] is None
    code, out, err, compiled = answer("--compare", "--fast-linear", "--compile", "--strict")
    assert code == 0, err
    assert out.count("compiled in") == 2
    for variant in ("dense", "sparse"):
        assert compiled[variant]["compile_seconds"] > 0
        for what in ("text", "sparse_tokens", "dense_tokens", "dense_reasons", "cost_share"):
            assert compiled[variant][what] == eager[variant][what], (variant, what)


def test_the_run_that_compiles_fits_into_the_cache(answer, tiny_tokenizer):
    prompt = "a" * (127 - len(tiny_tokenizer("")["input_ids"]))
    code, _, err, figures = answer("--raw", "--compile", "--prompt", prompt, "--max-new-tokens", 1)
    assert code == 0, err
    assert figures["sparse"]["prompt_tokens"] == 127


@pytest.fixture
def no_compiler():
    torch.compiler.reset()
    with inductor.patch({"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}):
        yield


def test_without_a_compiler_decoding_runs_eagerly(answer, no_compiler):
    code, out, err, figures = answer("--compile")
    assert code == 0, err
    assert "runs without --compile: torch.compile failed: InvalidCxxCompiler" in err
    assert "compiled in" not in out
    assert figures["sparse"]["text"] == answer()[3]["sparse"]["text"]
    code, _, err, figures = answer("--compile", "--strict")
    assert code == 1
    assert "error: torch.compile failed: InvalidCxxCompiler" in err
    assert figures is None


def test_nothing_ran_sparse_is_said_with_the_reason(answer, monkeypatch):
    """As installed without a compiler."""
    monkeypatch.setattr("sparse_runtime.kernels.backends.load_cpu_library", lambda: False)
    code, out, err, figures = answer()
    assert code == 0
    assert "cost share 1.000 (16.00 bits per FFN weight), " in out
    assert "; 0 tokens ran sparse" in out
    said = [line for line in err.splitlines() if line.startswith("nothing ran sparse: ")]
    assert len(said) == 1
    assert "is not there" in said[0]
    assert "is not there" in figures["sparse"]["nothing_sparse"]
    code, _, err, _ = answer("--strict")
    assert code == 1
    assert "cannot run" in err
    assert "is not there" in err


def test_centroids_are_for_cuts_only(run, tiny_model, tiny_folder, tmp_path, monkeypatch):
    """Their file, most of an artifact, may be left out of a copy."""
    text = tmp_path / "text.txt"
    text.write_text("alpha beta gamma " * 20)
    tasks = {"rows": [], "cost_share": 0.5, "bytes_per_token": 1e6}
    monkeypatch.setattr(
        "sparse_runtime.eval.quality.downstream.evaluate_tasks", lambda *a, **options: tasks
    )
    clusters = tmp_path / "clusters"
    cuttable_cluster_set(tiny_model).save_pretrained(clusters)
    (clusters / "centroids.safetensors").unlink()
    common = (tiny_folder, "--clusters", clusters, "--dtype", "float32")
    commands = {
        "generate": ("--prompt", "alpha", "--max-new-tokens", 3),
        "eval": ("--data", text, "--window", 32, "--max-tokens", 64),
        "tasks": ("--task", "x"),
        "bench": ("--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1),
    }
    for name, options in commands.items():
        code, _, err = run(name, *common, *options)
        assert code == 0, err
        cuts = [("--budget", 0.7), ("--no-verify",)]
        if name == "eval":
            cuts += [("--budgets", "0.5,0.7"), ("--baselines", "teal", "--calibration", text)]
        for cut in cuts:
            code, _, err = run(name, *common, *options, *cut)
            assert code == 1
            assert "centroids.safetensors is missing" in err


def test_strict_fails_where_nothing_ran_sparse(answer):
    code, _, err, figures = answer("--strict")
    assert code == 0, err
    code, _, err, figures = answer("--strict", "--max-new-tokens", 1)
    assert (code == 1) == (figures["sparse"]["sparse_tokens"] == 0)


def test_sampling_is_the_models_own_unless_given(answer, tiny_model):
    greedy = answer()[3]["sparse"]["text"]
    tiny_model.generation_config.do_sample = True
    tiny_model.generation_config.temperature = 9.0
    drawn = answer()[3]["sparse"]["text"]
    assert drawn != greedy
    assert answer("--seed", 1)[3]["sparse"]["text"] != drawn
    for options in (("--temperature", 0), ("--no-do-sample",), ("--top-k", 1)):
        assert answer(*options)[3]["sparse"]["text"] == greedy
    tiny_model.generation_config.do_sample = tiny_model.generation_config.temperature = None
    for options in (("--temperature", 9), ("--temperature", 9, "--top-p", 1, "--min-p", 0)):
        code, _, err, figures = answer(*options)
        assert code == 0, err
        assert figures["sparse"]["text"] == drawn
    assert answer("--repetition-penalty", 50)[3]["sparse"]["text"] != greedy


def test_a_system_prompt_goes_into_the_template(answer, tiny_tokenizer):
    code, _, err, figures = answer("--system", "be brief")
    assert code == 0, err
    text = "[system]be brief[user]alpha[assistant]"
    expected = len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
    assert figures["sparse"]["prompt_tokens"] == expected
    code, _, err, _ = answer("--system", "x", template=None)
    assert code == 2
    assert "--system is given, and the model's tokenizer has no chat template" in err
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x"
    code, _, err, _ = answer("--system", "x", template=refuses)
    assert code == 2
    assert "it may know no system prompt, so leave that out" in err


def test_a_stop_string_ends_the_text(answer):
    whole = answer("--max-new-tokens", 12)[3]["sparse"]["text"]
    stop = next(symbol for symbol in whole if symbol.isprintable() and symbol != "�")
    code, out, err, figures = answer("--max-new-tokens", 12, "--stop", stop, "--stop", "never")
    assert code == 0, err
    assert figures["sparse"]["text"] == whole[: whole.index(stop)]
    assert figures["sparse"]["ended"] == "end"
    assert stop not in out.split("\n")[1]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"alpha\n", "alpha"),
        (b"\xef\xbb\xbfalpha\r\n", "alpha"),
        ("naïve\n語\n\n".encode(), "naïve\n語\n"),
    ],
)
def test_the_prompt_may_come_from_standard_input(answer, monkeypatch, data, expected):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, _, err, figures = answer("--prompt", "-", "--raw")
    assert code == 0, err
    assert figures["prompt"] == expected
    assert figures["sparse"]["prompt_tokens"] == len(expected.encode())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"al\xffpha", "standard input is no UTF-8: byte 0xff at 2"),
        (b"\n", "--prompt is -, and standard input is empty"),
        (b"", "--prompt is -, and standard input is empty"),
    ],
)
def test_standard_input_that_is_no_prompt(answer, monkeypatch, data, message):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, _, err, figures = answer("--prompt", "-")
    assert code == 2
    assert message in err
    assert figures is None


def test_prompts_that_do_not_fit(answer):
    code, _, err, _ = answer("--raw", "--prompt", "a" * 512)
    assert code == 2
    assert "the prompt has 512 tokens, and the model's context holds 512" in err
    code, _, err, figures = answer("--raw", "--prompt", "a" * 509, "--max-new-tokens", 100)
    assert code == 0, err
    assert figures["sparse"]["new_tokens"] == 3
    code, _, err, _ = answer("--prompt", "a\udcff")
    assert code == 2
    assert "no text at character 1" in err


def test_what_a_model_says_has_no_effect_on_the_terminal(answer, tiny_model, tiny_tokenizer):
    bell = tiny_tokenizer("\x1b", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
        tiny_model.lm_head.weight[bell] = 1.0
        tiny_model.model.norm.weight.fill_(1.0)
        tiny_model.model.embed_tokens.weight.abs_()
    code, out, err, figures = answer("--raw")
    assert code == 0, err
    assert "\x1b" in figures["sparse"]["text"]
    assert "\x1b" not in out
    assert "�" in out
