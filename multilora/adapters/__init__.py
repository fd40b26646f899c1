"""Adapter logistics: from a directory or the hub through host memory into pages of the arena."""
