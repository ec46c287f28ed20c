"""The stage table: what each stage trains on and for how long, and how config changes update the table.

The table of a run records what was actually trained: a change in the middle of a stage ends its row and begins another
with the same name. Adjacent rows of one name are one stage. Settings that only the train step reads (learning rate,
times, weights of the loss) start no new row; a row holds the latest. The position of every data source follows from the
rows, so a checkpoint needs only the table and its step to restore the data position.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from omnihuman_jax import conditions, regions
from omnihuman_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Span:
    """The steps of one row of a stage table.

    Attributes:
      name: stage name; also the folder under `stages/`.
      first_step: first global step of the row, counted from 1.
      steps: number of optimizer steps, at least 1.
    """

    name: str
    first_step: int
    steps: int

    @property
    def last_step(self) -> int:
        """Last global step of the row."""
        return self.first_step + self.steps - 1


SpanT = TypeVar("SpanT", bound=Span)


@dataclasses.dataclass(frozen=True)
class Stage(Span):
    """One row of OmniHuman's stage table.

    Attributes:
      learning_rate: peak learning rate after the warm-up.
      warmup_steps: steps of linear warm-up at the start of the stage.
      ratios: condition name -> share of samples scheduled with it.
      latent_frames: latent frames T of the noisy window (1 = text-to-image); shorter clips are excluded.
      motion_ratio: share of windows that continue from motion frames; the rest start at the first frame of a clip.
      batch_size: samples per step, over all hosts.
      init_from: checkpoint whose parameters the stage may start from, see `loads_init_from`; "" = none.
      source_weights: source -> share of samples; None = determined by the data.
      bucket_weights: latent (H, W) -> share of steps; None = determined by the data.
      time_mean: mean of the logit-normal training times (`diffusion.time`); above 0 means more noise.
      time_std: standard deviation of the times before the logistic function.
      time_mean_by_condition: condition -> `time_mean` for samples whose strongest condition it is.
      rate_factors: condition -> learning rate of its modules as a multiple of `learning_rate`.
      region_shares: region -> share of the loss of a sample (`diffusion.loss_weights`).
      region_only: region -> share of samples whose loss covers only that region.
    """

    learning_rate: float
    warmup_steps: int
    ratios: Mapping[str, float]
    latent_frames: int
    motion_ratio: float
    batch_size: int
    init_from: str = ""
    source_weights: Mapping[str, float] | None = None
    bucket_weights: Mapping[tuple[int, int], float] | None = None
    time_mean: float = 0.0
    time_std: float = 1.0
    time_mean_by_condition: Mapping[str, float] | None = None
    rate_factors: Mapping[str, float] | None = None
    region_shares: Mapping[str, float] | None = None
    region_only: Mapping[str, float] | None = None


# Row settings written "NAME=NUMBER,…" in the config: key -> (index of a name, description of valid numbers, test).
_BY_NAME = {
    "time_mean_by_condition": (conditions.index, "a finite number", math.isfinite),
    "rate_factors": (conditions.index, "a finite number above 0", lambda x: math.isfinite(x) and x > 0),
    "region_shares": (regions.index, "a number from 0 to 1", lambda x: 0 <= x <= 1),
    "region_only": (regions.index, "a number from 0 to 1", lambda x: 0 <= x <= 1),
}


def curriculum(config: ConfigDict) -> tuple[Stage, ...]:
    """The stage table of a resolved config, in `stage_order`, without stages of zero steps.

    Raises:
      UserError: ratios violate principle 2 or are outside 0..1, weights cannot be parsed, or no stage has steps.
    """
    sources = _parse_weights(config.data.source_weights, "data.source_weights", str.strip, "source=weight")
    stages, first = [], 1
    for name in config.stage_order:
        row = config.stages[name]
        where = f"stages.{name}"
        ratios = row.ratios.to_dict()
        inverted = config.allow_inverted_ratios or row.inverted_ratios
        conditions.check_ratios(ratios, where=f"{where}.ratios", allow_inverted=inverted)
        buckets = _parse_weights(row.bucket_weights, f"{where}.bucket_weights", _parse_size, "HEIGHTxWIDTH=weight")
        by_name = {key: _parse_by_name(row[key], f"{where}.{key}", key) for key in _BY_NAME}
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
                batch_size=config.global_batch_size,
                init_from=row.init_from,
                source_weights=sources,
                bucket_weights=buckets,
                time_mean=row.time_mean,
                time_std=row.time_std,
                **by_name,
            )
        )
        first += row.steps
    if not stages:
        raise UserError("stages: every stage has steps=0; give at least one stage steps to train")
    return tuple(stages)


def _parse_weights(text: str, where: str, key: Callable[[str], Any], form: str) -> dict[Any, float] | None:
    """ "real=2,synthetic=1" -> {"real": 2.0, "synthetic": 1.0}; "" -> None."""
    if not text:
        return None
    try:
        return {key(name): float(weight) for name, weight in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise UserError(f"{where}={text!r}: write it as {form},{form}") from error


def _parse_by_name(text: str, where: str, key: str) -> dict[str, float] | None:
    position, words, allowed = _BY_NAME[key]
    values = _parse_weights(text, where, str.strip, "name=number")
    for name, value in (values or {}).items():
        try:
            position(name)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if not allowed(value):
            raise UserError(f"{where}: {name}={value:g} must be {words}")
    if key.startswith("region_") and sum((values or {}).values()) > 1 + 1e-9:
        raise UserError(f"{where}={text!r}: the shares sum to more than 1; lower them")
    return values


def _parse_size(text: str) -> tuple[int, int]:
    height, width = text.split("x")
    return int(height), int(width)


def stage_at(stages: Sequence[SpanT], step: int) -> SpanT:
    """The row that a global step (from 1) belongs to."""
    for stage in stages:
        if step <= stage.last_step:
            return stage
    raise ValueError(f"step {step} is after the last stage, which ends at {stages[-1].last_step}")


def begins_stage(stages: Sequence[Span], step: int) -> bool:
    """Whether a step is the first of its stage."""
    return step == 1 or stage_at(stages, step).name != stage_at(stages, step - 1).name


def ends_stage(stages: Sequence[Span], step: int) -> bool:
    """Whether a step is the last of its stage."""
    return step == stages[-1].last_step or begins_stage(stages, step + 1)


def last_steps(stages: Sequence[Span]) -> dict[str, int]:
    """Stage name -> its last step."""
    return {stage.name: stage.last_step for stage in stages}


def learning_rate_at(stages: Sequence[Stage], step: int) -> float:
    """Learning rate of a step: linear warm-up from the first step of its stage, then constant."""
    stage = stage_at(stages, step)
    first = stage.first_step
    while not begins_stage(stages, first):
        first = stage_at(stages, first - 1).first_step
    return stage.learning_rate * min(1.0, (step - first + 1) / max(1, stage.warmup_steps))


def loads_init_from(stages: Sequence[Stage], step: int, replace_parameters_at: Collection[str]) -> bool:
    """Whether the parameters of `init_from` are loaded before a step.

    They are loaded at the first step of a run and at the start of each stage listed in `replace_parameters_at`.
    Anywhere else they would overwrite what the run has trained so far.
    """
    stage = stage_at(stages, step)
    named = step == 1 or stage.name in replace_parameters_at
    return bool(stage.init_from) and named and begins_stage(stages, step)


def check_init_from(stages: Sequence[Stage], replace_parameters_at: Collection[str], *, fresh: bool) -> None:
    """Checks `init_from` of every stage against the stages named in --replace_parameters_at.

    Args:
      stages: the stage table of the config.
      replace_parameters_at: the stages listed in the flag.
      fresh: whether the run starts at step 1.

    Raises:
      UserError: a listed stage is not in the table or has no `init_from`, or a fresh run would never load an
        `init_from`.
    """
    sources = {stage.name: stage.init_from for stage in stages}
    for name in replace_parameters_at:
        if name not in sources:
            raise UserError(f"--replace_parameters_at={name}: no such stage with steps{nearest(name, sources)}")
        if not sources[name]:
            raise UserError(
                f"--replace_parameters_at={name}: stages.{name}.init_from is empty; set it, or leave {name} out of the "
                f"flag"
            )
    for stage in stages[1:] if fresh else ():
        if stage.init_from and stage.name not in replace_parameters_at:
            raise UserError(
                f"stages.{stage.name}.init_from={stage.init_from} would not be loaded, since {stage.name} is not the "
                f"first stage; clear it, or start with --replace_parameters_at={stage.name} to replace what the stages "
                f"before have trained"
            )


def to_json(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The rows as plain JSON; latent sizes become "HxW"."""
    rows = []
    for stage in stages:
        row = dataclasses.asdict(stage)
        for name in ("ratios", "source_weights", "bucket_weights", *_BY_NAME):
            row[name] = row[name] and {_key(k): float(v) for k, v in row[name].items()}
        rows.append(row)
    return rows


