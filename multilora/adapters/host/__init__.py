"""Host memory: packed adapters that are kept, and the memory that they are packed into."""
