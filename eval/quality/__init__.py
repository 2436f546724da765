"""How far a sparse model is from the dense one: on text, over budgets, in downstream tasks."""
