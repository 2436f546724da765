"""What a model is: loading one by name, and telling models apart."""

from sparse_runtime.models.loading import hub_failure, load_model, parse_dtype

__all__ = ["hub_failure", "load_model", "parse_dtype"]
