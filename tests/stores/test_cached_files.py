"""Data sets in object stores: files are downloaded once, whole and as they are in the store."""

import numpy as np
import pytest

from data_pipelines.schema import Dataset, clip_filename
from omnihuman_jax import stores
from omnihuman_jax.errors import UserError
from tests.data_pipelines.fake_dataset import write_fake_dataset


@pytest.fixture
def local(tmp_path):
    return write_fake_dataset(tmp_path / "data")


def put(local, store):
    stores.upload(local.directory, store.root / "data")
    return store.root / "data"


def assert_same(record, other):
    assert record.keys() == other.keys()
    for name, value in record.items():
        np.testing.assert_array_equal(value, other[name])


def test_records_are_those_of_the_files_and_are_downloaded_once(local, store, tmp_path):
    place = put(local, store)
    found = Dataset.open(place)
    assert found.fingerprint() == local.fingerprint()
    for i in range(len(local)):
        assert_same(found.read(i), local.read(i))
    files = list((tmp_path / "cache" / "records").glob("[!.]*"))
    assert [file.read_bytes() for file in files] == [
        file.read_bytes() for file in (local.directory / "records").iterdir()
    ]
    store.faults.seen.clear()
    assert_same(Dataset.open(place).read(3), local.read(3))
    assert not [seen for seen in store.faults.seen if "array_record" in seen]


def test_a_clip_is_downloaded_and_a_missing_one_has_only_a_path(local, gs):
    name = clip_filename(local.index[0]["id"])
    stores.write_whole(gs.root / "data" / "clips" / name, b"clip")
    found = Dataset.open(put(local, gs))
    assert found.clip_path(0).read_bytes() == b"clip" and found.clip_path(0).suffix == ".mp4"
    assert not found.clip_path(1).exists()


def test_what_arrives_damaged_is_not_kept(local, gs, tmp_path):
    found = Dataset.open(put(local, gs))
    gs.faults.change = lambda path, body: body[:-1] + b"!" if "array_record" in path and len(body) > 1000 else body
    with pytest.raises(OSError, match="CRC-32C"):
        found.read(0)
    assert not list((tmp_path / "cache" / "records").glob("[!.]*"))
    gs.faults.clear()
    assert_same(found.read(0), local.read(0))


def test_a_damaged_local_file_is_downloaded_again(local, gs, tmp_path):
    place = put(local, gs)
    Dataset.open(place).read(0)
    (file,) = (tmp_path / "cache" / "records").glob("[!.]*")
    file.write_bytes(b"\0" * file.stat().st_size)
    found = Dataset.open(place)
    with pytest.raises(Exception, match=""):
        found.read(0)
    assert_same(found.read(0), local.read(0))


def test_another_version_of_a_file_is_another_file(local, store, tmp_path):
    place = put(local, store)
    Dataset.open(place).read(0)
    write_fake_dataset(tmp_path / "other", 12, seed=5)
    stores.upload(tmp_path / "other", place)
    changed = Dataset.open(tmp_path / "other")
    assert_same(Dataset.open(place).read(0), changed.read(0))


@pytest.mark.parametrize("status", [429, pytest.param(503, marks=pytest.mark.slow)])
def test_reading_goes_on_after_refusals(local, store, status):
    place, refused = put(local, store), []

    def first_of_each(method, path):
        if path in refused:
            return 0
        refused.append(path)
        return status

    store.faults.of = first_of_each
    assert_same(Dataset.open(place).read(0), local.read(0))
    assert refused


def test_what_cannot_be_opened_is_one_line(local, store):
    with pytest.raises(UserError, match=f"data.dir={store.root}/none/dataset.json: no such bucket or object"):
        Dataset.open(store.root / "none")
    place = put(local, store)
    store.faults.of = lambda method, path: 403
    with pytest.raises(UserError, match="no permission"):
        Dataset.open(place)
    store.faults.clear()
    stores.file_system(place).rm(f"{place}/records", recursive=True)
    with pytest.raises(UserError, match="lacks records/records-00000.array_record; prepare the data again"):
        Dataset.open(place)
