import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.flops import forward_breakdown, train_step_flops
from omnihuman_jax.models.dit.mmdit import OmniHuman
from tests.models.dit.reference import Reference
from tests.models.dit.tiny import B, H, T, W, initial, random_batch, tiny_config, trained, velocity

TEXT, REFERENCE, AUDIO, POSE = (conditions.index(name) for name in ("text", "reference", "audio", "pose"))
MOTIF = {"num_decoder_blocks": 1, "text_cross_attention_dual": True, "text_cross_attention_single": True}
HUNYUAN15 = {"num_single_blocks": 0, "text2_dim": 9, "image_embed_dim": 6, "token_kinds": True}


def without(batch, *conditions):
    active = batch["active"].copy()
    active[:, list(conditions)] = False
    return {**batch, "active": active}


@functools.partial(jax.jit, static_argnums=0)
def gradients(graph, params, x_t, t, batch):
    return jax.grad(lambda p: jnp.square(nnx.merge(graph, p)(x_t, t, batch) - 1).mean())(params)


@functools.partial(jax.jit, static_argnums=0)
def embed(graph, params, x_t, t, batch):
    return nnx.merge(graph, params).embed(x_t, t, batch)


@functools.partial(jax.jit, static_argnums=0)
def trunk(graph, params, inputs):
    return nnx.merge(graph, params).trunk(inputs)


@pytest.mark.parametrize(
    ("has_motion", "active"),
    [(True, (1, 1, 1, 1)), (False, (1, 1, 0, 0)), (True, (0, 1, 1, 0)), (False, (0, 0, 0, 1))],
)
def test_the_whole_network_agrees_with_a_float64_reference(has_motion, active):
    config = tiny_config()
    x_t, t, batch = random_batch(config)
    batch = {**batch, "has_motion": np.full(B, has_motion), "active": np.tile(np.array(active, bool), (B, 1))}
    model = trained(config)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(model[1]))
    out = velocity(model, x_t, t, batch)
    sample = {name: value[1] for name, value in batch.items()}
    expected = Reference(config, params)(x_t[1].astype(np.float64), float(t[1]), sample)
    np.testing.assert_allclose(out[1], expected, atol=2e-4 * np.abs(expected).max())


def test_a_fresh_model_predicts_zero():
    config = tiny_config()
    x_t, t, batch = random_batch(config)
    assert not velocity(initial(config), x_t, t, batch).any()


@pytest.mark.parametrize(
    ("condition", "name"), [(TEXT, "text"), (REFERENCE, "reference"), (AUDIO, "audio"), (POSE, "keypoints")]
)
def test_an_absent_condition_is_exactly_inert(condition, name):
    config = tiny_config()
    x_t, t, batch = random_batch(config)
    model = trained(config)
    absent = without(batch, condition)
    changed = {**absent, name: np.full_like(batch[name], np.nan)}
    np.testing.assert_array_equal(velocity(model, x_t, t, absent), velocity(model, x_t, t, changed))
    assert np.abs(velocity(model, x_t, t, batch) - velocity(model, x_t, t, absent)).max() > 1e-3


def test_absent_motion_frames_are_exactly_inert():
    config = tiny_config()
    x_t, t, batch = random_batch(config)
    model = trained(config)
    absent = {**batch, "has_motion": np.zeros(B, bool)}
    changed = {**absent, "motion": np.full_like(batch["motion"], np.nan)}
    np.testing.assert_array_equal(velocity(model, x_t, t, absent), velocity(model, x_t, t, changed))
    assert np.abs(velocity(model, x_t, t, batch) - velocity(model, x_t, t, absent)).max() > 1e-3


def test_conditions_are_decided_per_sample():
    config = tiny_config()
    x_t, t, batch = random_batch(config)
    model = trained(config)
    mixed = {**batch, "active": np.array([[1, 1, 1, 1], [0, 0, 0, 0]], bool)}
    out = velocity(model, x_t, t, mixed)
    np.testing.assert_allclose(out[0], velocity(model, x_t, t, batch)[0], atol=2e-5)
    np.testing.assert_allclose(out[1], velocity(model, x_t, t, without(batch, 0, 1, 2, 3))[1], atol=2e-5)


def test_leaving_audio_and_keypoints_out_of_the_batch_means_absent():
    config = tiny_config()
    x_t, t, batch = random_batch(config)
    model = trained(config)
    less = {name: value for name, value in batch.items() if name not in ("audio", "keypoints")}
    expected = velocity(model, x_t, t, without(batch, AUDIO, POSE))
    np.testing.assert_allclose(velocity(model, x_t, t, less), expected, atol=1e-5)


