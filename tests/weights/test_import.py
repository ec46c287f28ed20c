"""Import and export of a base: there and back bit for bit, a training start, and one line for what is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments.import_weights import fresh_conditions, import_base
from omnihuman_jax.checkpoints import export
from omnihuman_jax.checkpoints.export import to_tensors
from omnihuman_jax.checkpoints.load import is_exported, load_parameters
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit.config import BASE_ONLY_INPUTS, ModelConfig
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.random_keys import INIT, purpose_key
from omnihuman_jax.sharding.rules import tree_shardings
from omnihuman_jax.weights import formats
from omnihuman_jax.weights.names import is_condition
from omnihuman_jax.weights.read import open_files
from tests.inference import tiny
from tests.weights.bases import FORMS, network_of, random_params, write_base

INFO = {"step": 3, "stage": "stage1"}


def config_of(naming, tmp_path):
    return tiny.config(tmp_path, **FORMS[naming])


def test_an_imported_base_is_an_exported_directory_with_fresh_conditions(tmp_path, capsys):
    config, network = config_of("motif", tmp_path), network_of("motif")
    params = random_params(network)
    write_base(tmp_path / "base.safetensors", "motif", params)
    config.vae.checkpoint = ""
    import_base(config, str(tmp_path / "base.safetensors"), "motif", str(tmp_path / "out"))
    loaded_config, loaded, info = load_parameters(tmp_path / "out")
    assert make_network(loaded_config).config == network.config and loaded_config.vae.checkpoint == ""
    assert (info["step"], info["stage"], info["ema"]) == (0, "imported", False)
    fresh = to_tensors(fresh_conditions(network, config.seed))
    for name, value in to_tensors(loaded).items():
        expected = fresh[name] if is_condition(name) else to_tensors(params)[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert not fresh["single.blocks.0.audio.out.kernel"].any()
    assert "Apache" in capsys.readouterr().out
    # What a stage's init_from does: straight into shards.
    mesh = jax.make_mesh((1, 4, 1, 2), ("data", "fsdp", "sequence", "tensor"))
    shardings = tree_shardings(network.abstract_params, mesh)
    sharded = load_parameters(tmp_path / "out", shardings=shardings)[1]
    jax.tree.map(np.testing.assert_array_equal, sharded, loaded)


@pytest.mark.slow
def test_fresh_conditions_are_those_of_a_fresh_model():
    network = network_of("hunyuan")
    whole = to_tensors(jax.jit(network.init)(purpose_key(5, INIT)))
    fresh = to_tensors(fresh_conditions(network, 5))
    assert set(fresh) == {name for name in whole if is_condition(name)}
    for name, value in fresh.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("naming", formats.FORMATS)
@pytest.mark.parametrize("max_bytes", [10**9, 20_000])
def test_an_export_in_the_originals_naming_is_the_original_and_loads_again(naming, max_bytes, tmp_path):
    config, params = config_of(naming, tmp_path), random_params(network_of(naming))
    original = write_base(tmp_path / "base.safetensors", naming, params)
    made = export.save(tmp_path / "out", config, params, INFO, ema=True, naming=naming, max_shard_bytes=max_bytes)
    base = open_files(made / "transformer")
    assert set(base.stored) == set(original)
    for name, value in original.items():
        np.testing.assert_array_equal(base.read(name), value, err_msg=name)
    assert (len(list((made / "transformer").glob("*.safetensors"))) == 1) == (max_bytes > 20_000)
    conditions = safetensors.numpy.load_file(made / "conditions.safetensors")
    assert set(conditions) == {name for name in to_tensors(params) if is_condition(name)}
    assert json.loads((made / "config.json").read_text())["naming"] == naming
    assert is_exported(made)
    loaded_config, loaded, info = load_parameters(made)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert info["ema"] and make_network(loaded_config).config == network_of(naming).config


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("x_embedder.proj.bias"), r"tensor x_embedder\.proj\.bias \(here x_embed\.bias\) is missing"),
        (lambda t: t.update(head=np.ones(1, np.float32)), "tensor head is not part of the model"),
        (
            lambda t: t.update({"proj_out.bias": np.ones(3, np.float32)}),
            r"proj_out\.bias \(here final\.proj\.bias\) has shape \(3,\), should be \(16,\); wrong base",
        ),
        (lambda t: t["proj_out.bias"].fill(np.nan), r"base\.safetensors: tensor proj_out\.bias holds NaN"),
    ],
)
def test_what_is_wrong_with_a_base_is_one_line(spoil, message, tmp_path):
    config, params = config_of("motif", tmp_path), random_params(network_of("motif"))
    tensors = write_base(tmp_path / "base.safetensors", "motif", params)
    spoil(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        import_base(config, str(tmp_path / "base.safetensors"), "motif", str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.", "transformer.", "module."])
def test_a_prefix_of_all_names_is_left_out_and_named(prefix, tmp_path, capsys):
    config, path = config_of("hunyuan", tmp_path), tmp_path / "base.safetensors"
    params = random_params(network_of("hunyuan"))
    tensors = write_base(path, "hunyuan", params)
    safetensors.numpy.save_file({prefix + name: value for name, value in tensors.items()}, path)
    import_base(config, str(path), "hunyuan", str(tmp_path / "out"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "removing the prefix" in line]
    assert lines == [f"{path}: removing the prefix {prefix} from every tensor's name"]
    loaded = to_tensors(load_parameters(tmp_path / "out")[1])
    for name, value in to_tensors(params).items():
        if not is_condition(name):
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)


def test_errors_of_a_checkpoint_with_a_prefix_are_as_without_it(tmp_path):
    path, network = tmp_path / "base.safetensors", network_of("hunyuan")
    tensors = write_base(path, "hunyuan", random_params(network))
    tensors.pop("final_layer.linear.bias")
    safetensors.numpy.save_file({f"model.{name}": value for name, value in tensors.items()}, path)
    with pytest.raises(
        UserError,
        match=r"\(names without model\.\): tensor final_layer\.linear\.bias \(here final\.proj",
    ):
        import_base(config_of("hunyuan", tmp_path), str(path), "hunyuan", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"these are names of --format=hunyuan$"):
        import_base(config_of("hunyuan", tmp_path), str(path), "hunyuan_diffusers", str(tmp_path / "out"))


def test_what_all_names_share_stays_where_the_formats_have_it(tmp_path):
    path, network = tmp_path / "base.safetensors", network_of("hunyuan")
    tensors = write_base(path, "hunyuan", random_params(network))
    part = {name: value for name, value in tensors.items() if name.startswith("double_blocks.")}
    for prefix in ("", "model."):
        safetensors.numpy.save_file({prefix + name: value for name, value in part.items()}, path)
        files = formats.without_prefix(open_files(path), network.config, network.abstract_params)
        assert files.prefix == prefix and set(files.stored) == set(part)


@pytest.mark.parametrize(
    "names",
    [
        ("transformer.single_blocks.0.linear1.lora_A.weight", "transformer.single_blocks.0.linear1.lora_B.weight"),
        ("lora_unet_single_blocks_0_linear1.lora_down.weight", "lora_unet_single_blocks_0_linear1.alpha"),
        ("single_blocks.0.linear1.lora.up.weight", "double_blocks.0.linear1.lora.down.weight"),
        ("diffusion_model.img_in.hada_w1_a", "diffusion_model.img_in.alpha"),
    ],
)
def test_a_lora_is_refused_by_its_name(names, tmp_path):
    path = tmp_path / "lora.safetensors"
    safetensors.numpy.save_file({name: np.zeros((2, 2), np.float32) for name in names}, path)
    with pytest.raises(UserError, match=r"lora\.safetensors: is a LoRA .*; give the base's weights") as caught:
        import_base(config_of("hunyuan", tmp_path), str(path), "hunyuan", str(tmp_path / "out"))
    assert "missing" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_base_of_another_preset_or_format_says_so(tmp_path):
    params = random_params(network_of("hunyuan"))
    path = tmp_path / "base.safetensors"
    write_base(path, "hunyuan", params)
    with pytest.raises(UserError, match=r"these are names of --format=hunyuan$"):
        import_base(config_of("hunyuan", tmp_path), str(path), "hunyuan_diffusers", str(tmp_path / "out"))
    with pytest.raises(UserError, match="hunyuan has no name for"):
        import_base(config_of("motif", tmp_path), str(path), "hunyuan", str(tmp_path / "out"))
    (tmp_path / "config.json").write_text('{"rope_theta": 10000.0}')
    write_base(path, "motif", random_params(network_of("motif")))
    with pytest.raises(
        UserError, match=r"config\.json: wrong base for the preset: rope_theta is 10000\.0, the preset's is 256"
    ):
        import_base(config_of("motif", tmp_path), str(path), "motif", str(tmp_path / "out"))


def test_the_command_reports_a_mistake_in_one_line_and_status_2(tmp_path):
    path = tmp_path / "base.pt"
    path.write_bytes(b"PK")
    command = [sys.executable, "-m", "experiments.import_weights", "--config=experiments/configs/motif_2b.py"]
    arguments = [f"--input={path}", "--format=motif", f"--output={tmp_path}/out"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and "is a pickle" in errors[0]
    assert not (tmp_path / "out").exists()


def test_docs_tell_of_every_input_that_only_a_base_has():
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    for setting, line in BASE_ONLY_INPUTS.items():
        assert hasattr(ModelConfig(), setting)
        assert f"| `{setting}` | {line.split('; here')[0]}" in page


def test_missing_arguments_are_named(tmp_path):
    config = config_of("motif", tmp_path)
    for arguments, missing in (
        (("", "motif", "o"), "input"),
        (("i", "", "o"), "format"),
        (("i", "motif", ""), "output"),
    ):
        with pytest.raises(UserError, match=f"--{missing} is missing"):
            import_base(config, *arguments)
    with pytest.raises(UserError, match=re.escape(", ".join(formats.FORMATS))):
        import_base(config, "i", "wan", "o")
