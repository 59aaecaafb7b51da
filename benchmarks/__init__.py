"""This project against its peers and its own bars. Each file is one benchmark: ``python -m benchmarks.overhead``."""
