"""The report of a run made by the commands on a tiny model, also in a real browser."""

import json
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch
from helpers import cuttable_cluster_set, make_tiny_model

from sparse_runtime import cli
from sparse_runtime.eval.report import bench_markdown as bench_report
from sparse_runtime.eval.report import coverage_markdown, quality_markdown
from sparse_runtime.eval.report import page as report
from sparse_runtime.eval.report.plots import make_plots
from sparse_runtime.eval.report.run_folder import FILES, RunFolder
from sparse_runtime.eval.studies import ablation
from sparse_runtime.eval.studies.ablation import Setting

mpl = pytest.importorskip("matplotlib")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Tests run as root in containers, without a network.
CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["sparse-runtime", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, " ".join(captured.err.split())

    return call


@pytest.fixture
def run_folder(made_once, tmp_path):
    """A folder with every file there is."""
    return shutil.copytree(made_once, tmp_path / "run")


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, tiny_tokenizer):
    pytest.importorskip("lm_eval")
    tmp_path = tmp_path_factory.mktemp("made")
    folder, tiny_folder = tmp_path / "run", tmp_path / "model"
    tiny_model = make_tiny_model()
    tiny_model.save_pretrained(tiny_folder)
    tiny_tokenizer.save_pretrained(tiny_folder)
    clusters = cuttable_cluster_set(tiny_model)
    clusters.build["layers"] = [
        {"index": i, "held_out": {}, "cluster_sizes": [9, 4, 0, 3, 2, 1]} for i in range(3)
    ]
    clusters.save_pretrained(folder / "clusters")
    picks = torch.randint(0, 4, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text(" ".join(("alpha", "beta", "gamma", "delta")[pick] for pick in picks))
    other.write_text(" ".join(("red", "green", "blue", "grey")[pick] for pick in picks))
    tasks = tmp_path / "lambada.jsonl"
    tasks.write_text(json.dumps({"text": "alpha beta gamma"}) + "\n")
    sizes = ["--window", 64, "--dtype", "float32"]
    fit = ["--data", text, "--max-tokens", 1024, "--test-tokens", 256, "--layers", "1"]
    judge = ["--clusters", folder / "clusters", "--data", text]
    calibration = ["--calibration", text, "--calibration-tokens", 640]
    calls = {
        "eval": ["eval", tiny_folder, *judge, "--max-tokens", 256, *sizes],
        "quality": [
            "eval", tiny_folder, *judge, "--max-tokens", 256, *sizes, "--budgets", "0.4,0.5",
            "--baselines", "teal,cats,static", *calibration,
        ],
        "planes": [
            "eval", tiny_folder, *judge, "--max-tokens", 256, *sizes, "--weights", 6, "--budgets",
            "0.3,0.4", "--verify", "--baselines", "dense,dense-4-gptq,q8_0", *calibration,
        ],
        "predictors": [
            "eval", tiny_folder, *judge, "--max-tokens", 256, *sizes, "--budgets", "0.5",
            "--baselines", "deja-vu,random,teal", *calibration,
        ],
        "domains": [
            "eval", tiny_folder, *judge[:2], "--data", other, "--max-tokens", 256, *sizes,
            "--budgets", "0.5", "--baselines", "teal", *calibration,
        ],
        "decode_only": [
            "eval", tiny_folder, *judge, "--max-tokens", 256, *sizes, "--budgets", "0.5",
            "--baselines", "griffin", *calibration, "--prompt-tokens", 16,
        ],
        "ablation": [
            "ablate", tiny_folder, *fit, "--clusters", "4,16", "--percentiles", "0.4,0.6", *sizes,
        ],
        "paper": ["paper", tiny_folder, *fit, "--clusters", "4", "--compare", *sizes],
        "tasks": ["tasks", tiny_folder, *judge[:2], "--task", f"lambada={tasks}"],
        "long": [
            "long", tiny_folder, *judge[:2], "--data", text, "--window", 300, "--max-tokens", 900,
            "--lengths", "250", "--depths", "0,1", "--needles", 2, "--prompts", 2,
            "--prompt-length", 8, "--new-tokens", 8, *sizes[2:],
        ],
        "bench": [
            "bench", tiny_folder, *judge[:2], "--prompt-tokens", 8, "--new-tokens", 2,
            "--repeats", 1,
        ],
    }  # fmt: skip
    assert set(calls) == set(FILES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "Setting", lambda method: Setting(method, clusters=8))
        for name, arguments in calls.items():
            arguments = ["sparse-runtime", *arguments, "--json", folder / f"{name}.json"]
            patch.setattr("sys.argv", list(map(str, arguments)))
            with pytest.raises(SystemExit) as exit_:
                cli.main()
            assert not exit_.value.code, name
    return folder


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data.strip())


