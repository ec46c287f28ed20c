"""The stage table: what each stage draws, how a checkpoint keeps it, and what becomes of it when the config changes.

A run's table is the plan that was really used: a change in the middle of a stage ends that row and begins another.
Since the position of every source follows from the rows before, the rows are all that a checkpoint needs to say.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omnihuman_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One row of the stage table. Several rows may have one name: parts of a stage that was changed while it ran.

    Attributes:
      first_step: counted from 1 over all stages.
      ratios: condition name -> share of the samples it is scheduled for.
      bucket_weights: latent (H,W) -> share of the steps; None: by the data.
      source_weights: source -> share of the samples; None: by the data.
      window_frames: latent frames of a training window in this stage, for which only clips as long are drawn; 0: the
        loader's setting, 1: images.
      first_share: probability that a window starts at the clip's first frame; None: the loader's setting.
      batch_size: samples of a step, over all hosts; 0: the schedule's setting.
    """

    name: str
    first_step: int
    num_steps: int
    ratios: Mapping[str, float]
    bucket_weights: Mapping[tuple[int, int], float] | None = None
    source_weights: Mapping[str, float] | None = None
    window_frames: int = 0
    first_share: float | None = None
    batch_size: int = 0

    @property
    def last_step(self) -> int:
        return self.first_step + self.num_steps - 1


def segments(stages: Sequence[StagePlan]) -> list[int]:
    """How many earlier rows with steps have the name of each row.

    Name and segment key a row's random streams, so a row that another stage splits off before it changes nothing in it.
    """
    names = [stage.name if stage.num_steps else None for stage in stages]
    return [names[:i].count(stage.name) for i, stage in enumerate(stages)]


def to_json(stages: Iterable[StagePlan]) -> list[dict[str, Any]]:
    """Rows with steps as plain JSON; latent sizes are written "HxW"."""
    rows = []
    for stage in stages:
        if not stage.num_steps:
            continue
        row = dataclasses.asdict(stage)
        for name in ("ratios", "source_weights", "bucket_weights"):
            row[name] = row[name] and {_key(k): float(v) for k, v in row[name].items()}
        rows.append(row)
    return rows


def _key(name: str | tuple[int, int]) -> str:
    return name if isinstance(name, str) else f"{name[0]}x{name[1]}"


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[StagePlan]:
    """The inverse of `to_json`.

    Raises:
      UserError: rows that are damaged or do not follow each other.
    """
    stages, expected = [], 1
    for row in rows:
        try:
            weights = row["bucket_weights"]
            sizes = weights and {tuple(int(n) for n in size.split("x")): share for size, share in weights.items()}
            stage = StagePlan(**{**row, "bucket_weights": sizes})
            if stage.first_step != expected or stage.num_steps < 1:
                raise ValueError(f"{stage.name} starts at step {stage.first_step}, expected {expected}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's plan of the data, row {len(stages) + 1}, cannot be read "
                f"({type(error).__name__}: {error}); continue from another checkpoint"
            ) from error
        expected += stage.num_steps
        stages.append(stage)
    return stages


def _settings(stage: StagePlan) -> dict[str, Any]:
    """What decides the data of a row besides its place."""
    return dataclasses.asdict(dataclasses.replace(stage, first_step=0, num_steps=0))


def continued(saved: Sequence[StagePlan], own: Sequence[StagePlan], done: int) -> list[StagePlan]:
    """The table that `saved` was up to step `done` and that `own` is from there on.

    A stage that goes on unchanged stays one row, so an unchanged table stays what it is. Steps that `saved` does not
    reach are those of `own`.
    """
    past = [
        dataclasses.replace(stage, num_steps=min(stage.last_step, done) - stage.first_step + 1)
        for stage in saved
        if stage.num_steps and stage.first_step <= done
    ]
    first = past[-1].last_step + 1 if past else 1
    future = [
        dataclasses.replace(stage, first_step=begin, num_steps=stage.last_step - begin + 1)
        for stage in own
        if stage.num_steps and stage.last_step >= (begin := max(stage.first_step, first))
    ]
    if past and future and _settings(past[-1]) == _settings(future[0]):
        whole = future.pop(0).last_step - past[-1].first_step + 1
        past[-1] = dataclasses.replace(past[-1], num_steps=whole)
    return past + future


def changes(saved: Sequence[StagePlan], own: Sequence[StagePlan], done: int) -> list[str]:
    """What `continued` changes after step `done`, a line a stage, for the person at the terminal."""
    lines = []
    covered = saved[-1].last_step if saved else 0
    if covered < done:
        lines.append(
            f"the checkpoint does not say how steps {covered + 1} to {done} were drawn; they count as drawn by the "
            f"stages of this config"
        )
    left = [stage for stage in own if stage.num_steps and stage.last_step > done]
    for stage in left:
        named = [old for old in saved if old.name == stage.name]
        # What was planned for it from here on, else what it last was.
        before = next((old for old in named if old.last_step > done), named[-1] if named else None)
        goes_on = before is not None and before.first_step <= done <= before.last_step
        if before is None:
            if saved:
                lines.append(f"{stage.name}: new, steps {max(stage.first_step, done + 1)} to {stage.last_step}")
            continue
        differences = [
            f"{what} {old} until step {done}, {new} from there" if goes_on else f"{what} {new} instead of {old}"
            for what, old, new in _differences(before, stage)
        ]
        if differences:
            differences += ["every source goes on where it was"] * goes_on
            lines.append(f"{stage.name}: {'; '.join(differences)}")
        if before.last_step != stage.last_step:
            lines.append(f"{stage.name}: ends at step {stage.last_step} instead of {before.last_step}")
    names = [stage.name for stage in left]
    for stage in saved:
        if stage.last_step > done and stage.name not in names:
            what = "left out" if stage.first_step > done else f"ends at step {done} instead of {stage.last_step}"
            lines.append(f"{stage.name}: {what}")
    return lines


def _differences(old: StagePlan, new: StagePlan) -> list[tuple[str, str, str]]:
    """(what, before, now) of each setting in which two rows differ."""
    pairs = [(f"{name} ratio", old.ratios.get(name), new.ratios.get(name)) for name in {**old.ratios, **new.ratios}]
    pairs += [
        ("source weights", old.source_weights, new.source_weights),
        ("frame sizes", old.bucket_weights, new.bucket_weights),
        ("latent frames of a window", old.window_frames, new.window_frames),
        ("share of windows at a clip's start", old.first_share, new.first_share),
        ("global batch size", old.batch_size, new.batch_size),
    ]
    return [(what, _told(a), _told(b)) for what, a, b in pairs if a != b]


def _told(value: Any) -> str:
    if value is None:
        return "by the data"
    if isinstance(value, Mapping):
        return ",".join(f"{_key(name)}={share:g}" for name, share in value.items())
    return f"{value:g}"
