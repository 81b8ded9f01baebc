"""Losses of all pairs of rows: InfoNCE and the sigmoid loss, logits a chunk at a time."""
