"""Stage settings for the train step, as small arrays so that one compiled step serves every stage."""

from typing import NamedTuple, Self

import jax
import numpy as np
from jax.sharding import Mesh

from omnihuman_jax import conditions, regions
from omnihuman_jax.sharding import rules
from omnihuman_jax.training.stages import Stage


class StepSettings(NamedTuple):
    """The third argument of the train step, float32.

    Attributes:
      learning_rate: for this step, with warm-up applied.
      rate_factors: (conditions,), learning rate multiplier for the modules of each condition.
      time_mean: (conditions + 1,), mean of the logit-normal times by strongest active condition; last: none active.
      time_std: standard deviation of the logit-normal times.
      region_shares: (regions,), share of the loss.
      region_only: (regions,), share of samples whose loss covers only that region.
    """

    learning_rate: np.ndarray
    rate_factors: np.ndarray
    time_mean: np.ndarray
    time_std: np.ndarray
    region_shares: np.ndarray
    region_only: np.ndarray

    @classmethod
    def of(cls, stage: Stage, learning_rate: float) -> Self:
        """The settings of a row of the stage table."""
        times, factors = stage.time_mean_by_condition or {}, stage.rate_factors or {}
        shares, only = stage.region_shares or {}, stage.region_only or {}
        values = (
            learning_rate,
            [factors.get(name, 1.0) for name in conditions.names()],
            [times.get(name, stage.time_mean) for name in (*conditions.names(), "")],
            stage.time_std,
            [shares.get(name, 0.0) for name in regions.NAMES],
            [only.get(name, 0.0) for name in regions.NAMES],
        )
        return cls(*(np.asarray(value, np.float32) for value in values))

    @classmethod
    def usual(cls, learning_rate: float) -> Self:
        """The published settings."""
        row = Stage("", 1, 1, learning_rate, 0, {}, latent_frames=1, motion_ratio=0.0, batch_size=1)
        return cls.of(row, learning_rate)

    @classmethod
    def abstract(cls, mesh: Mesh) -> Self:
        """Shapes with shardings, for compilation."""
        sharding = rules.replicated(mesh)
        return cls(*(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in cls.usual(0.0)))
