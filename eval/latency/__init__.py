"""Latency: FFNs alone, whole models, on CPUs and GPUs."""
