"""The published method (AWC, arXiv 2507.14179), on binary patterns."""