def _key(name: str | tuple[int, int]) -> str:
    return name if isinstance(name, str) else f"{name[0]}x{name[1]}"


def from_json(rows: Sequence[Mapping[str, Any]]) -> tuple[Stage, ...]:
    """The inverse of `to_json`.

    Raises:
      UserError: rows are damaged or not consecutive.
    """
    stages, expected = [], 1
    for row in rows:
        try:
            weights = row["bucket_weights"]
            sizes = weights and {_parse_size(size): share for size, share in weights.items()}
            stage = Stage(**{**row, "bucket_weights": sizes})
            if stage.first_step != expected or stage.steps < 1:
                raise ValueError(f"{stage.name} starts at step {stage.first_step}, expected {expected}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's stage table, row {len(stages) + 1}, cannot be read "
                f"({type(error).__name__}: {error}); continue from another checkpoint"
            ) from error
        expected += stage.steps
        stages.append(stage)
    return tuple(stages)


_OF_THE_STEP = ("time_mean", "time_std", *_BY_NAME)  # read by the train step, not by the input pipeline


def _data_settings(stage: Stage) -> Stage:
    """The settings of a row that determine its data, without its position; other changes need no new row."""
    usual = {field.name: field.default for field in dataclasses.fields(Stage) if field.name in _OF_THE_STEP}
    return dataclasses.replace(stage, first_step=0, steps=0, learning_rate=0.0, warmup_steps=0, init_from="", **usual)


