"""Metrics, one per file, and their registry."""
