"""What the training loop trains."""
