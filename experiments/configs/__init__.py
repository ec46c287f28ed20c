"""Presets: one file each, the difference to its parent."""
