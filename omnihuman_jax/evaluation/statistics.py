"""Statistics of series and of values per clip: NumPy in float64. F pixel frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def pearson(a: np.ndarray, b: np.ndarray, *, min_std: float = 1e-3) -> float:
    """Pearson correlation of two series (F,).

    Returns:
      The correlation in [-1, 1], or NaN when either series (nearly) does not vary: its standard deviation is below
      `min_std`, so that the correlation would be one of rounding errors.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two series of one length are needed, not {a.shape} and {b.shape}")
    if len(a) < 3 or a.std() < min_std or b.std() < min_std:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1, 1))


def best_lag(a: np.ndarray, b: np.ndarray, max_lag: int = 5) -> tuple[int, float]:
    """The shift of `a` (F,) against `b` (F,) in frames, up to ±max_lag, at which they correlate most.

    Returns:
      (lag, correlation); a positive lag says that `a` comes later. (0, NaN) when no shift has a correlation.
    """
    known = {}
    for lag in range(-max_lag, max_lag + 1):
        value = pearson(a[max(0, lag) : len(a) + min(0, lag)], b[max(0, -lag) : len(b) - max(0, lag)])
        if np.isfinite(value):
            known[lag] = value
    if not known:
        return 0, float("nan")
    lag = max(known, key=lambda k: (known[k], -abs(k)))
    return lag, known[lag]


def summarise(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """Number, mean, spread and a bootstrap interval of one value a clip; NaN values are left out and counted.

    Returns:
      {"n", "left_out", "mean", "std" (sample standard deviation), "low", "high" (95 % percentile bootstrap interval of
      the mean over clips), "values"}; numbers are None where they do not exist, so that the dict is valid JSON.
    """
    values = [float(v) for v in values]
    known = np.array([v for v in values if np.isfinite(v)])
    result: dict[str, Any] = {"n": len(known), "left_out": len(values) - len(known)}
    result |= dict.fromkeys(("mean", "std", "low", "high"))
    if len(known):
        result["mean"] = float(known.mean())
    if len(known) > 1:
        rows = np.random.default_rng(seed).integers(0, len(known), (resamples, len(known)))
        low, high = np.percentile(known[rows].mean(1), (2.5, 97.5))
        result |= {"std": float(known.std(ddof=1)), "low": float(low), "high": float(high)}
    result["values"] = [v if np.isfinite(v) else None for v in values]
    return result
