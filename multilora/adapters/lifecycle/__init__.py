"""The life of an adapter version: its states, and the host and device tiers that it passes through."""
