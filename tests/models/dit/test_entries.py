"""Every way into the network, taken by a condition that is not one of the four."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from omnihuman_jax import conditions
from omnihuman_jax.conditions import Condition, Kind
from omnihuman_jax.frames import STRIDE
from omnihuman_jax.models.dit import entries
from omnihuman_jax.models.dit.entries import Entry, Way
from omnihuman_jax.models.dit.flops import forward_breakdown
from omnihuman_jax.models.dit.layers import linear
from omnihuman_jax.models.functional import Network
from omnihuman_jax.tokens import Tokens
from omnihuman_jax.weights.names import is_condition
from tests.models.dit.tiny import B, H, T, W, random_batch, tiny_config

WIDTH = 3


class Encoder(nnx.Module):
    """A projection of a latent frame's rows, shaped for each way."""

    way: Way

    def __init__(self, config, *, rngs):
        self.config = config
        outputs = WIDTH if self.way is Way.CHANNELS else config.hidden_size
        self.fc = linear(config, 2 * STRIDE, outputs, rngs=rngs, bias=False)

    def __call__(self, values, present, *grid):
        x = self.fc(jnp.where(present[:, None, None], values, 0).reshape(len(values), -1, 2 * STRIDE))
        if self.way is Way.CHANNELS:
            return jnp.broadcast_to(x[:, :, None, None], (*x.shape[:2], *grid, WIDTH))
        if self.way is Way.ADDITION:
            return x
        frame = jnp.arange(x.shape[1], dtype=jnp.float32)
        clean = jnp.full((1, len(frame)), self.way is Way.TOKENS)
        segment = jnp.broadcast_to(present[:, None].astype(jnp.int32), x.shape[:2])
        return Tokens(x, jnp.stack([frame, 0 * frame, 0 * frame], -1)[None], segment, clean)

    @staticmethod
    def width(config):
        return WIDTH

    @staticmethod
    def flops(config, frames, rows, columns):
        return 1


@pytest.fixture(params=[Way.TOKENS, Way.CROSS_ATTENTION, Way.CHANNELS, Way.ADDITION])
def way(request, monkeypatch):
    """The table with a fifth condition that enters this way."""
    added = Condition("wind", Kind.TRACK, "wind", "wind", row=(2,), selects=True)
    monkeypatch.setattr(conditions, "_TABLE", [*conditions.table(), added])
    encoder = type("Encoder", (Encoder,), {"way": request.param})
    monkeypatch.setitem(entries._ENTRIES, "wind", Entry(request.param, encoder))
    return request.param


def test_a_condition_changes_the_velocity_of_the_samples_that_have_it_and_no_other(way):
    config = tiny_config()
    network = Network(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.2 * rng.standard_normal(s.shape), s.dtype), network.abstract_params)
    x_t, t, batch = random_batch(config)
    present = np.arange(B) == 0
    batch = {**batch, "active": np.concatenate([batch["active"], present[:, None]], 1)}
    wind = rng.standard_normal((B, STRIDE * T, 2)).astype(np.float32)
    run = jax.jit(lambda wind: network.apply(params, x_t, t, {**batch, "wind": wind}))
    left_out = np.asarray(jax.jit(lambda: network.apply(params, x_t, t, batch))())
    plain, changed = np.asarray(run(wind)), np.asarray(run(wind + 1))
    assert np.abs(changed[0] - plain[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1:], plain[1:])
    np.testing.assert_allclose(plain[1:], left_out[1:], atol=2e-5)


def test_its_parameters_are_not_the_bases_and_its_flops_are_counted(way):
    config = tiny_config()
    parameters = traverse_util.flatten_dict(Network(config).abstract_params, sep=".")
    names = [name for name in parameters if "wind" in name]
    assert names and all(is_condition(name) for name in names)
    assert any(name.startswith("wind_embed") for name in names) == (way is Way.CHANNELS)
    assert any("dual" in name for name in names) == (way is Way.CROSS_ATTENTION)
    assert forward_breakdown(config, T, H, W)["wind_encoder"] == 1
