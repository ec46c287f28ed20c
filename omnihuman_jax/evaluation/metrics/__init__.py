"""One file a metric, and their registry."""
