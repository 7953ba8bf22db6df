"""The commands of `mesh-llm`, one file each, and what they share."""
