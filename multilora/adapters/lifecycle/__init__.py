"""The adapter versions that the engine knows, with their way up and down between disk, host and device."""
