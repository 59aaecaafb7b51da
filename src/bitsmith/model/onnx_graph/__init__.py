"""An interpreter of ONNX graphs over torch operations, so that every technique works on a network from a file."""
