"""Pixel values: uint8 in files, float in [-1, 1] for the VAE."""

import numpy as np


def to_model(image: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1.0


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """float [-1, 1] as uint8 pixels, clipped."""
    return np.rint((np.clip(frames, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
