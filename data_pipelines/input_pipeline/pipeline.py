"""What the training loop pulls from: the stage table and a data set, as any rows of every step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.input_pipeline import stage_table
from data_pipelines.input_pipeline.batches import Batches, read_record
from data_pipelines.input_pipeline.loader import make_loader
from data_pipelines.input_pipeline.stage_table import StagePlan
from data_pipelines.input_pipeline.windows import WindowConfig, cut_window
from data_pipelines.schema import Dataset
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.training.stages import Stage


def parse_source_weights(text: str) -> dict[str, float] | None:
    """ "real=2,synthetic=1" -> {"real": 2.0, "synthetic": 1.0}; "" -> None (by size)."""
    if not text:
        return None
    try:
        return {name.strip(): float(weight) for name, weight in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise UserError(f"data.source_weights={text!r}: write it as source=weight,source=weight") from error


class InputPipeline:
    """Batches of a run, by step; implements `omnihuman_jax.training.loop.InputPipeline`."""

    def __init__(self, batches: Batches):
        self._batches, self._own = batches, batches  # those in use, and those of the config alone
        self._done = 0

    @classmethod
    def from_config(cls, config: ConfigDict, stages: Sequence[Stage], dataset: Dataset) -> "InputPipeline":
        """Plans every stage over the data set's training clips.

        Raises:
          UserError: clips too short for the window, or ratios and sources that the clips cannot give.
        """
        weights = parse_source_weights(config.data.source_weights)
        plans = [
            StagePlan(
                name=stage.name,
                first_step=stage.first_step,
                num_steps=stage.steps,
                ratios=stage.ratios,
                source_weights=weights,
                window_frames=stage.latent_frames,
                first_share=1.0 - stage.motion_ratio,
                batch_size=config.global_batch_size,
            )
            for stage in stages
        ]
        window = WindowConfig(config.data.latent_frames, ModelConfig.from_dict(config.model.to_dict()))
        dropout = {name: config.data[f"drop_{name}"] for name in conditions.guided()}
        return cls(
            Batches.open(
                dataset,
                plans,
                window,
                global_batch_size=config.global_batch_size,
                seed=config.seed,
                guidance_dropout=dropout,
                cache_bytes=config.data.cache_mb * 2**20,
            )
        )

    def plan(self) -> list[dict[str, Any]]:
        """The stage table in use as plain JSON, for the checkpoint: what decides which records fill which step."""
        return stage_table.to_json(self._batches.schedule.stages)

    def continue_from(self, plan: Sequence[Mapping[str, Any]], done: int) -> list[str]:
        """Takes steps 1 … done as drawn by a saved `plan`, and the config's stages from there on; before `iterate`.

        Every source goes on where the plan left it, whatever the config changes; unchanged, the run is the same to the
        bit. Where the plan says nothing, or not what this data set can give, the config's own table counts as drawn.

        Returns:
          a line for each stage that changes, for the person at the terminal.

        Raises:
          UserError: the plan is damaged.
        """
        saved, own = stage_table.from_json(plan), self._own.schedule.stages
        table, self._done = stage_table.continued(saved, own, done), done
        try:
            # Planning takes a moment and tells its warnings again.
            unchanged = table == [stage for stage in own if stage.num_steps]
            self._batches = self._own if unchanged else self._own.with_stages(table)
        except UserError as error:  # of the plan: the config's own stages have been planned over this data set
            self._batches = self._own
            return [
                f"the data set at hand cannot give what steps 1 to {done} drew ({error}); they count as drawn by the "
                f"stages of this config, so records may repeat or be left out once"
            ]
        return stage_table.changes(saved, own, done)

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
        dataset, window = self._batches.dataset, self._batches.window
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, entry in enumerate(dataset.index):
            if entry["split"] == "heldout" and entry["shape"][0] >= window.frames:
                by_shape.setdefault(tuple(entry["shape"][1:]), []).append(i)
        size, chosen = self._batches.schedule.batch_size, []
        groups = sorted(by_shape.values(), key=len, reverse=True)
        for turn in range(count if groups else 0):
            group, first = groups[turn % len(groups)], turn // len(groups) * size
            chosen.append([group[(first + row) % len(group)] for row in range(size)][rows])
        return [self._held_out_batch(members) for members in chosen]

    def _held_out_batch(self, members: Sequence[int]) -> dict[str, np.ndarray]:
        dataset, window = self._batches.dataset, self._batches.window
        draw = np.array([1.0, 0.5])  # from motion frames on where the clip is long enough, in its middle
        cut = [cut_window(read_record(dataset, i), window.frames, window, draw, 0.0) for i in members]
        active = np.stack([conditions.eligibility(dataset.index[i]) for i in members])
        return {name: np.stack([row[name] for row in cut]) for name in cut[0]} | {"active": active}

    def buckets(self) -> list[tuple[int, int, int]]:
        """Latent (T, H, W) of every kind of batch that is left to the run, without repeats."""
        schedule = self._batches.schedule
        shapes = {
            (stage.window_frames, *size)
            for i, stage in enumerate(schedule.stages)
            if stage.last_step > self._done
            for size in schedule.buckets(i)
        }
        return sorted(shapes)
