"""A node: what it serves, computes with and keeps on disk, and where it sends requests."""
