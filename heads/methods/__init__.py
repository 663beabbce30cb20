"""NAMES: one published method a file."""
