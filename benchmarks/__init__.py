"""Measured claims: each script prints ratios against a named peer, timed in the same process."""
