"""The commands of `hooked-moe`."""
