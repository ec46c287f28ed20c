"""Batches of video windows by step, for VAE training; implements `omnihuman_jax.training.tasks.vae.Videos`."""

from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.input_pipeline.loader import make_loader
from data_pipelines.input_pipeline.video_windows import Bucket, VideoFolder, bucket_of
from omnihuman_jax.errors import UserError


class VideoBatches:
    """The batches of a resolved config's `data`, `seed` and `steps`.

    Raises:
      UserError: invalid buckets or unusable directories.
    """

    def __init__(self, config: ConfigDict):
        d = config.data
        self._buckets, self._seed, self._min_scale = parse_buckets(d.buckets), config.seed, d.min_scale
        self.num_steps = config.steps
        self.folder = VideoFolder(
            d.dir, exclude=d.exclude, heldout=d.heldout, cache_bytes=d.cache_mb << 20, short_side=d.short_side
        )

    def sizes(self) -> list[tuple[int, int, int, int]]:
        """(F, Hp, Wp, B) of every bucket."""
        return [(bucket.frames, bucket.height, bucket.width, bucket.batch) for bucket in self._buckets]

    def batch(self, step: int, rows: Callable[[int], slice]) -> np.ndarray:
        """The batch of a step; `rows` maps its size to the rows to read."""
        bucket = bucket_of(self._buckets, self._seed, step)
        return self.folder.batch(self._buckets, self._seed, step, min_scale=self._min_scale, rows=rows(bucket.batch))

    def iterate(self, first_step: int, rows: Callable[[int], slice]) -> Iterator[np.ndarray]:
        """The batches of steps first_step to the last, as `batch`, read ahead in a thread."""
        num_steps = max(self.num_steps - first_step + 1, 0)
        return make_loader(self, start_step=first_step, num_steps=num_steps, rows=rows, threads=1, prefetch=2)

    def records(self, step: int) -> list[str]:
        """The file of each row of a step."""
        return [str(path) for path in self.folder.files(self._buckets, self._seed, step)]

    def windows(self, split: str, count: int, size: tuple[int, int, int]) -> Iterator[np.ndarray]:
        """`count` windows (1, F, Hp, Wp, 3) of whole frames; the same at every call."""
        bucket = Bucket(*size, 1)
        for index in range(count):
            yield self.folder.batch([bucket], self._seed + 1, index, min_scale=1.0, split=split)

    def fingerprint(self) -> str:
        """Hex digest of the files and of how they are split."""
        return self.folder.fingerprint()


def parse_buckets(rows: tuple[tuple[float, ...], ...]) -> list[Bucket]:
    """`data.buckets` of a config; UserError for a row that is not five numbers, or invalid shares."""
    buckets = []
    for row in rows:
        if len(row) != 5:
            raise UserError(f"data.buckets: {tuple(row)} is not (frames, height, width, batch, share)")
        buckets.append(Bucket(*(int(n) for n in row[:4]), float(row[4])))
    if sum(bucket.share for bucket in buckets) <= 0 or any(bucket.share < 0 for bucket in buckets):
        raise UserError("data.buckets: shares must not be negative, and one must be positive")
    return buckets
