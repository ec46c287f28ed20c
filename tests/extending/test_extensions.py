"""docs/extending.md: the other extensions, and that the files it names are there."""

import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipelines.raw import manifest, media
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit.mmdit import OmniHuman
from omnihuman_jax.models.functional import Network, make_network
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training import state as state_lib
from omnihuman_jax.training.step import jit_train_step
from omnihuman_jax.training.step_settings import StepSettings
from tests.extending import family  # noqa: F401  (registers it)
from tests.models.dit.tiny import random_batch, tiny_config
from tests.training.test_step import random_batch as training_batch
from tests.training.tiny import tiny_config as training_config

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_document_names_files_that_are_there():
    text = (ROOT / "docs" / "extending.md").read_text()
    paths = set(re.findall(r"`([\w/]+\.(?:py|md))`", text))
    assert len(paths) > 12
    missing = {path for path in paths if not (ROOT / path).is_file() and "NAME" not in path}
    assert missing == set()


def test_a_model_family_is_a_class_and_a_line():
    config = tiny_config(family="biased")
    network = Network(config)
    params = network.init(jax.random.key(0))
    x_t, t, batch = random_batch(config)
    plain = OmniHuman(config, rngs=nnx.Rngs(jax.random.key(0)))
    assert set(params) - set(nnx.to_pure_dict(nnx.state(plain))) == {"velocity_bias"}
    # A fresh network predicts zero, since its last projection is zero.
    np.testing.assert_allclose(network.apply(params, x_t, t, batch), 0.5)
    with pytest.raises(UserError, match=r"model.family='baised'.*did you mean 'biased'"):
        Network(tiny_config(family="baised"))


def test_a_model_family_trains_by_the_same_step():
    config = training_config("unused")
    config.model.family = "biased"
    mesh, network = make_mesh(config.mesh), make_network(config)
    with jax.set_mesh(mesh):
        state = state_lib.init_state(config, mesh, network)
        before = np.asarray(state.params["velocity_bias"])
        state, metrics = jit_train_step(config, network, mesh)(state, training_batch(config), StepSettings.usual(1e-2))
    assert np.isfinite(metrics["loss"]) and metrics["grad_norm_by_part"]["velocity_bias"] > 0
    assert np.abs(np.asarray(state.params["velocity_bias"]) - before).min() > 1e-3


def test_a_data_source_is_a_function_that_writes_a_manifest(tmp_path):
    for i in range(2):
        media.write_mp4(tmp_path / f"{i}.mp4", np.full((9, 16, 16, 3), 80 * i, np.uint8))
    manifest.write_manifest(tmp_path, "cameras", [{"id": f"c{i}", "file": f"{i}.mp4"} for i in range(2)])
    assert [(clip.source, clip.id) for clip in manifest.read(tmp_path)] == [("cameras", "c0"), ("cameras", "c1")]
