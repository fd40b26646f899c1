"""The loader: fetches, reads and packs, away from the step loop."""
