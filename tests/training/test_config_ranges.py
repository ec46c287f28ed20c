"""Every number of a config has a range, the presets keep to theirs, and what is out of it is refused by its key."""

import fnmatch
import importlib
import math
import pathlib

import pytest
from ml_collections import ConfigDict

from experiments import configs
from experiments.configs import base, demo_vae
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.config_ranges import RANGES, VAE_RANGES, check, leaves, range_of

PRESETS = sorted(path.stem for path in pathlib.Path(configs.__file__).parent.glob("[!_]*.py"))
BASES = ((base, RANGES), (demo_vae, VAE_RANGES))


def numbers(config):
    """(key, value) of the numeric leaves."""
    return [(key, value) for key, value in leaves(config) if type(value) in (int, float)]


NUMBERS = [
    pytest.param(module, ranges, key, id=f"{module.__name__.split('.')[-1]}-{key}")
    for module, ranges in BASES
    for key, _ in numbers(module.get_config())
]


def changed(module, key, value):
    """The module's config with one leaf, perhaps within a tuple, of another value."""

    def replaced(tree, parts):
        if not parts:
            return value
        first, *rest = parts
        if isinstance(tree, dict):
            return tree | {first: replaced(tree[first], rest)}
        index = int(first)
        return (*tree[:index], replaced(tree[index], rest), *tree[index + 1 :])

    return ConfigDict(replaced(module.get_config().to_dict(), key.split(".")))


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_of_a_preset_has_a_range_and_keeps_to_it(name):
    ranges = VAE_RANGES if name == "demo_vae" else RANGES
    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    assert [key for key, _ in numbers(config) if range_of(key, ranges) is None] == []
    check(config, ranges)


@pytest.mark.parametrize(("module", "ranges", "key"), NUMBERS)
def test_what_is_out_of_range_is_refused_by_its_key(module, ranges, key):
    allowed = range_of(key, ranges)
    outside = [x for x in (-2, -0.5, 1.5) if not allowed.has(x)]
    assert outside or key.endswith("time_mean") or key == "model.reference_time_slot"
    for value in (math.nan, math.inf, -math.inf, "1", True, None, *outside):
        with pytest.raises(UserError) as caught:
            check(changed(module, key, value), ranges)
        name, told = str(caught.value).split("=", 1)
        assert name.replace("[", ".").replace("]", "") == key
        assert told == f"{value}: must be {allowed.words}"


def test_no_rule_is_for_a_key_that_is_not_there():
    keys = [key for module, _ in BASES for key, _ in leaves(module.get_config())]
    keys.append("model.rope_axes.0")  # empty by default
    rules = [section + pattern for section, _, patterns in RANGES for pattern in patterns.split()]
    assert [rule for rule in rules if not fnmatch.filter(keys, rule)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mesh.fsdp", 0),
        ("mesh.data", -2),
        ("optimizer.b1", 1.0),
        ("ema_decay", 1.0),
        ("optimizer.eps", 0.0),
        ("optimizer.clip", 0.0),
        ("stages.stage2.learning_rate", 0.0),
        ("stages.stage1.ratios.text", 1.1),
        ("checkpoint.every", 0),
        ("sample.steps", 0),
        ("seed", 2**32),
        ("global_batch_size", 8.0),
    ],
)
def test_the_edges_of_the_training_configs_ranges(key, value):
    with pytest.raises(UserError):
        check(changed(base, key, value))


def test_the_vae_is_always_evaluated_and_other_training_only_when_asked():
    check(changed(base, "evaluation.every", 0))
    with pytest.raises(UserError, match=r"evaluation\.every=0: must be a whole number of at least 1"):
        check(changed(demo_vae, "evaluation.every", 0), VAE_RANGES)
    check(changed(demo_vae, "data.buckets.0.4", 0.0), VAE_RANGES)
    with pytest.raises(UserError, match=r"data\.buckets\[0\]\[3\]=0: must be"):
        check(changed(demo_vae, "data.buckets.0.3", 0), VAE_RANGES)
