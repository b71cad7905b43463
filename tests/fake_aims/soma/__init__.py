"""Stands in for the package ``soma`` of BrainVISA in tests; see ``soma.aims``."""
