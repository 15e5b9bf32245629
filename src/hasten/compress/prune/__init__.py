"""Weights taken out: one method a file."""
