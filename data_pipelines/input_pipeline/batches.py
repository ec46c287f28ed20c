"""Reads the records that the schedule selects, cuts windows out of them and stacks these into batches.

A batch is a pure function of (seed, step, rows), so the input pipeline's state is the next step, one integer, and each
host reads only its slice of the global rows.
"""

import collections
import copy
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from absl import logging

from data_pipelines.input_pipeline.schedule import Schedule
from data_pipelines.input_pipeline.windows import cut_window
from data_pipelines.schema import Dataset
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import pixel_frames
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.training.stages import Stage

RETRY_SECONDS = (0.2, 1.0, 5.0)  # pauses between attempts to read a record


def usable_records(index: Sequence[Mapping[str, Any]], frames: int, stages: str = "") -> list[int]:
    """Index positions of the training clips with at least `frames` latent frames; warns about shorter ones.

    Args:
      stages: names of the stages with this window, for the messages.

    Raises:
      UserError: there are no training clips, or all are too short.
    """
    members = [i for i, entry in enumerate(index) if entry["split"] == "train"]
    usable = [i for i in members if index[i]["shape"][0] >= frames]
    if not members:
        raise UserError("the data set has no clips of split 'train'; prepare data that has some")
    pixels, of_stages = pixel_frames(frames), f" of {stages}" if stages else ""
    if not usable:
        longest = max(index[i]["frames"] for i in members)
        raise UserError(
            f"all {len(members)} train clips are shorter than the training window{of_stages} of {frames} latent "
            f"frames ({pixels} frames; the longest has {longest}); use longer clips or a shorter window"
        )
    if len(usable) < len(members):
        logging.warning(
            f"{len(members) - len(usable)} of {len(members)} train clips are shorter than {pixels} frames (the "
            f"training window{of_stages}) and are left out"
        )
    return usable


def read_record(dataset: Dataset, i: int) -> dict[str, Any]:
    """Reads record i and retries after pauses, since network file systems can fail temporarily.

    Raises:
      UserError: the record still cannot be read.
    """
    pauses = iter(RETRY_SECONDS)
    while True:
        try:
            return dataset.read(i)
        # ArrayRecord raises OSError, RuntimeError or ValueError, and decoding a truncated record raises others.
        except Exception as error:
            entry = dataset.index[i]
            where = f"record {entry['id']} (row {entry['row']} of {dataset.directory / entry['file']})"
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            pause = next(pauses, None)
            if pause is None:
                raise UserError(
                    f"{where} cannot be read after {1 + len(RETRY_SECONDS)} attempts ({why}); restore the file or "
                    f"prepare the data again; the run continues from its last checkpoint"
                ) from error
            logging.warning(f"{where}: reading failed ({why}); retrying in {pause:g} s")
            time.sleep(pause)


class _RecordCache:
    """LRU cache of decoded records with a limit of `max_bytes`."""

    def __init__(self, dataset: Dataset, max_bytes: int):
        self._dataset, self._max_bytes = dataset, max_bytes
        self._empty()

    def _empty(self) -> None:
        self._records: collections.OrderedDict[int, dict[str, np.ndarray]] = collections.OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        with self._lock:
            if i in self._records:
                self._records.move_to_end(i)
                return self._records[i]
        whole = read_record(self._dataset, i)  # outside the lock, so that other threads can read
        needed = ("latents", "reference_frames", "boxes", *(condition.record for condition in conditions.table()))
        record = {name: whole[name] for name in needed if name in whole}
        with self._lock:
            if i not in self._records:
                self._records[i] = record
                self._bytes += _nbytes(record)
            while self._bytes > self._max_bytes:
                self._bytes -= _nbytes(self._records.popitem(last=False)[1])
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {"_dataset": self._dataset, "_max_bytes": self._max_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._empty()


def _nbytes(record: Mapping[str, np.ndarray]) -> int:
    return sum(value.nbytes for value in record.values())


class Batches:
    """Random access to batches by step; picklable and thread-safe."""

    def __init__(self, dataset: Dataset, schedule: Schedule, model: ModelConfig, cache_bytes: int):
        """Use `open`."""
        self.dataset, self.schedule, self.model = dataset, schedule, model
        self._cache = _RecordCache(dataset, cache_bytes)

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        stages: Sequence[Stage],
        model: ModelConfig,
        *,
        seed: int,
        guidance_dropout: Mapping[str, float] | None = None,
        cache_bytes: int = 2**30,
    ) -> "Batches":
        """Plans each stage over the training clips that are at least as long as its window.

        Args:
          guidance_dropout: see `Schedule`.
          cache_bytes: limit of the records kept in memory.

        Raises:
          UserError: no such clips, or they cannot meet a stage's ratios (see `Schedule`).
        """
        named: dict[int, list[str]] = {}
        for stage in stages:
            named.setdefault(stage.latent_frames, []).append(stage.name)
        for frames, names in named.items():
            records = usable_records(dataset.index, frames, stages=", ".join(names))
            needed = frames + model.motion_frames
            short = sum(dataset.index[i]["shape"][0] < needed for i in records)
            if short and frames > 1 and model.motion_frames:
                logging.warning(
                    f"{short} of {len(records)} training clips are shorter than {pixel_frames(needed)} frames (window "
                    f"and motion frames): their windows always start at frame 0 and do not train continuation"
                )
        schedule = Schedule(stages, dataset.index, seed=seed, guidance_dropout=guidance_dropout)
        return cls(dataset, schedule, model, cache_bytes)

    def with_stages(self, stages: Sequence[Stage]) -> Self:
        """The batches of another stage table over the same data, with the same record cache.

        Raises:
          UserError: the data cannot meet a stage's ratios.
        """
        other = copy.copy(self)
        other.schedule = self.schedule.with_stages(stages)
        return other

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Any]:
        """The global `rows` of a step's batch (steps count from 1).

        Returns:
          The fields of `omnihuman_jax.batch.fields`; in addition scheduled bool (B,conditions), record int32 (B,) data
          set indices, and latent_shape (H,W) of all rows.
        """
        selection = self.schedule.select(step, rows)
        stage = self.schedule.stages[selection.stage]
        cut = [
            cut_window(self._cache[int(i)], stage.latent_frames, stage.motion_ratio, self.model, start, reference)
            for i, start, reference in zip(
                selection.record, selection.start_draw, selection.reference_draw.tolist(), strict=True
            )
        ]
        return {name: np.stack([row[name] for row in cut]) for name in cut[0]} | {
            "active": selection.active,
            "scheduled": selection.scheduled,
            "record": selection.record.astype(np.int32),
            "latent_shape": selection.bucket,
        }

    def describe(self, step: int) -> dict[str, Any]:
        """The entry of data_log.jsonl for a step: step, record ids, active and scheduled conditions by global row."""
        selection = self.schedule.select(step)
        return {
            "step": step,
            "records": [self.dataset.index[i]["id"] for i in selection.record],
            "active": [list(conditions.active_names(row)) for row in selection.active],
            "scheduled": [list(conditions.active_names(row)) for row in selection.scheduled],
        }
