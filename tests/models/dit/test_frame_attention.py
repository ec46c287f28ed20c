import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnihuman_jax.models.dit.frame_attention import frame_tokens
from omnihuman_jax.tokens import Tokens
from tests.models.dit.tiny import T, random_batch, tiny_config, trained


def attention_inputs(config, per_frame=2):
    rng = np.random.default_rng(0)
    times = np.repeat(np.array([0, -2, -1, 0, 1, 2]), per_frame)  # reference, motion, video
    clean = np.repeat(np.array([1, 1, 1, 0, 0, 0], bool), per_frame)
    position = np.stack([times, 0 * times, 0 * times], -1).astype(np.float32)[None]
    value = rng.standard_normal((2, times.size, config.hidden_size)).astype(np.float32)
    visual = Tokens(
        jnp.asarray(value), jnp.asarray(position), jnp.ones((2, times.size), jnp.int32), jnp.asarray(clean)[None]
    )
    return visual, times, clean


def test_audio_of_a_frame_reaches_the_video_tokens_of_that_frame_only():
    config = tiny_config()
    model = nnx.merge(*trained(config))
    graph, stacked = nnx.split(model.dual.audio)
    attention = nnx.merge(graph, jax.tree.map(lambda x: x[0], stacked))
    visual, times, clean = attention_inputs(config)
    _, _, batch = random_batch(config)
    tokens = model.audio(batch["audio"], jnp.array([True, False]))
    seen = frame_tokens(visual, tokens)
    run = jax.jit(lambda value: attention(visual.value, seen._replace(value=value)))
    before = np.asarray(run(tokens.value))
    assert (np.abs(before[0]).max(-1) > 0).tolist() == (~clean).tolist()
    assert not before[1].any(), "a sample without audio sees nothing"
    for frame in range(T):
        span = slice(frame * config.audio_tokens, (frame + 1) * config.audio_tokens)
        changed = np.abs(np.asarray(run(tokens.value.at[:, span].add(1.0))) - before).max(-1) > 1e-6
        np.testing.assert_array_equal(changed[0], ~clean & (times == frame))
        assert not changed[1].any()
