"""Sample videos during training: held-out clips, driven by reference, text and, once trained, audio."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.batches import read_record
from data_pipelines.schema import Dataset
from omnihuman_jax import conditions
from omnihuman_jax.inference.generate import decode_latents, pad_text
from omnihuman_jax.inference.sampling import Inputs, Settings, sample_latents
from omnihuman_jax.models.vae import VAE
from omnihuman_jax.training.curriculum import Stage
from omnihuman_jax.training.metrics import write_gif
from omnihuman_jax.training.state import make_network


class SampleVideos:
    """Writes `samples/NAME.gif` at a stage's end: for each clip, the real one above the generated one.

    Args:
      config: resolved config.
      dataset: its held-out clips are used, or training clips where none are held out.
      vae: decodes both.
      workdir: run directory.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, vae: VAE, workdir: Path):
        self._config, self._dataset, self._vae = config, dataset, vae
        self._folder = workdir / "samples"
        held = [i for i, entry in enumerate(dataset.index) if entry["split"] == "heldout" and entry["audio"]]
        shape = dataset.index[(held or [0])[0]]["shape"]
        same = [i for i in held or range(len(dataset)) if dataset.index[i]["shape"] == shape]
        self._records = [read_record(dataset, i) for i in same[: config.sample.count]]

    def path(self, step: int, stage: Stage) -> Path:
        """The GIF of a stage that ended with this step."""
        return self._folder / f"{stage.name}-{step:06d}.gif"

    def __call__(self, params: Any, step: int, stage: Stage) -> tuple[Path, tuple[int, int]]:
        """Generates one window of each clip; returns the GIF and its (height, width)."""
        config, records = self._config, self._records
        network = make_network(config)
        window = min(stage.latent_frames, *(len(r["latents"]) for r in records))
        has_audio = stage.ratios["audio"] > 0 and all(len(r["audio"]) for r in records)
        texts, masks = zip(*(pad_text(r["text"], network.config.text_len) for r in records), strict=True)
        inputs = Inputs(
            active=conditions.for_inference(text=True, reference=True, audio=has_audio, pose=False),
            reference=np.stack([r["references"][0] for r in records]).astype(np.float32),
            text=np.stack(texts),
            text_mask=np.stack(masks),
            audio=np.stack([r["audio"] for r in records]).astype(np.float32) if has_audio else None,
        )
        settings = Settings.from_config(config, window=window)
        frames = 1 + 4 * (window - 1)
        made = sample_latents(
            network, params, inputs, settings, frames=frames, seeds=range(config.seed, config.seed + len(records))
        )
        real = np.stack([r["latents"][:window] for r in records]).astype(np.float32)
        pair = [np.concatenate(list(decode_latents(self._vae, x)), axis=2) for x in (real, np.asarray(made))]
        video = np.clip(np.round((np.concatenate(pair, axis=1) + 1) * 127.5), 0, 255).astype(np.uint8)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step, stage)
        part = path.with_name(f".{path.name}")
        write_gif(part, video)
        part.replace(path)  # a sample that is there is a whole one
        return path, video.shape[1:3]
