"""The engine behind counterfactuals: variants of single tokens through the layers, divided to fit into memory."""
