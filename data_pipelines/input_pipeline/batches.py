"""From records to batches: the schedule's rows are read, cut into windows and stacked.

A batch is a pure function of (seed, step) and the rows asked for, so the state of the input is one integer, the next
step, and a host reads only its slice of the global rows.
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

RETRY_SECONDS = (0.2, 1.0, 5.0)  # pauses before a record that could not be read is tried again


def _needed() -> tuple[str, ...]:
    """Fields of a record that `cut_window` reads."""
    return ("latents", "reference_frames", *(condition.record for condition in conditions.table()))


def usable_records(
    index: Sequence[Mapping[str, Any]], frames: int, split: str = "train", stages: str = ""
) -> list[int]:
    """Index positions of a split's clips with at least `frames` latent frames; says how many are left out.

    Args:
      stages: names of the stages with this window, for the messages.

    Raises:
      UserError: the split is empty, or every clip is too short.
    """
    members = [i for i, entry in enumerate(index) if entry["split"] == split]
    usable = [i for i in members if index[i]["shape"][0] >= frames]
    if not members:
        raise UserError(f"the data set has no clips of split {split!r}; prepare data that has some")
    pixels, of_stages = pixel_frames(frames), f" of {stages}" if stages else ""
    if not usable:
        longest = max(index[i]["frames"] for i in members)
        raise UserError(
            f"all {len(members)} {split} clips are shorter than the training window{of_stages} of {frames} latent "
            f"frames ({pixels} frames; the longest has {longest}); use longer clips or a shorter window"
        )
    if len(usable) < len(members):
        logging.warning(
            "%d of %d %s clips are shorter than %d frames (the training window%s) and are left out",
            len(members) - len(usable),
            len(members),
            split,
            pixels,
            of_stages,
        )
    return usable


def read_record(dataset: Dataset, i: int) -> dict[str, Any]:
    """Record i of a data set, read again after a pause where a file system fails for a moment.

    Raises:
      UserError: it cannot be read, with the record and its file.
    """
    pauses = iter(RETRY_SECONDS)
    while True:
        try:
            return dataset.read(i)
        # ArrayRecord raises OSError, RuntimeError or ValueError by what it met, and a cut record fails to decode.
        except Exception as error:
            entry = dataset.index[i]
            told = f"record {entry['id']} (row {entry['row']} of {dataset.directory / entry['file']})"
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            pause = next(pauses, None)
            if pause is None:
                raise UserError(
                    f"{told} cannot be read, {1 + len(RETRY_SECONDS)} times tried ({why}); restore the file, or "
                    f"prepare the data again; the run continues from its last checkpoint"
                ) from error
            logging.warning("%s: reading failed (%s); trying again in %g s", told, why, pause)
            time.sleep(pause)


class _RecordCache:
    """Decoded records, the least recently used leaving first when `max_bytes` is exceeded."""

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
        whole = read_record(self._dataset, i)  # outside the lock: other threads may read meanwhile
        record = {name: whole[name] for name in _needed() if name in whole}
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
    """Batches by random access; picklable and safe to call from several threads."""

    def __init__(self, dataset: Dataset, schedule: Schedule, model: ModelConfig, *, cache_bytes: int = 2**30):
        """Use `open`; `cache_bytes` bounds the records kept in memory."""
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
        """Plans the schedule, each stage over the training clips that are as long as its window.

        Raises:
          UserError: no such clips, or a stage that they cannot give (see `Schedule`).
        """
        named: dict[int, list[str]] = {}
        for stage in stages:
            named.setdefault(stage.latent_frames, []).append(stage.name)
        for frames, names in named.items():
            records = usable_records(dataset.index, frames, stages=", ".join(names))
            cls._warn_of_clips_without_motion(dataset, records, frames, model)
        schedule = Schedule(stages, dataset.index, seed=seed, guidance_dropout=guidance_dropout)
        return cls(dataset, schedule, model, cache_bytes=cache_bytes)

    def with_stages(self, stages: Sequence[Stage]) -> Self:
        """The batches of another stage table over the same data; they share the records kept in memory.

        Raises:
          UserError: a stage that the data cannot give.
        """
        other = copy.copy(self)
        other.schedule = self.schedule.with_stages(stages)
        return other

    @staticmethod
    def _warn_of_clips_without_motion(dataset: Dataset, records: Sequence[int], frames: int, model: ModelConfig):
        needed = frames + model.motion_frames
        short = sum(dataset.index[i]["shape"][0] < needed for i in records)
        if short and frames > 1 and model.motion_frames:
            logging.warning(
                "%d of %d training clips are shorter than %d frames (window and motion frames): their windows always "
                "start at frame 0, so they do not train how a segment continues another",
                short,
                len(records),
                pixel_frames(needed),
            )

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, Any]:
        """The given global rows of a step's batch (steps count from 1).

        Returns:
          the fields of `omnihuman_jax.batch.fields`; beside them scheduled bool (B,conditions), record int32 (B,) data
          set indices; latent_shape (H,W), the same for all rows.
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
        """What data_log.jsonl says about a step, in global row order.

        Returns:
          step; records, the ids; active and scheduled, the names of the conditions of each row.
        """
        selection = self.schedule.select(step)
        return {
            "step": step,
            "records": [self.dataset.index[i]["id"] for i in selection.record],
            "active": [list(conditions.active_names(row)) for row in selection.active],
            "scheduled": [list(conditions.active_names(row)) for row in selection.scheduled],
        }
