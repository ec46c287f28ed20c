"""Evaluation of checkpoints on held-out rendered clips."""
