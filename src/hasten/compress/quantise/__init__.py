"""Weights into few bits: one method a file. All but the names need torch."""
