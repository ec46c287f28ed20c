"""Checkpoints of a run: written, restored, read, exported."""
