"""Pallas kernels for TPU: attention over video lengths."""
