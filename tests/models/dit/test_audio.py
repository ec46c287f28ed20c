import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnihuman_jax.models.dit import audio
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
