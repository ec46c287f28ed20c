"""What the loop pulls from: continues through changes of the config, reads patiently, knows its data set."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest

from data_pipelines.input_pipeline import batches as batches_lib
from data_pipelines.input_pipeline.pipeline import InputPipeline
from data_pipelines.schema import Dataset
from experiments.configs import demo
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.stages import changes, continued, curriculum, from_json, to_json
from tests.data_pipelines.fake_dataset import Flaky, positions, write_fake_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_fake_dataset(tmp_path_factory.mktemp("data") / "fake", 24, sources={"a": 1, "b": 2}, heldout=4)


def _config(**settings):
    """The demo preset on fake data, without crops of faces: three stages of 6 steps of 4."""
    config = demo.get_config()
    config.global_batch_size = 4
    config.data.latent_frames = 4
    for name in ("stage1", "stage2", "stage3"):
        config.stages[name].steps = 6
    config.stages.stage2_warmup.steps = config.stages.stage3_warmup.steps = 0
    config.update_from_flattened_dict(settings)
    return config


def _feed(dataset, **settings):
    config = _config(**settings)
    return InputPipeline.from_config(config, curriculum(config), dataset)


def _equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _continue(input_pipeline, saved, own, done):
    """What the loop does with a checkpoint's table; the table and the lines it logs."""
    saved = from_json(json.loads(json.dumps(to_json(saved))))
    table = continued(saved, own, done)
    input_pipeline.use_stages(table)
    return table, changes(saved, own, done)


def test_an_unchanged_config_continues_bit_for_bit_from_any_step(dataset):
    whole = list(_feed(dataset).iterate(1, slice(None)))
    for done in (0, 3, 6, 17, 18):
        input_pipeline, own = _feed(dataset), curriculum(_config())
        assert _continue(input_pipeline, own, own, done) == (own, [])
        for a, b in zip(whole[done:], input_pipeline.iterate(done + 1, slice(None)), strict=True):
            _equal(a, b)


def test_changed_ratios_continue_every_source(dataset):
    """Counted over records: across the change no clip comes twice before all of its kind have come."""
    before, ratio = _feed(dataset), {"stages.stage3.ratios.audio": 0.3}
    after = _feed(dataset, **ratio)
    own = curriculum(_config(**ratio))
    table, lines = _continue(after, curriculum(_config()), own, 14)
    assert lines == ["stage3: audio ratio 0.5 until step 14, 0.3 from there; every source goes on where it was"]
    for step in range(1, 15):
        assert after.describe(step) == before.describe(step)
    schedule = after._batches.schedule
    drawn = {cell.name: [] for cell in schedule.cells}
    for step in range(1, 19):
        assert {name: len(records) for name, records in drawn.items()} == positions(schedule, step)
        for i in schedule.select(step).record:
            entry = dataset.index[i]
            drawn[entry["source"], tuple(entry["shape"][1:]), entry["audio"], entry["pose"]].append(int(i))
    for cell in schedule.cells:
        for start in range(0, len(drawn[cell.name]), len(cell.records)):
            epoch = drawn[cell.name][start : start + len(cell.records)]
            assert len(set(epoch)) == len(epoch)
    assert _continue(_feed(dataset, **ratio), table, own, 16) == (table, []), "continuing twice is continuing once"


def test_a_changed_batch_size_and_window_hold_from_the_step_on(dataset):
    settings = {"global_batch_size": 6, "stages.stage1.latent_frames": 7}
    input_pipeline = _feed(dataset, **settings)
    table, lines = _continue(input_pipeline, curriculum(_config()), curriculum(_config(**settings)), 2)
    assert [line.split(":")[0] for line in lines] == ["stage1", "stage2", "stage3"]
    assert "latent frames of a window 4 until step 2, 7 from there; global batch size 4 until step 2, 6" in lines[0]
    assert len(input_pipeline.describe(2)["records"]) == 4 and len(input_pipeline.describe(3)["records"]) == 6
    batch = next(input_pipeline.iterate(3, slice(3, 6)))
    assert batch["latents"].shape[:2] == (3, 7)
    assert len(input_pipeline.held_out(1, slice(None))[0]["latents"]) == 6
    assert {row.latent_frames for row in table if row.last_step > 2} == {4, 7}


