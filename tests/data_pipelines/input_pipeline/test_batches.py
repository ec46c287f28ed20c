"""Batches: the right slices of the right records, the same from any host, thread or restart."""

import copy
import dataclasses
import json
import time

import grain
import numpy as np
import pytest

from data_pipelines.input_pipeline.batches import Batches, usable_records
from data_pipelines.input_pipeline.loader import make_dataset, make_loader
from data_pipelines.input_pipeline.windows import cut_window, window_start
from omnihuman_jax.conditions import names
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import window_frames
from omnihuman_jax.models.dit.config import ModelConfig
from tests.data_pipelines.fake_dataset import fake_meta, fake_record, write_fake_dataset
from tests.training.stage_rows import FULL, stage_row

MODEL = ModelConfig(motion_frames=2, audio_context=2, text_len=6, audio_dim=6, text_dim=5, latent_channels=4)


def _row(*arguments, **settings):
    """A stage of windows of four latent frames."""
    return stage_row(*arguments, **({"latent_frames": 4, "batch_size": 8} | settings))


STAGES = (
    _row("stage1", 1, 10, {**FULL, "audio": 0.0, "pose": 0.0}),
    _row("stage2", 11, 10, {**FULL, "pose": 0.0}),
    _row("stage3", 21, 1000, FULL),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_fake_dataset(
        tmp_path_factory.mktemp("data") / "fake", 24, sources={"real": 1, "synthetic": 2}, heldout=3
    )


@pytest.fixture(scope="module")
def batches(dataset):
    return Batches.open(dataset, STAGES, MODEL, seed=0, guidance_dropout={"text": 0.1, "audio": 0.1})


def _equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_a_batch_has_the_documented_shapes_and_types(dataset, batches):
    for step in (1, 15, 500):
        batch = batches.batch(step)
        h, w = batch.pop("latent_shape")
        expected = {
            "latents": ((8, 4, h, w, 4), np.float32),
            "motion": ((8, 2, h, w, 4), np.float32),
            "has_motion": ((8,), np.bool_),
            "regions": ((8, 4, h, w, 3), np.bool_),
            "reference": ((8, h, w, 4), np.float32),
            "text": ((8, 6, 5), np.float32),
            "text_mask": ((8, 6), np.bool_),
            "audio": ((8, 20, 6), np.float32),
            "keypoints": ((8, 16, 28, 3), np.float32),
            "active": ((8, 4), np.bool_),
            "scheduled": ((8, 4), np.bool_),
            "record": ((8,), np.int32),
        }
        assert {name: (value.shape, value.dtype.type) for name, value in batch.items()} == expected
        assert all(dataset.index[i]["split"] == "train" for i in batch["record"])
        assert (batch["scheduled"] >= batch["active"]).all()


# Window start s, T=2, a clip of 4 latent frames = 13 pixel frames (0..12): the frames by hand.
@pytest.mark.parametrize(
    ("start", "context", "expected"),
    [
        (0, 0, [0, 0, 0, 0, 1, 2, 3, 4]),
        (1, 0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (2, 0, [5, 6, 7, 8, 9, 10, 11, 12]),
        (0, 2, [0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6]),
        (1, 2, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (2, 2, [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12, 12]),
    ],
)
def test_pixel_frames_of_a_window_follow_the_causal_vae(start, context, expected):
    assert window_frames(start, 2, 13, context).tolist() == expected


def test_a_row_holds_the_right_slices_of_its_record():
    meta = fake_meta()
    record = fake_record(np.random.default_rng(0), meta, "r", shape=(9, 4, 4), tokens=4)
    # Values that name their own place.
    record["latents"] = np.arange(9)[:, None, None, None] * np.ones((9, 4, 4, 4))
    record["audio"] = np.arange(33)[:, None] * np.ones((33, 6))
    record["keypoints"] = np.arange(33)[:, None, None] * np.ones((33, 28, 3))
    # The mouth is in the cell that the number of its pixel frame says, row by row.
    cell = np.arange(33) % 16
    corner = np.stack([cell % 4, cell // 4], 1) / 4 + 0.1
    record["boxes"] = np.zeros((33, 4, 4))
    record["boxes"][:, 1] = np.concatenate([corner, corner + 0.1], 1)
    # 0.99 is past the share of first windows, 0.5 of the starts 2..5 is 4; 0.6 of four references is the third.
    row = cut_window(record, 4, 0.75, MODEL, np.array([0.99, 0.5]), 0.6)
    assert row["latents"][:, 0, 0, 0].tolist() == [4, 5, 6, 7]
    assert row["motion"][:, 0, 0, 0].tolist() == [2, 3]
    assert row["has_motion"]
    assert row["keypoints"][:, 0, 0].tolist() == list(range(13, 29))
    # Pixel frames 13..16 are cells 13, 14, 15 and 0, and so on, in region 1 of face, mouth and limbs.
    cells = [np.flatnonzero(frame).tolist() for frame in row["regions"][..., 1]]
    assert cells == [[0, 13, 14, 15], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert not row["regions"][..., [0, 2]].any()
    assert row["audio"][:, 0].tolist() == list(range(11, 31))
    np.testing.assert_array_equal(row["reference"], record["references"][2].astype(np.float32))
    np.testing.assert_array_equal(row["text"][:4], record["text"].astype(np.float32))
    assert row["text_mask"].tolist() == [True] * 4 + [False] * 2 and not row["text"][4:].any()

    first = cut_window(record, 4, 0.75, MODEL, np.array([0.1, 0.5]), 0.0)
    assert first["latents"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert not first["has_motion"] and not first["motion"].any()
    assert first["keypoints"][:, 0, 0].tolist() == [0, 0, 0, 0, *range(1, 13)]
    assert [np.flatnonzero(frame).tolist() for frame in first["regions"][..., 1]][:2] == [[0], [1, 2, 3, 4]]
    record["boxes"] = np.zeros((0, 4, 4))
    assert not cut_window(record, 4, 0.75, MODEL, np.array([0.1, 0.5]), 0.0)["regions"].any()


def test_long_captions_are_cut_and_missing_conditions_are_zeros():
    record = fake_record(np.random.default_rng(0), fake_meta(), "r", audio=False, pose=False, tokens=9)
    row = cut_window(record, 4, 0.75, MODEL, np.array([0.0, 0.0]), 0.0)
    assert row["text_mask"].all()
    assert row["audio"].shape == (20, 6) and not row["audio"].any()
    assert row["keypoints"].shape == (16, 28, 3) and not row["keypoints"].any()


def test_window_starts_are_the_first_frame_a_quarter_of_the_time_and_else_uniform():
    draws = np.random.default_rng(0).random((20_000, 2))
    starts = np.array([window_start(10, 4, 2, 0.75, draw) for draw in draws])
    counts = np.bincount(starts, minlength=10) / len(starts)
    assert set(starts) == {0, 2, 3, 4, 5, 6}
    assert abs(counts[0] - 0.25) < 0.015
    assert np.abs(counts[2:7] - 0.15).max() < 0.015
    assert {window_start(5, 4, 2, 0.75, draw) for draw in draws[:100]} == {0}, "no room for motion frames"
    assert {window_start(6, 4, 2, 0.75, draw) for draw in draws[:100]} == {0, 2}


def test_an_image_stage_trains_on_single_image_latents():
    record = fake_record(np.random.default_rng(0), fake_meta(), "r", shape=(7, 4, 4))
    for draws in np.random.default_rng(1).random((50, 3)):
        row = cut_window(record, 1, 0.75, MODEL, draws[:2], draws[2])
        matches = [np.array_equal(row["latents"][0], r) for r in record["references"].astype(np.float32)]
        assert sum(matches) == 1 and not row["has_motion"]
        assert not np.array_equal(row["latents"][0], row["reference"])
        frame = record["reference_frames"][matches.index(True)]
        np.testing.assert_array_equal(row["keypoints"][-1], record["keypoints"][frame].astype(np.float32))
        assert row["audio"].shape == (8, 6)


def test_stages_may_have_windows_of_their_own(dataset):
    stages = [
        _row("images", 1, 2, STAGES[0].ratios, latent_frames=1, batch_size=2),
        _row("stage1", 3, 2, STAGES[0].ratios, batch_size=2),
    ]
    batches = Batches.open(dataset, stages, MODEL, seed=0)
    assert [batches.batch(step)["latents"].shape[1] for step in (1, 2, 3, 4)] == [1, 1, 4, 4]


def test_rows_match_their_record_and_eligibility(dataset, batches):
    for step in range(21, 41):
        batch, said = batches.batch(step), batches.describe(step)
        assert said["step"] == step
        assert said["records"] == [dataset.index[i]["id"] for i in batch["record"]]
        for row, i in enumerate(batch["record"]):
            entry = dataset.index[i]
            record = dataset.read(int(i))
            assert said["active"][row] == [name for name, on in zip(names(), batch["active"][row], strict=True) if on]
            assert entry["audio"] or not batch["scheduled"][row, 2]
            assert entry["pose"] or not batch["scheduled"][row, 3]
            assert any(np.array_equal(batch["reference"][row], r) for r in record["references"].astype(np.float32))
            tokens = batch["text_mask"][row].sum()
            assert tokens == min(len(record["text"]), 6)
            window = batch["latents"][row]
            starts = [
                s for s in range(len(record["latents"]) - 3) if np.array_equal(record["latents"][s : s + 4], window)
            ]
            assert len(starts) == 1 and batch["has_motion"][row] == (starts[0] > 0)
    json.dumps(said)


def test_host_slices_concatenate_to_the_global_batch(batches):
    for hosts in (2, 4):
        size = 8 // hosts
        parts = [batches.batch(30, slice(h * size, (h + 1) * size)) for h in range(hosts)]
        whole = batches.batch(30)
        shapes = {part.pop("latent_shape") for part in parts}
        assert shapes == {whole.pop("latent_shape")}
        _equal({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_the_loader_gives_what_random_access_gives(batches):
    given = list(make_loader(batches, start_step=8, num_steps=6))
    assert len(given) == 6
    for step, batch in enumerate(given, start=8):
        _equal(batch, batches.batch(step))


def test_the_loader_ends_with_the_last_stage(batches):
    assert len(list(make_loader(batches, start_step=1018))) == 3


def test_a_restart_at_a_step_continues_the_run(batches):
    whole = list(make_loader(batches, start_step=1, num_steps=12))
    for start in (2, 7, 12):
        for before, after in zip(
            whole[start - 1 :], make_loader(batches, start_step=start, num_steps=13 - start), strict=True
        ):
            _equal(before, after)


def test_grain_restores_the_loader_at_every_state(batches):
    grain.experimental.assert_equal_output_after_checkpoint(make_dataset(batches.batch, start_step=5, num_steps=5))


def test_the_number_of_threads_changes_nothing(batches):
    single, several = (make_loader(batches, start_step=20, num_steps=6, threads=n) for n in (1, 4))
    for a, b in zip(single, several, strict=True):
        _equal(a, b)


def test_a_copy_in_another_process_gives_the_same(batches):
    _equal(copy.deepcopy(batches).batch(25), batches.batch(25))


def test_a_small_cache_changes_nothing_and_stays_small(dataset, batches):
    small = Batches.open(
        dataset,
        STAGES,
        MODEL,
        seed=0,
        guidance_dropout={"text": 0.1, "audio": 0.1},
        cache_bytes=20_000,
    )
    for step in range(1, 6):
        _equal(small.batch(step), batches.batch(step))
    assert 0 < small._cache._bytes <= 20_000
    assert small._cache._bytes == sum(v.nbytes for record in small._cache._records.values() for v in record.values())


def test_short_clips_are_left_out_with_a_count_or_refused(tmp_path, caplog):
    dataset = write_fake_dataset(tmp_path / "short", 6, shapes=((3, 4, 4), (7, 4, 4)), audio_share=1, pose_share=1)
    with caplog.at_level("WARNING"):
        records = usable_records(dataset.index, 4)
    assert records == [1, 3, 5]
    assert "3 of 6 train clips are shorter than 13 frames" in caplog.text
    with pytest.raises(
        UserError, match=r"all 6 train clips are shorter .* 8 latent frames \(29 frames; the longest has 25\)"
    ):
        usable_records(dataset.index, 8)
    with pytest.raises(UserError, match="no clips of split 'train'"):
        usable_records([entry | {"split": "heldout"} for entry in dataset.index], 4)


def test_a_batch_takes_a_few_milliseconds_once_records_are_cached(batches):
    for step in range(21, 60):
        batches.batch(step)
    times = []
    for step in range(21, 60):
        start = time.perf_counter()
        batches.batch(step)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 0.02


def test_clips_too_short_for_motion_frames_are_told(tmp_path, caplog):
    data = write_fake_dataset(tmp_path, 6, shapes=((5, 4, 4), (9, 4, 4)))
    with caplog.at_level("WARNING", logger="absl"):
        Batches.open(
            data,
            [_row("a", 1, 4, {"text": 0.9, "reference": 0.7, "audio": 0.0, "pose": 0.0}, batch_size=2)],
            MODEL,
            seed=0,
        )
    assert "3 of 6 training clips are shorter than 21 frames" in caplog.text


def test_a_later_stages_longer_window_takes_no_clip_from_an_earlier_stage(tmp_path, caplog):
    data = write_fake_dataset(tmp_path / "mixed", 12, shapes=((5, 4, 4), (9, 4, 4)), audio_share=1, pose_share=1)
    window = dataclasses.replace(MODEL, motion_frames=0)
    short, long = _row("stage1", 1, 6, batch_size=4), _row("stage2", 7, 6, latent_frames=9, batch_size=4)
    alone = Batches.open(data, [short], window, seed=0)
    with caplog.at_level("WARNING", logger="absl"):
        both = Batches.open(data, [short, long], window, seed=0)
    assert (
        "6 of 12 train clips are shorter than 33 frames (the training window of stage2) and are left out" in caplog.text
    )
    assert "stage1" not in caplog.text
    for step in range(1, 7):
        assert both.describe(step) == alone.describe(step)
    assert len({i for step in range(1, 7) for i in both.describe(step)["records"]}) == 12
    assert len({i for step in range(7, 13) for i in both.describe(step)["records"]}) == 6
    with pytest.raises(UserError, match=r"all 12 train clips are shorter than the training window of stage2, stage3"):
        Batches.open(
            data,
            [short, _row("stage2", 7, 1, latent_frames=12), _row("stage3", 8, 1, latent_frames=12)],
            window,
            seed=0,
        )
