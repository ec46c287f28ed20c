"""Cells of regions against a search over all corners."""

import numpy as np
import pytest

from omnihuman_jax import regions
from omnihuman_jax.errors import UserError


def test_a_cell_belongs_to_a_region_that_its_square_overlaps_in_any_of_its_frames():
    rng = np.random.default_rng(0)
    first, height, width = rng.random((12, 4, 2)) * 1.1 - 0.1, 5, 7
    boxes = np.concatenate([first, first + rng.random((12, 4, 2)) * 0.3], -1)
    boxes[3:6, 1] = 0  # unknown
    found = regions.cells(boxes, height, width)
    assert found.shape == (3, height, width, 3) and found.dtype == bool
    of = {"face": [0], "mouth": [1], "limbs": [2, 3]}
    for t, y, x, r in np.ndindex(found.shape):
        overlaps = False
        for left, top, right, bottom in boxes[4 * t : 4 * t + 4, of[regions.NAMES[r]]].reshape(-1, 4):
            across = min(right, (x + 1) / width) - max(left, x / width)
            down = min(bottom, (y + 1) / height) - max(top, y / height)
            overlaps |= right > left and bottom > top and across > 0 and down > 0
        assert found[t, y, x, r] == overlaps, (t, y, x, r)


def test_an_unknown_region_is_named_with_the_nearest():
    with pytest.raises(UserError, match="mouht.*mouth"):
        regions.index("mouht")
