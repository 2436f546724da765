"""Judging a sparse model: perplexity, coverage, latency."""
