"""nnx modules <-> tensors by dotted path: for checkpoints that fit in memory (VAE, speech encoders, LPIPS)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnihuman_jax.weights.load import Cast, Source
from omnihuman_jax.weights.names import Entry, account
from omnihuman_jax.weights.read import Files


def parameter_shapes(build: Callable[[], nnx.Module]) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's parameters by dotted path, without allocating them."""
    state = nnx.state(nnx.eval_shape(build), nnx.Param)
    return {".".join(map(str, keys)): tuple(leaf.shape) for keys, leaf in nnx.to_flat_state(state)}


def parameters(module: nnx.Module) -> dict[str, np.ndarray]:
    """A module's parameters by dotted path."""
    state = nnx.state(module, nnx.Param)
    return {".".join(map(str, keys)): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(state)}


def build_with(build: Callable[[], nnx.Module], tensors: Mapping[str, np.ndarray]) -> Any:
    """The module with all its parameters from `tensors`, by dotted path."""
    graph, state = nnx.split(nnx.eval_shape(build))
    for keys, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.array(tensors[".".join(map(str, keys))]))
    return nnx.merge(graph, state)


def load(build: Callable[[], nnx.Module], files: Files, entries: Sequence[Entry]) -> Any:
    """The module with a checkpoint's tensors in float32; UserError if one is missing, unexpected or misshapen."""
    account(entries, files.shapes, files.path, "another model, or an incomplete checkpoint")
    return build_with(build, Cast(Source(files, entries), np.float32))
