"""Presets: one file each, with the difference from its parent."""
