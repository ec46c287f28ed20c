import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnihuman_jax.models.dit import audio
from omnihuman_jax.tokens import Tokens
from tests.models.dit.tiny import T, random_batch, tiny_config, trained


def test_windows_follow_the_table_of_pixel_frames():
    # Window of 3 latent frames that starts at latent frame s = 5, context 2: row r is pixel frame 4*5 - 3 - 2 + r.
    pixel_frames = np.arange(4 * 5 - 3 - 2, 4 * 7 + 2 + 1)
    table = np.asarray(audio.windows(jnp.asarray(pixel_frames, jnp.float32)[None, :, None], 2))[0]
    np.testing.assert_array_equal(
        table,
        [
            [15, 16, 17, 18, 19, 20, 21, 22],  # latent frame 5 covers pixel frames 17..20
            [19, 20, 21, 22, 23, 24, 25, 26],
            [23, 24, 25, 26, 27, 28, 29, 30],
        ],
    )


def test_a_feature_frame_reaches_only_the_latent_frames_whose_window_holds_it():
    config = tiny_config(audio_context=1)
    adapter = nnx.merge(*trained(config)).audio
    _, _, batch = random_batch(config, batch=1)
    run = jax.jit(lambda x: adapter(x, jnp.ones(1, bool)).value)
    before = np.asarray(run(batch["audio"])).reshape(T, -1)
    for row in range(batch["audio"].shape[1]):
        features = batch["audio"].copy()
        features[:, row] += 1
        changed = np.abs(np.asarray(run(features)).reshape(T, -1) - before).max(-1) > 1e-6
        np.testing.assert_array_equal(changed, [4 * k <= row < 4 * k + 6 for k in range(T)], err_msg=f"row {row}")


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
    segments = audio.listening(visual, tokens)
    run = jax.jit(lambda value: attention(visual.value, value, *segments))
    before = np.asarray(run(tokens.value))
    assert (np.abs(before[0]).max(-1) > 0).tolist() == (~clean).tolist()
    assert not before[1].any(), "a sample without audio hears nothing"
    for frame in range(T):
        span = slice(frame * config.audio_tokens, (frame + 1) * config.audio_tokens)
        changed = np.abs(np.asarray(run(tokens.value.at[:, span].add(1.0))) - before).max(-1) > 1e-6
        np.testing.assert_array_equal(changed[0], ~clean & (times == frame))
        assert not changed[1].any()


def test_packed_samples_hear_their_own_audio():
    visual = Tokens(jnp.zeros((1, 4, 1)), jnp.zeros((1, 4, 3)), jnp.array([[1, 2, 0, 3]]), jnp.zeros((1, 4), bool))
    sound = Tokens(jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 3)), jnp.array([[1, 2]]), jnp.zeros((1, 2), bool))
    q_segment, kv_segment = (np.asarray(x)[0] for x in audio.listening(visual, sound))
    assert q_segment[0] == kv_segment[0] != q_segment[1] == kv_segment[1]
    assert q_segment[2] == q_segment[3] == 0, "padding, and a sample without audio"