def test_untrained_audio_and_pose_paths_change_nothing():
    config = tiny_config()
    x_t, t, batch = random_batch(config)
    graph, params = trained(config)
    fresh = nnx.to_pure_dict(initial(config)[1])
    mixed = nnx.to_pure_dict(params)
    mixed["audio"], mixed["pose"] = fresh["audio"], fresh["pose"]
    mixed["dual"]["audio"], mixed["single"]["audio"] = fresh["dual"]["audio"], fresh["single"]["audio"]
    nnx.replace_by_pure_dict(state := jax.tree.map(lambda x: x, params), mixed)
    out = velocity((graph, state), x_t, t, batch)
    np.testing.assert_array_equal(out, velocity((graph, state), x_t, t, without(batch, AUDIO, POSE)))
    assert np.abs(out).max() > 0.1


@pytest.mark.parametrize("form", [{}, MOTIF], ids=["plain", "decoder and text cross-attention"])
def test_unrolled_blocks_give_the_scanned_values(form):
    config = tiny_config(**form)
    unrolled = dataclasses.replace(config, scan_blocks=False)
    x_t, t, batch = random_batch(config)
    expected = velocity(trained(config), x_t, t, batch)
    graph, _ = initial(unrolled)
    np.testing.assert_allclose(velocity((graph, trained(config)[1]), x_t, t, batch), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("remat", "form"),
    [("full", {}), ("dots", {}), ("attention", {}), pytest.param("full", MOTIF, marks=pytest.mark.slow)],
)
def test_rematerialisation_does_not_change_gradients(remat, form):
    config = tiny_config(num_dual_blocks=0, **form)
    x_t, t, batch = random_batch(config)
    # Audio stays: its attention is inside the blocks. Poses are not.
    inputs = x_t, t, {name: value for name, value in batch.items() if name != "keypoints"}
    changed = dataclasses.replace(config, remat=remat)
    expected = jax.tree.leaves(gradients(*trained(config), *inputs))
    for a, b in zip(expected, jax.tree.leaves(gradients(*trained(changed), *inputs)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(a).max(), 1e-2))


@pytest.mark.parametrize("active", [False, True])
def test_gradients_are_finite_with_everything_absent_or_present(active):
    config = tiny_config()
    x_t, t, batch = random_batch(config)
    batch = {**batch, "active": np.full((B, 4), active), "has_motion": np.full(B, active)}
    for leaf in jax.tree.leaves(gradients(*trained(config), x_t, t, batch)):
        assert np.isfinite(leaf).all()


