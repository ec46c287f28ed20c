"""The pipeline from raw clips to a data set directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines import boxes, schema
from data_pipelines import keypoints as kp
from data_pipelines.prepare import face_crop, features, names
from data_pipelines.prepare.cut import Cut, cuts
from data_pipelines.prepare.latents import encode_clips, reference_frames
from data_pipelines.prepare.summary import Summary
from data_pipelines.raw import media
from data_pipelines.raw.fetch import sha256_of
from data_pipelines.raw.manifest import RawClip
from data_pipelines.schema import Dataset, DatasetWriter, Meta
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that affect a data set's content."""

    sizes: tuple[tuple[int, int], ...]  # training sizes (height, width) in pixels, each divisible by 16
    clip_frames: int  # 1 + 4n
    vae_sha256: str
    vae_tile: int = 0  # side of the VAE's tiles in pixels; 0 encodes whole frames. Tiling changes latents slightly.
    face_crops: tuple[tuple[int, int], ...] = ()  # sizes of the additional crops to the face


@dataclasses.dataclass
class Prepared:
    """A clip before VAE encoding: its record without latents, and its mp4 (a file, or frames and sound)."""

    record: dict[str, Any]
    frames: np.ndarray
    file: pathlib.Path | None
    sound: np.ndarray | None


def inputs_digest(clips: Sequence[RawClip], settings: Settings, encoders: features.Encoders, detector: str) -> str:
    """Hex sha256 of everything that affects the result: file contents, manifest entries, settings and encoders."""
    used = {name: value for name, value in dataclasses.asdict(settings).items() if value}
    digest = hashlib.sha256(json.dumps([used, encoders.text.name, encoders.speech.name]).encode())
    digest.update(detector.encode())
    for clip in clips:
        digest.update(clip_values(clip, _content).encode())
    return digest.hexdigest()


def clip_values(clip: RawClip, content: Callable[[pathlib.Path], str]) -> str:
    """JSON of everything about a raw clip that affects its records; `content` gives the digest of a file."""
    values = dataclasses.asdict(clip) | {"path": content(clip.path)}
    values["annotations"] = clip.annotations and content(clip.annotations)
    for name in ("problem", "sound_late"):  # fields that came later change no digest where they are not used
        if not values[name]:
            del values[name]
    return json.dumps(values, sort_keys=True)


def _content(path: pathlib.Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:  # such a clip is rejected later
        return f"unreadable: {error.strerror}"


def finished(output: pathlib.Path, digest: str) -> Dataset | None:
    """The data set at `output` if it was made from the same inputs; None if `output` is missing or empty.

    Raises UserError if `output` holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        dataset = Dataset.open(output)
    except UserError as error:  # as of an older schema version
        raise UserError(f"{error}: delete {output} or choose another --output") from error
    if dataset.extra.get("inputs_sha256") != digest:
        raise UserError(f"{output} was made from other clips or settings; delete it or choose another --output")
    return dataset


class _Piece(NamedTuple):
    """A view of a cut without its source frames, which for a long clip would not fit into memory."""

    number: int
    view: str
    first: int
    frames: np.ndarray
    arrays: dict[str, np.ndarray]
    untouched: bool


def _pieces(clip: RawClip, settings: Settings, encoders: features.Encoders) -> Iterator[_Piece]:
    notes = features.annotations(clip)
    for number, cut in enumerate(cuts(clip, settings.sizes, settings.clip_frames)):
        arrays = {name: features.truth(name, clip, cut, notes) for name in ("mouth", "attributes")}
        arrays |= features.tracks(clip, cut, notes, encoders)
        yield _Piece(number, schema.FULL, cut.first, cut.resized(), arrays, cut.untouched)
        face = face_crop.choose(cut, arrays["boxes"], settings.face_crops)
        if face is not None:
            yield _Piece(number, schema.FACE, cut.first, face.resized(), _cropped(arrays, cut, face), False)


def _cropped(arrays: dict[str, np.ndarray], whole: Cut, part: Cut) -> dict[str, np.ndarray]:
    """The arrays of a part of a cut's picture; what is not a place in the picture is shared."""
    place = face_crop.place(whole, part)
    moved = {"keypoints": kp.crop(arrays["keypoints"], *place), "boxes": boxes.crop(arrays["boxes"], *place)}
    return arrays | moved


def prepare_clip(
    clip: RawClip, settings: Settings, encoders: features.Encoders, text: np.ndarray, name: names.Name | None = None
) -> list[Prepared]:
    """Prepares all cuts of a raw clip and their face crops up to VAE encoding; empty if it is too short.

    The clip is decoded once and its speech encoded once.

    Args:
      text: (L,Dt) token states of the caption.
      name: ids of its records; default "source/id".

    Raises UserError if one of the clip's files cannot be read.
    """
    name = name or names.of(clip)
    pieces = list(_pieces(clip, settings, encoders))
    if not pieces:
        return []
    total = pieces[-1].first + settings.clip_frames
    sound = features.sound(clip, total)
    silence = np.zeros((0, encoders.speech.dim), np.float32)
    audio = encoders.speech.encode(sound.wave, total) if sound and clip.speech else silence
    # A raw clip that already is a training clip is copied instead of encoded again.
    several = pieces[-1].number > 0
    unchanged = not several and pieces[0].untouched and clip.start == 0 and clip.end is None
    unchanged = (
        unchanged
        and not clip.sound_late
        and clip.path.suffix == ".mp4"
        and media.is_exactly(clip.path, settings.clip_frames)
    )
    prepared = []
    for piece in pieces:
        heard = features.part_of(sound, piece.first, settings.clip_frames)
        whole = name.cut(piece.number) if several else name.whole
        record = {
            "id": schema.view_id(whole, piece.view),
            "view": piece.view,
            **{field: getattr(clip, field) for field in ("source", "split", "caption", "speaker", "sentence")},
            "reference_frames": reference_frames(settings.clip_frames),
            "audio": silence if heard is None else audio[piece.first : piece.first + settings.clip_frames],
            "text": text,
            **piece.arrays,
            "frames": settings.clip_frames,
            "height": piece.frames.shape[1],
            "width": piece.frames.shape[2],
        }
        file = clip.path if unchanged and piece.view == schema.FULL else None
        prepared.append(Prepared(record, piece.frames, file, heard))
    return prepared


def _text(encoders: features.Encoders, caption: str) -> np.ndarray | UserError:
    """The caption's token states, or the reason why its clips cannot be used."""
    try:
        return encoders.text.encode(caption)
    except UserError as error:
        return error


def meta_of(settings: Settings, encoders: features.Encoders, latent_channels: int) -> Meta:
    """What the records of a run share."""
    return Meta(
        latent_channels=latent_channels,
        sizes={"audio_dim": encoders.speech.dim, "text_dim": encoders.text.dim, "num_keypoints": kp.NUM_KEYPOINTS},
        encoders={"text": encoders.text.name, "audio": encoders.speech.name},
        vae_sha256=settings.vae_sha256,
    )


def in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator[tuple[Any, Future]]:
    """Yields (item, future) in order, with at most `ahead` submitted items to bound memory."""
    pending: deque[tuple[Any, Future]] = deque()
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) > ahead:
            yield pending.popleft()
    while pending:
        yield pending.popleft()


