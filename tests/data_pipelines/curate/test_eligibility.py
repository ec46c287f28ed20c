"""Scores and thresholds become fates; nothing is decoded."""

import math
import pathlib

import numpy as np
import pytest

from data_pipelines.curate import config as curate_config
from data_pipelines.curate import eligibility, manifest, report, run, scores
from data_pipelines.curate.eligibility import Clip
from data_pipelines.curate.scenes import Span
from data_pipelines.curate.store import Store
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError

GOOD = {
    "side": 480.0, "sharpness": 200.0, "brightness": 0.4, "clipped": 0.01, "subject_motion": 0.05, "camera_motion": 0.0,
    "person_share": 1.0, "people": 1.0, "face_height": 0.3, "face_pixels": 140.0, "speech_share": 0.7,
    "mouth_motion": 0.1, "pose_visibility": 1.0, "pose_stability": 1.0, "pose_jitter": 0.01, "hands_visibility": 0.0,
}  # fmt: skip


def peak(value, lag):
    """A curve of correlations with one peak."""
    return [round(value * math.exp(-(((k - 25) - lag) ** 2) / 4), 4) for k in range(51)]


def clip(name="x/a", curve=None, content="", raw=None, **changes):
    found = {"scores": GOOD | changes, "sync_curve": peak(0.7, 2) if curve is None else curve, "frames": 150}
    # Hashes of different clips share no band.
    hashes = [f"{(hash_of(name) + k) * 0x0001000100010001:016x}" for k in (0, 1)]
    result = found | {"hashes": hashes, "notes": [], "framing": "half body", "seconds": {"people": 1.0}}
    raw = raw or RawClip(name.split("/")[-1], pathlib.Path("a.mp4"), "x")
    return Clip(name, raw, content or name, Span(0, 150), f"key of {name}", result)


def hash_of(name):
    return sum(ord(c) * 7 for c in name) % 40000


def judge(*clips, first=frozenset(), **changes):
    config = curate_config.get_config()
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    still = np.zeros((30, 16), np.float32)
    return eligibility.judge(clips, config, lambda _: still, first)


def test_a_good_clip_trains_all_conditions():
    (fate,) = judge(clip())
    assert (fate.fate, fate.conditions, fate.reasons) == ("kept", ("text", "reference", "audio", "pose"), {})
    assert fate.scores["sync_correlation"] == 0.7


@pytest.mark.parametrize(
    ("score", "value"),
    [
        ("side", 100), ("sharpness", 5), ("brightness", 0.02), ("brightness", 0.97), ("clipped", 0.8),
        ("subject_motion", 0.0), ("subject_motion", 9), ("camera_motion", 2), ("person_share", 0.5), ("people", 2),
        ("face_height", 0.01),
    ],
)  # fmt: skip
def test_each_general_filter_drops_a_clip_for_its_own_reason(score, value):
    (fate,) = judge(clip(**{score: value}))
    assert (fate.fate, fate.conditions) == ("dropped", ())
    assert [reason.split(" ")[0] for reason in fate.reasons["general"]] == [score]


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({"speech_share": 0.05}, ("pose",)), ({"face_pixels": 20.0}, ("pose",)), ({"mouth_motion": 0.001}, ("pose",)),
        ({"curve": peak(0.2, 2)}, ("pose",)), ({"curve": [], "mouth_motion": None}, ("pose",)),
        ({"pose_visibility": 0.5}, ("audio",)), ({"pose_jitter": 0.2}, ("audio",)),
        ({"pose_stability": 0.9}, ("audio",)), ({"hands_visibility": 0.0}, ("audio", "pose")),
    ],
)  # fmt: skip
def test_failing_audio_or_pose_keeps_the_clip_for_the_weaker_conditions(change, left):
    (fate,) = judge(clip(**change))
    assert fate.fate == "kept" and fate.conditions == ("text", "reference", *left)
    assert set(fate.reasons) == {"audio", "pose"} - set(left)


def test_thresholds_come_from_the_config():
    clips = [clip(f"x/{k}", sharpness=float(k)) for k in (40, 60, 80)]
    kept = [fate.fate for fate in judge(*clips, general__sharpness__min=70.0)]
    assert kept == ["dropped", "dropped", "kept"]
    assert judge(clip(), pose__hands_visibility__min=0.2)[0].conditions == ("text", "reference", "audio")


def test_what_a_manifest_says_stands():
    raw = RawClip("a", pathlib.Path("a.mp4"), "x", speech=False, pose=False)
    (fate,) = judge(clip(raw=raw))
    assert fate.conditions == ("text", "reference")
    assert "manifest" in fate.reasons["audio"][0] and "manifest" in fate.reasons["pose"][0]


@pytest.mark.parametrize(
    ("lag", "value", "late", "correlation"),
    [
        (2, 0.7, 0.0, 0.7), (6, 0.7, 0.0, 0.7), (7, 0.7, 0.2, 0.7), (-6, 0.7, -0.32, 0.7),
        (7, 0.5, 0.0, 0.5 * math.exp(-1 / 4)), (20, 0.7, 0.0, 0.0),
    ],
)  # fmt: skip
def test_a_clear_constant_offset_is_repaired_and_a_weak_or_distant_one_is_not(lag, value, late, correlation):
    (fate,) = judge(clip(curve=peak(value, lag)))
    assert fate.sound_late == pytest.approx(late)
    assert fate.scores["sync_correlation"] == pytest.approx(correlation, abs=1e-3)
    assert fate.notes == (
        [f"sound {abs(late):g} s {'late' if late > 0 else 'early'}, moved to fit the mouth"] * bool(late)
    )


