"""Deterministic binary filters: accuracy against stored parameters."""
