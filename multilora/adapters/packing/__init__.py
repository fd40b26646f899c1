"""Packing: from an adapter's typed blocks to the bytes of its pages."""
