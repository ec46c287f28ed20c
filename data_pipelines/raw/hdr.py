"""Tone mapping of HDR pictures (ITU-R BT.2100) to SDR."""

from __future__ import annotations

import functools

import cv2
import numpy as np

# Extended Reinhard: the darker half keeps its contrast, and light of WHITE cd/m2 becomes white.
EXPOSURE, WHITE = 441.0, 1500.0
_PEAK = 1000.0  # cd/m2 of the display that HLG is made for
_GAMMA = 2.4  # of the SDR display, BT.1886
_LUMA_2020 = (0.2627, 0.6780, 0.0593)
_FROM_2020 = np.array(  # linear BT.2020 to BT.709
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)


def to_sdr(signal: np.ndarray, *, hlg: bool, wide: bool) -> np.ndarray:
    """(H,W,3) uint16 PQ or HLG (`hlg`) RGB -> (H,W,3) uint8 RGB; `wide`: the primaries are those of BT.2020."""
    light = _table(hlg)[signal >> 4]
    if hlg:
        light *= _PEAK * np.maximum(light @ np.float32(_LUMA_2020), 1e-6)[..., None] ** np.float32(0.2)
    if wide:
        light = cv2.transform(light, _FROM_2020)
    light = np.maximum(light, 0) / np.float32(EXPOSURE)
    shown = light * (1 + light * np.float32((EXPOSURE / WHITE) ** 2)) / (1 + light)
    return np.rint(255 * np.minimum(shown, 1) ** np.float32(1 / _GAMMA)).astype(np.uint8)


@functools.cache
def _table(hlg: bool) -> np.ndarray:
    """(4096,) float32: cd/m2 of a PQ signal, or the scene light in [0,1] of an HLG signal."""
    signal = np.arange(4096) / 4095
    if hlg:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        power = signal ** (1 / 78.84375)
        light = 1e4 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    return light.astype(np.float32)
