"""Fakes and drivers for tests: tiny models, an engine without a model, a server without a network."""
