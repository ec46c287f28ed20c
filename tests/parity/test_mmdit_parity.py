"""The MMDiT against diffusers' Motif-Video and HunyuanVideo (1.0, 1.5) classes, through files that those wrote."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-all installs it)")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (make test-all installs it)")

import safetensors.torch  # noqa: E402
from flax import nnx  # noqa: E402

from experiments.common import cli  # noqa: E402
from experiments.import_weights import fresh_conditions  # noqa: E402
from omnihuman_jax.checkpoints.export import to_tensors  # noqa: E402
from omnihuman_jax.errors import UserError  # noqa: E402
from omnihuman_jax.models.dit import text  # noqa: E402
from omnihuman_jax.models.functional import Network, make_network  # noqa: E402
from omnihuman_jax.weights import formats  # noqa: E402
from omnihuman_jax.weights.names import is_condition  # noqa: E402
from omnihuman_jax.weights.write import Renamed  # noqa: E402
from tests.parity import mmdit_pairs as pairs  # noqa: E402

pytestmark = pytest.mark.slow

MOTIF = diffusers.MotifVideoTransformer3DModel
HUNYUAN = diffusers.HunyuanVideoTransformer3DModel
HUNYUAN15 = diffusers.HunyuanVideo15Transformer3DModel
SMALL = {"batch": 2, "size": (2, 6, 10), "masked": True}

CASES = {
    "motif-published-form": (MOTIF, "motif", pairs.motif(single=True, decoder=2), SMALL),
    "motif-image": (
        MOTIF,
        "motif",
        pairs.motif(single=True, decoder=1, image=10, theta=10000.0),
        {**SMALL, "images": 3},
    ),
    "motif-all-cross": (MOTIF, "motif", pairs.motif(dual=True, single=True), {**SMALL, "masked": False}),
    "motif-plain": (MOTIF, "motif", pairs.motif(decoder=1, image=10), {"batch": 1, "size": (3, 2, 14), "masked": True}),
    "hunyuan": (HUNYUAN, "hunyuan_diffusers", pairs.hunyuan(), SMALL),
    "hunyuan-undistilled": (
        HUNYUAN,
        "hunyuan_diffusers",
        pairs.hunyuan(guidance=False, refiner=1, condition=5),
        {"batch": 3, "size": (1, 10, 2), "masked": True},
    ),
    "hunyuan15": (
        HUNYUAN15,
        "hunyuan15_diffusers",
        pairs.hunyuan15(),
        {"batch": 3, "size": (2, 5, 3), "masked": True, "images": 4, "second": (3, 0, 5)},
    ),
    "hunyuan15-text-to-video": (
        HUNYUAN15,
        "hunyuan15_diffusers",
        pairs.hunyuan15(refiner=1),
        {"batch": 2, "size": (3, 1, 7), "masked": True},
    ),
    "hunyuan15-text2": (
        HUNYUAN15,
        "hunyuan15_diffusers",
        pairs.hunyuan15(),
        {"batch": 1, "size": (1, 5, 5), "masked": False, "second": (4,)},
    ),
    "hunyuan15-image": (
        HUNYUAN15,
        "hunyuan15_diffusers",
        pairs.hunyuan15(refiner=1),
        {"batch": 2, "size": (5, 3, 2), "masked": True, "images": 3},
    ),
}
PUBLISHED = ["motif-published-form", "hunyuan", "hunyuan15"]


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(their model, our network, our parameters read from their file, inputs, folder, naming)."""
    kind, naming, (arguments, config), sizes = CASES[request.param]
    theirs, network = pairs.build(kind, arguments), Network(config)
    theirs.save_pretrained(tmp_path / "theirs")
    params = pairs.read(tmp_path / "theirs", naming, network)
    return theirs, network, params, pairs.inputs(config, **sizes), tmp_path, naming


