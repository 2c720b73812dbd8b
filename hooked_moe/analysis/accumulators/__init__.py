"""What a pass over the effect table adds up: each module takes chunks of it in order and keeps sums of bounded size.

Memory grows with layers, experts and documents, never with tokens.
"""
