"""Sparse from scratch along quasi-random paths, after Keller and Van Keirsbilck 2021."""
