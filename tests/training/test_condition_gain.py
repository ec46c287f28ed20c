"""Condition gain with a network whose use of the audio is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnihuman_jax import batch as batch_lib
from omnihuman_jax import regions
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.random_keys import CONDITION_GAIN, purpose_key
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.mesh import make_mesh
from omnihuman_jax.training.condition_gain import NOISE_LEVELS, ConditionGain, partners, percent_gain, summary
from tests.training.tiny import tiny_config

BUCKET = (3, 4, 4)
AUDIO = 2


class Listener:
    """Predicts the velocity plus an error that is the audio's first number minus `params`, in the mouth's cells."""

    def __init__(self, network, velocity, mouth):
        self.abstract_params, self._velocity, self._mouth = network.abstract_params, velocity, mouth

    def apply(self, params, x, t, batch):
        heard = jnp.where(batch["active"][:, AUDIO], batch["audio"][:, 0, 0], 0.0)
        error = (heard - jnp.arange(len(x)))[:, None, None, None] * self._mouth
        return self._velocity + error[..., None]


@pytest.fixture(scope="module")
def case():
    config = tiny_config("unused")
    config.mesh.update({"data": 2, "fsdp": 4})
    size, rng = config.global_batch_size, np.random.default_rng(0)
    batch = {}
    for name, (row, dtype) in batch_lib.fields(config.model, BUCKET).items():
        batch[name] = np.zeros((size, *row), dtype)
    batch["latents"] = rng.standard_normal(batch["latents"].shape).astype(np.float32)
    batch["active"][:] = True
    batch["active"][3, AUDIO] = False
    batch["audio"][:, 0, 0] = np.arange(size)  # right: no error
    batch["regions"][:, :, 2:, 1:3, regions.index("mouth")] = True
    batch["regions"][5] = False
    batch["clip"] = np.array([0, 1, 2, 3, 4, 5, 6, 6])
    return config, batch


def test_the_gain_of_a_network_that_hears_perfectly(case):
    config, batch = case
    network, mesh = make_network(config), make_mesh(config.mesh)
    eps = jax.random.normal(jax.random.fold_in(purpose_key(config.seed, CONDITION_GAIN), 0), batch["latents"].shape)
    mouth = np.zeros((*batch["latents"].shape[:-1],), np.float32)
    mouth[:, :, 2:, 1:3] = 1
    listener = Listener(network, np.asarray(eps) - batch["latents"] + 1.0, mouth)  # + 1: a loss of 1 everywhere
    with jax.set_mesh(mesh):
        params = network.init(jax.random.key(0))
        params = jax.device_put(params, rules.tree_shardings(params, mesh))
        gains = ConditionGain(config, listener, mesh, [batch])(params)
    assert set(gains) == {"text", "reference", "audio", "pose"} and set(gains["audio"]) == {"all", "mouth"}
    assert set(gains["audio"]["mouth"]) == {f"{level:g}" for level in NOISE_LEVELS}

    clip = batch["clip"]
    partner = partners(clip, batch["active"][:, AUDIO])
    assert partner[3] == -1 and all(clip[p] != clip[i] for i, p in enumerate(partner) if p >= 0)
    rows = [i for i in range(8) if i not in (3, 5)]  # 3 has no audio, the mouth of 5 is unknown
    for variant, heard in (("wrong", partner), ("none", np.zeros(8))):
        by_row = {i: (heard[i] - i + 1.0) ** 2 - 1 for i in rows}  # the right loss is 1
        by_clip = np.array([by_row[i] for i in rows[:4]] + [(by_row[6] + by_row[7]) / 2])
        found = gains["audio"]["mouth"]["0.75"][variant]
        assert found["clips"] == 5
        assert found["gain"] == pytest.approx(100 * by_clip.mean(), rel=1e-4, abs=1e-2)
        assert found["error"] == pytest.approx(100 * by_clip.std(ddof=1) / np.sqrt(5), rel=1e-4)
        assert gains["text"]["all"]["0.5"][variant]["gain"] == pytest.approx(0, abs=1e-4)
    assert set(gains["pose"]) == {"all"}, "no limbs are known"
    assert "audio (mouth) " in summary(gains) and "against none" in summary(gains)


def test_rows_without_another_clip_cannot_tell():
    assert partners(np.array([4, 4, 4]), np.array([True] * 3)).tolist() == [-1, -1, -1]
    assert partners(np.array([4, 5, 6]), np.array([True, False, True])).tolist() == [2, -1, 0]
    assert percent_gain(np.ones(2), np.ones(2), np.array([3, 3])) == {}
    assert percent_gain(np.ones(2), np.array([1, np.nan]), np.array([3, 4])) == {}
    assert "no condition is in two held-out clips" in summary({"audio": {"all": {"0.5": {"wrong": {}, "none": {}}}}})
