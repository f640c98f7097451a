"""A program that does nothing: what the start alone costs, for the benchmark (`freeze.py empty`)."""
