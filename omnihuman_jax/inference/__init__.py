"""From a checkpoint to frames: segments, sampling, decoding."""