def test_reference_and_motion_are_modulated_at_time_zero():
    config = tiny_config(num_single_blocks=0, num_dual_blocks=1)
    x_t, _, batch = random_batch(config)
    at_zero, early, late = (embed(*trained(config), x_t, jnp.full(B, t), batch) for t in (0.0, 0.1, 0.9))
    clean = np.asarray(early.visual.clean)[0]
    assert clean.sum() == (1 + config.motion_frames) * (H // 2) * (W // 2)
    assert not clean[-T * (H // 2) * (W // 2) :].any()
    np.testing.assert_array_equal(early.vec[:, 1], late.vec[:, 1])
    assert np.abs(early.vec[:, 0] - late.vec[:, 0]).max() > 1e-3
    np.testing.assert_allclose(at_zero.vec[:, 0], at_zero.vec[:, 1], atol=1e-6)


def test_the_reference_time_slot_moves_only_the_reference():
    config = tiny_config(reference_time_slot=-7)
    x_t, t, batch = random_batch(config)
    position = np.asarray(embed(*trained(config), x_t, t, batch).visual.position)[0, :, 0]
    per_frame = (H // 2) * (W // 2)
    assert list(position[::per_frame]) == [-7, -2, -1, 0, 1, 2]


def test_bfloat16_compute_with_float32_parameters_stays_close():
    config = tiny_config()
    half = dataclasses.replace(config, dtype="bfloat16")
    x_t, t, batch = random_batch(config)
    graph, params = initial(half)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    expected = velocity(trained(config), x_t, t, batch)
    out = velocity((graph, trained(config)[1]), x_t, t, batch)
    assert out.dtype == np.float32
    assert np.abs(out - expected).mean() < 0.05 * np.abs(expected).mean()


def test_refiner_pooled_text_guidance_swiglu_and_text_rope_all_act():
    config = tiny_config(
        text_refiner_depth=1,
        pooled_text_dim=4,
        guidance_embed=True,
        mlp_activation="swiglu",
        text_embed="mlp",
        rope_on_text=True,
    )
    x_t, t, batch = random_batch(config)
    model = trained(config)
    given = {"pooled": np.ones((B, 4), np.float32), "guidance": np.full(B, 6.0, np.float32)}
    out = velocity(model, x_t, t, batch, **given)
    assert np.isfinite(out).all()
    for name in given:
        changed = velocity(model, x_t, t, batch, **{**given, name: given[name] + 1})
        assert np.abs(out - changed).max() > 1e-4, name
    absent = without(batch, TEXT)
    no_text = velocity(model, x_t, t, absent, **given)
    np.testing.assert_array_equal(no_text, velocity(model, x_t, t, absent, **{**given, "pooled": given["pooled"] * 9}))
    with pytest.raises(UserError, match="guidance is missing"):
        velocity(model, x_t, t, batch, pooled=given["pooled"])
    with pytest.raises(UserError, match="pooled is given"):
        velocity(trained(tiny_config()), x_t, t, batch, pooled=given["pooled"])


@pytest.mark.parametrize("form", [{}, MOTIF], ids=["plain", "decoder and text cross-attention"])
def test_a_sequence_sharded_mesh_gives_the_values_of_one_device(form):
    config = tiny_config(**form)
    x_t, t, batch = random_batch(config, rows=4, columns=4)
    expected = velocity(trained(config), x_t, t, batch)
    mesh = jax.make_mesh((1, 2, 2, 1), ("data", "fsdp", "sequence", "tensor"),
                         axis_types=(jax.sharding.AxisType.Auto,) * 4)  # fmt: skip
    graph, params = trained(config)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda p: nnx.merge(graph, p)(x_t, t, batch))(params)
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_condition_channels_and_image_tokens_act_when_given_and_are_refused_without_a_use():
    config = tiny_config(first_frame_channels=4, image_embed_dim=6, **MOTIF)
    x_t, t, batch = random_batch(config)
    model, rng = trained(config), np.random.default_rng(5)
    out = velocity(model, x_t, t, batch)
    zeros = np.zeros((B, T, H, W, 4), np.float32)
    np.testing.assert_allclose(velocity(model, x_t, t, {**batch, "first_frame": zeros}), out, atol=1e-5)
    given = {"first_frame": zeros + 1, "image": rng.standard_normal((B, 3, 6)).astype(np.float32)}
    for name, value in given.items():
        changed = velocity(model, x_t, t, {**batch, name: value})
        assert np.isfinite(changed).all() and np.abs(changed - out).max() > 1e-3
        with pytest.raises(UserError, match=f"{name} is given, but the model has"):
            velocity(trained(tiny_config()), x_t, t, {**batch, name: value})


def test_pooled_text_and_guidance_have_defaults_where_the_config_says_so():
    sizes = {"pooled_text_dim": 4, "guidance_embed": True}
    config = tiny_config(**sizes, pooled_required=False, guidance_default=2.0)
    x_t, t, batch = random_batch(config)
    given = {"pooled": np.zeros((B, 4), np.float32), "guidance": np.full(B, 2.0, np.float32)}
    expected = velocity(trained(tiny_config(**sizes)), x_t, t, batch, **given)
    np.testing.assert_array_equal(velocity(trained(config), x_t, t, batch), expected)


def second_text(present):
    """`text2` and `text2_mask` of the two samples of a batch, with so many tokens present."""
    states = np.random.default_rng(6).standard_normal((B, 4, 9)).astype(np.float32)
    return {"text2": states, "text2_mask": np.arange(4)[None] < np.array(present)[:, None]}


def test_a_second_text_acts_where_it_is_present_and_goes_with_the_text():
    config = tiny_config(**HUNYUAN15)
    x_t, t, batch = random_batch(config)
    model = trained(config)
    out, given = velocity(model, x_t, t, batch), second_text((3, 0))
    changed = velocity(model, x_t, t, {**batch, **given})
    assert np.abs(changed - out)[0].max() > 1e-3
    np.testing.assert_allclose(changed[1], out[1], atol=1e-5)
    hidden = {**given, "text2": np.where(given["text2_mask"][..., None], given["text2"], np.nan)}
    np.testing.assert_array_equal(velocity(model, x_t, t, {**batch, **hidden}), changed)
    absent = without(batch, TEXT)
    expected = velocity(model, x_t, t, absent)
    np.testing.assert_allclose(velocity(model, x_t, t, {**absent, **second_text((4, 4))}), expected, atol=1e-5)
    with pytest.raises(UserError, match="text2 is given, but the model has model.text2_dim=0"):
        velocity(trained(tiny_config()), x_t, t, {**batch, **given})
    with pytest.raises(UserError, match="text2_mask is missing"):
        velocity(model, x_t, t, {**batch, "text2": given["text2"]})


def test_token_kinds_tell_text_second_text_and_image_apart_but_not_the_null_token():
    config = tiny_config(**HUNYUAN15)
    x_t, t, batch = random_batch(config)
    images = np.random.default_rng(7).standard_normal((B, 3, 6)).astype(np.float32)
    graph, params = model = trained(config)
    batch |= second_text((4, 4)) | {"image": images}
    out = velocity(model, x_t, t, batch)
    absent = {name: value for name, value in without(batch, TEXT).items() if name != "image"}
    null = velocity(model, x_t, t, absent)
    for kind in range(3):
        other = nnx.to_pure_dict(params)
        table = other["kind_embed"]["embedding"]
        # Of all channels the norms would take it away.
        other["kind_embed"]["embedding"] = table.at[kind, ::2].add(1)
        nnx.replace_by_pure_dict(state := jax.tree.map(lambda x: x, params), other)
        assert np.abs(velocity((graph, state), x_t, t, batch) - out).max() > 1e-3
        np.testing.assert_array_equal(velocity((graph, state), x_t, t, absent), null)


def test_an_image_of_zeros_is_absent_with_token_kinds_sample_by_sample():
    config = tiny_config(**HUNYUAN15)
    x_t, t, batch = random_batch(config)
    model = trained(config)
    images = np.random.default_rng(7).standard_normal((B, 3, 6)).astype(np.float32)
    images[0] = 0
    out = velocity(model, x_t, t, {**batch, "image": images})
    expected = velocity(model, x_t, t, batch)
    np.testing.assert_allclose(out[0], expected[0], atol=1e-5)
    assert np.abs(out - expected)[1].max() > 1e-3
    # Elsewhere (Motif-Video) zeros are an image like any other.
    plain = trained(tiny_config(image_embed_dim=6))
    zeros = {**batch, "image": np.zeros_like(images)}
    assert np.abs(velocity(plain, x_t, t, zeros) - velocity(plain, x_t, t, batch)).max() > 1e-3


@pytest.mark.parametrize("form", [{}, MOTIF], ids=["plain", "decoder and text cross-attention"])
def test_flops_count_matmuls_of_the_compiled_program(form):
    config = tiny_config(num_dual_blocks=1, num_single_blocks=1, scan_blocks=False, **form)
    graph, params = initial(config)
    x_t, t, batch = random_batch(config, batch=1)
    jaxpr = jax.make_jaxpr(lambda p: nnx.merge(graph, p)(x_t, t, batch))(params)
    parts = forward_breakdown(config, T, H, W)
    assert train_step_flops(config, 2, (T, H, W)) == 6 * sum(parts.values())
    # The program computes audio logits over all frames and masks them; the model needs those of the own frame only.
    video, keys = T * (H // 2) * (W // 2), T * config.audio_tokens
    blocks = 3 if form else 2
    masked = blocks * 4 * video * (keys - config.audio_tokens) * config.attention_dim
    # It also projects the reference and motion tokens to velocities, which nobody reads.
    unread = 2 * 3 * (H // 2) * (W // 2) * config.hidden_size * 4 * config.latent_channels
    # And it reorders kernel, bias and norm of rotated queries and their keys, as products of D x D.
    pairs = 6 if form else 3
    inner, d = config.attention_dim, config.head_dim
    reordered = 2 * pairs * 2 * d * (config.hidden_size * inner + inner + d)
    assert dot_flops(jaxpr.jaxpr) == sum(parts.values()) + masked + unread + reordered


def dot_flops(jaxpr) -> int:
    """Two per multiply-add of every matmul and convolution in a jaxpr."""
    total = 0
    for eqn in jaxpr.eqns:
        shapes = [v.aval.shape for v in eqn.invars if hasattr(v.aval, "shape")]
        out = int(np.prod(eqn.outvars[0].aval.shape))
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += 2 * out * int(np.prod([shapes[0][i] for i in contracted]))
        elif eqn.primitive.name == "conv_general_dilated":
            total += 2 * out * int(np.prod(shapes[1][:-1]))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            total += dot_flops(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"num_heads": 3}, "not divisible by model.num_heads"),
        ({"attention": "dense"}, "must be one of xla, splash, flash"),
        ({"rope_axes": (3, 5, 8)}, "three even sizes"),
        ({"hidden_size": "big"}, "must be a value like"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


def test_a_config_survives_its_dictionary():
    config = tiny_config(patch_size=[1, 2, 2])
    assert ModelConfig.from_dict(dataclasses.asdict(config)) == config


def test_parameter_paths_are_the_documented_ones():
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: OmniHuman(tiny_config(), rngs=nnx.Rngs(0)))))
    dual, single = state["dual"], state["single"]
    assert {f"{s}_{n}" for s in ("img", "txt") for n in ("mod", "q", "k", "v", "q_norm", "k_norm", "out", "mlp")} | {
        "audio"
    } == set(dual)
    assert set(single) == {"mod", "q", "k", "v", "q_norm", "k_norm", "mlp_in", "mlp_out", "out", "audio"}
    assert dual["img_mlp"]["fc1"]["kernel"].shape == (2, 32, 48)
    assert state["x_embed"]["kernel"].shape == (12, 32) and "bias" not in state["pose_embed"]
