"""Mixed precision by a sensitivity and a search over its order, after Schaefer et al. 2023, arXiv:2302.01382."""
