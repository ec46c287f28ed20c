"""Train state, step, curriculum, loop, checkpoints and metrics."""
