"""Figures as a page, plots and Markdown."""
