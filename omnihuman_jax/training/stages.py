"""The stages as a table: name, steps, ratios, learning rate, window, where a stage starts from."""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the curriculum.

    Attributes:
      name: stage name; also the folder under `stages/`.
      first_step: first global step of the stage, counted from 1.
      steps: number of optimizer steps.
      learning_rate: peak learning rate after the warm-up.
      warmup_steps: steps of linear warm-up at the start of the stage.
      ratios: condition name -> share of the samples that keep it.
      latent_frames: latent frames T of the noisy window (1 = text-to-image).
      motion_ratio: share of the windows that continue from motion frames instead of starting at the clip's first frame.
      init_from: checkpoint whose parameters the stage starts from; empty = the stage before.
    """

    name: str
    first_step: int
    steps: int
    learning_rate: float
    warmup_steps: int
    ratios: Mapping[str, float]
    latent_frames: int
    motion_ratio: float
    init_from: str

    @property
    def last_step(self) -> int:
        """Last global step of the stage."""
        return self.first_step + self.steps - 1

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a global step of this stage: linear warm-up, then constant."""
        done = step - self.first_step + 1
        return self.learning_rate * min(1.0, done / max(1, self.warmup_steps))


def curriculum(config: ConfigDict) -> tuple[Stage, ...]:
    """The stage table of a resolved config, in `stage_order`, without stages of zero steps.

    Raises:
      UserError: ratios against principle 2 or outside 0..1, no stage left to train.
    """
    stages, first = [], 1
    for name in config.stage_order:
        row = config.stages[name]
        where = f"stages.{name}"
        ratios = row.ratios.to_dict()
        conditions.check_ratios(ratios, where=f"{where}.ratios", allow_inverted=config.allow_inverted_ratios)
        if not row.steps:
            continue
        stages.append(
            Stage(
                name=name,
                first_step=first,
                steps=row.steps,
                learning_rate=row.learning_rate,
                warmup_steps=row.warmup_steps,
                ratios=ratios,
                latent_frames=row.latent_frames or config.data.latent_frames,
                motion_ratio=row.motion_ratio,
                init_from=row.init_from,
            )
        )
        first += row.steps
    if not stages:
        raise UserError("stages: every stage has steps=0; give at least one stage steps to train")
    return tuple(stages)


def stage_at(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage that a global step (from 1) belongs to."""
    for stage in stages:
        if step <= stage.last_step:
            return stage
    raise ValueError(f"step {step} is after the last stage, which ends at {stages[-1].last_step}")


def last_steps(stages: tuple[Stage, ...]) -> dict[str, int]:
    """Stage name -> its last step."""
    return {stage.name: stage.last_step for stage in stages}


def continued(stages: tuple[Stage, ...], done: int, current: str) -> tuple[Stage, ...]:
    """The stage table of a run whose step `done` was one of stage `current`.

    Where the config has moved the border between two stages behind the run, the stage that was trained ends with `done`
    and the one that the config has at the next step begins there; unmoved, the table is the same.
    """
    if not done or done >= stages[-1].last_step:
        return stages
    following = stage_at(stages, done + 1)
    if following.name == current or following.first_step == done + 1:
        return stages
    table = []
    for stage in stages:
        if stage.name == current and stage.first_step <= done:
            stage = dataclasses.replace(stage, steps=done - stage.first_step + 1)
        elif stage is following:
            stage = dataclasses.replace(stage, first_step=done + 1, steps=stage.last_step - done)
        table.append(stage)
    return tuple(table)
