"""Random windows of a directory of video files, as a pure function of (seed, step): the data of VAE training."""

import collections
import dataclasses
import hashlib
import re
from pathlib import Path

import av
import cv2
import numpy as np

from data_pipelines import media
from omnihuman_jax.errors import UserError

_WHOLE_CLIP_BYTES = 64 << 20  # clips up to this size are decoded once and kept; longer ones are read by seeking


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One shape of batch: `frames` x `height` x `width` pixels, `batch` rows, drawn with a weight of `share`."""

    frames: int
    height: int
    width: int
    batch: int
    share: float = 1.0


class VideoFolder:
    """The video files below a directory, split by name into "train" and "heldout".

    Args:
      directory: searched recursively for files with one of `media.VIDEO_SUFFIXES`.
      exclude: regular expression; files whose path below `directory` it finds are left out. "" leaves out none.
      heldout: share of the files to hold out, 0..1; at least one file, whatever the share.
      cache_bytes: how much decoded video to keep.

    Raises:
      UserError: no such directory, fewer than two videos in it, or a bad regular expression.
    """

    def __init__(self, directory: str | Path, *, exclude: str = "", heldout: float = 0.05, cache_bytes: int = 1 << 30):
        root = Path(directory)
        if not root.is_dir():
            raise UserError(f"data.dir={str(directory)!r}: no such directory; give one that holds video files")
        try:
            pattern = re.compile(exclude) if exclude else None
        except re.error as error:
            raise UserError(f"data.exclude={exclude!r}: not a regular expression ({error})") from error
        files = sorted(p for p in root.rglob("*") if p.suffix.lower() in media.VIDEO_SUFFIXES and p.is_file())
        files = [p for p in files if not (pattern and pattern.search(p.relative_to(root).as_posix()))]
        if len(files) < 2:
            raise UserError(f"data.dir={directory}: {len(files)} video files; at least 2 are needed")
        # By the digest of the name, so that adding files moves none from one split to the other.
        ranked = sorted(files, key=lambda p: _fraction(p.relative_to(root).as_posix()))
        held = max(1, sum(_fraction(p.relative_to(root).as_posix()) < heldout for p in ranked))
        if held == len(files):
            raise UserError(
                f"data.heldout={heldout} leaves no video to train on among {len(files)}; use a smaller share"
            )
        self.splits = {"heldout": ranked[:held], "train": sorted(ranked[held:])}
        self._cache: collections.OrderedDict[Path, np.ndarray] = collections.OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0
        self._sizes: dict[Path, _Size] = {}

    def read(self, path: Path, start: int, count: int) -> np.ndarray:
        """Frames start..start+count-1 at 25 fps, uint8 (count, height, width, 3); the last is repeated past the end.

        Raises:
          UserError: the file cannot be decoded.
        """
        if path not in self._cache and self._size(path).bytes <= _WHOLE_CLIP_BYTES:
            self._cache[path] = media.read_video(path)
            self._cached += self._cache[path].nbytes
            while self._cached > self._cache_bytes and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        if path in self._cache:
            self._cache.move_to_end(path)
            clip = self._cache[path]
            frames = clip[min(start, len(clip) - 1) : start + count]
        else:
            frames = media.read_video(path, start=start / media.FPS, end=(start + count) / media.FPS)[:count]
        return np.concatenate([frames, np.repeat(frames[-1:], count - len(frames), axis=0)])

    def _size(self, path: Path) -> "_Size":
        if path not in self._sizes:
            self._sizes[path] = _probe(path)
        return self._sizes[path]

    def window(self, split: str, bucket: Bucket, rng: np.random.Generator, min_scale: float) -> np.ndarray:
        """One random window, cropped and resized to the bucket: float32 (frames, height, width, 3) in [-1, 1].

        The crop has the bucket's aspect ratio and between `min_scale` and all of the largest such size in the frame;
        half of the windows are mirrored.
        """
        files = self.splits[split]
        path = files[rng.integers(len(files))]
        start = int(rng.integers(max(self._size(path).frames - bucket.frames, 0) + 1))
        frames = self.read(path, start, bucket.frames)
        height, width = frames.shape[1:3]
        fit = min(height / bucket.height, width / bucket.width) * rng.uniform(min_scale, 1.0)
        crop_h, crop_w = max(round(bucket.height * fit), 1), max(round(bucket.width * fit), 1)
        top, left = rng.integers(height - crop_h + 1), rng.integers(width - crop_w + 1)
        crop = frames[:, top : top + crop_h, left : left + crop_w]
        if rng.random() < 0.5:
            crop = crop[:, :, ::-1]
        method = cv2.INTER_AREA if crop_h >= bucket.height else cv2.INTER_CUBIC
        size = (bucket.width, bucket.height)
        resized = np.stack([cv2.resize(np.ascontiguousarray(f), size, interpolation=method) for f in crop])
        return resized.astype(np.float32) / 127.5 - 1.0

    def batch(self, buckets: list[Bucket], seed: int, step: int, *, min_scale: float, split: str = "train"):
        """The batch of a step: float32 (B, F, Hp, Wp, 3); a function of the files, the seed and the step alone."""
        shares = np.array([bucket.share for bucket in buckets], np.float64)
        choice = np.random.default_rng([seed, step]).choice(len(buckets), p=shares / shares.sum())
        bucket = buckets[choice]
        rows = (np.random.default_rng([seed, step, row]) for row in range(bucket.batch))
        return np.stack([self.window(split, bucket, rng, min_scale) for rng in rows])


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


@dataclasses.dataclass(frozen=True)
class _Size:
    """Frames at 25 fps, and bytes of all of them decoded."""

    frames: int
    bytes: int


def _probe(path: Path) -> _Size:
    """From the file's header, without decoding."""
    if not media.has_video(path):
        raise UserError(f"{path}: has no video stream; take it out or replace it")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = max(int((container.duration or 0) / av.time_base * media.FPS), 1)
        return _Size(frames, frames * stream.height * stream.width * 3)
