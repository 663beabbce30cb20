"""Interchangeable: one data set a file."""
