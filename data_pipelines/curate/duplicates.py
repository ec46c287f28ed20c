"""Copies of a clip: exact by digest, near by perceptual hash and by how its brightness changes over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.curate import fingerprint

BANDS = 4  # of 16 bits: two hashes that differ in at most three bits share one
IN_BUCKET = 32  # clips with one value of a band that a new one is compared with; more look like a common background
STILL_BITS = 4  # mean distance of pictures that do not change, whose time course cannot be compared


class Entry(NamedTuple):
    """A clip's fingerprint.

    Attributes:
      name: of the clip, for the manifest.
      key: equal for clips with equal content.
      hashes: one perceptual hash a second.
      cells: reads the brightness over time (S,16), only for candidates.
    """

    name: str
    key: str
    hashes: Sequence[int]
    cells: Callable[[], np.ndarray]


def find(entries: Sequence[Entry], config: Mapping[str, Any]) -> dict[int, str]:
    """Index of a copy -> the name of the first clip with the same content, with "exact: " or "near: " before it.

    Clips that follow each other in one recording look alike, so alike pictures alone make no copy: their brightness
    must also change at the same moments.

    Args:
      config: the section `duplicates`: max_bits, min_correlation.
    """
    first_of: dict[str, int] = {}
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    cells: dict[int, np.ndarray] = {}
    copies: dict[int, str] = {}
    for i, entry in enumerate(entries):
        if entry.key in first_of:
            copies[i] = f"exact: {entries[first_of[entry.key]].name}"
            continue
        first_of[entry.key] = i
        bands = {(band, value >> 16 * band & 0xFFFF) for value in entry.hashes for band in range(BANDS)}
        candidates = sorted({j for band in bands for j in buckets[band][:IN_BUCKET]})
        original = next((j for j in candidates if _alike(entries, j, i, cells, config)), None)
        if original is not None:
            copies[i] = f"near: {entries[original].name}"
            continue
        for band in bands:
            buckets[band].append(i)
    return copies


def _alike(
    entries: Sequence[Entry], first: int, second: int, cells: dict[int, np.ndarray], config: Mapping[str, Any]
) -> bool:
    bits = _distance(entries[first].hashes, entries[second].hashes)
    if bits > config["max_bits"]:
        return False
    for i in (first, second):
        if i not in cells:
            cells[i] = entries[i].cells()
    found = fingerprint.correlation(cells[first], cells[second])
    return bits <= STILL_BITS if found is None else found >= config["min_correlation"]


def _distance(first: Sequence[int], second: Sequence[int]) -> float:
    """Mean over the shorter clip's hashes of the distance to the nearest of the other's."""
    short, long = sorted((np.array(hashes, np.uint64) for hashes in (first, second)), key=len)
    if not len(short):
        return float(fingerprint.BITS)
    return float(np.bitwise_count(short[:, None] ^ long).min(1).mean())
