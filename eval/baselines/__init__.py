"""The opponents: other ways to choose neurons, at the same interface and cost."""
