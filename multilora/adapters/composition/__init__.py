"""Several adapters for one request, and whose KV may serve whom."""
