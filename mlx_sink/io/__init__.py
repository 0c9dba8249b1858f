"""Disk, terminal, and numbers as people write them; nothing here knows a model."""
