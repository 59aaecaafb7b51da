"""Accuracy against bytes: quantized, shared and pruned weights, and what they give together."""
