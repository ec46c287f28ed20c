"""Records survive the trip to disk exactly; unusable data directories are refused with one clear line."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_pipelines import schema
from omnihuman_jax.errors import UserError

META = schema.Meta(
    latent_channels=4,
    sizes={"audio_dim": 6, "text_dim": 5, "num_keypoints": 28},
    encoders={"audio": "log-mel", "text": "t"},
    vae_sha256="0" * 64,
)


def make_record(name="real/a-0", frames=9, audio=True, pose=True, seed=0):
    rng = np.random.default_rng(seed)
    tokens = 1 + (frames - 1) // 4
    return {
        "id": name,
        "source": "real",
        "split": "train",
        "caption": "a man — speaking",
        "speaker": "",
        "sentence": "",
        "view": "full",
        "latents": rng.normal(size=(tokens, 3, 2, 4)).astype(np.float16),
        "references": rng.normal(size=(4, 3, 2, 4)).astype(np.float16),
        "reference_frames": np.arange(4, dtype=np.int32),
        "audio": rng.normal(size=(frames if audio else 0, 6)).astype(np.float16),
        "keypoints": rng.random((frames if pose else 0, 28, 3)).astype(np.float32),
        "text": rng.normal(size=(7, 5)).astype(np.float16),
        "mouth": np.zeros((0,), np.float32),
        "attributes": np.arange(3, dtype=np.float32),
        "boxes": rng.random((frames, 4, 4)).astype(np.float32),
        "frames": frames,
        "height": 24,
        "width": 16,
    }


def write(directory, records, **kwargs):
    with schema.DatasetWriter(directory, META, **kwargs) as writer:
        for record in records:
            writer.add(record)


def assert_same(a, b):
    assert set(a) == set(b) == {*schema.TEXT_FIELDS, *schema.NUMBER_FIELDS, *META.arrays}
    for name, value in a.items():
        if isinstance(value, np.ndarray):
            assert b[name].dtype == value.dtype and b[name].shape == value.shape, name
            np.testing.assert_array_equal(b[name], value, err_msg=name)
        else:
            assert b[name] == value, name


@pytest.mark.parametrize("audio", [True, False])
@pytest.mark.parametrize("pose", [True, False])
def test_record_round_trip_is_exact_with_and_without_conditions(audio, pose):
    record = make_record(audio=audio, pose=pose)
    assert_same(record, schema.decode(schema.encode(record, META.arrays), META.arrays))


def test_a_record_is_the_same_bytes_in_every_process():
    """Protocol buffers write a map in an order that differs from process to process, unless told otherwise."""
    from tensorflow_datasets.proto import tf_example_pb2

    for seed in range(5):
        data = schema.encode(make_record(seed=seed), META.arrays)
        example = tf_example_pb2.Example.FromString(data)
        assert example.SerializeToString(deterministic=True) == data
        keys = list(example.features.feature)
        places = [data.index(b"\n" + bytes([len(key)]) + key.encode()) for key in sorted(keys)]
        assert places == sorted(places)


def test_missing_or_unknown_field_is_refused():
    record = make_record()
    record["extra"] = 1
    with pytest.raises(ValueError, match="extra"):
        schema.encode(record, META.arrays)


def test_dataset_reads_in_any_order_from_threads_and_after_pickling(tmp_path):
    records = [make_record(f"real/a-{i}", frames=9 + 4 * (i % 2), audio=i % 3 > 0, seed=i) for i in range(70)]
    write(tmp_path / "d", records, extra={"inputs_sha256": "abc"})
    data = copy.deepcopy(schema.Dataset.open(tmp_path / "d"))
    assert data.meta == META and len(data) == 70 and data.extra["inputs_sha256"] == "abc"
    assert len({entry["file"] for entry in data.index}) == 2
    order = np.random.default_rng(0).permutation(70)
    with ThreadPoolExecutor(4) as pool:
        for i, read in zip(order, pool.map(data.read, order), strict=True):
            assert_same(records[i], read)
    again = copy.deepcopy(data)
    assert_same(records[69], again.read(69))
    entry = data.index[1]
    assert entry["shape"] == [4, 3, 2] and entry["audio"] and entry["pose"] and entry["frames"] == 13
    assert not data.index[0]["audio"]


def test_clips_are_copied_under_their_id(tmp_path):
    clip = tmp_path / "x.mp4"
    clip.write_bytes(b"clip")
    with schema.DatasetWriter(tmp_path / "d", META) as writer:
        writer.add(make_record(), clip)
    data = schema.Dataset.open(tmp_path / "d")
    assert data.clip_path(0).name == "real__a-0.mp4" and data.clip_path(0).read_bytes() == b"clip"


def test_failure_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), schema.DatasetWriter(tmp_path / "d", META) as writer:
        writer.add(make_record())
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


def test_writing_no_record_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no clip"):
        write(tmp_path / "d", [])
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_not_overwritten(tmp_path):
    write(tmp_path / "d", [make_record()])
    with pytest.raises(UserError, match="already exists"):
        write(tmp_path / "d", [make_record()])


@pytest.mark.parametrize(
    "change",
    [
        {"audio": np.zeros((5, 6), np.float16)},
        {"audio": np.zeros((9, 7), np.float16)},
        {"keypoints": np.zeros((9, 27, 3), np.float32)},
        {"boxes": np.zeros((9, 3, 4), np.float32)},
        {"latents": np.full((3, 3, 2, 4), np.nan, np.float16)},
        {"split": "test"},
        {"view": "feet"},
        {"frames": 10},
    ],
)
def test_inconsistent_records_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="real/a-0"):
        write(tmp_path / "d", [make_record() | change])


def test_same_id_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write(tmp_path / "d", [make_record(), make_record()])


def test_unusable_directories_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        schema.Dataset.open(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        schema.Dataset.open(tmp_path / "empty")
    write(tmp_path / "d", [make_record()])
    head = json.loads((tmp_path / "d/dataset.json").read_text())

    def rewrite(**change):
        (tmp_path / "d/dataset.json").write_text(json.dumps(head | change))

    rewrite(schema_version=99)
    with pytest.raises(UserError, match="version 99"):
        schema.Dataset.open(tmp_path / "d")
    rewrite(index=[])
    with pytest.raises(UserError, match="no records"):
        schema.Dataset.open(tmp_path / "d")
    (tmp_path / "d/dataset.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        schema.Dataset.open(tmp_path / "d")
    rewrite()
    (tmp_path / "d" / head["index"][0]["file"]).unlink()
    with pytest.raises(UserError, match="lacks"):
        schema.Dataset.open(tmp_path / "d")


def test_views_have_ids_and_file_names_of_their_own_and_can_be_left_out(tmp_path):
    assert schema.view_id("real/a-0", "full") == "real/a-0" and schema.view_id("real/a-0", "face") == "real/a-0#face"
    assert schema.clip_filename("real/a-0#face") == "real__a-0@face.mp4"
    records = [
        make_record("real/a") | {"split": "heldout"},
        make_record("real/a#face") | {"split": "heldout", "view": "face"},
        make_record("real/b#face") | {"view": "face"},
        make_record("real/b"),
    ]
    write(tmp_path / "d", records)
    data = schema.Dataset.open(tmp_path / "d")
    assert [entry["view"] for entry in data.index] == ["full", "face", "face", "full"]
    assert schema.full_records(data, "heldout") == [0] and schema.full_records(data, "train") == [3]
    assert schema.full_records(data) == [0, 3]
    assert all(schema.clip_id(schema.view_id("a/b#c", view)) == "a/b#c" for view in schema.VIEWS)
