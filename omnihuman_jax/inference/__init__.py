"""From a checkpoint to frames: segments, generation, export."""
