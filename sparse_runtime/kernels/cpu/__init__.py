"""The C++ backend: a library of fused operations, and its sources in csrc/."""
