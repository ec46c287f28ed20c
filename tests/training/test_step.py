"""The train step against an independent recomputation, and on different meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omnihuman_jax import batch as batch_lib
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.functional import make_network
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.mesh import check_batch, check_heads, make_mesh, training_mesh
from omnihuman_jax.training import state as state_lib
from omnihuman_jax.training.step import draw_noise, ema_decay_at, gradients, jit_train_step, make_train_step, part_of
from omnihuman_jax.training.step_settings import StepSettings
from tests.training.stage_rows import stage_row
from tests.training.tiny import tiny_config

BUCKET = (3, 4, 4)


def random_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    batch = {}
    for name, (row, dtype) in batch_lib.fields(config.model, BUCKET).items():
        shape = (config.global_batch_size, *row)
        batch[name] = rng.random(shape) < 0.6 if dtype == np.bool_ else rng.standard_normal(shape).astype(np.float32)
    return batch


def run_steps(config, count=2):
    mesh = make_mesh(config.mesh)
    network = make_network(config)
    with jax.set_mesh(mesh):
        state = state_lib.init_state(config, mesh, network)
        step = jit_train_step(config, network, mesh)
        losses = []
        for i in range(count):
            batch = jax.device_put(random_batch(config, i), rules.batch_sharding(mesh))
            state, metrics = step(state, batch, StepSettings.usual(1e-2))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state), metrics


def perturbed(network):
    """Parameters without the zeros of a fresh network, which would hide most gradients."""
    params = network.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def assert_close_gradients(grads, expected, rtol=1e-5):
    """Norm of the difference over the norm, of every leaf, but for those that are zero beside the rest."""
    largest = max(np.linalg.norm(x) for x in jax.tree.leaves(expected))
    for (path, g), e in zip(jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(g - e) / max(np.linalg.norm(e), 1e-3 * largest)
        assert error <= rtol, f"{jax.tree_util.keystr(path)}: {error:.2e}"


@pytest.fixture(scope="module")
def reference():
    config = tiny_config("unused")
    config.mesh.update({"data": 8, "fsdp": 1})
    return run_steps(config)


AXES = ("data", "fsdp", "sequence", "tensor")
MESHES = [{axis: 8} for axis in AXES] + [{a: 2, b: 4} for i, a in enumerate(AXES) for b in AXES[i + 1 :]]
MESHES += [mesh | {"sequence_attention": "all_gather"} for mesh in MESHES if "sequence" in mesh]
QUICK = ({"sequence": 2, "tensor": 4}, {"sequence": 2, "tensor": 4, "sequence_attention": "all_gather"})


def gradients_on(mesh_sizes, parts=1):
    """Row losses and gradients of a batch with weights, all conditions of some rows in use, on a mesh or one device."""
    config = tiny_config("unused")
    config.model.update({"hidden_size": 64, "num_heads": 8, "mlp_hidden": 128})
    config.mesh.update(mesh_sizes or {})
    network = make_network(config)
    batch, params = random_batch(config), perturbed(network)
    batch["loss_weight"] = np.random.default_rng(5).random(batch["latents"].shape[:-1], np.float32)
    t, eps = draw_noise(config, jnp.int32(0), batch["latents"].shape)
    run = jax.jit(lambda *args: gradients(network, *args, parts))
    if not mesh_sizes:
        return jax.device_get(run(params, batch, t, eps))
    mesh = make_mesh({"data": 1, "fsdp": 1} | mesh_sizes)
    check_heads(8, mesh, config.mesh.sequence_attention)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, rules.tree_shardings(params, mesh))
        return jax.device_get(run(params, *jax.device_put((batch, t, eps), rules.batch_sharding(mesh))))


def mesh_id(mesh):
    return "-".join(axis for axis in mesh if axis in AXES) + "-all_gather" * ("sequence_attention" in mesh)


@pytest.fixture(scope="module")
def single_device():
    return gradients_on(None)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(m, id=mesh_id(m), marks=() if m in QUICK else pytest.mark.slow) for m in MESHES],
)
def test_gradients_do_not_depend_on_the_mesh(single_device, mesh):
    losses, grads = gradients_on(mesh)
    np.testing.assert_allclose(losses, single_device[0], rtol=1e-5)
    assert_close_gradients(grads, single_device[1])


def test_heads_that_do_not_divide_are_refused_with_the_valid_choices():
    with pytest.raises(UserError, match=r"3 attention heads .* 1 x 8 = 8; their product can be 1, 3"):
        check_heads(3, make_mesh({"data": 1, "fsdp": 1, "tensor": 8}))
    with pytest.raises(UserError, match=r"3 attention heads .* 8 x 1 = 8; .* mesh.sequence_attention=all_gather"):
        check_heads(3, make_mesh({"sequence": 8}))
    with pytest.raises(UserError, match=r"3 attention heads .* mesh.tensor = 2; it can be 1, 3, with any mesh.sequen"):
        check_heads(3, make_mesh({"sequence": 4, "tensor": 2}), "all_gather")
    check_heads(3, make_mesh({"sequence": 8}), "all_gather")


def test_an_unknown_sequence_attention_is_refused_with_the_choices():
    config = tiny_config("unused")
    config.mesh.sequence_attention = "ring"
    with pytest.raises(UserError, match=r"mesh.sequence_attention='ring': must be one of ulysses, all_gather"):
        training_mesh(config)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "sequence": 2}])
def test_the_mesh_does_not_change_the_training(reference, mesh):
    config = tiny_config("unused")
    config.mesh.update({"data": 1, "fsdp": 1} | mesh)
    losses, state, _ = run_steps(config)
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    # Adam divides by the gradient's size, so where a gradient is nearly zero its rounding shows; hence atol.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), state.params, reference[1].params)


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ({"data": 2, "fsdp": 2, "sequence": 2}, 2),
        pytest.param({"fsdp": 2, "sequence": 4}, 4, marks=pytest.mark.slow),
    ],
)
def test_gradients_over_micro_batches_are_those_of_the_whole_batch(single_device, mesh, parts):
    losses, grads = gradients_on(mesh, parts)
    np.testing.assert_allclose(losses, single_device[0], rtol=1e-5)
    assert_close_gradients(grads, single_device[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameters", "mu", "nu", "stochastic"),
    [("float32", "bfloat16", "float32", False), ("bfloat16", "bfloat16", "bfloat16", True)],
)
def test_lower_precision_is_stored_as_such_and_trains_alike(parameters, mu, nu, stochastic):
    config = tiny_config("unused")
    config.mesh.update({"data": 8, "fsdp": 1})
    full = run_steps(config)
    config.model.param_dtype = parameters
    config.optimizer.update({"mu_dtype": mu, "nu_dtype": nu, "stochastic_rounding": stochastic})
    losses, state, _ = run_steps(config)
    stored = (state.params, state.opt_state[1].mu, state.opt_state[1].nu, state.ema)
    for tree, dtype in zip(stored, (parameters, mu, nu, "float32"), strict=True):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(losses, full[0], rtol=1e-2)


def test_a_batch_that_does_not_divide_into_micro_batches_is_refused():
    config = tiny_config("unused")
    mesh = make_mesh({"data": 2, "fsdp": 4})
    with pytest.raises(UserError, match=r"x optimizer.accumulate = 3 = 24; use a multiple of 24"):
        check_batch(config.global_batch_size, mesh, 3)


def test_parameters_are_sharded_over_fsdp():
    config = tiny_config("unused")
    config.mesh.update({"data": 2, "fsdp": 4})
    mesh = make_mesh(config.mesh)
    state = state_lib.abstract_state(config, mesh)
    kernels = [x for x in jax.tree.leaves(state.params) if x.ndim >= 2]
    sharded = [x for x in kernels if "fsdp" in jax.tree.leaves(tuple(x.sharding.spec))]
    assert sum(x.size for x in sharded) > 0.9 * sum(x.size for x in kernels)
    by_part = [
        jax.tree.map(lambda x: x.sharding.spec, part) for part in (state.params, state.ema, state.opt_state[1].mu)
    ]
    assert by_part[0] == by_part[1] == by_part[2]


def test_one_step_is_clipped_adamw_on_the_flow_loss():
    config = tiny_config("unused")
    config.mesh.update({"data": 8, "fsdp": 1})
    network = make_network(config)
    before = jax.device_get(state_lib.create_state(config, network))
    batch = random_batch(config)
    x0 = batch["latents"]
    t, eps = (np.asarray(x) for x in draw_noise(config, jnp.int32(0), x0.shape))
    x_t = (1 - t)[:, None, None, None, None] * x0 + t[:, None, None, None, None] * eps

    def loss(params):
        v = network.apply(params, jnp.asarray(x_t), jnp.asarray(t), batch)
        return jnp.mean(jnp.square(v - (eps - x0)))

    value, grads = jax.jit(jax.value_and_grad(loss))(before.params)
    mask = jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key == "kernel", before.params)
    # optax's own AdamW, with the learning rate inside, as the reference.
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.01, mask=mask))
    updates, _ = adamw.update(grads, adamw.init(before.params), before.params)
    expected = optax.apply_updates(before.params, updates)

    losses, after, metrics = run_steps(config, 1)
    assert losses[0] == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(np.mean(metrics["sample_loss"]), losses[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), after.params, expected)
    decay = float(ema_decay_at(jnp.int32(0), config.ema_decay))
    jax.tree.map(
        lambda e, a, b: np.testing.assert_allclose(e, decay * b + (1 - decay) * a, rtol=1e-5, atol=1e-6),
        after.ema,
        after.params,
        before.params,
    )


def stage_settings(**settings):
    return StepSettings.of(stage_row("stage1", 1, 1, **settings), 1e-2)


def one_step(config, settings, batch):
    """State and metrics after a step on one device."""
    network = make_network(config)
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])) as mesh:
        del mesh
        state = state_lib.create_state(config, network)._replace(params=perturbed(network))
        return state, *jax.jit(make_train_step(config, network))(state, batch, settings)


def test_weights_of_regions_and_times_by_condition_are_those_of_the_stage():
    config = tiny_config("unused")
    config.stages.stage1.region_shares = "mouth=0.5"
    batch, mouth = random_batch(config), 1
    assert batch["regions"][..., mouth].any()
    settings = stage_settings(region_shares={"mouth": 0.5}, time_mean=-1.0, time_mean_by_condition={"pose": 2.0})
    before, _, metrics = one_step(config, settings, batch)
    mean = np.where(batch["active"][:, 3], 2.0, -1.0)
    normal_t, eps = draw_noise(config, jnp.int32(0), batch["latents"].shape, jnp.asarray(mean, jnp.float32))
    np.testing.assert_allclose(metrics["time"], normal_t, rtol=1e-5)
    x0, t = batch["latents"], np.asarray(normal_t)[:, None, None, None, None]
    v = jax.jit(make_network(config).apply)(before.params, (1 - t) * x0 + t * np.asarray(eps), normal_t, batch)
    error = (np.asarray(v, np.float64) - (np.asarray(eps) - x0)) ** 2
    regions = batch["regions"][..., mouth]
    expected = [0.5 * e.mean() + 0.5 * e[m].mean() for e, m in zip(error, regions, strict=True)]
    np.testing.assert_allclose(metrics["sample_loss"], expected, rtol=1e-4)


def test_without_weights_regions_change_nothing():
    """A run without any is the same program; a stage without any, in a run with some, agrees to rounding."""
    config = tiny_config("unused")
    batch = random_batch(config)
    _, plain, metrics = one_step(config, StepSettings.usual(1e-2), batch)
    _, same, _ = one_step(config, StepSettings.usual(1e-2), batch | {"regions": ~batch["regions"]})
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    config.stages.stage2.region_shares = "mouth=0.5"
    _, _, again = one_step(config, StepSettings.usual(1e-2), batch)
    np.testing.assert_allclose(metrics["sample_loss"], again["sample_loss"], rtol=1e-6)
    # Not the parameters: Adam's first step would turn the rounding of a gradient that is zero into a whole step.
    for name, norm in metrics["grad_norm_by_part"].items():
        np.testing.assert_allclose(norm, again["grad_norm_by_part"][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_condition_s_own_modules_learn_at_their_own_rate():
    config = tiny_config("unused")
    batch = random_batch(config)
    before, plain, _ = one_step(config, StepSettings.usual(1e-2), batch)
    _, faster, _ = one_step(config, stage_settings(rate_factors={"audio": 3.0}), batch)
    moved = 0
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(before.params),
        jax.tree.leaves(plain.params),
        jax.tree.leaves(faster.params),
        strict=True,
    ):
        factor = 3.0 if "audio" in rules.path_name(path).replace("_embed", "").split("/") else 1.0
        moved += factor == 3.0
        np.testing.assert_allclose(c - a, factor * (b - a), rtol=1e-3, atol=3e-6, err_msg=rules.path_name(path))
    assert moved > 5


def test_noise_depends_on_the_step_and_the_seed_only():
    config = tiny_config("unused")
    first, again, later = (draw_noise(config, jnp.int32(i), (8, *BUCKET, 4)) for i in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.allclose(first[1], later[1])


def test_the_audio_attention_of_every_kind_of_block_is_a_part_of_its_own():
    config = tiny_config("unused")
    config.model.num_decoder_blocks = 1
    params = make_network(config).abstract_params
    names = [rules.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    parts = {name: part_of(name) for name in names}
    audio = {name for name, part in parts.items() if part == "audio_attention"}
    assert {name.split("/")[0] for name in audio} == {"dual", "single", "decoder"}
    assert audio == {name for name in names if "/audio/" in name and name.split("/")[0] != "audio"}
    assert {"audio", "pose", "dual", "single", "decoder", "null_text"} <= set(parts.values())


def test_a_step_that_would_leave_something_not_finite_changes_nothing_but_the_step_number():
    """Loss and gradient are finite in every case; the update, the second moments or the EMA are not."""
    config = tiny_config("unused")
    config.mesh.update({"data": 2, "fsdp": 4})
    mesh, network = make_mesh(config.mesh), make_network(config)

    def infinite(tree):
        return tree | {"x_embed": jax.tree.map(lambda x: x.at[-1].set(jnp.inf), tree["x_embed"])}

    def with_moments(state):
        clip, adam, decay = state.opt_state
        return state._replace(opt_state=(clip, adam._replace(nu=infinite(adam.nu)), decay))

    cases = {
        "fine": (1e-2, lambda state: state),
        "parameters": (np.inf, lambda state: state),
        "moments": (1e-2, with_moments),
        "ema": (1e-2, lambda state: state._replace(ema=infinite(state.ema))),
    }
    with jax.set_mesh(mesh):
        step = jit_train_step(config, network, mesh)
        batch = jax.device_put(random_batch(config), rules.batch_sharding(mesh))
        for name, (rate, spoil) in cases.items():
            state = spoil(state_lib.init_state(config, mesh, network))
            before = jax.device_get(state)
            after, metrics = jax.device_get(step(state, batch, StepSettings.usual(rate)))
            assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
            assert metrics["skipped"] == (name != "fine"), name
            assert after.step == 1
            if name != "fine":
                jax.tree.map(np.testing.assert_array_equal, after._replace(step=before.step), before)


@pytest.mark.parametrize(
    ("ratios", "motion_ratio", "absent"),
    [
        ({"text": 0.9, "reference": 0.0, "audio": 0.0}, 0.0, {"reference", "audio", "keypoints", "motion"}),
        ({"reference": 0.7, "audio": 0.5, "pose": 0.0}, 0.75, {"keypoints"}),
    ],
)
def test_fields_that_a_stage_never_has_change_nothing_but_the_work(ratios, motion_ratio, absent):
    config = tiny_config("")
    network, never = make_network(config), batch_lib.never_present(ratios, motion_ratio)
    assert never == absent
    batch = random_batch(config)
    for index, name in enumerate(conditions.names()):
        batch["active"][:, index] &= bool(ratios.get(name))
    batch["has_motion"] &= bool(motion_ratio)
    mesh = make_mesh(config.mesh)
    less = batch_lib.place(config, mesh, batch, never)
    assert batch.keys() - less.keys() == never
    rng = np.random.default_rng(1)
    t, eps = rng.random(config.global_batch_size), rng.standard_normal(batch["latents"].shape)
    t, eps, params = t.astype(np.float32), eps.astype(np.float32), perturbed(network)
    both = jax.jit(lambda params, batch: gradients(network, params, batch, t, eps, 1))
    (losses, grads), (expected_losses, expected) = both(params, less), both(params, batch)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    assert_close_gradients(grads, expected, rtol=1e-4)
