"""Reading safetensors: what is there comes as it is, and what is wrong is one line naming file and tensor."""

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from omnihuman_jax.errors import UserError
from omnihuman_jax.weights.read import open_files


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((4, 3)).astype(np.float32),
        "b": rng.standard_normal(5).astype(np.float16),
        "c": rng.standard_normal((2, 2, 2)).astype(ml_dtypes.bfloat16),
        "d": rng.standard_normal(2),
    }


@pytest.fixture
def file(tmp_path, tensors):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def write_shards(folder, tensors, weight_map=None):
    for name, value in tensors.items():
        safetensors.numpy.save_file({name: value}, folder / f"{name}.safetensors")
    index = {"weight_map": weight_map or {name: f"{name}.safetensors" for name in tensors}}
    path = folder / "weights.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path


def assert_reads(path, tensors):
    files = open_files(path)
    assert set(files.stored) == set(tensors)
    for name, value in tensors.items():
        found = files.read(name)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)


def test_one_file_its_directory_an_index_and_its_directory_read_the_same(file, tensors, tmp_path):
    assert_reads(file, tensors)
    assert_reads(tmp_path, tensors)
    (tmp_path / "shards").mkdir()
    assert_reads(write_shards(tmp_path / "shards", tensors), tensors)
    assert_reads(tmp_path / "shards", tensors)


def write_series(folder, tensors):
    folder.mkdir(exist_ok=True)
    files = [folder / f"model-{i:05d}-of-{len(tensors):05d}.safetensors" for i in range(1, len(tensors) + 1)]
    for file, (name, value) in zip(files, tensors.items(), strict=True):
        safetensors.numpy.save_file({name: value}, file)
    return files


def test_shards_without_an_index_are_read_together(tensors, tmp_path):
    files = write_series(tmp_path / "shards", tensors)
    assert_reads(tmp_path / "shards", tensors)
    assert_reads(files[2], tensors)


def test_missing_shards_are_named(tensors, tmp_path):
    files = write_series(tmp_path / "shards", tensors)
    files[1].unlink()
    for given in (files[0], tmp_path / "shards"):
        with pytest.raises(UserError, match=r"one of 4 shards, without model-00002-of-00004\.safetensors; get all"):
            open_files(given)
    files[0].unlink()
    files[2].unlink()
    with pytest.raises(UserError, match=r"without model-00001-of-00004.*, model-00003-of-00004\.safetensors; get"):
        open_files(tmp_path / "shards")


def test_shards_of_two_checkpoints_are_not_mixed(tensors, tmp_path):
    write_series(tmp_path / "shards", tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "shards" / "other.safetensors")
    with pytest.raises(UserError, match="name the file to read"):
        open_files(tmp_path / "shards")


def test_rows_are_read_alone(file, tensors):
    np.testing.assert_array_equal(open_files(file).read("a", slice(1, 3)), tensors["a"][1:3])


def test_a_truncated_file_names_its_first_lost_tensor(file):
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"weights\.safetensors: is truncated: tensor \w ends at byte"):
        open_files(file)


@pytest.mark.parametrize("content", [b"", b"nonsense", struct.pack("<Q", 4) + b"{{}}", struct.pack("<Q", 2) + b"[]"])
def test_what_is_no_safetensors_file_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.safetensors: cannot be read"):
        open_files(file)


def test_a_value_that_is_not_finite_names_its_tensor(file, tensors):
    for value in (np.nan, np.inf):
        bad = tensors["c"].copy()
        bad[1, 0, 1] = value
        safetensors.numpy.save_file(tensors | {"c": bad}, file)
        with pytest.raises(UserError, match=r"weights\.safetensors: tensor c holds NaN or infinity"):
            open_files(file).read("c")


def test_a_dtype_that_is_not_read_names_its_tensor(file, tensors):
    safetensors.numpy.save_file(tensors | {"scale": np.arange(3)}, file)
    with pytest.raises(UserError, match=r"weights\.safetensors: tensor scale is I64, not one of F64, F32, F16, BF16"):
        open_files(file)


def test_tensors_without_a_use_are_left_out_whatever_they_are(file, tensors, tmp_path):
    more = tensors | {"head.bias": np.arange(3)}
    safetensors.numpy.save_file(more, file)
    (tmp_path / "shards").mkdir()
    for path in (file, write_shards(tmp_path / "shards", more)):
        assert set(open_files(path, ("other", r"head\..*")).stored) == set(tensors)
    with pytest.raises(UserError, match=r"tensor head\.bias is I64"):
        open_files(file, ("head",))  # the whole name or nothing


def test_settings_are_those_beside_the_file(file, tmp_path):
    assert open_files(file).settings() == {}
    (tmp_path / "config.json").write_text('{"width": 3}')
    assert open_files(tmp_path).settings() == {"width": 3}
    (tmp_path / "other.json").write_text("{")
    with pytest.raises(UserError, match=r"other\.json: cannot be read"):
        open_files(file).settings("other.json")


def test_an_index_must_agree_with_its_files(tmp_path, tensors):
    path = write_shards(tmp_path, tensors)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"index\.json: lists tensor b in b\.safetensors, which is missing"):
        open_files(path)
    path = write_shards(tmp_path, tensors, {"a": "a.safetensors", "z": "b.safetensors"})
    with pytest.raises(UserError, match=r"tensor z should be in b\.safetensors, but is not"):
        open_files(path)
    path = write_shards(tmp_path, tensors, {"a": "../a.safetensors"})
    with pytest.raises(UserError, match="outside its directory"):
        open_files(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="no weight_map"):
        open_files(path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"a": 1}))
    for given in (path, tmp_path) if name.endswith((".pt", ".bin")) else (path,):
        with pytest.raises(UserError) as caught:
            open_files(given)
        message = str(caught.value)
        assert (
            "is a pickle" in message and "weights_only=True" in message and f"{tmp_path}/weights.safetensors" in message
        )
        assert "\n" not in message


def test_places_without_weights_are_refused(tmp_path, file):
    with pytest.raises(UserError, match="no such file"):
        open_files(tmp_path / "nothing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no .safetensors file"):
        open_files(tmp_path / "empty")
    (tmp_path / "other.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"other\.safetensors, weights\.safetensors; name the file"):
        open_files(tmp_path)
