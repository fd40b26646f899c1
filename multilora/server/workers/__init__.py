"""Several front processes for one server (--front-workers): each serves HTTP, one holds the registry."""
