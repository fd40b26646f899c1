"""Grammars for constrained decoding: what their sources may be, and what is made of them for the engine."""
