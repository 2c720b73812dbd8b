"""The documentation, and in `tools` what makes parts of it."""
