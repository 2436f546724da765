"""Compensation and layer weights, found in the whole sparse model."""
