"""The probe's geometry against exact cases, its file, and its reading of frames."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines.keypoints import KEYPOINTS
from omnihuman_jax.errors import UserError
from omnihuman_jax.evaluation import probe as probe_lib


@pytest.fixture(scope="module")
def small() -> probe_lib.Probe:
    config = probe_lib.ProbeConfig(KEYPOINTS, ("a", "b"), (1.0, 2.0), (0.5, 2.0), widths=(8, 8, 8, 8))
    return probe_lib.Probe(config, probe_lib.ProbeNetwork(config, rngs=nnx.Rngs(0)), {"accuracy": {}})


def test_heatmap_points_are_the_centre_of_a_gaussian_and_ignore_a_second_peak():
    w, h, target = 24, 20, np.array([7.3, 12.6])
    x, y = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    logits = -((x - target[0]) ** 2 + (y - target[1]) ** 2) / 2
    logits = np.logaddexp(logits, np.log(0.2) - ((x - 20) ** 2 + (y - 2) ** 2) / 2)
    points = probe_lib.heatmap_points(jnp.asarray(logits)[None, :, :, None])
    np.testing.assert_allclose(points[0, 0] * np.array([w, h]), target, atol=0.12)


@pytest.mark.parametrize("size", [(128, 80), (80, 112), (96, 96), (384, 240)])
def test_letterbox_and_warp_put_a_pixel_where_the_affine_says(size):
    frame = np.zeros((*size, 3), np.uint8)
    block = max(size) // 12
    row, column = size[0] // 3, size[1] // 2
    frame[row : row + block, column : column + block] = 255
    affine = probe_lib.letterbox(size, 96)
    canvas = probe_lib.warp(frame, affine, 96)[..., 0].astype(float)
    expected = affine[:, :2] @ (column + block / 2, row + block / 2) + affine[:, 2]
    y, x = np.indices(canvas.shape) + 0.5
    near = (np.abs(x - expected[0]) < 8) & (np.abs(y - expected[1]) < 8)  # away from the grey rim
    found = [np.average(v[near], weights=canvas[near]) for v in (x, y)]
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_mouth_crop_holds_the_mouth_in_its_middle():
    affine = probe_lib.mouth_crop_affine(np.array([30.0, 50.0]), 16.0, 32)
    np.testing.assert_allclose(affine[:, :2] @ (30, 50) + affine[:, 2], (16, 16))
    np.testing.assert_allclose(affine[:, :2] @ (38, 42) + affine[:, 2], (32, 0))


def test_a_reading_has_frame_units_for_any_frame_size_and_number(small):
    for size in ((96, 96), (128, 80), (112, 176)):
        frames = np.random.default_rng(0).integers(0, 256, (probe_lib.BATCH + 3, *size, 3), dtype=np.uint8)
        seen = small.read(frames)
        shapes = [(len(frames), len(KEYPOINTS), 3), (len(frames),), (len(frames), 2)]
        chex.assert_shape([seen.keypoints, seen.mouth, seen.attributes], shapes)
        assert ((seen.mouth >= 0) & (seen.mouth <= 1)).all()
        # The letterbox is undone: points lie on the canvas, whose middle strip is the frame.
        reach = 0.5 * max(size) / np.array(size[::-1]) + 1e-3
        assert (np.abs(seen.keypoints[..., :2] - 0.5) <= reach).all()


def test_frames_are_read_one_by_one(small):
    frames = np.random.default_rng(1).integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    alone = small.read(frames[3:4])
    np.testing.assert_allclose(small.read(frames).keypoints[3], alone.keypoints[0], atol=1e-5)


def test_a_saved_probe_reads_the_same(small, tmp_path):
    path = tmp_path / "probe.safetensors"
    probe_lib.save_probe(path, small)
    again = probe_lib.load_probe(path)
    assert again.config == small.config and again.header == small.header
    chex.assert_trees_all_close(nnx.state(small.network), nnx.state(again.network), rtol=1e-3, atol=1e-6)  # float16


def test_a_file_that_is_no_probe_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        probe_lib.load_probe(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match="not readable"):
        probe_lib.load_probe(tmp_path / "bad.safetensors")
