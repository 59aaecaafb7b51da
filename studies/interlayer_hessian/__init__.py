"""What two layers lose together, and whether knowing it helps, after Schaefer et al. 2023, arXiv:2306.04879."""
