"""The one device arena: pages, who owns them, and how KV lies in them. It knows nothing of LoRA."""
