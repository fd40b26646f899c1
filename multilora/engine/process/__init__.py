"""The engine in a process of its own, and the handle that others have on it."""
