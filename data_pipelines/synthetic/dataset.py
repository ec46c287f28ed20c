"""Renders a data set of people with exact ground truth, in one or several processes.

It writes a raw directory for `data_pipelines.prepare` (data_pipelines/raw/manifest.py), atomically:

    DIR/manifest.json         the arguments, the names of the attributes and one entry per clip
    DIR/clips/ID.mp4          H.264, and AAC speech if the clip has sound
    DIR/annotations/ID.npz    mouth (F,) true opening of the lips in 0..1 (1: as at jawOpen 1), attributes (A,),
                              keypoints (F,28,3) if the clip has a pose, truth_keypoints (F,28,3) for evaluation
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import time
from typing import Any

from data_pipelines.raw import fetch, manifest
from data_pipelines.synthetic import appearance, body, clips, plan, speech
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import latent_frames, pixel_frames

VERSION = 3
NOTE = "synthetic, rendered people; bodies from MakeHuman data (CC0), speech by espeak-ng"


def generate(
    output: str | pathlib.Path,
    count: int,
    seed: int = 0,
    workers: int = 1,
    frames: int = 49,
    size: str = "mix",
    cache: str | None = None,
) -> bool:
    """Writes a data set; returns False, with a message, if `output` already holds the same one.

    Raises:
      UserError: a bad argument, an output directory with other content, or a package that cannot be fetched.
    """
    output = pathlib.Path(os.path.abspath(output))
    wanted_size = _check(count, seed, workers, frames, size)
    arguments = {"clips": count, "seed": seed, "frames": frames, "size": size}
    if _is_finished(output, arguments):
        print(f"{output} already holds these {count} clips")
        return False
    _load_template(cache)
    engine = _engine(cache)
    temporary = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        for folder in ("clips", "annotations"):
            (temporary / folder).mkdir(parents=True)
        plans = [plan.plan(seed, index, wanted_size, engine is not None) for index in range(count)]
        started = time.perf_counter()
        entries = _render(plans, temporary, engine, seed, frames, workers, cache)
        _write_manifest(temporary, entries, arguments, engine)
        if output.exists():
            output.rmdir()  # it is empty
        temporary.replace(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; choose a writable directory") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.perf_counter() - started
    rate = count * frames / seconds
    print(f"wrote {count} clips ({count * frames} frames) to {output} in {seconds:.0f} s, {rate:.0f} frames/s")
    return True


def _check(count: int, seed: int, workers: int, frames: int, size: str) -> tuple[int, int] | None:
    for name, value, least in (("clips", count, 1), ("seed", seed, 0), ("workers", workers, 1), ("frames", frames, 5)):
        if value is None or value < least:
            problem = "is not given" if value is None else f"{value} is too small"
            raise UserError(f"--{name}: {problem}; give a whole number of at least {least}")
    if pixel_frames(latent_frames(frames)) != frames:
        raise UserError(f"--frames={frames}: a clip has 1 + 4n frames; give {pixel_frames(latent_frames(frames))}")
    if count > 1_000_000 or frames > 10_000:
        raise UserError("--clips may be at most 1000000 and --frames at most 10000; give less")
    return plan.parse_size(size)


def _is_finished(output: pathlib.Path, arguments: dict[str, Any]) -> bool:
    """Whether `output` holds a data set with the same arguments; False if it is missing or empty.

    Raises:
      UserError: it holds something else.
    """
    if output.is_dir() and any(output.iterdir()):
        if _manifest(output).get("arguments") == {"version": VERSION, **arguments}:
            return True
        raise UserError(f"{output} is not empty and not this data set; choose another --output or delete it")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; give a directory as --output")
    return False


def _manifest(output: pathlib.Path) -> dict[str, Any]:
    """The directory's manifest; empty if it is missing or unreadable."""
    try:
        found = json.loads((output / manifest.MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _engine(cache: str | None) -> speech.Engine | None:
    try:
        return speech.find_engine(cache)
    except fetch.PackageUnavailableError as error:
        print(f"going on without speech: {error}; nobody speaks in these clips and they have no sound", flush=True)
        return None


def _write_manifest(directory: pathlib.Path, entries: list[dict], arguments: dict, engine) -> None:
    name = engine.name if engine else None
    notes = {"arguments": {"version": VERSION, **arguments}, "note": NOTE, "speech_by": name}
    manifest.write_manifest(directory, "synthetic", entries, **notes, attributes=appearance.ATTRIBUTE_NAMES)


_template: list[body.Body] = []  # the body of this process


def _load_template(cache: str | None) -> None:
    _template[:] = [body.load(cache)]


def _one(clip: plan.ClipPlan, directory: pathlib.Path, engine, seed: int, frames: int) -> dict[str, Any]:
    return clips.write(clips.make(_template[0], engine, clip, seed, frames), directory)


def _render(plans, directory, engine, seed, frames, workers, cache) -> list[dict[str, Any]]:
    """Manifest entries in the order of the clips."""
    task = functools.partial(_one, directory=directory, engine=engine, seed=seed, frames=frames)
    entries, reported = [], time.perf_counter()
    with contextlib.ExitStack() as stack:
        if workers == 1 or len(plans) == 1:
            results = map(task, plans)
        else:
            pool = concurrent.futures.ProcessPoolExecutor(
                min(workers, len(plans)), multiprocessing.get_context("spawn"), _load_template, (cache,)
            )
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(task, plans, chunksize=2)
        try:
            for entry in results:
                entries.append(entry)
                if time.perf_counter() - reported > 10:
                    reported = time.perf_counter()
                    print(f"rendered {len(entries)} of {len(plans)} clips", flush=True)
        except concurrent.futures.BrokenExecutor as error:
            raise UserError("a worker process died, perhaps for lack of memory; use fewer --workers") from error
    return entries
