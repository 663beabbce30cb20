"""Interchangeable: one backbone family a file."""
