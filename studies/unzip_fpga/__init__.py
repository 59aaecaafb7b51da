"""unzipFPGA: weights that are generated while the engine computes, against moving them. See README.md."""
