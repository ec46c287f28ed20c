"""The network classes that a config can name: `model.family`."""

import importlib
from typing import Any

from omnihuman_jax.errors import UserError, nearest

# Family -> module and class, which takes the arguments of `models.dit.mmdit.OmniHuman`.
_FAMILIES = {"mmdit": "omnihuman_jax.models.dit.mmdit:OmniHuman"}


def register(family: str, where: str) -> None:
    """Adds a network class: "package.module:Class"."""
    _FAMILIES[family] = where


def network_class(family: str) -> Any:
    """The `nnx.Module` class of a family; UserError if there is no such family."""
    if family not in _FAMILIES:
        raise UserError(f"model.family={family!r}: unknown family{nearest(family, _FAMILIES)}")
    module, name = _FAMILIES[family].split(":")
    return getattr(importlib.import_module(module), name)
