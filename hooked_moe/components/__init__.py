"""The parts of the transformer, one idea a file."""