def continued(saved: Sequence[Stage], own: Sequence[Stage], done: int) -> tuple[Stage, ...]:
    """The table of a run that trained steps 1 … done from `saved` and continues with `own`, the table of the config.

    A stage whose data do not change stays one row, so an unchanged table stays identical.
    """
    past = [
        dataclasses.replace(stage, steps=min(stage.last_step, done) - stage.first_step + 1)
        for stage in saved
        if stage.first_step <= done
    ]
    future = [
        dataclasses.replace(stage, first_step=begin, steps=stage.last_step - begin + 1)
        for stage in own
        if stage.last_step >= (begin := max(stage.first_step, done + 1))
    ]
    if past and future and _data_settings(past[-1]) == _data_settings(future[0]):
        first = past.pop().first_step
        future[0] = dataclasses.replace(future[0], first_step=first, steps=future[0].last_step - first + 1)
    return (*past, *future)


def changes(saved: Sequence[Stage], own: Sequence[Stage], done: int) -> list[str]:
    """Log lines that describe what `continued` changes after step `done`, by stage."""
    lines = []
    left = [stage for stage in own if stage.last_step > done]
    for stage in left:
        named = [old for old in saved if old.name == stage.name]
        if not named:
            lines.append(f"{stage.name}: new, steps {max(stage.first_step, done + 1)} to {stage.last_step}")
            continue
        # The row planned from here on, else the last one trained.
        before = next((old for old in named if old.last_step > done), named[-1])
        goes_on = before.first_step <= done <= before.last_step
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


def _differences(old: Stage, new: Stage) -> list[tuple[str, str, str]]:
    """(setting, before, now) for each setting that differs between two rows."""
    pairs = [(f"{name} ratio", old.ratios.get(name), new.ratios.get(name)) for name in {**old.ratios, **new.ratios}]
    pairs += [
        ("source weights", old.source_weights, new.source_weights),
        ("bucket weights", old.bucket_weights, new.bucket_weights),
        ("latent frames of a window", old.latent_frames, new.latent_frames),
        ("share of windows with motion frames", old.motion_ratio, new.motion_ratio),
        ("global batch size", old.batch_size, new.batch_size),
        ("learning rate", old.learning_rate, new.learning_rate),
        ("warm-up steps", old.warmup_steps, new.warmup_steps),
        ("mean of the times", old.time_mean, new.time_mean),
        ("spread of the times", old.time_std, new.time_std),
        ("mean of the times by condition", old.time_mean_by_condition or "none", new.time_mean_by_condition or "none"),
        ("learning rate factors", old.rate_factors or "none", new.rate_factors or "none"),
        ("shares of the loss", old.region_shares or "none", new.region_shares or "none"),
        ("shares of samples with one region", old.region_only or "none", new.region_only or "none"),
    ]
    return [(what, _text(a), _text(b)) for what, a, b in pairs if a != b]


def _text(value: Any) -> str:
    if value is None:
        return "by the data"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ",".join(f"{_key(name)}={share:g}" for name, share in value.items())
    return f"{value:g}"
