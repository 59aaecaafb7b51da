"""Networks trained under Winograd convolutions, after Fernandez-Marques et al. 2020, arXiv:2002.10711."""
