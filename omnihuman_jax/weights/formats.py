"""The formats of open bases by name, for importers and exporters."""

import os
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.weights import hunyuan, hunyuan15_diffusers, hunyuan_diffusers, motif
from omnihuman_jax.weights.names import Entry, account, check_complete, expand, is_condition, our_shapes
from omnihuman_jax.weights.read import Files

FORMATS: dict[str, ModuleType] = {
    "motif": motif,
    "hunyuan": hunyuan,
    "hunyuan_diffusers": hunyuan_diffusers,
    "hunyuan15_diffusers": hunyuan15_diffusers,
}
LORA = re.compile(r"\blora_(A|B|up|down)\b|\.lora\.(up|down)\.|\.alpha$")


def check_format(name: str, flag: str = "--format") -> None:
    """Raises UserError for an unknown format."""
    if name not in FORMATS:
        raise UserError(f"{flag}={name}: unknown naming{nearest(name, FORMATS)}; choose one of {', '.join(FORMATS)}")


def base_entries(name: str, config: ModelConfig, abstract: Any) -> list[Entry]:
    """Entries of a model's base part in the naming of format `name`; leaves of `abstract` only need a shape.

    Raises UserError if the format has no names for a part of this model.
    """
    shapes = {ours: shape for ours, shape in our_shapes(abstract).items() if not is_condition(ours)}
    entries = expand(FORMATS[name].rows(config), shapes, config.patch_size)
    nameless = shapes.keys() - {ours for entry in entries for ours in entry.ours}
    if nameless:
        raise UserError(
            f"{name} has no name for {', '.join(sorted(nameless)[:3])}{' …' if len(nameless) > 3 else ''}; choose the "
            "format of this config's kind of model"
        )
    check_complete(entries, shapes)
    return entries


def without_prefix(files: Files, config: ModelConfig, abstract: Any) -> Files:
    """The checkpoint without a prefix that all its names share (`model.diffusion_model.`), if known names follow it."""
    shared = os.path.commonprefix([name.split(".")[:-1] for name in files.stored])
    if not shared:
        return files
    known = {theirs for theirs_of in _names(config, abstract).values() for theirs in theirs_of}
    prefixes = ["", *(".".join(shared[:n]) + "." for n in range(1, len(shared) + 1))]
    best = max(prefixes, key=lambda prefix: sum(name.removeprefix(prefix) in known for name in files.stored))
    return Files(files.path, {name.removeprefix(best): stored for name, stored in files.stored.items()}, best)


def check_files(name: str, files: Files, entries: list[Entry], config: ModelConfig, abstract: Any) -> None:
    """Checks a checkpoint of a base against the model, before any tensor is read.

    Raises:
      UserError: tensors missing, unexpected or misshapen; another layout or format; a LoRA; a config.json next to the
        weights that contradicts the model's config.
    """
    if lora := next(filter(LORA.search, files.stored), None):
        raise UserError(
            f"{files.path}: is a LoRA (it has {lora}), not a base; give the base's weights, or the base with the LoRA "
            "merged into it"
        )
    if any(getattr(FORMATS[name], "OTHER_LAYOUT", "\0") in tensor for tensor in files.stored):
        raise UserError(
            f"{files.path}: has the older layout with {FORMATS[name].OTHER_LAYOUT}, which is another network; get the "
            "diffusers layout"
        )
    found, differ = files.settings(), []
    for key, value in FORMATS[name].class_config(config).items():
        if found.get(key, value) != value:
            differ.append(f"{key} is {found[key]}, the preset's is {value}")
    if differ:
        raise UserError(
            f"{files.path.parent / 'config.json'}: wrong base for the preset: {'; '.join(differ)}; change preset or "
            "--config.model.*"
        )
    where = f"{files.path} (names without {files.prefix})" if files.prefix else files.path
    account(entries, files.shapes, where, _hint(name, files.stored.keys(), config, abstract))


def _names(config: ModelConfig, abstract: Any) -> dict[str, set[str]]:
    """Format -> its names for this model's tensors."""
    shapes = our_shapes(abstract)
    return {
        name: {entry.theirs for entry in expand(module.rows(config), shapes, config.patch_size)}
        for name, module in FORMATS.items()
    }


def _hint(name: str, found: Iterable[str], config: ModelConfig, abstract: Any) -> str:
    """The format that the names belong to, if not this one; otherwise what may be wrong."""
    fits = {other: len(theirs.intersection(found)) for other, theirs in _names(config, abstract).items()}
    best = max(fits, key=fits.get)
    if fits[best] > 2 * fits[name]:
        return f"these are names of --format={best}"
    return "wrong base for the preset, or an incomplete checkpoint"