def test_report(command, run_folder):
    code, _, err = command("report", run_folder)
    assert code == 0, err
    text = (run_folder / "report.html").read_text()
    page = Page(text)
    names = {attributes["id"] for tag, attributes in page.tags if tag == "section"}
    assert names == {
        "rates_1", "quality_1", "domains", "coverage", "confidence", "densities",
        "cluster_sizes", "positions", "needle", "latency", "ablation", "convergence", "methods",
        "coverage-table", "long", "tasks", "prediction", "ablation-table", "measured",
    }  # fmt: skip
    # Nothing from outside: no address but those of XML names inside the figures.
    assert not any(tag in ("link", "script") and "http" in str(a) for tag, a in page.tags)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 12
    for attributes in images:
        assert attributes["src"].startswith("data:image/svg+xml;base64,")
        assert len(attributes["alt"]) > 60
    figures = json.loads((run_folder / "quality.json").read_text())
    for row in figures["results"][0]["rows"]:
        assert f"{row['ratio']:.3f}" in page.text
    assert any(line.startswith("Deja Vu is left out at 0.5: it reads") for line in page.text)
    row = next(r for r in figures["results"][0]["rows"] if r["budget"] == 0.5)
    share = f"clusters with looks {row['ratio']:.2f} at {row['cost_share']:.2f}"
    assert share in images[1]["alt"]
    # The first picture has ours and dense formats on one axis.
    alt = images[0]["alt"]
    assert alt.startswith("KL against bits read per FFN weight on text.txt. clusters with looks ")
    assert f"{row['kl']:.3g} at {row['bits_per_weight']:.2f}" in alt
    planes = json.loads((run_folder / "planes.json").read_text())["results"][0]["rows"]
    for label in ("clusters, 6 bits, GPTQ", "dense planes", "dense planes, GPTQ"):
        assert f"; {label} " in alt
    for row in planes:
        assert f"{row['kl']:.3g} at {row['bits_per_weight']:.2f}" in alt
    assert any("KL at bits read per FFN weight: " in line for line in page.text)
    assert any(line.startswith("GGUF Q8_0 is left out: its blocks hold 32") for line in page.text)
    long = json.loads((run_folder / "long.json").read_text())
    for row in long["positions"]["rows"]:
        assert any(f"{row['kl']:.3f} at {row['from']}–" in image["alt"] for image in images)
    rows = [row["log_probability"] for row in long["needle"]["rows"]]
    for row in rows + long["continuations"]["rows"]:
        assert f"{row['difference']:.3f}" in page.text
    for name in ("rates_1", "quality_1", "latency"):
        ElementTree.parse(run_folder / "figures" / f"{name}.svg")
        assert (run_folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    before = (run_folder / "figures" / "quality_1.svg").read_bytes()
    assert command("report", run_folder, "-o", run_folder / "again.html")[0] == 0
    assert (run_folder / "figures" / "quality_1.svg").read_bytes() == before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: chromium)")
