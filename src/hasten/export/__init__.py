"""Packed models in other engines' formats: one format a file, and one table in `exporters`."""
