"""Sampling; no test samples on the double."""
