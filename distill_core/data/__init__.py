"""Shards -> samples -> views -> batches, with exact state."""