def run(
    clips: Sequence[RawClip],
    output: pathlib.Path,
    settings: Settings,
    encoders: features.Encoders,
    encode: Callable[[Any], Any],
    *,
    latent_channels: int,
    extra: dict[str, Any],
    workers: int = 2,
    batch: int = 8,
) -> Summary:
    """Prepares all clips and writes the data set.

    Args:
      encode: the VAE's encoder, (B,F,H,W,3) in [-1,1] -> normalised latents (B,T,h,w,C).
      extra: more entries of dataset.json.
      workers: threads that decode and detect while the VAE encodes.
      batch: clips per VAE batch.

    A clip in which anything goes wrong does not stop the others; the summary lists it.

    Raises UserError if no clip could be used, or the output cannot be written.
    """
    summary = Summary()
    meta = meta_of(settings, encoders, latent_channels)
    try:
        with DatasetWriter(output, meta, extra) as writer:
            items = list(zip(clips, names.assign(clips), strict=True))
            fill(writer, items, settings, encoders, encode, summary, workers=workers, batch=batch)
    except UserError as error:
        raise UserError(f"{error}{summary.reasons()}") from error
    return summary


def fill(
    writer: DatasetWriter,
    items: Sequence[tuple[RawClip, names.Name]],
    settings: Settings,
    encoders: features.Encoders,
    encode: Callable[[Any], Any],
    summary: Summary,
    *,
    workers: int,
    batch: int,
) -> None:
    """Prepares clips under the given names into an open data set, as `run` does, and adds them to the summary."""
    usable = {clip.caption for clip, _ in items if not clip.problem}
    texts = {caption: _text(encoders, caption) for caption in sorted(usable)}
    summary.add_captions((clip.caption for clip, _ in items if not clip.problem), encoders.text)

    def prepare(item: tuple[RawClip, names.Name]) -> list[Prepared]:
        clip, name = item
        if clip.problem:
            raise UserError(clip.problem)
        text = texts[clip.caption]
        if isinstance(text, UserError):
            raise text
        return prepare_clip(clip, settings, encoders, text, name)

    def pieces(pool: ThreadPoolExecutor) -> Iterator[tuple[np.ndarray, tuple[RawClip, Prepared]]]:
        progress = tqdm(in_order(pool, prepare, items, 2 * workers), total=len(items), desc="prepare", unit="clip")
        for (clip, _), future in progress:
            try:
                prepared = future.result()
            except UserError as error:
                summary.reject(clip, str(error))
                continue
            except Exception as error:  # whatever a strange file does to a library
                summary.reject(clip, f"{clip.path}: {type(error).__name__}: {error}")
                continue
            if not prepared:
                summary.reject(clip, f"shorter than {settings.clip_frames} frames ({settings.clip_frames / FPS:g} s)")
            yield from ((piece.frames, (clip, piece)) for piece in prepared)

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(workers) as pool:
        for (clip, piece), latents, references in encode_clips(pieces(pool), encode, batch):
            record = piece.record | {"latents": latents, "references": references}
            file = piece.file or pathlib.Path(scratch, "clip.mp4")
            if piece.file is None:
                media.write_mp4(file, piece.frames, audio=piece.sound)
            try:
                writer.add(record, file)
            except ValueError as error:  # as a detector's or an encoder's values that are not finite
                summary.reject(clip, str(error))
                continue
            summary.add(record)
