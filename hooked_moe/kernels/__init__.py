"""The hot operations, each with one signature and a plain reference beside its fast form."""
