"""Picture regions in which a condition shows: mouth and face follow speech, the limbs follow the pose.

Records hold boxes for each pixel frame; a batch holds the latent cells that each region touches. The cells weight the
loss (`diffusion.loss_weights`) and define where condition gain is measured. The network never sees them.
"""

import numpy as np

from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.frames import STRIDE

BOXES = ("face", "mouth", "left_arm", "right_arm")  # in a record, (F, 4, 4)
_BOXES_OF = {"face": ("face",), "mouth": ("mouth",), "limbs": ("left_arm", "right_arm")}
NAMES = tuple(_BOXES_OF)


def index(name: str) -> int:
    """Position of a region in `NAMES`.

    Raises:
      UserError: unknown region.
    """
    if name not in NAMES:
        raise UserError(f"unknown region {name!r}{nearest(name, NAMES)}")
    return NAMES.index(name)


def cells(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Latent cells that each region touches in any pixel frame of the latent frame.

    Args:
      boxes: (4T, boxes, 4) left, top, right, bottom as fractions of the picture, with the four pixel frames of each
        latent frame in sequence; a box without area is unknown.
      height: latent rows H.
      width: latent columns W.

    Returns:
      bool (T, H, W, regions).
    """
    left, top, right, bottom = np.moveaxis(np.asarray(boxes, np.float64), -1, 0)[..., None]
    known = (right > left) & (bottom > top)
    rows, columns = np.arange(height), np.arange(width)
    touched_rows = known & (rows + 1 > top * height) & (rows < bottom * height)  # (4T, boxes, H)
    touched_columns = known & (columns + 1 > left * width) & (columns < right * width)
    touched = touched_rows[..., :, None] & touched_columns[..., None, :]
    touched = touched.reshape(-1, STRIDE, *touched.shape[1:]).any(1)  # (T, boxes, H, W)
    of_regions = [touched[:, [BOXES.index(box) for box in names]].any(1) for names in _BOXES_OF.values()]
    return np.stack(of_regions, axis=-1)
