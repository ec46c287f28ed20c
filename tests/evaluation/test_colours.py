"""Colours against published values and painted regions."""

import numpy as np

from omnihuman_jax.evaluation import colours

FACE = {
    "nose": (48, 40),
    "left_eye": (56, 32),
    "right_eye": (40, 32),
    "chin": (48, 56),
    "left_shoulder": (76, 70),
    "right_shoulder": (20, 70),
}


def face() -> dict[str, np.ndarray]:
    return {name: np.array(point, float) for name, point in FACE.items()}


def test_lab_has_the_published_values_of_srgb_colours():
    # Bruce Lindbloom's calculator, sRGB, D65.
    known = {
        (255, 255, 255): (100, 0, 0),
        (255, 0, 0): (53.2408, 80.0925, 67.2032),
        (0, 255, 0): (87.7347, -86.1827, 83.1793),
        (0, 0, 255): (32.2970, 79.1875, -107.8602),
        (0, 0, 0): (0, 0, 0),
    }
    for rgb, expected in known.items():
        np.testing.assert_allclose(colours.lab(np.array(rgb)), expected, atol=0.02)


def test_region_colours_read_the_painted_regions():
    frame = np.full((96, 96, 3), (30, 90, 160), np.uint8)
    points = face()
    for name, colour in (("hair", (60, 40, 20)), ("skin", (220, 180, 150)), ("clothes", (200, 30, 30))):
        x0, y0, x1, y1 = (round(v) for v in colours.region_boxes(points)[name])
        frame[max(0, y0) : y1 + 1, max(0, x0) : x1 + 1] = colour
    got = dict(zip(colours.REGIONS, colours.region_colours(frame, points)))
    for name, colour in (("hair", (60, 40, 20)), ("skin", (220, 180, 150)), ("clothes", (200, 30, 30))):
        np.testing.assert_allclose(got[name], colours.lab(np.array(colour)), atol=1e-9)
    np.testing.assert_allclose(got["background"], colours.lab(np.array((30, 90, 160))), atol=1e-9)


def test_a_region_outside_the_frame_has_no_colour():
    points = face()
    points["left_shoulder"] = points["right_shoulder"] = np.array([48.0, 140.0])
    found = colours.region_colours(np.zeros((96, 96, 3), np.uint8), points)
    assert np.isnan(found[colours.REGIONS.index("clothes")]).all()
    assert np.isfinite(found[colours.REGIONS.index("skin")]).all()
