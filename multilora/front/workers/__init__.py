"""Several front processes for one server: what they say to the one that holds the registry, and how they see it."""
