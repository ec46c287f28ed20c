"""What the loop pulls from: continues through changes of the config, reads patiently, knows its data set."""

import copy
import shutil

import numpy as np
import pytest

from data_pipelines import batches as batches_lib
from data_pipelines.feed import Feed
from data_pipelines.schema import Dataset
from experiments.configs import demo
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.curriculum import curriculum
from tests.data_pipelines.fake_dataset import write_fake_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_fake_dataset(tmp_path_factory.mktemp("data") / "fake", 24, sources={"a": 1, "b": 2}, heldout=4)


def _config(**changes):
    """The demo preset on fake data: three stages of 6 steps of 4."""
    config = demo.get_config()
    config.global_batch_size = 4
    config.data.latent_frames = 4
    for name in ("stage1", "stage2", "stage3"):
        config.stages[name].steps = 6
    config.update_from_flattened_dict(changes)
    return config


def _feed(dataset, **changes):
    config = _config(**changes)
    return Feed.from_config(config, curriculum(config), dataset)


def _equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class Failing:
    """A data set whose first reads fail so many times."""

    def __init__(self, dataset, failures):
        self._dataset, self.left = dataset, failures

    def read(self, i):
        if self.left > 0:
            self.left -= 1
            raise OSError("Input/output error")
        return self._dataset.read(i)

    def __getattr__(self, name):
        return getattr(self._dataset, name)


def test_held_out_clips_are_read_again_after_a_failure(dataset, monkeypatch):
    monkeypatch.setattr(batches_lib, "RETRY_SECONDS", (0.01, 0.01))
    flaky = Failing(dataset, failures=2)
    for a, b in zip(_feed(flaky).held_out(2, slice(None)), _feed(dataset).held_out(2, slice(None)), strict=True):
        _equal(a, b)
    assert flaky.left == 0


def test_a_held_out_clip_that_cannot_be_read_is_named(dataset, monkeypatch):
    monkeypatch.setattr(batches_lib, "RETRY_SECONDS", (0.01, 0.01))
    with pytest.raises(UserError, match=r"record ./\d+ \(row \d+ of .*\) cannot be read, 3 times tried .*Input/output"):
        _feed(Failing(dataset, failures=10**6)).held_out(1, slice(None))


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
