import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnihuman_jax.models.dit import pose
from tests.models.dit import reference
from tests.models.dit.tiny import H, T, W, initial, random_batch, tiny_config, trained


def test_heatmaps_follow_the_gaussian_formula():
    keypoints = np.array([[0.25, 0.75, 1.0], [0.5, 0.1, 0.4], [-0.2, 1.3, 1.0], [0.3, 0.3, 0.0]], np.float32)
    maps = np.asarray(pose.heatmaps(jnp.asarray(keypoints), 6, 10, 1.2))
    np.testing.assert_allclose(maps, reference.heatmap(keypoints, 6, 10, 1.2), atol=1e-6)
    assert not maps[..., 3].any()


def test_a_keypoint_at_a_cell_centre_peaks_there_with_its_confidence():
    maps = np.asarray(pose.heatmaps(jnp.array([[2.5 / 8, 1.5 / 4, 0.7]]), 4, 8, 1.0))[..., 0]
    assert np.unravel_index(maps.argmax(), maps.shape) == (1, 2)
    np.testing.assert_allclose(maps.max(), 0.7, rtol=1e-6)


def guide(model, keypoints, present):
    guider = nnx.merge(*model).pose
    return np.asarray(jax.jit(lambda k, p: guider(k, p, H, W))(keypoints, present))


def test_four_pixel_frames_become_the_channels_of_their_latent_frame():
    config = tiny_config()
    keypoints = random_batch(config)[2]["keypoints"]
    keypoints[..., 2] = 1
    before = guide(trained(config), keypoints, np.ones(2, bool))
    assert before.shape == (2, T, H, W, config.pose_channels)
    for frame in range(4 * T):
        moved = keypoints.copy()
        moved[0, frame, :, :2] = 0.5
        changed = np.abs(guide(trained(config), moved, np.ones(2, bool)) - before).max((2, 3, 4)) > 1e-6
        np.testing.assert_array_equal(changed, [[k == frame // 4 for k in range(T)], [False] * T])


def test_absent_poses_give_zero_even_from_garbage():
    config = tiny_config()
    keypoints = np.full((2, 4 * T, 3, 3), np.nan, np.float32)
    assert not guide(trained(config), keypoints, np.zeros(2, bool)).any()


def test_an_untrained_guider_gives_zero_but_its_last_convolution_learns():
    config = tiny_config()
    graph, params = initial(config)
    x_t, t, batch = random_batch(config)
    assert not guide((graph, params), batch["keypoints"], np.ones(2, bool)).any()

    def loss(params):
        model = nnx.merge(graph, params)
        features = model.pose(batch["keypoints"], jnp.ones(2, bool), H, W)
        return jnp.square(model.pose_embed(features.reshape(2, -1, 4 * config.pose_channels)) - 1).mean()

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    assert np.abs(gradient["pose"]["out"]["kernel"]).max() > 0


def test_a_coarser_or_finer_heatmap_still_lands_on_the_latent_grid():
    for scale, widths in ((1, [4]), (4, [4, 4, 4])):
        config = tiny_config(pose_scale=scale, pose_widths=widths)

        def run(keypoints, config=config):
            return pose.PoseGuider(config, rngs=nnx.Rngs(0))(keypoints, jnp.ones(1, bool), 6, 8)

        shape = jax.eval_shape(run, jnp.zeros((1, 8, 3, 3))).shape
        assert shape == (1, 2, 6, 8, config.pose_channels)
