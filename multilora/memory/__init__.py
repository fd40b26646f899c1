"""The one device arena: pages, who owns them, and how KV lies in them. Has never heard of LoRA."""
