"""What a model is: loading one by name, and telling models apart."""

from sparse_runtime.models.loading import load_model, parse_dtype

__all__ = ["load_model", "parse_dtype"]
