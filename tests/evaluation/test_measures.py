"""Measures against SciPy and published values."""

import numpy as np
import pytest
from scipy import stats

from omnihuman_jax.evaluation import measures

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


def test_pearson_agrees_with_scipy():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.standard_normal((2, 21))
        assert measures.pearson(a, a + b) == pytest.approx(stats.pearsonr(a, a + b).statistic, abs=1e-12)


def test_pearson_of_a_series_that_does_not_vary_is_undefined():
    assert np.isnan(measures.pearson(np.ones(10), np.arange(10)))
    assert np.isnan(measures.pearson(np.arange(10), np.full(10, 0.3)))
    with pytest.raises(ValueError, match="one length"):
        measures.pearson(np.arange(3), np.arange(4))


def test_best_lag_finds_a_delay_in_both_directions():
    truth = np.random.default_rng(1).standard_normal(60)
    late = np.concatenate([np.zeros(3), truth[:-3]])
    assert measures.best_lag(late, truth) == (3, pytest.approx(1.0))
    assert measures.best_lag(truth, late) == (-3, pytest.approx(1.0))
    assert measures.best_lag(np.zeros(60), truth)[0] == 0


def test_keypoint_error_is_percent_of_the_diagonal_over_visible_points():
    truth = np.zeros((2, 3, 3))
    truth[..., :2], truth[..., 2] = 0.5, 1
    truth[:, 2, 2] = 0  # hidden: its error does not count
    predicted = truth.copy()
    predicted[:, 0, 0] += 0.1  # 8 of 80 pixels
    predicted[:, 1, 1] += 0.1  # 12.8 of 128 pixels
    predicted[:, 2] += 10
    expected = 100 * (8 + 12.8) / 2 / np.hypot(128, 80)
    assert measures.keypoint_error(predicted, truth, (128, 80)) == pytest.approx(expected)
    truth[..., 2] = 0
    assert np.isnan(measures.keypoint_error(predicted, truth, (128, 80)))


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
        np.testing.assert_allclose(measures.lab(np.array(rgb)), expected, atol=0.02)


def test_region_colours_read_the_painted_regions():
    frame = np.full((96, 96, 3), (30, 90, 160), np.uint8)
    points = face()
    for name, colour in (("hair", (60, 40, 20)), ("skin", (220, 180, 150)), ("clothes", (200, 30, 30))):
        x0, y0, x1, y1 = (round(v) for v in measures.region_boxes(points)[name])
        frame[max(0, y0) : y1 + 1, max(0, x0) : x1 + 1] = colour
    got = dict(zip(measures.REGIONS, measures.region_colours(frame, points)))
    for name, colour in (("hair", (60, 40, 20)), ("skin", (220, 180, 150)), ("clothes", (200, 30, 30))):
        np.testing.assert_allclose(got[name], measures.lab(np.array(colour)), atol=1e-9)
    np.testing.assert_allclose(got["background"], measures.lab(np.array((30, 90, 160))), atol=1e-9)


def test_a_region_outside_the_frame_has_no_colour():
    points = face()
    points["left_shoulder"] = points["right_shoulder"] = np.array([48.0, 140.0])
    colours = measures.region_colours(np.zeros((96, 96, 3), np.uint8), points)
    assert np.isnan(colours[measures.REGIONS.index("clothes")]).all()
    assert np.isfinite(colours[measures.REGIONS.index("skin")]).all()


def test_attribute_distance_is_in_spreads():
    assert measures.attribute_distance([1.0, 4.0], [0.0, 0.0], [1.0, 2.0]) == pytest.approx(np.sqrt((1 + 4) / 2))


def test_summary_counts_what_is_left_out_and_bounds_the_mean():
    values = np.random.default_rng(3).normal(0.5, 0.2, 40)
    result = measures.summarise([*values, float("nan")])
    assert (result["n"], result["left_out"]) == (40, 1)
    assert result["mean"] == pytest.approx(values.mean())
    assert result["std"] == pytest.approx(values.std(ddof=1))
    # The percentile bootstrap of a mean is near the normal interval at this number.
    half = 1.96 * values.std(ddof=1) / np.sqrt(40)
    assert result["low"] == pytest.approx(values.mean() - half, abs=0.02)
    assert result["high"] == pytest.approx(values.mean() + half, abs=0.02)
    assert result["values"][-1] is None


def test_summary_of_too_few_values_has_no_spread():
    assert measures.summarise([0.3])["mean"] == 0.3
    assert measures.summarise([0.3])["std"] is None
    assert measures.summarise([float("nan")])["mean"] is None
