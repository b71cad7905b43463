"""Measurements by named question. Each is a program: ``python -m benchmarks.NAME``."""
