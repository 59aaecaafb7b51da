"""Degree-Quant, arXiv:2008.05000, on graph networks of PyTorch Geometric."""
