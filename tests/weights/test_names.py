"""The name tables: the published key sets, layouts and their inverses, the account of every tensor."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments.common import cli
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import Network, make_network
from omnihuman_jax.weights import formats, names
from tests.inference import tiny
from tests.weights.bases import network_of

PUBLISHED = Path(__file__).parent / "published.txt"


def published(naming: str) -> Counter:
    """(pattern, shape) -> how many tensors, biases too, of the published checkpoint."""
    section = PUBLISHED.read_text().split(f"[{naming}]\n")[1].split("[")[0:]
    text = PUBLISHED.read_text().split(f"[{naming}]\n")[1]
    text = re.split(r"^\[[a-z0-9_]+\]$", text, flags=re.M)[0]
    assert section
    found = Counter()
    for line in text.splitlines():
        if not line.strip():
            continue
        name, shape, count, biases = line.split()
        found[name, tuple(json.loads(shape))] += int(count)
        if int(biases):
            found[re.sub("weight$", "bias", name), (json.loads(shape)[0],)] += int(biases)
    return found


@pytest.mark.parametrize(
    ("naming", "preset", "tensors", "billions"),
    [
        ("hunyuan", "hunyuan_13b", 856, 12.8210),
        ("hunyuan_diffusers", "hunyuan_13b", 1264, 12.8210),
        ("motif", "motif_2b", 902, 2.0378),
        ("hunyuan15_diffusers", "hunyuan15_8b", 1801, 8.3266),
    ],
)
def test_the_base_of_a_preset_has_exactly_the_published_tensors(naming, preset, tensors, billions):
    network = make_network(cli.load_preset(f"experiments/configs/{preset}.py"))
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    ours = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "{}", entry.theirs), entry.shape) for entry in entries)
    assert ours == published(naming)
    assert len({entry.theirs for entry in entries}) == tensors
    assert round(sum(math.prod(entry.shape) for entry in entries) / 1e9, 4) == billions


@pytest.mark.parametrize("layout", ["LINEAR", "SWAPPED", "UNPATCH", "PATCH"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layout_has_an_inverse_and_its_shape(layout, bias):
    patch, rng = (1, 2, 2), np.random.default_rng(0)
    layout = getattr(names, layout)
    shape = (8,) if bias else (12, 8)
    x = rng.standard_normal(shape)
    theirs = layout.to_theirs(x, patch)
    assert theirs.shape == layout.shape(shape, patch)
    np.testing.assert_array_equal(layout.to_ours(theirs, patch), x)


@pytest.mark.parametrize(
    ("layout", "shape", "formula", "theirs"),
    [
        (names.permuted((4, 3, 0, 1, 2)), (1, 2, 3, 4, 5), "thwio->oithw", (5, 4, 1, 2, 3)),
        (names.permuted((4, 3, 0, 1, 2), (2,)), (1, 2, 3, 4, 5), "thwio->oihw", (5, 4, 2, 3)),
        (names.expanded((0, 2, 3)), (5,), "c->c", (1, 5, 1, 1)),
    ],
)
def test_a_layout_of_views_moves_axes_and_has_an_inverse(layout, shape, formula, theirs):
    x = np.random.default_rng(0).standard_normal(shape)
    moved = layout.to_theirs(x, ())
    assert moved.shape == layout.shape(shape, ()) == theirs
    np.testing.assert_array_equal(moved, np.einsum(formula, x).reshape(theirs))
    np.testing.assert_array_equal(layout.to_ours(moved, ()), x)


def test_a_patch_embedding_is_their_convolution():
    rng = np.random.default_rng(0)
    theirs, pixels = rng.standard_normal((5, 3, 1, 2, 2)), rng.standard_normal((3, 1, 2, 2))
    expected = np.einsum("octhw,cthw->o", theirs, pixels)
    ours = names.PATCH.to_ours(theirs, (1, 2, 2))
    np.testing.assert_allclose(pixels.transpose(1, 2, 3, 0).ravel() @ ours, expected)


def test_every_mistake_is_listed_in_both_namings():
    shapes = {"dual.blocks.0.img_q.kernel": (2, 3), "x_embed.kernel": (4, 3)}
    rows = [names.row("blocks.{}.to_q", "dual.blocks.{}.img_q"), names.row("embed", "x_embed")]
    entries = names.expand(rows, shapes, (1, 2, 2))
    names.account(entries, {"blocks.0.to_q.weight": (3, 2), "embed.weight": (3, 4)}, "F")
    with pytest.raises(UserError) as caught:
        names.account(entries, {"embed.weight": (4, 4), "head.weight": (1,)}, "F", "look")
    assert str(caught.value) == (
        "F: tensor blocks.0.to_q.weight (here dual.blocks.0.img_q.kernel) is missing; "
        "tensor embed.weight (here x_embed.kernel) has shape (4, 4), should be (3, 4); "
        "tensor head.weight is not part of the model; look"
    )


def test_a_model_that_a_format_cannot_name_is_refused():
    swiglu = Network(ModelConfig.from_dict(tiny.MODEL | {"mlp_activation": "swiglu"}))
    with pytest.raises(UserError, match=r"motif has no name for .*gate"):
        formats.base_entries("motif", swiglu.config, swiglu.abstract_params)
    with pytest.raises(UserError, match="did you mean 'hunyuan'"):
        formats.check_format("hunyan")


@pytest.mark.parametrize("naming", formats.FORMATS)
def test_a_table_holds_every_base_tensor_once_and_no_condition(naming):
    network = network_of(naming)
    entries = formats.base_entries(naming, network.config, network.abstract_params)
    held = sorted(name for entry in entries for name in entry.ours)
    shapes = names.our_shapes(network.abstract_params)
    assert held == sorted(name for name in shapes if not names.is_condition(name))
    assert {"null_text", "pose_embed.kernel", "dual.blocks.0.audio.q.kernel"} <= shapes.keys() - set(held)
