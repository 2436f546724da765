"""What replaces a model's FFNs, and what it counts."""
