"""Quantization-aware training at few bits, ours against Brevitas and torchao."""
