"""The training loop's input: batches by step from a stage table and a data set."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.input_pipeline.batches import Batches, read_record
from data_pipelines.input_pipeline.loader import make_loader
from data_pipelines.input_pipeline.windows import cut_window
from data_pipelines.schema import FULL, Dataset, clip_id
from omnihuman_jax import conditions
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.training.stages import Stage


class InputPipeline:
    """Implements `omnihuman_jax.training.tasks.omnihuman.InputPipeline`."""

    def __init__(self, batches: Batches, held_out_size: tuple[int, int]):
        """Use `from_config`; `held_out_size`: samples and latent frames of a held-out batch."""
        self._batches, self._held_out_size = batches, held_out_size

    @classmethod
    def from_config(cls, config: ConfigDict, stages: Sequence[Stage], dataset: Dataset) -> "InputPipeline":
        """Plans every stage over the data set's training clips.

        Raises:
          UserError: all clips are too short, or they cannot meet a stage's ratios and weights.
        """
        batches = Batches.open(
            dataset,
            stages,
            ModelConfig.from_dict(config.model.to_dict()),
            seed=config.seed,
            guidance_dropout={name: config.data[f"drop_{name}"] for name in conditions.guided()},
            cache_bytes=config.data.cache_mb * 2**20,
        )
        return cls(batches, (config.global_batch_size, config.data.latent_frames))

    def use_stages(self, stages: Sequence[Stage]) -> None:
        """Replaces the stage table, for a run whose config has changed; call before `iterate`.

        Raises:
          UserError: the data cannot meet a stage's ratios and weights; the table is not replaced.
        """
        if tuple(stages) != self._batches.schedule.stages:  # planning takes time and repeats its warnings
            self._batches = self._batches.with_stages(stages)

    def fingerprint(self) -> str:
        """Hex digest of the data set; see `Dataset.fingerprint`."""
        return self._batches.dataset.fingerprint()

    def iterate(self, first_step: int, rows: slice) -> Iterator[Mapping[str, np.ndarray]]:
        """Yields the global `rows` of every batch from `first_step` to the end of the last stage."""
        return make_loader(self._batches, start_step=first_step, rows=rows)

    def describe(self, step: int) -> dict[str, Any]:
        """A step's entry of data_log.jsonl; see `Batches.describe`."""
        return self._batches.describe(step)

    def held_out(self, count: int, rows: slice, view: str = FULL) -> list[dict[str, np.ndarray]]:
        """The global `rows` of `count` fixed batches of held-out clips, with all conditions that each clip has.

        `clip` (B,) numbers the clips; a crop has the number of its clip. A batch has one shape and one view, full
        frames or crops to the "face". The most frequent shapes come first; clips repeat if there are too few.
        """
        dataset, (size, frames) = self._batches.dataset, self._held_out_size
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, entry in enumerate(dataset.index):
            if (entry["split"], entry["view"]) == ("heldout", view) and entry["shape"][0] >= frames:
                by_shape.setdefault(tuple(entry["shape"][1:]), []).append(i)
        chosen = []
        groups = sorted(by_shape.values(), key=len, reverse=True)
        for turn in range(count if groups else 0):
            group, first = groups[turn % len(groups)], turn // len(groups) * size
            chosen.append([group[(first + row) % len(group)] for row in range(size)][rows])
        names = sorted({clip_id(entry["id"]) for entry in dataset.index if entry["split"] == "heldout"})
        numbers = {name: number for number, name in enumerate(names)}
        return [self._held_out_batch(members, numbers) for members in chosen]

    def _held_out_batch(self, members: Sequence[int], numbers: Mapping[str, int]) -> dict[str, np.ndarray]:
        dataset, (_, frames) = self._batches.dataset, self._held_out_size
        draw = np.array([1.0, 0.5])  # the middle of the clip, after motion frames if it is long enough
        cut = [cut_window(read_record(dataset, i), frames, 1.0, self._batches.model, draw, 0.0) for i in members]
        active = np.stack([conditions.eligibility(dataset.index[i]) for i in members])
        return {name: np.stack([row[name] for row in cut]) for name in cut[0]} | {
            "active": active,
            "clip": np.array([numbers[clip_id(dataset.index[i]["id"])] for i in members], np.int32),
        }
