"""What only a CPU does: experts one after another in its cache, and memory that is used again."""
