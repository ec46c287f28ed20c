"""What the training loop pulls from: the stage table and a data set, as any rows of every step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.input_pipeline.batches import Batches, read_record
from data_pipelines.input_pipeline.loader import make_loader
from data_pipelines.input_pipeline.windows import cut_window
from data_pipelines.schema import Dataset
from omnihuman_jax import conditions
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.training.stages import Stage


class InputPipeline:
    """Batches of a run, by step; implements `omnihuman_jax.training.tasks.omnihuman.InputPipeline`."""

    def __init__(self, batches: Batches, held_out_size: tuple[int, int]):
        """Use `from_config`; `held_out_size` is the samples and latent frames of a held-out batch."""
        self._batches, self._held_out_size = batches, held_out_size

    @classmethod
    def from_config(cls, config: ConfigDict, stages: Sequence[Stage], dataset: Dataset) -> "InputPipeline":
        """Plans every stage over the data set's training clips.

        Raises:
          UserError: clips too short for the window, or ratios and sources that the clips cannot give.
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
        """Draws every step by another table, a run's own where the config changed on the way; before `iterate`.

        Raises:
          UserError: the data set cannot give what a stage draws; the table in use stays.
        """
        if tuple(stages) != self._batches.schedule.stages:  # planning takes a moment and repeats its warnings
            self._batches = self._batches.with_stages(stages)

    def fingerprint(self) -> str:
        """Hex digest of what the data set says of its records; see `Dataset.fingerprint`."""
        return self._batches.dataset.fingerprint()

    def iterate(self, first_step: int, rows: slice) -> Iterator[Mapping[str, np.ndarray]]:
        """These global rows of the batches of steps first_step, first_step + 1, … to the last stage's end."""
        return make_loader(self._batches, start_step=first_step, rows=rows)

    def describe(self, step: int) -> dict[str, Any]:
        """`records`, `active` and `scheduled` of every global row of a step; see `Batches.describe`."""
        return self._batches.describe(step)

    def held_out(self, count: int, rows: slice) -> list[dict[str, np.ndarray]]:
        """These global rows of `count` batches of held-out clips, always the same, with all that each clip can give.

        A batch has one shape; the shapes with the most clips come first, and few clips are repeated.
        """
        dataset, (size, frames) = self._batches.dataset, self._held_out_size
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, entry in enumerate(dataset.index):
            if entry["split"] == "heldout" and entry["shape"][0] >= frames:
                by_shape.setdefault(tuple(entry["shape"][1:]), []).append(i)
        chosen = []
        groups = sorted(by_shape.values(), key=len, reverse=True)
        for turn in range(count if groups else 0):
            group, first = groups[turn % len(groups)], turn // len(groups) * size
            chosen.append([group[(first + row) % len(group)] for row in range(size)][rows])
        return [self._held_out_batch(members) for members in chosen]

    def _held_out_batch(self, members: Sequence[int]) -> dict[str, np.ndarray]:
        dataset, (_, frames) = self._batches.dataset, self._held_out_size
        draw = np.array([1.0, 0.5])  # from motion frames on where the clip is long enough, in its middle
        cut = [cut_window(read_record(dataset, i), frames, 1.0, self._batches.model, draw, 0.0) for i in members]
        active = np.stack([conditions.eligibility(dataset.index[i]) for i in members])
        return {name: np.stack([row[name] for row in cut]) for name in cut[0]} | {"active": active}