def test_forward_and_gradients_agree(case):
    theirs, network, params, given, folder, naming = case
    expected, expected_x = pairs.run_theirs(theirs, given, gradients=True)
    out, grad_x, grads = pairs.run_ours(network, params, given, gradients=True)
    print(f"{naming}: forward {pairs.error(out, expected):.1e}, gradient of x {pairs.error(grad_x, expected_x):.1e}")
    assert pairs.error(out, expected) < 1e-4
    assert pairs.error(grad_x, expected_x) < 1e-3

    # Their gradients, through a file and the importer, are our tree's.
    slopes = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    safetensors.torch.save_file(slopes, folder / "gradients.safetensors")
    reference = pairs.read(folder / "gradients.safetensors", naming, network)
    whole = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(reference)))
    worst, compared = 0.0, 0
    for (path, ours), leaf in zip(
        jax.tree_util.tree_flatten_with_path(grads)[0], jax.tree.leaves(reference), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # Where the true gradient is zero (a bias of keys without norm) rounding is all there is.
        if is_condition(name) or np.linalg.norm(leaf) < 1e-6 * whole:
            continue
        worst, compared = max(worst, pairs.error(ours, leaf)), compared + 1
        assert pairs.error(ours, leaf) < 1e-3, name
    print(f"{naming}: gradients of {compared} parameters, worst {worst:.1e}")
    assert compared > 60


def test_the_embedders_beside_the_text_agree_closely(tmp_path):
    """An approximate GELU in them would be lost in the network's output, but not here."""
    arguments, config = pairs.hunyuan15()
    theirs, network = pairs.build(HUNYUAN15, arguments), Network(config)
    with torch.no_grad():
        for parameter in (*theirs.context_embedder_2.parameters(), *theirs.image_embedder.parameters()):
            parameter.mul_(2)
    theirs.save_pretrained(tmp_path)
    params = pairs.read(tmp_path, "hunyuan15_diffusers", network)
    for kind, name, module, width in (
        (text.Text2Embedder, "text2_embed", theirs.context_embedder_2, config.text2_dim),
        (text.ImageEmbedder, "image_embed", theirs.image_embedder, config.image_embed_dim),
    ):
        graph, state = nnx.split(nnx.eval_shape(lambda kind=kind: kind(config, rngs=nnx.Rngs(0))))
        nnx.replace_by_pure_dict(state, params[name])
        x = np.random.default_rng(0).standard_normal((2, 5, width)).astype(np.float32)
        with torch.no_grad():
            expected = module(torch.from_numpy(x)).numpy()
        error = pairs.error(nnx.merge(graph, state)(x), expected)
        print(f"{name}: {error:.1e}")
        assert error < 1e-5


@pytest.mark.parametrize(("batch", "size"), [(1, (1, 2, 2)), (2, (5, 6, 2)), (3, (2, 14, 6))])
@pytest.mark.parametrize("name", PUBLISHED)
def test_other_shapes_agree(name, batch, size, tmp_path):
    kind, naming, (arguments, config), _ = CASES[name]
    theirs, network = pairs.build(kind, arguments), Network(config)
    theirs.save_pretrained(tmp_path)
    params = pairs.read(tmp_path, naming, network)
    given = pairs.inputs(config, batch=batch, size=size, masked=batch > 1)
    assert pairs.error(pairs.run_ours(network, params, given), pairs.run_theirs(theirs, given)) < 1e-4


@pytest.mark.parametrize("name", PUBLISHED)
def test_bfloat16_agrees_as_well_as_the_reference_with_itself(name, tmp_path):
    kind, naming, (arguments, config), sizes = CASES[name]
    theirs = pairs.build(kind, arguments)
    theirs.save_pretrained(tmp_path)
    half = Network(dataclasses.replace(config, dtype="bfloat16"))
    given = pairs.inputs(config, **sizes)
    exact = pairs.run_theirs(theirs, given)
    ours = pairs.error(pairs.run_ours(half, pairs.read(tmp_path, naming, half), given), exact)
    reference = pairs.error(pairs.run_theirs(theirs.to(torch.bfloat16), given, dtype=torch.bfloat16), exact)
    print(f"{naming} in bfloat16 against float32: ours {ours:.1e}, theirs {reference:.1e}")
    assert ours < max(2 * reference, 0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_warm_start_is_the_base_with_untrained_audio_and_poses_present(name, tmp_path):
    kind, naming, (arguments, config), sizes = CASES[name]
    theirs, network = pairs.build(kind, arguments), Network(config)
    theirs.save_pretrained(tmp_path)
    params = pairs.read(tmp_path, naming, network)
    merged = _merge(params, fresh_conditions(network, seed=3))
    given, rng = pairs.inputs(config, **sizes), np.random.default_rng(1)
    batch, more = pairs.our_batch(config, given)
    b, frames = given["x"].shape[:2]
    heard = batch | {
        "audio": rng.standard_normal((b, 4 * frames + 2 * config.audio_context, config.audio_dim)).astype(np.float32),
        "keypoints": rng.uniform(0, 1, (b, 4 * frames, config.num_keypoints, 3)).astype(np.float32),
        "active": np.tile(np.array([1, 0, 1, 1], bool), (b, 1)),
    }
    apply = jax.jit(network.apply)
    out = apply(merged, given["x"], given["t"], heard, **more)
    assert pairs.error(out, pairs.run_theirs(theirs, given)) < 1e-4
    # The same program without them; one compiled without audio and poses rounds differently at some sizes.
    silent = heard | {"active": batch["active"]}
    np.testing.assert_array_equal(out, apply(merged, given["x"], given["t"], silent, **more))


def _merge(base, over):
    return {
        name: (_merge(value, over.get(name, {})) if isinstance(value, dict) else over.get(name, value))
        for name, value in base.items()
    }


def test_what_we_write_loads_in_diffusers_bit_for_bit(case):
    theirs, network, params, _, folder, naming = case
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    written = Renamed(to_tensors(params), entries)
    (folder / "back").mkdir()
    tensors = {name: torch.from_numpy(np.ascontiguousarray(written[name])) for name in written}
    safetensors.torch.save_file(tensors, folder / "back" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    theirs.save_config(folder / "back")
    again = type(theirs).from_pretrained(folder / "back")
    for (name, a), (other, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name
    described = formats.FORMATS[naming].class_config(network.config)
    assert described == {name: _plain(theirs.config.get(name, described["_class_name"])) for name in described}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def original_names(weights: dict[str, torch.Tensor], refiner: int) -> dict[str, torch.Tensor]:
    """diffusers' tensors under HunyuanVideo's original names, from its published key list."""
    left, out = dict(weights), {}

    def move(theirs, *ours, dim=0):
        for end in ("weight", "bias"):
            found = [left.pop(f"{name}.{end}") for name in ours if f"{name}.{end}" in left]
            if found:
                out[f"{theirs}.{end}"] = torch.cat(found, dim)

    def swap(theirs, ours):
        for end in ("weight", "bias"):
            scale, shift = left.pop(f"{ours}.{end}").chunk(2)
            out[f"{theirs}.{end}"] = torch.cat([shift, scale])

    def embed(theirs, ours, names=("mlp.0", "mlp.2")):
        for i, name in enumerate(names, 1):
            move(f"{theirs}.{name}", f"{ours}.linear_{i}")

    embed("time_in", "time_text_embed.timestep_embedder")
    embed("guidance_in", "time_text_embed.guidance_embedder")
    embed("vector_in", "time_text_embed.text_embedder", ("in_layer", "out_layer"))
    embed("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder")
    embed("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", ("linear_1", "linear_2"))
    move("txt_in.input_embedder", "context_embedder.proj_in")
    move("img_in.proj", "x_embedder.proj")
    move("final_layer.linear", "proj_out")
    swap("final_layer.adaLN_modulation.1", "norm_out.linear")
    for i in range(refiner):
        there, here = (
            f"txt_in.individual_token_refiner.blocks.{i}",
            f"context_embedder.token_refiner.refiner_blocks.{i}",
        )
        move(f"{there}.self_attn_qkv", *(f"{here}.attn.to_{x}" for x in "qkv"))
        move(f"{there}.self_attn_proj", f"{here}.attn.to_out.0")
        move(f"{there}.mlp.fc1", f"{here}.ff.net.0.proj")
        move(f"{there}.mlp.fc2", f"{here}.ff.net.2")
        move(f"{there}.adaLN_modulation.1", f"{here}.norm_out.linear")
        for norm in ("norm1", "norm2"):
            move(f"{there}.{norm}", f"{here}.{norm}")
    for i in range(2):
        there, here = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for s, norm, ff, qkv, qk, proj in (
            ("img", "norm1", "ff", "to_{}", "norm_{}", "to_out.0"),
            ("txt", "norm1_context", "ff_context", "add_{}_proj", "norm_added_{}", "to_add_out"),
        ):
            move(f"{there}.{s}_mod.linear", f"{here}.{norm}.linear")
            move(f"{there}.{s}_attn_qkv", *(f"{here}.attn.{qkv.format(x)}" for x in "qkv"))
            move(f"{there}.{s}_attn_proj", f"{here}.attn.{proj}")
            move(f"{there}.{s}_mlp.fc1", f"{here}.{ff}.net.0.proj")
            move(f"{there}.{s}_mlp.fc2", f"{here}.{ff}.net.2")
            for x in "qk":
                move(f"{there}.{s}_attn_{x}_norm", f"{here}.attn.{qk.format(x)}")
        there, here = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{there}.linear1", *(f"{here}.attn.to_{x}" for x in "qkv"), f"{here}.proj_mlp")
        move(f"{there}.linear2", f"{here}.proj_out")
        move(f"{there}.modulation.linear", f"{here}.norm.linear")
        for x in "qk":
            move(f"{there}.{x}_norm", f"{here}.attn.norm_{x}")
    assert not left, sorted(left)
    return out


def test_the_original_hunyuan_names_give_the_same_network(tmp_path):
    arguments, config = pairs.hunyuan()
    theirs, network = pairs.build(HUNYUAN, arguments), Network(config)
    theirs.save_pretrained(tmp_path / "theirs")
    original = original_names(theirs.state_dict(), refiner=2)
    safetensors.torch.save_file(original, tmp_path / "original.safetensors")
    expected = pairs.read(tmp_path / "theirs", "hunyuan_diffusers", network)
    params = pairs.read(tmp_path / "original.safetensors", "hunyuan", network)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    given = pairs.inputs(config, **SMALL)
    assert pairs.error(pairs.run_ours(network, params, given), pairs.run_theirs(theirs, given)) < 1e-4
    entries = formats.base_entries("hunyuan", config, network.abstract_params)
    written = Renamed(to_tensors(params), entries)
    assert set(written) == set(original)
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value.numpy(), err_msg=name)


def test_the_older_motif_layout_is_refused(tmp_path):
    arguments, config = pairs.motif(single=True)
    weights = {
        re.sub("cross_attn.to_q", "cross_attn_query_proj", name): value
        for name, value in pairs.build(MOTIF, arguments).state_dict().items()
    }
    safetensors.torch.save_file(weights, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match=r"old\.safetensors: has the older layout"):
        pairs.read(tmp_path / "old.safetensors", "motif", Network(config))


@pytest.mark.parametrize(
    ("kind", "naming", "preset", "count"),
    [
        (MOTIF, "motif", "motif_2b", 902),
        (HUNYUAN, "hunyuan_diffusers", "hunyuan_13b", 1264),
        (HUNYUAN15, "hunyuan15_diffusers", "hunyuan15_8b", 1801),
    ],
)
def test_full_size_presets_have_the_keys_and_shapes_of_the_class(kind, naming, preset, count):
    network = make_network(cli.load_preset(f"experiments/configs/{preset}.py"))
    config = network.config
    described = formats.FORMATS[naming].class_config(config)
    with torch.device("meta"):
        theirs = kind(**{name: value for name, value in described.items() if name != "_class_name"})
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    entries = formats.base_entries(naming, config, network.abstract_params)
    assert {entry.theirs: entry.shape for entry in entries} == expected
    assert len(expected) == count
    assert sum(math.prod(shape) for shape in expected.values()) == sum(math.prod(entry.shape) for entry in entries)


def test_the_hunyuan15_preset_is_the_class_with_its_default_sizes():
    config = make_network(cli.load_preset("experiments/configs/hunyuan15_8b.py")).config
    with torch.device("meta"):
        theirs = HUNYUAN15()
    described = formats.FORMATS["hunyuan15_diffusers"].class_config(config)
    assert described == {name: _plain(theirs.config.get(name, described["_class_name"])) for name in described}
    assert set(theirs.config) - set(described) <= {"target_size", "task_type", "_use_default_values"}
