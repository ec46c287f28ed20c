"""Shots, black bars, and the clips that follow from them."""

import numpy as np
import pytest

from data_pipelines.curate import config, picture, scenes
from data_pipelines.curate.scenes import Span
from data_pipelines.prepare.cut import Box
from data_pipelines.raw import media
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError


def cuts(**changes):
    return config.get_config().cuts.to_dict() | changes


def texture(count, seed, size=(96, 128)):
    """A picture that drifts slowly, in colours of its own."""
    rng = np.random.default_rng(seed)
    image = np.kron(rng.integers(60, 220, (12, 20, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([np.roll(image, i // 4, 1)[: size[0], : size[1]] for i in range(count)])


def written(path, frames):
    media.write_mp4(path, np.ascontiguousarray(frames))
    return RawClip("a", path, "x")


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_hard_cuts_are_found_at_their_frames(tmp_path, detector):
    shots = [texture(40, 1), texture(55, 2), texture(30, 3)]
    clip = written(tmp_path / "a.mp4", np.concatenate(shots))
    found = scenes.find(clip, cuts(detector=detector))
    assert (found["frames"], found["height"], found["width"], found["cuts"]) == (125, 96, 128, [40, 95])


def test_one_shot_has_no_cut_and_part_of_a_file_is_counted_from_its_start(tmp_path):
    clip = written(tmp_path / "a.mp4", np.concatenate([texture(50, 1), texture(50, 2)]))
    assert scenes.find(RawClip("a", clip.path, "x", end=2.0), cuts())["cuts"] == []
    assert scenes.find(RawClip("a", clip.path, "x", start=1.0), cuts())["cuts"] == [25]


def test_shots_become_clips_between_the_lengths():
    found = {"frames": 1000, "height": 96, "width": 128, "cuts": [100, 300], "bars": []}
    clips = scenes.spans(RawClip("a", None, "x"), found, cuts(min_seconds=5, max_seconds=10))
    assert [(c.first, c.last) for c in clips] == [(0, 100), (100, 300), (300, 533), (533, 767), (767, 1000)]
    assert [bool(c.problem) for c in clips] == [True, False, False, False, False]
    assert clips[0].problem == "4 s, shorter than 5 s"


@pytest.mark.parametrize(
    ("keep", "shots", "kept"), [(True, [], [True]), (False, [], [False]), (True, [20], [False] * 2)]
)
def test_a_short_source_is_kept_by_a_flag_but_not_shots_of_it(keep, shots, kept):
    found = {"frames": 60, "height": 96, "width": 128, "cuts": shots, "bars": []}
    clips = scenes.spans(RawClip("a", None, "x"), found, cuts(keep_short=keep))
    assert [not c.problem for c in clips] == kept
    assert ("cuts.keep_short" in clips[0].problem) == (not keep)


def test_black_bars_are_measured_and_left_out_of_each_shot(tmp_path):
    frames = np.zeros((60, 128, 128, 3), np.uint8)
    frames[:30, 20:108] = texture(30, 1)[:, :88]
    frames[30:, :, 16:112] = np.pad(texture(30, 2)[:, :96, :96], ((0, 0), (0, 32), (0, 0), (0, 0)), "edge")
    clip = written(tmp_path / "a.mp4", frames)
    found = scenes.find(clip, cuts())
    assert found["cuts"] == [30]
    spans = scenes.spans(clip, found, cuts(min_seconds=0.5))
    assert [span.box for span in spans] == [Box(0, 20, 128, 88), Box(16, 0, 96, 128)]
    inside = RawClip("a", clip.path, "x", crop=(32, 8, 64, 112), end=1.2)
    found = scenes.find(inside, cuts())
    assert scenes.spans(inside, found, cuts(min_seconds=0.5)) == [Span(0, 30, Box(32, 20, 64, 88))]


def test_bars_of_a_dark_moment_or_a_dark_picture_do_not_count():
    dark = np.zeros((96, 128, 3), np.uint8)
    assert picture.bars(dark) is None
    assert picture.without_bars([], 96, 128) is None
    assert picture.without_bars([(0, 12, 0, 12), (0, 0, 0, 0)], 96, 128) is None
    assert picture.without_bars([(0, 45, 0, 45)], 96, 128) is None  # six pixels are no picture
    assert picture.without_bars([(3, 0, 4, 0)], 96, 128) == Box(4, 0, 120, 96)


def test_a_crop_outside_of_the_picture_is_refused(tmp_path):
    clip = written(tmp_path / "a.mp4", texture(12, 1))
    with pytest.raises(UserError, match="exceeds the picture of 128x96"):
        scenes.find(RawClip("a", clip.path, "x", crop=(100, 0, 64, 64)), cuts())
