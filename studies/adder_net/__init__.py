"""Adder networks: accuracy beside convolutions, ablations, integers, modelled energy."""
