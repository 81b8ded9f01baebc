"""Shared by the sources that draw their own samples: SVG to pixels, and the shards that a cache folder keeps."""
