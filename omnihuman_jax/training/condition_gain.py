"""Condition gain: by how much the right condition lowers the loss, against another clip's and against none.

Generated videos show after hours whether a network follows a condition; the gain shows it within minutes. On held-out
clips at fixed noise, the loss of each clip is measured with its own condition, with that of another clip, and without
one. Stronger conditions are off, because a pose reveals what the audio contains. The network follows a condition if the
right one beats both others. The effect appears first in the region of the condition (`conditions.Condition.region`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from omnihuman_jax import batch as batch_lib
from omnihuman_jax import conditions, regions
from omnihuman_jax.conditions import Condition
from omnihuman_jax.diffusion import flow
from omnihuman_jax.models.functional import Network
from omnihuman_jax.random_keys import CONDITION_GAIN, purpose_key
from omnihuman_jax.sharding import rules
from omnihuman_jax.sharding.processes import compile_together
from omnihuman_jax.training.state import abstract_state

NOISE_LEVELS = (0.5, 0.75, 0.95)  # times t; the lower ones reveal much of the picture
VARIANTS = ("right", "wrong", "none")
WHOLE = "all"  # the whole picture, next to the region names


def partners(records: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Row that supplies the wrong condition for each row, int (B,); -1 if there is none.

    Args:
      records: (B,), the clip of each row.
      has: bool (B,), whether the row has the condition.
    """
    found = np.full(len(records), -1)
    rows = np.flatnonzero(has)
    for place, row in enumerate(rows):
        # Start half a batch away, since neighbours in a data set may show the same person.
        others = np.roll(rows, -(place + max(len(rows) // 2, 1)))
        different = others[records[others] != records[row]]
        if len(different):
            found[row] = different[0]
    return found


def percent_gain(right: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Gain of the per-clip losses `right` over `other`, both (n,): mean difference and its standard error.

    Both are percentages of the mean of `right`; {} for fewer than two clips.
    """
    if len(right) < 2:
        return {}
    difference, scale = np.asarray(other, np.float64) - right, 100 / np.mean(right, dtype=np.float64)
    return {
        "gain": float(scale * difference.mean()),
        "error": float(scale * difference.std(ddof=1) / np.sqrt(len(difference))),
        "clips": len(difference),
    }


class ConditionGain:
    """Gain of every condition on fixed batches.

    Args:
      config: resolved config.
      network: the network.
      mesh: the mesh.
      batches: rows of held-out batches that this process holds; `active` marks the conditions of each row, `record` is
        its clip.
    """

    def __init__(self, config: ConfigDict, network: Network, mesh: Mesh, batches: Sequence[Mapping[str, np.ndarray]]):
        self._config, self._mesh, self._batches = config, mesh, batches
        self._loss = _jit_losses(config, network, mesh)
        self._compiled: dict[tuple[int, ...], Callable[..., jax.Array]] = {}

    def __call__(self, params: Any) -> dict[str, Any]:
        """condition -> region or "all" -> time -> "wrong" and "none" -> `percent_gain`."""
        found: dict[tuple[str, str, float], list[np.ndarray]] = {}
        for name, level, losses in self._measured(params):
            for where, values in zip((WHOLE, conditions.get(name).region), np.moveaxis(losses, -1, 0), strict=True):
                if where:
                    found.setdefault((name, where, level), []).append(values)
        result: dict[str, Any] = {}
        for (name, where, level), parts in found.items():
            rows = np.concatenate(parts, axis=1)  # (variants, clips)
            right, *others = rows[:, np.isfinite(rows).all(0)]
            gains = {variant: percent_gain(right, other) for variant, other in zip(VARIANTS[1:], others, strict=True)}
            result.setdefault(name, {}).setdefault(where, {})[f"{level:g}"] = gains
        return result

    def _measured(self, params: Any) -> Iterator[tuple[str, float, np.ndarray]]:
        """(condition, t, losses (variants, B, [all, region])) of every batch; NaN if a row has no valid value."""
        for number, batch in enumerate(self._batches):
            for condition in conditions.table():
                variants = [self._variant(batch, condition, variant) for variant in VARIANTS]
                for level in NOISE_LEVELS:
                    key = jax.random.fold_in(purpose_key(self._config.seed, CONDITION_GAIN), number)
                    losses = [self._losses(params, variant, level, key) for variant in variants]
                    yield condition.name, level, np.stack(losses)

    def _variant(self, batch: Mapping[str, np.ndarray], condition: Condition, variant: str) -> dict[str, jax.Array]:
        place = conditions.index(condition.name)
        has = batch["active"][:, place]
        partner = partners(batch["record"], has)
        active = batch["active"] & (np.arange(batch["active"].shape[1]) <= place - (variant == "none"))
        changed = dict(batch) | {"active": active}
        if variant == "wrong":
            for name in condition.batch_fields(self._config.model, batch_lib.bucket_of(batch)):
                changed[name] = np.where(_rows(partner >= 0, batch[name]), batch[name][partner], batch[name])
        where = regions.index(condition.region) if condition.region else 0
        placed = batch_lib.place(self._config, self._mesh, changed)
        masks = {"gain_region": batch["regions"][..., where], "gain_rows": partner >= 0}
        return placed | {name: self._place(value) for name, value in masks.items()}

    def _place(self, value: np.ndarray) -> jax.Array:
        shape = (self._config.global_batch_size, *value.shape[1:])
        return jax.make_array_from_process_local_data(rules.batch_sharding(self._mesh), value, shape)

    def _losses(self, params: Any, batch: Any, level: float, key: jax.Array) -> np.ndarray:
        shape, arguments = batch["latents"].shape, (params, batch, jnp.float32(level), key)
        if shape not in self._compiled:
            self._compiled[shape] = compile_together(self._loss, *arguments)
        return np.asarray(self._compiled[shape](*arguments))


def _rows(mask: np.ndarray, like: np.ndarray) -> np.ndarray:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _jit_losses(config: ConfigDict, network: Network, mesh: Mesh) -> Any:
    """losses(params, batch, t, key) -> (B, 2): over all cells and `gain_region`; NaN for rows not in `gain_rows`."""

    def losses(params: Any, batch: Any, level: jax.Array, key: jax.Array) -> jax.Array:
        x0 = batch["latents"]
        eps = jax.random.normal(key, x0.shape)
        t = jnp.full(len(x0), level)
        predicted, target = network.apply(params, flow.interpolate(x0, eps, t), t, batch), flow.velocity(x0, eps)
        region = batch["gain_region"]
        inside = flow.flow_loss(predicted, target, region)
        inside = jnp.where(region.any(axis=(1, 2, 3)), inside, jnp.nan)
        found = jnp.stack([flow.flow_loss(predicted, target), inside], axis=-1)
        return jnp.where(batch["gain_rows"][:, None], found, jnp.nan)

    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, network)).params
    replicated = rules.replicated(mesh)
    return jax.jit(
        losses,
        in_shardings=(shardings, rules.batch_sharding(mesh), replicated, replicated),
        out_shardings=replicated,
    )


def summary(gains: Mapping[str, Any]) -> str:
    """One line for the log: the gain of each condition in its region, averaged over the times."""
    parts = []
    for name, by_region in gains.items():
        where, by_level = list(by_region.items())[-1]  # the region of the condition, if it has one
        for variant in VARIANTS[1:]:
            measured = [gain[variant] for gain in by_level.values() if gain[variant]]
            if measured:
                mean = np.mean([gain["gain"] for gain in measured])
                error = np.mean([gain["error"] for gain in measured])  # same clips, so the error does not shrink
                parts.append(f"{name} ({where}) {mean:+.2f} ± {error:.2f} % against {variant}")
    return ", ".join(parts)
