"""The Markdown report of bench figures."""

import json

from sparse_runtime.eval.report import bench_markdown as bench_report


def figures():
    milliseconds = {"dense": 10.0, "dense_fast": 8.0, "sparse": 5.0, "sparse_fast": 4.0}
    decode = {f"{name}_ms": value for name, value in milliseconds.items()}
    decode |= {f"{name}_p90_ms": value + 1 for name, value in milliseconds.items()}
    decode |= {f"{name}_tok_s": 1e3 / value for name, value in milliseconds.items()}
    run = {
        "cost_share": 0.52,
        "prefill": {"dense_ms": 100.0, "sparse_ms": 80.0, "speedup": 1.25},
        "decode": {
            **decode,
            "gbps": dict.fromkeys(milliseconds, 20.0),
            "speedup": 2.0,
            "speedup_fast": 2.0,
            "speedup_total": 2.5,
            "ceiling": 1.65,
        },
        "prediction": {
            "ffn_ms": 2.0,
            "rows": [{"name": "router", "ms": 0.05, "share": 0.025, "bytes": 4096}],
        },
        "mlp": {
            "density": 0.5,
            "looked_at": 0.25,
            "read_gbps": 30.0,
            "dense_ms": 4.0,
            "prepacked_ms": None,
            "all_rows_ms": 2.0,
            "all_rows_gbps": 29.0,
            "sparse_ms": 1.0,
            "gbps": 27.0,
            "tokens": [
                {"tokens": 1, "dense_ms": 4.0, "all_rows_ms": 2.0, "sparse_ms": 1.0},
                {
                    "tokens": 2,
                    "dense_ms": 5.0,
                    "all_rows_ms": 3.0,
                    "sparse_ms": 2.5,
                    "chosen_ms": 2.6,
                    "path": "sparse",
                },
            ],
        },
    }
    return {
        "model": "demo",
        "clusters": "a folder",
        "budget": 0.4,
        "verify": False,
        "prompt_tokens": 128,
        "runs": [run],
        "batches": [{"batch": 4, "dense_ms": 20.0, "sparse_ms": 10.0, "speedup": 2.0}],
        "memory": {
            "dense_mib": 900.0,
            "sparse_mib": 905.0,
            "weights_mib": 256.0,
            "artifact_mib": 16.0,
            "ratio": 1.02,
        },
        "host": {
            "date": "2026-01-01",
            "cpu": "a processor",
            "threads": 2,
            "versions": {"torch": "2.13.0"},
            "commit": "abc",
            "command": "sparse-runtime bench demo",
        },
    }


def test_report_of_files(tmp_path, monkeypatch):
    source, target = tmp_path / "demo.json", tmp_path / "docs" / "cpu.md"
    source.write_text(json.dumps(figures()))
    monkeypatch.setattr("sys.argv", ["bench_report", str(target), str(source)])
    bench_report.main()
    text = target.read_text()
    lines = text.splitlines()
    assert "| F.linear | 4.000 | 4.00× |  |  |" in lines
    assert "| sparse | 1.000 | 1.00× | 27.0 | 0.90 |" in lines
    assert not any(line.startswith("| prepacked") for line in lines)
    assert "| sparse + fast linears | 4.0 | 5.0 | 250.0 | 20.0 |" in lines
    assert "| router | 50 | 2.5% | 4 |" in lines
    assert "| 2 | 5.00 |  | 3.00 | 2.50 | 2.60 | sparse |" in lines
    assert "| 4 | 20.0 | 10.0 | 2.00× |" in lines
    assert "    sparse-runtime bench demo" in lines
    assert "1.65×" in text
    assert "## demo, budget 0.4, without looks" in lines
    header = "### Density 0.50, 0.25 looked at, cost share "
    assert sum(line.startswith(header) for line in lines) == 1
