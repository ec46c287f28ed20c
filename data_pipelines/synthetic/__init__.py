"""Rendered people who talk and move, with exact ground truth: `python -m data_pipelines.synthetic`."""
