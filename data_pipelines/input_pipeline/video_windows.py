"""Batches of random windows of video files, a pure function of (seed, step), for VAE training."""

import collections
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import cv2
import numpy as np

from data_pipelines.raw import media
from data_pipelines.schema import clip_filename
from omnihuman_jax.errors import UserError
from omnihuman_jax.pixels import to_model

_WHOLE_CLIP_BYTES = 256 << 20  # larger clips are not cached whole but read by seeking


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A batch shape: `frames` x `height` x `width` pixels, `batch` rows, drawn with weight `share`."""

    frames: int
    height: int
    width: int
    batch: int
    share: float = 1.0


class VideoFolder:
    """Video files of one or more directories, split into "train" and "heldout"; directories are drawn equally often.

    The directory's `manifest.json` (raw clips) or `dataset.json` (prepared clips) lists the held-out files. The digest
    of its name decides for an unlisted file, so that added files do not change the split of others.

    Args:
      directories: one path, or several separated by commas; searched recursively for `media.VIDEO_SUFFIXES`.
      exclude: regular expression for relative paths to leave out; "" leaves out none.
      heldout: share of the unlisted files to hold out, 0..1; at least one file per directory.
      cache_bytes: limit of the decoded video kept in memory.
      short_side: larger frames are shrunk to this many pixels on their short side.

    Raises:
      UserError: a missing directory, fewer than two videos in it, none left to train on, or a bad regular expression.
    """

    def __init__(
        self,
        directories: str | Path,
        *,
        exclude: str = "",
        heldout: float = 0.05,
        cache_bytes: int = 1 << 30,
        short_side: int = 160,
    ):
        try:
            pattern = re.compile(exclude) if exclude else None
        except re.error as error:
            raise UserError(f"data.exclude={exclude!r}: not a regular expression ({error})") from error
        roots = [_split_files(Path(d.strip()), pattern, heldout) for d in str(directories).split(",")]
        # Split -> the files of each directory.
        self.splits = {"train": [train for train, _ in roots], "heldout": [held for _, held in roots]}
        self._cache: collections.OrderedDict[Path, np.ndarray] = collections.OrderedDict()
        self._cache_bytes, self._cached, self._short_side = cache_bytes, 0, short_side
        self._sizes: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()  # evaluation reads concurrently with the reading thread

    def count(self, split: str) -> int:
        """Number of files in a split."""
        return sum(len(files) for files in self.splits[split])

    def read(self, path: Path, start: int, count: int) -> np.ndarray:
        """Frames start..start+count-1 at 25 fps, uint8 (count, height, width, 3); repeats the last frame past the end.

        Raises:
          UserError: the file cannot be decoded.
        """
        with self._lock:
            if path not in self._cache and self._size(path)[1] <= _WHOLE_CLIP_BYTES:
                self._cache[path] = _shrunk(media.iter_video(path), self._short_side)
                self._cached += self._cache[path].nbytes
                while self._cached > self._cache_bytes and len(self._cache) > 1:
                    self._cached -= self._cache.popitem(last=False)[1].nbytes
            if path in self._cache:
                self._cache.move_to_end(path)
                clip = self._cache[path]
                frames = clip[min(start, len(clip) - 1) : start + count]
            else:
                times = {"start": start / media.FPS, "end": (start + count) / media.FPS}
                frames = _shrunk(media.iter_video(path, **times), self._short_side)[:count]
        return np.concatenate([frames, np.repeat(frames[-1:], count - len(frames), axis=0)])

    def _size(self, path: Path) -> tuple[int, int]:
        """Frames at 25 fps, and bytes of all of them decoded and shrunk; from the file's header, without decoding."""
        if path not in self._sizes:
            if not media.has_video(path):
                raise UserError(f"{path}: has no video stream; remove or replace it")
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                frames = max(int((container.duration or 0) / av.time_base * media.FPS), 1)
                scale = min(1.0, self._short_side / min(stream.height, stream.width))
                self._sizes[path] = frames, round(frames * stream.height * stream.width * 3 * scale**2)
        return self._sizes[path]

    def choose(self, split: str, rng: np.random.Generator) -> Path:
        """A random file of a split; each directory is drawn equally often."""
        files = self.splits[split][rng.integers(len(self.splits[split]))]
        return files[rng.integers(len(files))]

    def window(self, split: str, bucket: Bucket, rng: np.random.Generator, min_scale: float) -> np.ndarray:
        """One random window, cropped and resized to the bucket: float32 (frames, height, width, 3) in [-1, 1].

        The crop has the bucket's aspect ratio and `min_scale`..1 times the largest possible size; half of the windows
        are mirrored.
        """
        path = self.choose(split, rng)
        start = int(rng.integers(max(self._size(path)[0] - bucket.frames, 0) + 1))
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
        return to_model(resized)

    def batch(
        self,
        buckets: Sequence[Bucket],
        seed: int,
        step: int,
        *,
        min_scale: float,
        split: str = "train",
        rows: slice = slice(None),
    ) -> np.ndarray:
        """Rows of the batch of a step: float32 (B, F, Hp, Wp, 3); a function of the files, the seed and the step."""
        bucket = bucket_of(buckets, seed, step)
        return np.stack([self.window(split, bucket, rng, min_scale) for rng in _streams(bucket, seed, step)[rows]])

    def files(self, buckets: Sequence[Bucket], seed: int, step: int) -> list[Path]:
        """The file of each row of the training batch of a step."""
        return [self.choose("train", rng) for rng in _streams(bucket_of(buckets, seed, step), seed, step)]

    def fingerprint(self) -> str:
        """Hex digest of the names, sizes and splits of all files."""
        listed = {
            split: [[(path.name, path.stat().st_size) for path in files] for files in roots]
            for split, roots in self.splits.items()
        }
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def bucket_of(buckets: Sequence[Bucket], seed: int, step: int) -> Bucket:
    """The bucket of a step's batch."""
    shares = np.array([bucket.share for bucket in buckets], np.float64)
    return buckets[np.random.default_rng([seed, step]).choice(len(buckets), p=shares / shares.sum())]


