"""Fingerprints by which copies of a clip are found: how it looks each second, and how its brightness changes."""

from __future__ import annotations

import cv2
import numpy as np

from omnihuman_jax.frames import FPS

HASH_EVERY = FPS  # frames
CELLS_EVERY = 5  # frames
CELLS = 4  # of a side
BITS = 64
STILL = 0.25  # variance over time, in squared levels of 255, below which a picture does not change


def perceptual_hash(luma: np.ndarray) -> int:
    """64 bits of a picture (H,W) uint8: signs of its lowest 8 x 8 DCT coefficients against their median (pHash)."""
    small = cv2.resize(luma, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > np.median(low[1:])  # the first is the mean brightness
    return int(np.packbits(bits).view(">u8")[0])


def distance(first: int, second: int) -> int:
    """Number of bits in which two hashes differ."""
    return (first ^ second).bit_count()


class Fingerprint:
    """Collects the fingerprint of a clip frame by frame."""

    def __init__(self):
        self._count, self._hashes, self._cells = 0, [], []

    def add(self, luma: np.ndarray) -> None:
        """Adds the next frame (H,W) uint8."""
        if self._count % HASH_EVERY == HASH_EVERY // 2:
            self._hashes.append(perceptual_hash(luma))
        if self._count % CELLS_EVERY == 0:
            self._cells.append(cv2.resize(luma, (CELLS, CELLS), interpolation=cv2.INTER_AREA).ravel())
        self._count += 1

    def hashes(self) -> list[int]:
        """One perceptual hash a second."""
        return self._hashes

    def cells(self) -> np.ndarray:
        """(S,16) float32 brightness of 4 x 4 cells, five times a second."""
        return np.array(self._cells, np.float32)


def correlation(first: np.ndarray, second: np.ndarray, max_shift: int = 10, least: float = 0.6) -> float | None:
    """How alike two clips change over time: the best correlation of their cells (S,16) over some shifts.

    Args:
      max_shift: in samples, as copies may begin at another moment.
      least: share of the shorter clip that must overlap.

    Returns:
      None if neither changes, so that there is nothing to compare; 0 if one of them does.
    """
    needed, best = max(2, round(least * min(len(first), len(second)))), -1.0
    still = [float(np.var(cells, axis=0).mean()) < STILL for cells in (first, second)]
    if any(still):
        return None if all(still) else 0.0
    for shift in range(-max_shift, max_shift + 1):
        a, b = first[max(0, -shift) :], second[max(0, shift) :]
        count = min(len(a), len(b))
        if count < needed:
            continue
        a, b = a[:count] - a[:count].mean(0), b[:count] - b[:count].mean(0)
        power = np.sqrt((a**2).sum() * (b**2).sum())
        best = max(best, float((a * b).sum() / power) if power else 0.0)
    return best
