"""Blobs on their way between machines: in chunks with offsets, resumed after any interruption, hashed."""
