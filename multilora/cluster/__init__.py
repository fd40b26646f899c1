"""Several engines as one service: which replica a request goes to, and one registry for all of them.

Where is decided here, how a request is served is not: every replica is a whole server with an engine of its own.
Ray Serve (the extra `ray`) starts replicas, scales and replaces them; nothing of Ray is imported before it is used.
"""
