"""Studies of weights in planes, on tiny models."""

import json

import pytest
import torch
from helpers import make_tiny_model, needs_library, random_cluster_set

from sparse_runtime import SparseConfig, sparsify
from sparse_runtime.eval.quality.perplexity import score_text
from sparse_runtime.eval.studies.ramp import batching_noise, compare_ramps
from sparse_runtime.eval.studies.rounding import ROUNDINGS, compare_roundings
from sparse_runtime.ffn.plane_packing import pack_model


def tokens(count, seed=0):
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed))


def cut_clusters(model):
    """Every neuron a candidate, its threshold near what a typical token gives."""
    result = random_cluster_set(model, 0.9)
    for layer in result.layers.values():
        layer.maybe_sets, layer.active_sets = layer.active_sets, torch.zeros_like(layer.active_sets)
        layer.factors = torch.full((44,), 3.0)
    return result


class TestRounding:
    def test_rows_are_what_packing_gives(self):
        windows, text = tokens(256, seed=1).view(8, 32), tokens(128)
        loads = []

        def load():
            loads.append(make_tiny_model())
            return loads[-1]

        rows = compare_roundings(load, windows, text, bits=(4, 6), window=32)
        assert [(row["weights"], row["rounding"]) for row in rows] == [
            (bits, name) for bits in (4, 6) for name in ROUNDINGS
        ]
        assert len(loads) == 7
        reference = score_text(make_tiny_model(), text, window=32, keep=True)
        plain = score_text(pack_model(make_tiny_model(), 6), text, window=32, reference=reference)
        assert rows[3]["kl"] == pytest.approx(plain.kl)
        assert len({row["kl"] for row in rows}) == 6
        assert max(row["kl"] for row in rows[3:]) < min(row["kl"] for row in rows[:3])

    def test_command(self, run, tiny_folder, tmp_path):
        text, figures = tmp_path / "text.txt", tmp_path / "figures.json"
        text.write_text("".join(f"alpha {n * n} beta {n} gamma\n" for n in range(300)))
        code, out, err = run(
            *("rounding", tiny_folder, "--data", text, "--weights", "5", "--window", 32),
            *("--max-tokens", 320, "--test-tokens", 128, "--dtype", "float32", "--json", figures),
        )
        assert code == 0, err
        assert "mean-squares" in out
        record = json.loads(figures.read_text())
        assert [row["rounding"] for row in record["rows"]] == list(ROUNDINGS)
        assert record["test_tokens"] == 128
        code, _, err = run("rounding", tiny_folder, "--data", text, "--weights", "5,2")
        assert code == 2
        assert "--weights is 2; expected 3, 4, 5, 6, 7 or 8" in err


class TestRamp:
    def test_noise_is_the_divergence_of_chunks(self, tiny_model):
        text = tokens(23)
        assert batching_noise(tiny_model, text, 5) == pytest.approx(0, abs=1e-6)

        class Shaken(torch.nn.Module):
            """Logits that are wrong in calls of few tokens."""

            config = tiny_model.config
            device = torch.device("cpu")

            def forward(self, input_ids, **options):
                output = tiny_model(input_ids=input_ids, **options)
                if input_ids.shape[1] < 23:
                    output.logits = output.logits * 0.5
                return output

        with torch.inference_mode():
            log_p = tiny_model(input_ids=text[None]).logits[0].log_softmax(-1)
            log_q = (tiny_model(input_ids=text[None]).logits[0] * 0.5).log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        assert expected > 0.01
        assert batching_noise(Shaken(), text, 5) == pytest.approx(expected, rel=1e-3)

    def test_rows(self, tiny_model):
        clusters, text = cut_clusters(tiny_model), tokens(96)
        rows = compare_ramps(
            tiny_model,
            clusters,
            text,
            bits=5,
            widths=[0.0, 0.5],
            backends=["reference"],
            window=48,
            noise_tokens=32,
        )
        assert [(row["backend"], row["ramp"]) for row in rows] == [
            ("reference", None),
            ("reference", 0.0),
            ("reference", 0.5),
        ]
        dense, step, ramp = rows
        assert 0 < dense["kl"] < step["kl"]
        assert step["kl"] != ramp["kl"]
        assert ramp["bits_per_weight"] == pytest.approx(step["bits_per_weight"], rel=0.1)
        assert 0 < step["refined"] < step["counted"] < step["looked"]
        # The step is what sparsify gives on the packed model.
        model = sparsify(
            pack_model(make_tiny_model(), 5),
            clusters,
            config=SparseConfig(prefill="sparse", backend="reference", check_fingerprint=False),
        )
        reference = score_text(make_tiny_model(), text, window=48, keep=True)
        expected = score_text(model, text, window=48, reference=reference)
        assert step["kl"] == pytest.approx(expected.kl, rel=1e-4)

    @needs_library
    def test_command(self, run, tiny_model, tiny_folder, tmp_path):
        clusters, text = tmp_path / "clusters", tmp_path / "text.txt"
        cut_clusters(tiny_model).save_pretrained(clusters)
        text.write_text("alpha beta gamma " * 40)
        figures = tmp_path / "figures.json"
        command = ("ramp", tiny_folder, "--clusters", clusters, "--data", text, "--window", 32)
        code, out, err = run(
            *command,
            *("--widths", "0,1", "--backends", "cpu,reference", "--max-tokens", 64, "--weights", 5),
            *("--noise-tokens", 20, "--dtype", "float32", "--json", figures),
        )
        assert code == 0, err
        assert "noise" in out
        rows = json.loads(figures.read_text())["rows"]
        assert [(row["backend"], row["ramp"]) for row in rows] == [
            ("cpu", None),
            ("cpu", 0.0),
            ("cpu", 1.0),
            ("reference", 0.0),
            ("reference", 1.0),
        ]
        for wrong, words in (
            (("--backends", "gpu"), "--backends has 'gpu'; expected some of"),
            (("--widths", "-1"), "--widths is -1.0; expected 0 or more"),
            (("--max-tokens", 8), "--max-tokens is 8; expected at least one window, 32"),
        ):
            code, _, err = run(*command, *wrong)
            assert code == 2
            assert words in err