def test_a_run_beyond_the_configs_end_has_no_more_steps(dataset):
    shorter = {"stages.stage3.steps": 0}
    input_pipeline = _feed(dataset, **shorter)
    table, lines = _continue(input_pipeline, curriculum(_config()), curriculum(_config(**shorter)), 15)
    assert lines == ["stage3: ends at step 15 instead of 18"]
    assert table[-1].steps == 3
    assert not list(input_pipeline.iterate(16, slice(None)))


def test_a_table_that_the_data_cannot_give_leaves_the_one_in_use(dataset):
    own = curriculum(_config())
    saved = (dataclasses.replace(own[0], source_weights={"a": 1.0, "gone": 1.0}), *own[1:])
    input_pipeline = _feed(dataset)
    with pytest.raises(UserError, match="gone"):
        _continue(input_pipeline, saved, own, 3)
    for step in range(1, 19):
        assert input_pipeline.describe(step) == _feed(dataset).describe(step)


def test_held_out_clips_are_read_again_after_a_failure(dataset, monkeypatch):
    monkeypatch.setattr(batches_lib, "RETRY_SECONDS", (0.01, 0.01))
    flaky = Flaky(dataset, failures=2)
    for a, b in zip(_feed(flaky).held_out(2, slice(None)), _feed(dataset).held_out(2, slice(None)), strict=True):
        _equal(a, b)
    assert flaky.left == 0


def test_crops_to_the_face_are_not_measured_as_held_out_clips(dataset):
    changed = Dataset.open(dataset.directory)
    held = [entry for entry in changed.index if entry["split"] == "heldout"]
    kept = held[0]
    for entry in held[1:]:
        entry["view"] = "face"
    assert len(held) > 2
    row = changed.read(changed.index.index(kept))["latents"]
    (crops,) = _feed(changed).held_out(1, slice(None), "face")
    assert 0 < len(set(crops["clip"])) < len(held)
    for batch in _feed(changed).held_out(2, slice(None)):
        assert len(set(batch["clip"])) == 1 and not set(batch["clip"]) & set(crops["clip"])
        for latents in batch["latents"]:
            # Every row is a part of the one clip that is left.
            assert any(np.array_equal(row[i : i + len(latents)].astype(np.float32), latents) for i in range(len(row)))


def test_a_held_out_clip_that_cannot_be_read_is_named(dataset, monkeypatch):
    monkeypatch.setattr(batches_lib, "RETRY_SECONDS", (0.01, 0.01))
    with pytest.raises(
        UserError, match=r"record ./\d+ \(row \d+ of .*\) cannot be read after 3 attempts .*Input/output"
    ):
        _feed(Flaky(dataset, failures=10**6)).held_out(1, slice(None))


def test_the_fingerprint_is_that_of_the_data_not_of_its_place(dataset, tmp_path):
    found = _feed(dataset).fingerprint()
    assert len(found) == 64 and int(found, 16) >= 0
    moved = shutil.copytree(dataset.directory, tmp_path / "moved")
    assert _feed(Dataset.open(moved), seed=7).fingerprint() == found


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.index[3].update(id="other"),
        lambda data: data.index[3].update(split="heldout"),
        lambda data: data.index[3].update(shape=[9, 4, 4]),
        lambda data: data.index[3].update(audio=not data.index[3]["audio"]),
        lambda data: data.index[3].update(source="a" if data.index[3]["source"] == "b" else "b"),
        lambda data: data.index.reverse(),
        lambda data: data.index.pop(),
        lambda data: data.extra.update(inputs_sha256="0"),
    ],
)
def test_the_fingerprint_changes_with_whatever_decides_the_batches(dataset, change):
    other = copy.deepcopy(dataset)
    change(other)
    assert other.fingerprint() != dataset.fingerprint()
