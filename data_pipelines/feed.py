"""What the training loop pulls from: the stage table and a data set, as this process's rows of every step."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.batches import Batches, make_loader
from data_pipelines.schedule import StagePlan
from data_pipelines.schema import Dataset
from data_pipelines.windows import WindowConfig
from omnihuman_jax.errors import UserError
from omnihuman_jax.training.curriculum import Stage


def parse_source_weights(text: str) -> dict[str, float] | None:
    """ "real=2,synthetic=1" -> {"real": 2.0, "synthetic": 1.0}; "" -> None (by size)."""
    if not text:
        return None
    try:
        return {name.strip(): float(weight) for name, weight in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise UserError(f"data.source_weights={text!r}: write it as source=weight,source=weight") from error


class Feed:
    """Batches of a run, by step; implements `omnihuman_jax.training.loop.Feed`."""

    def __init__(self, batches: Batches):
        self._batches = batches

    @classmethod
    def from_config(cls, config: ConfigDict, stages: Sequence[Stage], dataset: Dataset) -> "Feed":
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
            )
            for stage in stages
        ]
        window = WindowConfig(
            frames=config.data.latent_frames,
            motion_frames=config.model.motion_frames,
            audio_context=config.model.audio_context,
            text_len=config.model.text_len,
        )
        dropout = {"text": config.data.drop_text, "audio": config.data.drop_audio}
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

    def iterate(self, first_step: int) -> Iterator[Mapping[str, np.ndarray]]:
        """This process's rows of the batches of steps first_step, first_step + 1, … to the last stage's end."""
        return make_loader(
            self._batches, start_step=first_step, host_index=jax.process_index(), host_count=jax.process_count()
        )

    def describe(self, step: int) -> tuple[list[str], list[list[str]]]:
        """Record ids and active condition names of every global row of a step."""
        line = self._batches.describe(step)
        return line["records"], line["active"]

    def buckets(self) -> list[tuple[int, int, int]]:
        """Latent (T, H, W) of every kind of batch of the run, without repeats."""
        schedule = self._batches.schedule
        shapes = {
            (stage.window_frames, *size) for i, stage in enumerate(schedule.stages) for size in schedule.buckets(i)
        }
        return sorted(shapes)