def _streams(bucket: Bucket, seed: int, step: int) -> list[np.random.Generator]:
    """The random numbers of each row of a step's batch."""
    return [np.random.default_rng([seed, step, row]) for row in range(bucket.batch)]


def _split_files(root: Path, exclude: re.Pattern | None, heldout: float) -> tuple[list[Path], list[Path]]:
    """The training and held-out files below a directory."""
    if not root.is_dir():
        raise UserError(f"data.dir={str(root)!r}: no such directory; give a directory of videos")
    files = (p for p in root.rglob("*") if p.suffix.lower() in media.VIDEO_SUFFIXES and p.is_file())
    names = sorted(p.relative_to(root).as_posix() for p in files)
    names = [n for n in names if not (exclude and exclude.search(n))]
    if len(names) < 2:
        raise UserError(f"data.dir={root}: {len(names)} video files; at least 2 are needed")
    listed = _listed_splits(root)
    held = {n for n in names if (listed[n] == "heldout" if n in listed else _fraction(n) < heldout)}
    held = held or {min(names, key=_fraction)}
    train = [n for n in names if n not in held]
    if not train:
        raise UserError(
            f"data.dir={root}: all {len(names)} videos are held out; lower data.heldout={heldout} or add more"
        )
    return [root / n for n in train], [root / n for n in sorted(held)]


def _listed_splits(root: Path) -> dict[str, str]:
    """File below `root` -> "train" or "heldout", from the directory's manifest.json or dataset.json."""
    for name, key in (("manifest.json", "clips"), ("dataset.json", "index")):
        try:
            entries = json.loads((root / name).read_text())[key]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{root / name}: not a readable list of clips ({error}); make it again") from error
        files = (e["file"] if key == "clips" else f"clips/{clip_filename(e['id'])}" for e in entries)
        return {f: e["split"] for f, e in zip(files, entries, strict=True) if "split" in e}
    return {}


def _shrunk(frames: Iterable[np.ndarray], short_side: int) -> np.ndarray:
    """Stacks frames and shrinks them to at most `short_side` pixels on their short side."""
    shrunk = []
    for frame in frames:
        scale = short_side / min(frame.shape[:2])
        if scale < 1:
            size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        shrunk.append(frame)
    return np.stack(shrunk)


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
