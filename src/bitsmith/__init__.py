"""Bitsmith."""
