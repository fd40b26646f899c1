"""The two ends of the socket between a front process and the one that holds the registry, by asyncio."""
