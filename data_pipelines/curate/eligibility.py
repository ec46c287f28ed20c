"""Step 3: scores and thresholds -> the fate of each clip and the conditions that it may train. Decodes nothing."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.curate import duplicates, scores, sync
from data_pipelines.curate.scenes import Span
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.frames import FPS

KEPT, DROPPED, UNREADABLE = "kept", "dropped", "unreadable"
GENERAL = "general"
ALWAYS = ("text", "reference")  # conditions of every clip that passes the general filters


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip with what is known about it.

    Attributes:
      name: "source/id", or "source/id/FIRST" with its first frame if it is cut from that source.
      clip: the source.
      content: equal for all clips of one file.
      key: of its result in the store.
      result: see `score.Scored`; {"problem": …} if it could not be scored; None if it was not to be.
    """

    name: str
    clip: RawClip
    content: str
    span: Span
    key: str = ""
    result: Mapping[str, Any] | None = None

    @property
    def identity(self) -> str:
        """Of the clip in a data set: its name and its content."""
        return f"{self.name}:{self.key}"


@dataclasses.dataclass
class Fate:
    """What becomes of a clip.

    Attributes:
      conditions: names of those that it may train; none if it is dropped.
      reasons: "general" or a condition -> why it is dropped, or kept without that condition.
      scores: those of the store and sync_correlation.
      sound_late: seconds by which its sound was late and is moved.
    """

    fate: str
    conditions: tuple[str, ...]
    reasons: dict[str, list[str]]
    notes: list[str]
    scores: dict[str, float | None]
    sound_late: float = 0.0


def judge(clips: Sequence[Clip], config: Mapping[str, Any], cells, first: frozenset[str] = frozenset()) -> list[Fate]:
    """The fates of clips, in order.

    Args:
      config: see `config.get_config`.
      cells: clip -> its brightness over time, see `duplicates.Entry`.
      first: `Clip.identity` of clips that are in the data set already; of two copies these stay.
    """
    offsets = _offsets(clips, config["sync"])
    fates = [_fate(clip, config, offsets.get(clip.content, 0)) for clip in clips]
    if config["duplicates"]["drop"]:
        for i, original in _copies(clips, fates, config["duplicates"], cells, first).items():
            reasons = {GENERAL: [f"a copy ({original})"]} | fates[i].reasons
            fates[i] = dataclasses.replace(fates[i], fate=DROPPED, conditions=(), reasons=reasons)
    return fates


def _scored(clip: Clip) -> bool:
    return not clip.span.problem and clip.result is not None and "problem" not in clip.result


def _copies(clips: Sequence[Clip], fates: Sequence[Fate], config, cells, first: frozenset[str]) -> dict[int, str]:
    """Copies among the clips that are kept, so that a good one is not dropped as the copy of a bad one."""
    kept = [i for i, fate in enumerate(fates) if fate.fate == KEPT]
    order = sorted(kept, key=lambda i: (clips[i].identity not in first, i))
    entries = [
        duplicates.Entry(
            clips[i].name,
            clips[i].key,
            [int(value, 16) for value in clips[i].result["hashes"]],
            lambda clip=clips[i]: cells(clip),
        )
        for i in order
    ]
    return {order[k]: original for k, original in duplicates.find(entries, config).items()}


def _offsets(clips: Sequence[Clip], config: Mapping[str, Any]) -> dict[str, int]:
    """Content of a source -> frames by which its sound is late, if that is clear and it is not in sync.

    The offset is a property of the recording, so it is read from the mean of its clips' curves.
    """
    curves: dict[str, list[tuple[int, list[float]]]] = defaultdict(list)
    for clip in clips:
        if _scored(clip) and clip.result["sync_curve"]:
            curves[clip.content].append((clip.result["frames"], clip.result["sync_curve"]))
    found = {}
    for content, rows in curves.items():
        weights, values = zip(*rows)
        mean = np.average(values, axis=0, weights=weights).tolist()
        value, lag = sync.best(mean, config["usual_lag"], config["max_offset"])
        late = lag - config["usual_lag"]
        if value >= config["repair_correlation"] and abs(late) > config["tolerance"]:
            found[content] = late
    return found


def _fate(clip: Clip, config: Mapping[str, Any], late: int) -> Fate:
    for problem, fate in ((clip.clip.problem, UNREADABLE), (clip.span.problem, DROPPED)):
        if problem:
            return Fate(fate, (), {GENERAL: [problem]}, [], {})
    if clip.result is None or "problem" in clip.result:
        problem = clip.result["problem"] if clip.result else "it was not scored"
        return Fate(UNREADABLE, (), {GENERAL: [problem]}, [], {})
    notes, found = list(clip.result["notes"]), dict(clip.result["scores"])
    if clip.result["sync_curve"]:
        sync_config = config["sync"]
        centre = sync_config["usual_lag"] + late
        found["sync_correlation"] = sync.best(clip.result["sync_curve"], centre, sync_config["tolerance"])[0]
    if late:
        notes.append(f"sound {abs(late) / FPS:g} s {'late' if late > 0 else 'early'}, moved to fit the mouth")
    reasons = {name: _reasons(found, config[name], required=name != GENERAL) for name in (GENERAL, "audio", "pose")}
    if not clip.clip.speech:
        reasons["audio"].insert(0, "its manifest says that the sound is not speech of the person shown")
    if not clip.clip.pose:
        reasons["pose"].insert(0, "its manifest says pose false")
    reasons = {name: found for name, found in reasons.items() if found}
    if GENERAL in reasons:
        return Fate(DROPPED, (), reasons, notes, found)
    passed = tuple(name for name in ("audio", "pose") if name not in reasons)
    return Fate(KEPT, (*ALWAYS, *passed), reasons, notes, found, late / FPS)


def _reasons(found: Mapping[str, float | None], ranges: Mapping[str, Mapping[str, float]], required: bool) -> list[str]:
    """Which scores are out of range; if they are required, also which were not measured."""
    reasons = []
    for name, limits in ranges.items():
        value, unit = found.get(name), scores.TABLE[name].unit
        if value is None:
            if required and limits["min"] > -np.inf:
                reasons.append(f"{name} was not measured")
        elif value < limits["min"]:
            reasons.append(f"{name} {value:.3g} {unit}, below {limits['min']:g}")
        elif value > limits["max"]:
            reasons.append(f"{name} {value:.3g} {unit}, above {limits['max']:g}")
    return reasons
