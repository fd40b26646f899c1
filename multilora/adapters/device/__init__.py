"""Adapters in pages of the arena: who is resident, who leaves first, and the copies there."""
