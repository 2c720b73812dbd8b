"""Where tokens go: routing tables and what they say, the tokens of every expert, and sending tokens elsewhere."""
