"""CUDA sources, and the way from tensor shapes to a launch."""
