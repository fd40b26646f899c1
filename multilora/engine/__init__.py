"""Scheduling, running and sampling: token ids in, token ids out. Never sees text or adapter names."""
