"""Links and streams between nodes over one UDP port. See `transport`."""
