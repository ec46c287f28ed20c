"""The curation of some inputs: scores what is not scored, judges all, writes manifest, scores and report."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.curate import eligibility, manifest, report, scenes, voice
from data_pipelines.curate.eligibility import KEPT, Clip, Fate
from data_pipelines.curate.sources import Settings, Source, is_final
from data_pipelines.curate.store import Store
from data_pipelines.prepare import names
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS


class Machine(NamedTuple):
    """Where and how the steps run.

    Attributes:
      detect: whether to detect people.
      runner: of Beam; "" for processes on this machine.
      workers: their number.
      beam: more options of Beam.
      cache: of fetched packages.
    """

    detect: bool
    runner: str = ""
    workers: int = 2
    beam: tuple[str, ...] = ()
    cache: str | None = None


@dataclasses.dataclass(frozen=True)
class Curated:
    """A clip that is kept, as an input of `prepare.pipeline`, and its `Clip.identity`."""

    clip: RawClip
    identity: str


class Result(NamedTuple):
    """What the curation found; `kept` and `dropped` by identity are in the order of `clips`."""

    clips: list[Clip]
    fates: list[Fate]
    kept: list[Curated]


def check(config: ConfigDict) -> None:
    """Raises UserError for settings that cannot work."""
    cuts = config.cuts
    if cuts.detector not in ("adaptive", "content"):
        raise UserError(f"--config.cuts.detector={cuts.detector}: give adaptive or content")
    if not 0 < cuts.min_seconds <= cuts.max_seconds / 2:
        # Else a shot slightly longer than the maximum would be divided into clips below the minimum.
        raise UserError(
            f"--config.cuts.min_seconds={cuts.min_seconds:g} must be above 0 and at most half of "
            f"max_seconds={cuts.max_seconds:g}"
        )
    for group in ("general", "audio", "pose"):
        for name, limits in config[group].items():
            if not limits["min"] <= limits["max"]:
                raise UserError(f"--config.{group}.{name}: min {limits.min:g} is above max {limits.max:g}")


def curate(
    inputs: Sequence[RawClip],
    directory: pathlib.Path,
    config: ConfigDict,
    machine: Machine,
    in_data_set: frozenset[str] = frozenset(),
) -> Result:
    """Curates raw clips.

    Args:
      directory: for the store, the manifest and the report.
      in_data_set: identities of clips that were encoded before; of two copies these stay.

    Raises UserError for impossible settings, a model that cannot be fetched, or a directory that cannot be written.
    """
    check(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}; choose a writable directory") from error
    store, cuts = Store(directory), config.cuts.to_dict()
    sources = _sources(inputs, store)
    missing = [source for source in sources if source.digest and not source.clip.problem]
    missing = [source for source in missing if not _is_scored(source, store, cuts, machine.detect)]
    seconds = 0.0
    if missing:
        begin = time.perf_counter()
        model = voice.fetch_model(machine.cache)
        settings = Settings(
            str(directory.absolute()), cuts, machine.detect, str(model), 0 if machine.runner else os.getpid()
        )
        print(f"curate: {len(sources) - len(missing)} of {len(sources)} sources are scored already", flush=True)
        _graph().run(missing, settings, machine.runner, machine.workers, machine.beam)
        seconds = time.perf_counter() - begin
    clips = list(_clips(sources, store, cuts, machine.detect))
    fates = eligibility.judge(clips, config, functools.partial(_cells, store), in_data_set)
    manifest.write(directory, clips, fates)
    report.write(directory, clips, fates, config, store, seconds)
    kept = [_curated(clip, fate, store) for clip, fate in zip(clips, fates) if fate.fate == KEPT]
    return Result(clips, fates, kept)


def _graph():
    """The module of the graph. It imports Beam, which takes two seconds and warns of parts that are not installed."""
    logging.disable(logging.WARNING)
    try:
        from data_pipelines.curate import graph
    finally:
        logging.disable(logging.NOTSET)
    return graph


def _sources(inputs: Sequence[RawClip], store: Store) -> list[Source]:
    paths = [clip.path for clip in inputs if not clip.problem]
    paths += [clip.annotations for clip in inputs if not clip.problem and clip.annotations]
    digests = store.digests(sorted(set(paths)))
    found = []
    for clip in inputs:
        digest = "" if clip.problem else digests[clip.path]
        if not clip.problem and not digest:
            clip = dataclasses.replace(clip, problem=f"cannot read {clip.path}; check the file")
        found.append(Source(clip, digest, digests.get(clip.annotations, "") if clip.annotations else ""))
    return found


def _is_scored(source: Source, store: Store, cuts: dict[str, Any], detect: bool) -> bool:
    found = store.read(source.key(cuts))
    if not is_final(found) or "problem" in found:
        return found is not None and is_final(found)
    spans = scenes.spans(source.clip, found, cuts)
    return all(is_final(store.read(source.clip_key(span, detect))) for span in spans if not span.problem)


def _clips(sources: Sequence[Source], store: Store, cuts: dict[str, Any], detect: bool) -> Iterator[Clip]:
    """Every clip of every source with its result; a source that cannot be read is one clip of unknown length."""
    for source, name in zip(sources, names.assign([source.clip for source in sources]), strict=True):
        clip, whole = source.clip, name.whole
        found = None if clip.problem else store.read(source.key(cuts))
        if found is None or "problem" in found:
            problem = clip.problem or (found["problem"] if found else "it was not scored")
            yield Clip(whole, dataclasses.replace(clip, problem=problem), source.digest, scenes.Span(0, 0))
            continue
        spans = scenes.spans(clip, found, cuts)
        for span in spans:
            own = whole if len(spans) == 1 else f"{whole}/{span.first:06d}"
            key = "" if span.problem else source.clip_key(span, detect)
            yield Clip(own, clip, source.digest, span, key, store.read(key) if key else None)


def _cells(store: Store, clip: Clip) -> np.ndarray:
    with np.load(store.path(clip.key, ".npz"), allow_pickle=False) as arrays:
        return arrays["cells"].astype(np.float32)


def _curated(clip: Clip, fate: Fate, store: Store) -> Curated:
    source, span = clip.clip, clip.span
    notes = store.path(clip.key, ".npz")
    with np.load(notes, allow_pickle=False) as arrays:
        has_keypoints = "keypoints" in arrays
    kept = dataclasses.replace(
        source,
        id=clip.name.removeprefix(f"{source.source}/"),
        start=source.start + span.first / FPS,
        end=source.start + span.last / FPS,
        crop=tuple(span.box) if span.box else None,
        speech="audio" in fate.conditions,
        pose="pose" in fate.conditions,
        annotations=source.annotations or (notes if has_keypoints else None),
        sound_late=fate.sound_late,
    )
    return Curated(kept, clip.identity)
