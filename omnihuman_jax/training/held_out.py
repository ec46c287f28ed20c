"""Loss on held-out clips at fixed noise and times: comparable between steps, and between sets of conditions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnihuman_jax import conditions
from omnihuman_jax.models.functional import Network
from omnihuman_jax.random_keys import HELD_OUT, purpose_key
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.processes import compile_together
from omnihuman_jax.training.step import jit_evaluation_loss


def condition_sets() -> tuple[str, ...]:
    """Condition sets, named by their strongest condition and including all weaker ones that the clip has."""
    return conditions.names()[1:]


class HeldOutLoss:
    """Mean flow-matching loss of fixed batches; the times t are spaced evenly over the rows.

    Args:
      config: resolved config.
      network: the network.
      mesh: the mesh that the batches are on.
      batches: global batches as in training, placed on the mesh; `active` marks the conditions of each clip.
    """

    def __init__(self, config: ConfigDict, network: Network, mesh: Mesh, batches: Sequence[Mapping[str, jax.Array]]):
        self._loss = jit_evaluation_loss(config, network, mesh)
        self._compiled: dict[tuple[int, ...], Callable[..., jax.Array]] = {}
        self._batches = []
        rows = rules.batch_sharding(mesh)
        for i, batch in enumerate(batches):
            size, shape = config.global_batch_size, batch["latents"].shape
            key = jax.random.fold_in(purpose_key(config.seed, HELD_OUT), i)
            noise = jax.jit(lambda key, shape=shape: jax.random.normal(key, shape), out_shardings=rows)(key)
            t = jax.make_array_from_callback(
                (size,), rows, lambda index, n=size: ((np.arange(n, dtype=np.float32) + 0.5) / n)[index]
            )
            masked = jax.jit(lambda active, keep: active & keep, out_shardings=rows)
            for name in condition_sets():
                keep = jnp.arange(len(conditions.table())) <= conditions.index(name)
                self._batches.append((name, dict(batch) | {"active": masked(batch["active"], keep)}, t, noise))

    def __call__(self, params: Any) -> dict[str, float]:
        """Name of the strongest condition ("reference", "audio", "pose") -> mean loss over all rows."""
        losses: dict[str, list[float]] = {name: [] for name in condition_sets()}
        for name, batch, t, noise in self._batches:
            shape = batch["latents"].shape
            if shape not in self._compiled:
                self._compiled[shape] = compile_together(self._loss, params, batch, t, noise)
            losses[name].append(float(self._compiled[shape](params, batch, t, noise).mean()))
        return {name: float(np.mean(values)) for name, values in losses.items() if values}
