"""Statistics of series and of values per clip: NumPy in float64. F pixel frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MIN_STD = 1e-3  # below this standard deviation, a correlation would only measure rounding errors


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two series (F,), in [-1, 1]; NaN if either (nearly) does not vary."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"needs two series of the same length, got shapes {a.shape} and {b.shape}")
    if len(a) < 3 or a.std() < MIN_STD or b.std() < MIN_STD:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1, 1))


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """Summary of one value per clip; NaN values are left out and counted.

    Returns:
      {"n", "left_out", "mean", "std" (sample standard deviation), "low", "high" (95 % percentile bootstrap interval of
      the mean over clips), "values"}; undefined numbers are None, so the dict is valid JSON.
    """
    values = [float(v) for v in values]
    known = np.array([v for v in values if np.isfinite(v)])
    result: dict[str, Any] = {"n": len(known), "left_out": len(values) - len(known)}
    result |= dict.fromkeys(("mean", "std", "low", "high"))
    if len(known):
        result["mean"] = float(known.mean())
    if len(known) > 1:
        rows = np.random.default_rng(0).integers(0, len(known), (2000, len(known)))
        low, high = np.percentile(known[rows].mean(1), (2.5, 97.5))
        result |= {"std": float(known.std(ddof=1)), "low": float(low), "high": float(high)}
    result["values"] = [v if np.isfinite(v) else None for v in values]
    return result
