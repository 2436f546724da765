"""The AWC paper's own tables."""
