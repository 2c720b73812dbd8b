"""What only the repository needs: where training text comes from, and model cards."""
