"""Segments and the pixel frames each window reads."""

import numpy as np
import pytest

from data_pipelines.input_pipeline import windows
from omnihuman_jax.inference import segments


def covered(latent):
    """Pixel frames of an absolute latent frame, from the definition."""
    return [0] if latent == 0 else list(range(4 * latent - 3, 4 * latent + 1))


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (21, 6), (22, 7), (49, 13)])
def test_latent_frames_cover_the_clip_and_no_more(frames, latents):
    assert segments.latent_frames(frames) == latents
    assert segments.pixel_frames(latents) >= frames > segments.pixel_frames(latents) - 4
    assert sorted({f for k in range(latents) for f in covered(k)})[-1] >= frames - 1


def test_segments_abut_and_only_the_first_has_no_motion_frames():
    plan = segments.plan(frames=75, window=6)  # 20 latent frames
    assert [(s.number, s.start, s.has_motion) for s in plan] == [
        (0, 0, False),
        (1, 6, True),
        (2, 12, True),
        (3, 18, True),
    ]
    assert len(segments.plan(frames=21, window=6)) == 1
    assert len(segments.plan(frames=22, window=6)) == 2


@pytest.mark.parametrize("start", [0, 6, 12])
def test_windows_read_exactly_the_frames_their_latents_cover(start):
    indices = segments.frame_indices(start, 6, 1000)
    assert indices.shape == (4 * 6,)
    expected = [f for k in range(start, start + 6) for f in (covered(k) if k else [0, 0, 0, 0])]
    assert indices.tolist() == expected


def test_audio_windows_add_context_on_both_sides_and_clamp_into_the_clip():
    indices = segments.frame_indices(6, 6, 45, context=2)
    assert indices.shape == (4 * 6 + 2 * 2,)
    assert indices[:3].tolist() == [19, 20, 21]  # 4 * 6 - 3 - 2
    np.testing.assert_array_equal(indices[-2:], [44, 44])  # 4 * 11 + 2 = 46 is past the end
    assert segments.frame_indices(0, 6, 45, context=2)[:6].tolist() == [0] * 6


@pytest.mark.parametrize(("start", "context"), [(0, 0), (0, 2), (6, 2), (12, 0)])
def test_generation_reads_the_frames_that_training_read(start, context):
    trained = windows.pixel_indices(start, 6, context, 70)
    np.testing.assert_array_equal(segments.frame_indices(start, 6, 70, context), trained)
