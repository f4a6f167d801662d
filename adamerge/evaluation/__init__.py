"""Accuracies, tables and figures (floor 6)."""
