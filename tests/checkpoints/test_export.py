"""Exported directories: bit-exact there and back, complete or absent, and refused when damaged."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments.export import export_checkpoint
from omnihuman_jax.checkpoints import export
from omnihuman_jax.checkpoints.load import is_exported, load_config, load_parameters
from omnihuman_jax.checkpoints.manager import Checkpoints
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.training.state import TrainState
from tests.inference import tiny
from tests.weights.bases import FORMS, network_of, random_params

INFO = {"step": 12, "stage": "stage2", "path": "somewhere"}


@pytest.fixture
def config(tmp_path):
    return tiny.config(tmp_path)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("max_bytes", [10**9, 20_000])
def test_parameters_come_back_bit_for_bit(tmp_path, config, max_bytes):
    made = export.save(tmp_path / "out", config, tiny.params(), INFO, ema=True, max_shard_bytes=max_bytes)
    assert is_exported(made)
    loaded, params, info = load_parameters(made)
    assert_same(params, tiny.params())
    assert (info["step"], info["stage"], info["ema"]) == (12, "stage2", True)
    assert make_network(loaded).config == make_network(config).config
    files = sorted(file.name for file in made.glob("model*"))
    assert (files == ["model.safetensors"]) == (max_bytes > 20_000)


@pytest.mark.parametrize("mask", [0o022, 0o027])
@pytest.mark.parametrize("naming", ["", "motif"])
def test_what_is_written_has_the_mode_of_new_files(tmp_path, config, naming, mask):
    config = tiny.config(tmp_path, **FORMS[naming]) if naming else config
    before = os.umask(mask)
    try:
        params = random_params(network_of(naming)) if naming else tiny.params()
        made = export.save(tmp_path / "out", config, params, INFO, ema=True, naming=naming, max_shard_bytes=20_000)
    finally:
        os.umask(before)
    for path in (made, *made.rglob("*")):
        mode = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == mode & ~mask, path


def test_bfloat16_parameters_come_back_bit_for_bit(tmp_path, config):
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)), tiny.params())
    made = export.save(tmp_path / "out", config, params, INFO, ema=False)
    assert_same(load_parameters(made, use_ema=False)[1], params)


def test_names_are_dotted_and_blocks_are_apart():
    tensors = export.to_tensors(tiny.params())
    stacked = tiny.params()["single"]["q"]["kernel"]
    np.testing.assert_array_equal(tensors["single.blocks.0.q.kernel"], stacked[0])
    assert "x_embed.kernel" in tensors and "null_text" in tensors
    assert not any(name.startswith(("single.q", "dual.img")) for name in tensors)
    assert sum(value.size for value in tensors.values()) == sum(x.size for x in jax.tree.leaves(tiny.params()))


def test_other_tools_can_read_the_files(tmp_path, config):
    made = export.save(tmp_path / "out", config, tiny.params(), INFO, ema=True, max_shard_bytes=20_000)
    index = json.loads((made / "model.safetensors.index.json").read_text())
    expected = export.to_tensors(tiny.params())
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(made / file)[name], expected[name])


def test_the_directory_stands_alone(tmp_path, config):
    made = export.save(tmp_path / "out", config, tiny.params(), INFO, ema=True)
    moved = made.rename(tmp_path / "moved")
    (tmp_path / "vae.safetensors").unlink()
    loaded = load_config(moved)
    assert loaded.vae.checkpoint == str(moved / "vae.safetensors")
    head = json.loads((moved / "config.json").read_text())
    assert head["conditions"] == ["text", "reference", "audio", "pose"]
    assert head["config"]["dataset"]["encoders"]["audio"] == "log-mel" and len(head["vae_sha256"]) == 64


def test_nothing_is_left_behind_by_a_failed_export(tmp_path, config):
    config.vae.checkpoint = str(tmp_path / "missing.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        export.save(tmp_path / "out", config, tiny.params(), INFO, ema=True)
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_in_the_way_is_not_overwritten(tmp_path, config):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty directory"):
        export.save(tmp_path / "out", config, tiny.params(), INFO, ema=True)
    with pytest.raises(UserError, match="does not exist"):
        export.check_output(tmp_path / "no" / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_empty_output_directory_is_used(tmp_path, config):
    (tmp_path / "out").mkdir()
    export.save(tmp_path / "out", config, tiny.params(), INFO, ema=True)
    assert is_exported(tmp_path / "out")
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_damaged_exports_are_refused_by_name(tmp_path, config):
    made = export.save(tmp_path / "out", config, tiny.params(), INFO, ema=True)
    weights = made / "model.safetensors"
    good = safetensors.numpy.load_file(weights)
    name = "single.blocks.0.q.kernel"
    for bad, message in (
        ({k: v for k, v in good.items() if k != name}, f"{name} is missing"),
        (good | {name: good[name][:-1]}, f"{name} has shape"),
        (good | {"extra": good[name]}, "extra is not part"),
    ):
        safetensors.numpy.save_file(bad, weights)
        with pytest.raises(UserError, match=message):
            load_parameters(made)
    weights.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        load_parameters(made)
    (made / "config.json").write_text('{"kind": "else"}')
    with pytest.raises(UserError, match="kind and version"):
        load_parameters(made)


def test_the_other_kind_of_parameters_is_not_passed_off(tmp_path, config):
    made = export.save(tmp_path / "out", config, tiny.params(), INFO, ema=False)
    assert load_parameters(made)[2]["ema"] is False
    with pytest.raises(UserError, match="--noema"):
        load_parameters(made, use_ema=True)


def test_unknown_formats_name_those_there_are():
    with pytest.raises(UserError, match="safetensors"):
        export.check_format("onnx")
    export.check_format("safetensors")


def test_a_training_checkpoint_exports_its_ema_or_its_raw_parameters(tmp_path, config, capsys):
    raw, ema = tiny.params(), jax.tree.map(lambda x: jnp.asarray(2 * np.asarray(x)), tiny.params())
    checkpoints = Checkpoints(tmp_path / "run", every=1, keep=1)
    state = TrainState(jnp.int32(7), raw, {"count": jnp.int32(7)}, ema)
    meta = {"step": 7, "stage": "stage1", "config": json.loads(json.dumps(config.to_dict()))}
    checkpoints.save(7, state, meta, ends="stage1")
    checkpoints.close()
    for use_ema, expected in ((True, ema), (False, raw)):
        output = tmp_path / f"out-{use_ema}"
        for made in (output, output.with_suffix(".safetensors")):
            export_checkpoint(str(tmp_path / "run"), str(made), ema=use_ema)
            _, params, info = load_parameters(made)
            assert_same(params, expected)
        assert (info["step"], info["stage"], info["ema"]) == (7, "stage1", use_ema)
    assert "step 7 (stage1), raw parameters" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_file_holds_parameters_and_config(tmp_path, config, dtype, monkeypatch):
    made = export.save_file(tmp_path / "base.safetensors", config, tiny.params(), INFO, ema=True, dtype=dtype)
    moved = made.rename(tmp_path / "moved.safetensors")
    assert is_exported(moved) and not is_exported(tmp_path / "other.safetensors")
    loaded, params, info = load_parameters(moved)
    assert loaded.vae.checkpoint == config.vae.checkpoint  # not moved with it
    assert (info["step"], info["stage"], info["ema"]) == (12, "stage2", True)
    assert_same(params, jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype)), tiny.params()))
    with pytest.raises(UserError, match="exists; name a new file"):
        export.save_file(moved, config, tiny.params(), INFO, ema=True, dtype=dtype)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_tensors", full)
        with pytest.raises(UserError, match="other.safetensors: cannot be written .*No space left"):
            export.save_file(moved.with_stem("other"), config, tiny.params(), INFO, ema=True, dtype=dtype)
    assert list(tmp_path.glob("*other*")) == []
    moved.write_bytes(moved.read_bytes()[:100])
    with pytest.raises(UserError, match=r"moved\.safetensors: not a readable safetensors file"):
        load_config(moved)
    safetensors.numpy.save_file({"x": np.zeros(2)}, moved)
    with pytest.raises(UserError, match=r"moved\.safetensors: kind and version are \(None, None\)"):
        load_config(moved)
