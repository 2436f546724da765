"""The Triton backend, for GPUs."""