def test_report_in_a_browser(command, run_folder):
    sync_api = pytest.importorskip("playwright.sync_api")
    assert command("report", run_folder)[0] == 0
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        for width in (390, 1440):
            page = browser.new_page(viewport={"width": width, "height": 900})
            complaints = []
            page.on("console", lambda message, c=complaints: c.append(message.text))
            page.on("pageerror", lambda error, c=complaints: c.append(str(error)))
            page.goto((run_folder / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
            assert page.evaluate(broken) == 0
            table = page.locator("#methods table").first
            header = table.locator("th button", has_text="÷ dense")
            column = "rows => rows.map(row => parseFloat(row.cells[7].dataset.value))"
            for click, reverse in ((1, False), (2, True)):
                header.click()
                values = table.locator("tbody tr").evaluate_all(column)
                assert values == sorted(values, reverse=reverse), click
                assert len(set(values)) > 2
            table.locator("th button", has_text="looked").click()
            shown = table.locator("tbody tr").evaluate_all(
                "rows => rows.map(row => row.cells[11].dataset.value)"
            )
            assert shown[-1] == ""  # what is no number goes last
            assert complaints == []
        browser.close()


def test_ratios_beyond_the_axis(run_folder):
    figures = json.loads((run_folder / "quality.json").read_text())
    for row in figures["results"][0]["rows"]:
        if row["method"] == "static":
            row["ratio"], row["interval"] = 40.0, [30.0, 50.0]
    (run_folder / "quality.json").write_text(json.dumps(figures))
    plots = {plot.name: plot for plot in make_plots(RunFolder.read(run_folder))}
    legend = [text.get_text() for text in plots["quality_1"].figure.legends[0].get_texts()]
    assert "static set (40, above)" in legend
    assert "clusters with looks" in legend


@pytest.mark.parametrize("sizes", ["x", [], [0, 0], [1, "x"], [1, -1], {"a": 1}, None, [True]])
def test_sizes_of_any_build_record(made_once, sizes):
    run = RunFolder.read(made_once)
    for layers in ([{"index": 0, "cluster_sizes": sizes}], ["cluster_sizes"], "x", sizes):
        run.clusters.build["layers"] = layers
        assert "cluster_sizes" not in {plot.name for plot in make_plots(run)}


def test_only_what_is_there(command, run_folder):
    for file in run_folder.glob("*.json"):
        if file.stem != "paper":
            file.unlink()
    shutil.rmtree(run_folder / "clusters")
    assert command("report", run_folder)[0] == 0
    text = (run_folder / "report.html").read_text()
    assert "matrix factorization" in text
    assert "<img" not in text


def test_bad_folders(command, tmp_path):
    code, _, err = command("report", tmp_path)
    assert code == 1
    assert "holds no figures; expected one or more of eval.json, quality.json" in err
    (tmp_path / "quality.json").write_text("{")
    code, _, err = command("report", tmp_path)
    assert code == 1
    assert "quality.json' cannot be read as JSON" in err
    (tmp_path / "quality.json").write_text("{}")
    code, _, err = command("report", tmp_path)
    assert code == 1
    assert "quality.json' has no 'results'; expected what 'sparse-runtime eval MODEL" in err
    assert not (tmp_path / "report.html").exists()


def leaves(value, path=""):
    """Paths to every string and number of JSON, as keys to follow."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        if isinstance(entry, (dict, list)) and entry:
            yield from ((key, *rest) for rest in leaves(entry))
        else:
            yield (key,)


def changed(value, path, change):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = change(value[path[-1]]) if change else value.pop(path[-1])


@pytest.mark.parametrize("name", FILES)
def test_half_a_file_is_named_with_its_key(command, run_folder, name, monkeypatch):
    """Whatever is missing or of another kind: a page, or one line with file and key."""
    # Figures are made, as all of the page is, and not saved: that is what takes time.
    monkeypatch.setattr(report, "make_plots", lambda run: iter(list(make_plots(run))[:0]))
    file = run_folder / f"{name}.json"
    whole = file.read_text()
    for other in run_folder.glob("*.json"):
        if other != file:
            other.unlink()
    shutil.rmtree(run_folder / "clusters")
    shape = FILES[name][1]
    for key in (key for key in shape if not key.endswith("?")):
        figures = json.loads(whole)
        del figures[key]
        file.write_text(json.dumps(figures))
        code, _, err = command("report", run_folder)
        assert (code, f"{name}.json' has no '{key}'" in err) == (1, True), err
        for wrong in (["a list"], {"an": "object"}, "text", float("nan"), None, 10**400, []):
            file.write_text(json.dumps(json.loads(whole) | {key: wrong}))
            code, _, err = command("report", run_folder)
            assert code == 0 or f"{name}.json' has '{key}" in err or f"has no '{key}." in err, err
            assert "report it if the input was right" not in err
    # Deep inside: every leaf that the shape names is checked, or not used.
    paths = list(leaves(json.loads(whole)))
    generator = random.Random(0)
    for path in generator.sample(paths, min(60, len(paths))):
        figures = json.loads(whole)
        changed(figures, path, lambda value: {"wrong": value})
        file.write_text(json.dumps(figures))
        code, _, err = command("report", run_folder)
        assert code == 0 or (f"{name}.json' has '" in err and f"{path[-1]}" in err), err


HOSTILE = "<script>alert(1)</script> | `code` $x$ **b** [red]\x1b]8;;http://e\x07 \u202e"


def test_strings_from_strangers_are_shown_not_obeyed(command, run_folder, tmp_path, monkeypatch):
    """Every string of every file is hostile; pages and documents only show it."""

    def hostile(value, key=None):
        if isinstance(value, dict):
            return {name: hostile(entry, name) for name, entry in value.items()}
        if isinstance(value, list):
            return [hostile(entry) for entry in value]
        kept = key in ("data", "factor") or not isinstance(value, str)
        # Names that are compared between files stay apart from each other.
        return f"{HOSTILE} {value}" if not kept or key == "data" else value

    for file in run_folder.glob("*.json"):
        file.write_text(json.dumps(hostile(json.loads(file.read_text()))))
    code, _, err = command("report", run_folder)
    assert code == 0, err
    text = (run_folder / "report.html").read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<script>alert" not in text
    assert any("<script>alert(1)" in part for part in page.text)
    assert not {"\x1b", "\x07", "\u202e"} & set(text)
    for svg in (run_folder / "figures").glob("*.svg"):
        ElementTree.parse(svg)

    document, readme = tmp_path / "quality.md", tmp_path / "README.md"
    readme.write_text(f"{quality_markdown.START}\n{quality_markdown.END}\n")
    coverage = tmp_path / "coverage.md"
    bench = tmp_path / "cpu.md"
    for module, arguments in (
        (quality_markdown, (run_folder, document, readme)),
        (coverage_markdown, (run_folder / "paper.json", coverage)),
        (bench_report, (bench, run_folder / "bench.json")),
    ):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        module.main()
    for file in (document, readme, coverage, bench):
        lines = file.read_text().splitlines()
        assert any("alert(1)" in line for line in lines)
        outside = [line for line in lines if not line.startswith("    ")]  # of indented code
        assert not any("<script" in line for line in outside)
        assert not any(re.search(r"(?<!\\)`code", line) for line in outside)
        previous = 0
        for line in outside:
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert previous in (0, cells) or not cells, line
            previous = cells


def test_dollar_signs_are_no_formula(run_folder):
    """Of an odd number Matplotlib would make none, of an even one a formula that does not parse."""
    figures = json.loads((run_folder / "quality.json").read_text())
    figures["results"][0]["data"] = r"a$\frac{$ b.txt"
    (run_folder / "quality.json").write_text(json.dumps(figures))
    for name in ("predictors", "domains", "decode_only"):
        (run_folder / f"{name}.json").unlink()
    figures["results"][0]["rows"][0]["method"] = r"$\frac{$"
    (run_folder / "quality.json").write_text(json.dumps(figures))
    with mpl.rc_context():
        for plot in make_plots(RunFolder.read(run_folder)):
            plot.figure.canvas.draw()


def test_runs_that_do_not_fit_together(command, run_folder):
    figures = json.loads((run_folder / "predictors.json").read_text())
    figures["results"][0]["dense"]["perplexity"] *= 1.1
    (run_folder / "predictors.json").write_text(json.dumps(figures))
    code, _, err = command("report", run_folder)
    assert code == 1
    assert "predictors.json has text.txt with a dense perplexity of" in err
    assert not (run_folder / "report.html").exists()


def test_markdown(run_folder, tmp_path, monkeypatch, capsys):
    document, readme = tmp_path / "docs" / "quality.md", tmp_path / "README.md"
    readme.write_text(f"before\n{quality_markdown.START}\nold\n{quality_markdown.END}\nafter\n")
    arguments = ["quality_markdown", str(run_folder), str(document), str(readme)]
    monkeypatch.setattr("sys.argv", arguments)
    quality_markdown.main()
    lines = readme.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "old" not in lines
    figures = json.loads((run_folder / "quality.json").read_text())
    rows = [row for row in figures["results"][0]["rows"] if row["budget"] == 0.5]
    # Those of the other files on the same text; TEAL stands there once.
    more = json.loads((run_folder / "predictors.json").read_text())["results"][0]["rows"]
    rows += [row for row in more if row["method"] == "random"]
    planes = json.loads((run_folder / "planes.json").read_text())["results"][0]["rows"]
    planes = [row for row in planes if row["rounding"] == "gptq"]  # as of the clusters' planes
    cells = [line for line in lines if line.startswith("| ")]
    second = 2 + 1 + len(planes)
    for part, expected in ((cells[:second], planes), (cells[second:], rows)):
        header = [cell.strip() for cell in part[0].split("|")[1:-1]]
        assert header[1:] == ["bits", "KL", "95 %", "top-1", "perplexity ÷ dense", "95 %"]
        assert len(part) == 3 + len(expected)
        expected = sorted(expected, key=lambda row: (-row["bits_per_weight"], row["kl"]))
        for column, key in ((2, "bits_per_weight"), (3, "kl")):
            shown = [float(line.split("|")[column]) for line in part[3:]]
            tolerance = 5.1e-3 if key == "bits_per_weight" else 1e-4
            assert shown == pytest.approx([row[key] for row in expected], abs=tolerance)
    names = {line.split("|")[1].strip() for line in cells}
    assert {"dense", "**clusters with looks**", "**clusters, 6 bits, GPTQ**", "TEAL"} <= names
    assert "dense, 4 bits, GPTQ" in names
    assert "dense, 8 bits" not in names
    text = document.read_text()
    for title in (
        "## text.txt",
        "## other.txt",
        "after a dense prompt of 16",
        "## Ablations",
        "## Long contexts",
    ):
        assert title in text
    assert "GRIFFIN" in text
    assert "Deja Vu is left out at 0.5: it reads" in text

    coverage = tmp_path / "coverage.md"
    arguments = ["coverage_markdown", str(run_folder / "paper.json"), str(coverage)]
    monkeypatch.setattr("sys.argv", arguments)
    coverage_markdown.main()
    rows = json.loads((run_folder / "paper.json").read_text())["coverage"]
    table = [line for line in coverage.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(table) == len(rows)
    assert f"| {rows[0]['coverage']:.3f} |" in table[0]
    assert "| – |" in table[-1]  # no density is asked of the others

    monkeypatch.setattr(
        "sys.argv", ["quality_markdown", str(run_folder), str(document), str(readme)]
    )
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="are not in the file"):
        quality_markdown.main()
    (run_folder / "quality.json").unlink()
    with pytest.raises(SystemExit, match=r"has no quality.json with a budget of 0.5"):
        quality_markdown.main()