def test_the_offset_is_that_of_the_recording_not_of_a_clip():
    weak = clip("x/a", curve=peak(0.4, 12), content="f")
    clips = [
        weak,
        *(clip(f"x/{k}", curve=peak(0.9, 12), content="f") for k in range(3)),
        clip("x/z", curve=peak(0.4, 12)),
    ]
    assert [fate.sound_late for fate in judge(*clips)] == [0.4] * 4 + [0.0]


def test_copies_are_dropped_unless_the_other_is_bad_or_is_in_the_data_set():
    same = [clip("x/b"), clip("x/a")]
    for entry in same:
        entry.result["hashes"][:] = ["0123456789abcdef"]
    first, second = judge(*same)
    assert (first.fate, second.fate) == ("kept", "dropped") and second.reasons["general"] == ["a copy (near: x/b)"]
    first, second = judge(*same, first=frozenset({same[1].identity}))
    assert (first.fate, second.fate) == ("dropped", "kept")
    same[0].result["scores"]["sharpness"] = 1.0
    assert [fate.fate for fate in judge(*same)] == ["dropped", "kept"]
    assert [fate.fate for fate in judge(*same, duplicates__drop=False)] == ["dropped", "kept"]


def test_reasons_are_counted_by_their_kind():
    reasons = (
        "side 3 pixels, below 9",
        "a copy (near: x/a)",
        "cannot read a b.mp4: broken",
        "2 s, shorter than 5 s; so",
    )
    kinds = [manifest.first_reason([reason]) for reason in reasons]
    assert kinds == ["side", "a copy", "cannot be read", "2 s, shorter than 5 s"]


def test_clips_that_cannot_be_read_or_are_too_short_say_why():
    unreadable = Clip("x/u", RawClip("u", pathlib.Path("u"), "x", problem="cannot read it"), "u", Span(0, 0))
    failed = Clip("x/f", RawClip("f", pathlib.Path("f"), "x"), "f", Span(0, 150), "k", {"problem": "strange"})
    short = Clip("x/s", RawClip("s", pathlib.Path("s"), "x"), "s", Span(0, 20, problem="0.8 s, shorter than 5 s"))
    fates = judge(unreadable, failed, short)
    assert [f.fate for f in fates] == ["unreadable", "unreadable", "dropped"]
    assert [f.reasons["general"] for f in fates] == [["cannot read it"], ["strange"], ["0.8 s, shorter than 5 s"]]


def test_every_threshold_is_of_a_score_that_is_explained():
    config = curate_config.get_config()
    named = {name for group in ("general", "audio", "pose") for name in config[group]}
    assert named <= set(scores.TABLE)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cuts.detector", "magic", "adaptive or content"),
        ("cuts.min_seconds", 20.0, "at most half"),
        ("audio.face_pixels.max", 3.0, "--config.audio.face_pixels: min 32 is above max 3"),
    ],
)
def test_impossible_settings_are_refused(key, value, message):
    config = curate_config.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        run.check(config)


def test_hours_and_the_table_count_what_is_kept():
    clips = [clip("x/a"), clip("x/b", pose_visibility=0.1), clip("x/c", sharpness=1.0)]
    fates = judge(*clips)
    assert manifest.hours(clips, fates) == pytest.approx(
        {"in": 18 / 3600, "kept": 12 / 3600, "audio": 12 / 3600, "pose": 6 / 3600}
    )
    table = manifest.table(clips, fates)
    assert "clips: 1 dropped, 2 kept" in table and "66.7 %" in table and "first reason, general: sharpness 1" in table


def test_thousands_of_clips_are_judged_in_seconds():
    import time

    clips = [clip(f"x/{k:05d}", sharpness=float(k % 100)) for k in range(3000)]
    rng = np.random.default_rng(0)
    for entry in clips:
        entry.result["hashes"][:] = [f"{int(v):016x}" for v in rng.integers(0, 2**63, 8)]
    begin = time.perf_counter()
    fates = judge(*clips)
    assert sum(fate.fate == "kept" for fate in fates) == 2100
    assert time.perf_counter() - begin < 30


def test_the_report_shows_a_histogram_with_its_threshold_and_what_was_dropped(tmp_path):
    clips = [clip(f"x/{k}", sharpness=float(10 * k)) for k in range(8)] + [clip("x/<b>&", people=2.0)]
    fates, store = judge(*clips), Store(tmp_path)
    for entry in clips:
        store.write(entry.key, entry.result, {}, b"picture of " + entry.name.encode())
    report.write(tmp_path, clips, fates, curate_config.get_config(), store, 3.0)
    page = (tmp_path / "report.html").read_text()
    assert "x/&lt;b&gt;&amp;" in page and "<b>&" not in page
    section = page[page.index("<h3>sharpness") :].split("<h3>")[1]
    assert "at least 30" in section and "Outside: 3 of 9" in section and section.count("<line") == 1
    outside, near = section.split("Nearly outside")
    assert [f"x/{k}:" in outside for k in range(8)] == [True] * 3 + [False] * 5
    assert near.index("x/3:") < near.index("x/4:") < near.index("x/5:")
    import base64

    assert base64.b64encode(b"picture of x/0").decode() in outside


def test_a_histogram_has_its_bars_where_the_values_are():
    page = report.histogram(np.array([0.0] * 3 + [10.0]), 5.0, math.inf)
    assert page.count("<rect") == 2 and page.count("<line") == 1
    assert 'x1="210.0"' in page  # the middle of 420
    assert f'height="{110:.1f}"' in page and f'height="{110 / 3:.1f}"' in page
