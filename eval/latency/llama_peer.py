"""llama.cpp in a process of its own, for ``peers``: written for an environment with xllamacpp and gguf.

Run as a script, because that environment has no sparse_runtime:

    python llama_peer.py write SHAPE.json Q4_0 FILE.gguf    random weights of a shape
    python llama_peer.py run FILE.gguf THREADS              then one JSON request a line on stdin
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Rows of random weights that every matrix repeats: drawing and rounding seven billion takes minutes.
_BLOCK_ROWS = 256


def write(shape: dict[str, int], kind: str, path: Path) -> None:
    """Write a GGUF file of Mistral's architecture with random weights.

    The output projection is Q8_0 where the rest is Q4_0, about as llama.cpp's own files keep it finer.

    Args:
        shape: fields of a ``MistralConfig``.
        kind: ``Q4_0`` or ``Q8_0``.
        path: written to at the end only.
    """
    draft = path.with_suffix(".part")
    try:
        _write(shape, kind, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write(shape: dict[str, int], kind: str, path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    hidden, ffn, layers = (
        shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    vocabulary, head = shape["vocab_size"], hidden // heads
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    _add_tokens(writer, gguf, vocabulary)
    coarse, fine = gguf.GGMLQuantizationType[kind], gguf.GGMLQuantizationType.Q8_0
    draw = _Blocks(gguf)
    draw.add(writer, "token_embd.weight", vocabulary, hidden, coarse)
    for i in range(layers):
        sizes = {
            "attn_q": (heads * head, hidden),
            "attn_k": (kv_heads * head, hidden),
            "attn_v": (kv_heads * head, hidden),
            "attn_output": (hidden, heads * head),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }
        for name, (rows, columns) in sizes.items():
            draw.add(writer, f"blk.{i}.{name}.weight", rows, columns, coarse)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", draw.ones(hidden))
    writer.add_tensor("output_norm.weight", draw.ones(hidden))
    draw.add(writer, "output.weight", vocabulary, hidden, fine)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokens(writer: Any, gguf: Any, vocabulary: int) -> None:
    control, byte, normal = (int(gguf.TokenType[name]) for name in ("CONTROL", "BYTE", "NORMAL"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [int(gguf.TokenType.UNKNOWN), control, control, *[byte] * 256]
    tokens += [f"t{i}" for i in range(vocabulary - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types(kinds + [normal] * (vocabulary - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


class _Blocks:
    """Random weights in rounded form, one block of rows for each width and type."""

    def __init__(self, gguf: Any) -> None:
        import numpy

        self._gguf, self._numpy = gguf, numpy
        self._random = numpy.random.default_rng(0)
        self._blocks: dict[Any, Any] = {}

    def ones(self, size: int) -> Any:
        return self._numpy.ones(size, self._numpy.float32)

    def add(self, writer: Any, name: str, rows: int, columns: int, kind: Any) -> None:
        if (columns, kind) not in self._blocks:
            values = self._random.standard_normal((_BLOCK_ROWS, columns)) * columns**-0.5
            values = values.astype(self._numpy.float32)
            self._blocks[columns, kind] = self._gguf.quants.quantize(values, kind)
        block = self._blocks[columns, kind]
        data = self._numpy.tile(block, (-(-rows // len(block)), 1))[:rows]
        writer.add_tensor(name, data, raw_dtype=kind)


def serve(path: Path, threads: int) -> None:
    """Answer requests of ``{"prompt": ids, "new_tokens": n}`` with tokens per second, line by line."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 1024, 1
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = threads
    params.warmup, params.n_gpu_layers = True, 0
    server = xllamacpp.Server(params)
    _answer(
        {
            "version": xllamacpp.__version__,
            "system": xllamacpp.get_system_info().strip(" |"),
            "bytes_per_token": bytes_per_token(path),
        }
    )
    for line in sys.stdin:
        request = json.loads(line)
        result = server.handle_completions(
            {
                "prompt": request["prompt"],
                "n_predict": request["new_tokens"] + 1,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = result["timings"]
        _answer(
            {
                "prefill_tok_s": timings["prompt_per_second"],
                "decode_tok_s": timings["predicted_per_second"],
                "prompt_tokens": timings["prompt_n"],
                "new_tokens": timings["predicted_n"],
            }
        )


def bytes_per_token(path: Path) -> int:
    """Weight bytes that decoding one token reads: all but the embedding, unless it is the head too."""
    import gguf

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    head = "output.weight" in tensors
    return sum(size for name, size in tensors.items() if not (head and name == "token_embd.weight"))


def _answer(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(json.loads(Path(sys.argv[2]).read_text()), sys.argv[3], Path(sys.argv[4]))
    else:
        serve(Path(sys.argv[2]), int(sys.argv[3]))
