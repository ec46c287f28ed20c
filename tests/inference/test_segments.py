"""Segments of a clip of any length."""

from omnihuman_jax.inference import segments


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
