"""From a decoded frame to the picture that a player shows."""

from __future__ import annotations

import av
import cv2
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import ColorPrimaries, ColorTrc

from data_pipelines.raw import hdr


def displayed(frame: av.VideoFrame, aspect: float = 1.0) -> np.ndarray:
    """The picture (H,W,3) uint8 RGB of a frame in any pixel format.

    Applies the colour matrix, range and, of HDR, the transfer function of the frame, its display matrix (turns by 90
    degrees and mirrors), and makes its pixels square by enlarging one side.

    Args:
      aspect: width of a stored pixel divided by its height.
    """
    if frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
        wide = frame.color_primaries in (ColorPrimaries.BT2020, ColorPrimaries.UNSPECIFIED)
        signal = frame.to_ndarray(format="rgb48le")
        image = hdr.to_sdr(signal, hlg=frame.color_trc == ColorTrc.ARIB_STD_B67, wide=wide)
    else:
        image = frame.to_ndarray(format="rgb24")
    height, width = image.shape[:2]
    size = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    if size != (width, height):
        image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(_placed(image, frame))


def _placed(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    matrix = next((data for data in frame.side_data if data.type == Type.DISPLAYMATRIX), None)
    if matrix is None:
        return image
    # A stored point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(memoryview(matrix), np.int32)[:5]
    if abs(int(a)) + abs(int(d)) < abs(int(b)) + abs(int(c)):
        image = image.swapaxes(0, 1)
        flip_x, flip_y = c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return image[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
