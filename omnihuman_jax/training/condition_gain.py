"""Condition gain: by how much the right condition lowers the loss, against another clip's and against none.

Generated videos say after hours whether a network obeys a condition; this says it within minutes. On held-out clips at
fixed noise, the loss of each clip is measured with the condition that belongs to it, with that of another clip, and
without it. Stronger conditions are off, because a pose gives away what the audio says. A condition is obeyed where the
right one beats both others; the region in which it shows (`conditions.Condition.region`) tells it first.
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
from omnihuman_jax.sharding.processes import compile_together, gather
from omnihuman_jax.training.state import abstract_state

NOISE_LEVELS = (0.5, 0.75, 0.95)  # times t; the lower ones give away much of the picture
VARIANTS = ("right", "wrong", "none")
WHOLE = "all"  # beside the names of regions


def partners(clips: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Row from which each row takes the wrong condition, int (B,); -1 where there is none.

    Args:
      clips: (B,), the clip of each row.
      has: bool (B,), whether it has the condition.
    """
    found = np.full(len(clips), -1)
    rows = np.flatnonzero(has)
    for place, row in enumerate(rows):
        # From the other half of the batch on, since neighbours in a data set may show the same person.
        others = np.roll(rows, -(place + max(len(rows) // 2, 1)))
        different = others[clips[others] != clips[row]]
        if len(different):
            found[row] = different[0]
    return found


def percent_gain(right: np.ndarray, other: np.ndarray, clips: np.ndarray) -> dict[str, float]:
    """Gain of losses `right` over `other`: mean of the differences and its standard error over clips.

    Both are percentages of the mean of `right`; {} with fewer than two clips.

    Args:
      right: (n,) losses, NaN for rows that cannot tell.
      other: (n,), likewise.
      clips: (n,), the clip of each row; rows of one clip count once, by their mean.
    """
    usable = np.isfinite(right) & np.isfinite(other)
    names = np.unique(clips[usable])
    if len(names) < 2:
        return {}
    rows = [usable & (clips == name) for name in names]
    right, other = (np.array([x[mine].mean(dtype=np.float64) for mine in rows]) for x in (right, other))
    difference, scale = other - right, 100 / right.mean()
    return {
        "gain": float(scale * difference.mean()),
        "error": float(scale * difference.std(ddof=1) / np.sqrt(len(difference))),
        "clips": len(difference),
    }


class ConditionGain:
    """The gain of every condition on fixed batches.

    Args:
      config: resolved config.
      network: the network.
      mesh: the mesh.
      batches: this process's rows of held-out batches; `active` names the conditions that each clip has and `clip`
        numbers the clips.
    """

    def __init__(self, config: ConfigDict, network: Network, mesh: Mesh, batches: Sequence[Mapping[str, np.ndarray]]):
        self._config, self._mesh, self._batches = config, mesh, batches
        self._loss = _jit_losses(config, network, mesh)
        self._compiled: dict[tuple[int, ...], Callable[..., jax.Array]] = {}
        rows = rules.batch_sharding(mesh)
        self._keep = jax.jit(lambda active, keep: active & keep, out_shardings=rows)
        self._take = jax.jit(lambda x, partner: jnp.take(x, jnp.maximum(partner, 0), axis=0), out_shardings=rows)

    def __call__(self, params: Any) -> dict[str, Any]:
        """condition -> region or "all" -> time -> "wrong" and "none" -> `percent_gain`.

        A region that is not known in at least two clips is left out.
        """
        found: dict[tuple[str, str, float], list[np.ndarray]] = {}
        clips: list[np.ndarray] = []
        for batch in self._batches:
            placed = batch_lib.place(self._config, self._mesh, batch)
            clip, active = gather((self._rows(batch["clip"]), placed["active"]))
            clips.append(np.asarray(clip))
            for condition in conditions.table():
                for level, losses in self._measured(params, placed, condition, clips[-1], np.asarray(active)):
                    for where, values in zip((WHOLE, condition.region), np.moveaxis(losses, -1, 0), strict=True):
                        if where:
                            found.setdefault((condition.name, where, level), []).append(values)
        result: dict[str, Any] = {}
        for (name, where, level), parts in found.items():
            right, *others = np.concatenate(parts, axis=1)  # each (rows,)
            of_rows = np.concatenate(clips)
            gains = {v: percent_gain(right, other, of_rows) for v, other in zip(VARIANTS[1:], others, strict=True)}
            if where == WHOLE or any(gains.values()):
                result.setdefault(name, {}).setdefault(where, {})[f"{level:g}"] = gains
        return result

    def _measured(
        self, params: Any, batch: Mapping[str, jax.Array], condition: Condition, clip: np.ndarray, active: np.ndarray
    ) -> Iterator[tuple[float, np.ndarray]]:
        """(t, losses (variants, B, [all, region])) of a batch; NaN where a row cannot tell.

        `clip` (B,) and `active` (B, conditions) are of all rows, whichever process has them.
        """
        has = active[:, conditions.index(condition.name)]
        partner = partners(clip, has)
        variants = [self._variant(batch, condition, variant, partner) for variant in VARIANTS]
        tells = np.stack([has, partner >= 0, has])[..., None]
        key = jax.random.fold_in(purpose_key(self._config.seed, CONDITION_GAIN), int(clip[0]))
        region = jnp.int32(regions.index(condition.region) if condition.region else 0)
        for level in NOISE_LEVELS:
            losses = [self._losses(params, variant, region, jnp.float32(level), key) for variant in variants]
            yield level, np.where(tells, np.stack(losses), np.nan)

    def _variant(
        self, batch: Mapping[str, jax.Array], condition: Condition, variant: str, partner: np.ndarray
    ) -> dict[str, jax.Array]:
        keep = np.arange(batch["active"].shape[1]) <= conditions.index(condition.name) - (variant == "none")
        changed = dict(batch) | {"active": self._keep(batch["active"], keep)}
        if variant == "wrong":
            own = condition.batch_fields(self._config.model, batch_lib.bucket_of(batch))
            changed |= {name: self._take(batch[name], partner) for name in own}
        return changed

    def _rows(self, value: np.ndarray) -> jax.Array:
        shape = (self._config.global_batch_size, *value.shape[1:])
        return jax.make_array_from_process_local_data(rules.batch_sharding(self._mesh), value, shape)

    def _losses(self, params: Any, batch: Any, *rest: jax.Array) -> np.ndarray:
        shape, arguments = batch["latents"].shape, (params, batch, *rest)
        if shape not in self._compiled:
            self._compiled[shape] = compile_together(self._loss, *arguments)
        return np.asarray(self._compiled[shape](*arguments))


def _jit_losses(config: ConfigDict, network: Network, mesh: Mesh) -> Any:
    """losses(params, batch, region, t, key) -> (B, 2): of all cells, and of those of a region, NaN where it is empty.

    `region` is its position in `regions.NAMES`.
    """

    def losses(params: Any, batch: Any, region: jax.Array, level: jax.Array, key: jax.Array) -> jax.Array:
        x0, cells = batch["latents"], batch["regions"][..., region]
        eps = jax.random.normal(key, x0.shape)
        t = jnp.full(len(x0), level)
        predicted, target = network.apply(params, flow.interpolate(x0, eps, t), t, batch), flow.velocity(x0, eps)
        inside = jnp.where(cells.any(axis=(1, 2, 3)), flow.flow_loss(predicted, target, cells), jnp.nan)
        return jnp.stack([flow.flow_loss(predicted, target), inside], axis=-1)

    shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh, network)).params
    replicated = rules.replicated(mesh)
    return jax.jit(
        losses,
        in_shardings=(shardings, rules.batch_sharding(mesh), replicated, replicated, replicated),
        out_shardings=replicated,
    )


def mean_gains(gains: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, tuple[float, float]]]]:
    """condition -> (where it shows, "wrong" and "none" -> mean gain over the times and its error), as far as known."""
    means = {}
    for name, by_region in gains.items():
        where, by_level = list(by_region.items())[-1]  # the condition's own region if it is known
        known = {v: [gain[v] for gain in by_level.values() if gain[v]] for v in VARIANTS[1:]}
        # The mean of the errors too: all times have the same clips, so errors do not shrink.
        pairs = {
            v: np.mean([(gain["gain"], gain["error"]) for gain in found], 0) for v, found in known.items() if found
        }
        means[name] = where, {v: (float(gain), float(error)) for v, (gain, error) in pairs.items()}
    return means


def summary(gains: Mapping[str, Any]) -> str:
    """One line for the log: the mean gain of each condition over the times, where it shows."""
    parts = [
        f"{name} ({where}) {gain:+.2f} ± {error:.2f} % against {variant}"
        for name, (where, by_variant) in mean_gains(gains).items()
        for variant, (gain, error) in by_variant.items()
    ]
    return ", ".join(parts) or "no condition is in two held-out clips; prepare data with more of them"
