"""The fields of a data set's records, for writers and readers.

A data set is a directory:

    dataset.json                  sizes, encoders and an index with one entry per record
    records/*.array_record        serialised TFDS `FeaturesDict` records (no TensorFlow needed)
    clips/ID.mp4                  the prepared clips at training size (`clip_filename`)

Everything is at 25 frames per second. A record is a dict. An array that a clip lacks has zero rows, so "has audio" is
`record["audio"].shape[0] > 0`. The writer takes the arrays from the table of conditions (`array_fields`) and stores
their names and types in dataset.json, so that a data set describes itself.

A record's `view` is "full", or "face" for a crop of a full record's clip to the face; its id is then that one's with
"#face". The two share everything but the picture and the places in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines.cached_files import CachedFiles
from omnihuman_jax import conditions, regions, stores
from omnihuman_jax.conditions import Kind
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS, latent_frames, pixel_frames
from omnihuman_jax.stores import AnyPath

SCHEMA_VERSION = 3
SPLITS = ("train", "heldout")
FULL, FACE = VIEWS = ("full", "face")
RECORDS_PER_FILE = 64
MAX_NAME = 251  # bytes of a file name without ".mp4"; file systems allow 255

TEXT_FIELDS = ("id", "source", "split", "caption", "speaker", "sentence", "view")
NUMBER_FIELDS = ("frames", "height", "width")
# Array name -> (rank, dtype). Letters: T latent frames, F pixel frames, H W latent rows and columns, C channels,
# R references, K keypoints, L text tokens, A appearance attributes, Da Dt feature widths.
ArrayFields = Mapping[str, tuple[int, str]]
# The conditions add references (R,H,W,C), audio (F,Da) speech features, keypoints (F,K,3), and text (L,Dt), the
# unpadded token states of the caption.
_OTHER_ARRAYS: ArrayFields = {
    "latents": (4, "float16"),  # (T,H,W,C) normalised latents of the whole clip, posterior mean
    "reference_frames": (1, "int32"),  # (R,) pixel frame of each reference
    "mouth": (1, "float32"),  # (F,) true mouth opening of rendered clips; else (0,)
    "attributes": (1, "float32"),  # (A,) true appearance numbers of rendered clips; else (0,)
    "boxes": (3, "float32"),  # (F,4,4) or (0,4,4) boxes of `omnihuman_jax.regions`; also of clips without eligible pose
}


def array_fields() -> ArrayFields:
    """The arrays of a record: the fixed ones and one for each condition of the table."""
    of_conditions = {c.record: (c.rank, np.dtype(c.dtype).name) for c in conditions.table()}
    return dict(_OTHER_ARRAYS) | of_conditions


@dataclasses.dataclass(frozen=True)
class Meta:
    """What all records of one data set share (the head of dataset.json).

    Attributes:
      sizes: sizes of the conditions' rows by name (`Condition.sizes`): audio_dim, text_dim, num_keypoints.
      encoders: condition -> name of its encoder.
      vae_sha256: digest of the VAE's encoder (`omnihuman_jax.models.vae.vae.encoder_sha256`).
    """

    latent_channels: int
    sizes: Mapping[str, int]
    encoders: Mapping[str, str]
    vae_sha256: str
    arrays: ArrayFields = dataclasses.field(default_factory=array_fields)
    fps: int = FPS
    schema_version: int = SCHEMA_VERSION


@functools.cache
def _features(arrays: tuple[tuple[str, tuple[int, str]], ...]):
    # Imported here because it takes about a second, which would slow down `--help`.
    from tensorflow_datasets import features as tf_features

    spec: dict[str, Any] = {name: tf_features.Text() for name in TEXT_FIELDS}
    spec |= {name: np.int32 for name in NUMBER_FIELDS}
    for name, (rank, dtype) in arrays:
        # zlib also stores the shape, which an array of more than one unknown dimension needs.
        encoding = "zlib" if rank > 1 else "none"
        spec[name] = tf_features.Tensor(shape=(None,) * rank, dtype=np.dtype(dtype), encoding=encoding)
    return tf_features.FeaturesDict(spec)


def encode(record: Mapping[str, Any], arrays: ArrayFields) -> bytes:
    """Serialises one record with its arrays cast to the schema's types; ValueError for wrong fields or ranks."""
    expected = {*TEXT_FIELDS, *NUMBER_FIELDS, *arrays}
    if set(record) != expected:
        raise ValueError(f"record fields differ from the schema: {sorted(set(record) ^ expected)}")
    raw: dict[str, Any] = {name: str(record[name]) for name in TEXT_FIELDS}
    raw |= {name: int(record[name]) for name in NUMBER_FIELDS}
    for name, (rank, dtype) in arrays.items():
        value = np.asarray(record[name], dtype)
        if value.ndim != rank:
            raise ValueError(f"record {record['id']}: {name} has shape {value.shape}, expected rank {rank}")
        raw[name] = np.ascontiguousarray(value)
    from tensorflow_datasets.proto import tf_example_pb2  # imported here as in `_features`

    example = tf_example_pb2.Example.FromString(_features(tuple(arrays.items())).serialize_example(raw))
    return example.SerializeToString(deterministic=True)  # else the order of its map is another in each process


def decode(data: bytes, arrays: ArrayFields) -> dict[str, Any]:
    """Inverse of `encode`: text fields as str, number fields as int, arrays as NumPy."""
    record = dict(_features(tuple(arrays.items())).deserialize_example_np(data))
    for name in TEXT_FIELDS:
        record[name] = record[name].decode("utf-8")
    for name in NUMBER_FIELDS:
        record[name] = int(record[name])
    return record


def condition_arrays(record: Mapping[str, Any], names: Iterable[str], reference: int = 0) -> dict[str, np.ndarray]:
    """The record's arrays of conditions that it has, by condition, as inputs for generation; one of its references."""
    arrays = {name: record[conditions.get(name).record] for name in names}
    return {name: x[reference] if conditions.get(name).kind is Kind.IMAGE else x for name, x in arrays.items()}


def flat_name(record_id: str) -> str:
    """The id without characters that paths and URLs reserve: "a/b#face" -> "a__b@face". Two ids may become one name."""
    return record_id.replace("/", "__").replace("#", "@")


def clip_filename(record_id: str) -> str:
    """The record's file name under clips/, which is also a part of a URL: "a/b#face" -> "a__b@face.mp4".

    A name that is too long for a file system ends in a digest of the id instead.
    """
    name = flat_name(record_id)
    if len(name.encode()) > MAX_NAME:
        digest = hashlib.sha256(record_id.encode()).hexdigest()[:16]
        name = name.encode()[: MAX_NAME - 17].decode(errors="ignore") + f"-{digest}"
    return name + ".mp4"


def view_id(record_id: str, view: str) -> str:
    """The id of a view of the clip with this id."""
    return record_id if view == FULL else f"{record_id}#{view}"


def clip_id(record_id: str) -> str:
    """The inverse of `view_id`: the id of the clip that a record is a view of."""
    return record_id.removesuffix(f"#{FACE}")


def full_records(dataset: Dataset, split: str | None = None) -> list[int]:
    """Indices of a split's records (None: of all) that show the whole picture: those are evaluated and shown."""
    entries = enumerate(dataset.index)
    return [i for i, entry in entries if entry["view"] == FULL and split in (None, entry["split"])]


def _check(record: Mapping[str, Any], meta: Meta) -> None:
    """Raises ValueError if shapes disagree with `meta` or with each other, or values are not finite."""
    frames, name, size = int(record["frames"]), record["id"], record["latents"].shape[1:3]
    expected = {
        "latents": (latent_frames(frames), *size, meta.latent_channels),
        "mouth": (frames if len(record["mouth"]) else 0,),
        "boxes": (frames if len(record["boxes"]) else 0, len(regions.BOXES), 4),
    }
    for condition in conditions.table():
        count = len(record[condition.record])
        if condition.kind is Kind.IMAGE:
            expected[condition.record] = (len(record["reference_frames"]), *size, meta.latent_channels)
        elif condition.kind is Kind.TOKENS:
            expected[condition.record] = (count, *condition.row_shape(meta.sizes))
        else:
            expected[condition.record] = (frames if count else 0, *condition.row_shape(meta.sizes))
    for field, shape in expected.items():
        value = np.asarray(record[field])
        if value.shape != shape:
            raise ValueError(f"record {name}: {field} has shape {value.shape}, expected {shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"record {name}: {field} has values that are not finite")
    if pixel_frames(latent_frames(frames)) != frames or not len(record["references"]) or not len(record["text"]):
        raise ValueError(f"record {name} has {frames} frames; it needs 1+4n frames, a reference and text tokens")
    if record["split"] not in SPLITS:
        raise ValueError(f"record {name}: split is {record['split']!r}, expected one of {SPLITS}")
    if record["view"] not in VIEWS:
        raise ValueError(f"record {name}: view is {record['view']!r}, expected one of {VIEWS}")


def check_sizes(dataset: Dataset, model: Any) -> None:
    """Raises UserError if the data set's feature sizes differ from the model config's."""
    keys = [key for condition in conditions.table() for key in condition.sizes if key in dataset.meta.sizes]
    for key in ("latent_channels", *keys):
        size = dataset.meta.latent_channels if key == "latent_channels" else dataset.meta.sizes[key]
        if model[key] != size:
            raise UserError(
                f"model.{key}={model[key]}, but the data set {dataset.directory} has {size}; set "
                f"--config.model.{key}={size}, or prepare the data with the encoders this preset expects"
            )


class DatasetWriter:
    """Context manager that writes a data set directory, or extends one.

    A new data set is written to a sibling `.NAME.partial` and renamed at the end, so it is complete or absent. An
    extended one gets more files, and at the end another dataset.json that lists them, so it is as before or complete.
    """

    def __init__(
        self, directory: str | pathlib.Path, meta: Meta, extra: Mapping[str, Any] | None = None, *, extend: bool = False
    ):
        """Writes nothing yet.

        Args:
          extra: more top-level keys of dataset.json, such as the digest of the inputs; read at the end.
          extend: keep the records that are in `directory`, if it exists, and write even without a new one.
        """
        self._final = pathlib.Path(directory).absolute()
        self._extends = extend and self._final.exists()
        self._partial = self._final if self._extends else self._final.parent / f".{self._final.name}.partial"
        self._meta, self._extra, self._needs_records = meta, extra if extra is not None else {}, not extend
        self._index: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._writer: ArrayRecordWriter | None = None
        self._file = self._row = -1
        self._written: list[pathlib.Path] = []

    def __enter__(self) -> Self:
        if self._extends:
            return self._open()
        if self._final.exists() and (not self._final.is_dir() or any(self._final.iterdir())):
            raise UserError(f"output {self._final} already exists and is not empty; choose another or delete it")
        shutil.rmtree(self._partial, ignore_errors=True)  # left over from a killed process
        try:
            (self._partial / "records").mkdir(parents=True)
            (self._partial / "clips").mkdir()
        except OSError as error:
            raise UserError(f"cannot write {self._final}: {error.strerror}; choose a writable directory") from error
        return self

    def _open(self) -> Self:
        dataset = Dataset.open(self._final, empty=True)
        if dataset.meta != self._meta:
            raise UserError(
                f"{self._final} was made with other encoders or sizes; choose another --output or delete it"
            )
        self._index = dataset.index
        self._ids = {entry["id"] for entry in self._index}
        self._file = max((_number_of(entry["file"]) for entry in self._index), default=-1)
        self._row = RECORDS_PER_FILE  # its last file is full or not, but it is closed
        return self

    def add(self, record: Mapping[str, Any], clip_path: str | pathlib.Path | None = None) -> None:
        """Appends one record and copies its clip.

        Raises ValueError if it does not fit schema and `Meta`, or reuses an id; UserError if it cannot be written.
        """
        if record["id"] in self._ids:
            raise ValueError(f"record id {record['id']!r} is used twice")
        self._ids.add(record["id"])
        _check(record, self._meta)
        data = encode(record, self._meta.arrays)
        with self._writing():
            self._write(record, data, clip_path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # RuntimeErrors are of ArrayRecord
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(f"cannot write {self._final}: {reason}; free some space or choose another") from error

    def _write(self, record: Mapping[str, Any], data: bytes, clip_path: str | pathlib.Path | None) -> None:
        if self._writer is None or self._row == RECORDS_PER_FILE:
            self._close_file()
            self._file, self._row = self._file + 1, 0
            self._written.append(self._partial / _file_name(self._file))
            # One record per group, because batches read single records in random order.
            self._writer = ArrayRecordWriter(str(self._written[-1]), "group_size:1")
        self._writer.write(data)
        if clip_path is not None:
            self._written.append(self._partial / "clips" / clip_filename(record["id"]))
            shutil.copyfile(clip_path, self._written[-1])
        self._index.append(
            {
                **{key: record[key] for key in ("id", "source", "split", "view")},
                "file": _file_name(self._file),
                "row": self._row,
                "shape": list(record["latents"].shape[:3]),
                **{name: len(record[conditions.get(name).record]) > 0 for name in conditions.selecting()},
                "frames": int(record["frames"]),
            }
        )
        self._row += 1

    def _close_file(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __exit__(self, kind, error, traceback) -> None:
        finished = False
        try:
            with self._writing() if kind is None else contextlib.suppress(OSError, RuntimeError):
                self._close_file()
                if kind is None and (self._index or not self._needs_records):
                    self._finish()
                    finished = True
        finally:
            if not finished:
                self._remove()
        if kind is None and not finished:
            raise UserError(f"no clip could be used; nothing was written to {self._final}")

    def _remove(self) -> None:
        if not self._extends:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        for path in self._written:
            path.unlink(missing_ok=True)

    def _finish(self) -> None:
        head = dataclasses.asdict(self._meta) | self._extra | {"records": len(self._index), "index": self._index}
        path = self._partial / "dataset.json"
        partial = path.with_name(".dataset.json.partial")
        partial.write_text(json.dumps(head, indent=1) + "\n")
        partial.replace(path)
        if not self._extends:
            self._partial.rename(self._final)


def _file_name(number: int) -> str:
    return f"records/records-{number:05d}.array_record"


def _number_of(file_name: str) -> int:
    return int(file_name.rpartition("-")[2].partition(".")[0])


class Dataset:
    """Random access to the records of one data set; picklable and thread-safe."""

    def __init__(
        self,
        directory: AnyPath,
        meta: Meta,
        index: list[dict[str, Any]],
        extra: dict[str, Any],
        files: CachedFiles | None = None,
    ):
        self.directory, self.meta, self.index, self.extra = directory, meta, index, extra
        self._files = files  # of a directory in an object store
        self._readers: dict[str, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: str | AnyPath, *, empty: bool = False) -> Dataset:
        """Opens a data set directory, also in an object store, whose files are downloaded as they are read.

        `empty` allows one without records, as one that is only begun. Raises UserError if it is missing, empty, damaged
        or of another schema version.
        """
        directory = stores.absolute(directory)
        make = "create one with `python -m data_pipelines.prepare`"
        path, files = directory / "dataset.json", None
        if stores.is_remote(directory):
            text = stores.read_object("data.dir", path)
            files = CachedFiles(directory, "data.dir")
        else:
            if not directory.is_dir():
                raise UserError(f"data directory {directory} does not exist; {make}")
            if not path.is_file():
                what = "has no dataset.json" if any(directory.iterdir()) else "is empty"
                raise UserError(f"data directory {directory} {what}; {make}")
            text = path.read_bytes()
        try:
            head = json.loads(text)
            version = head.pop("schema_version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}); prepare the data again") from error
        if version != SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {version}, not {SCHEMA_VERSION}; prepare the data again")
        names = [field.name for field in dataclasses.fields(Meta) if field.name != "schema_version"]
        missing = [name for name in [*names, "index"] if name not in head]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; prepare the data again")
        index = head.pop("index")
        if not index and not empty:
            raise UserError(f"data directory {directory} has no records; {make}")
        for name in sorted({entry["file"] for entry in index}):
            if not (name in files if files else (directory / name).is_file()):
                raise UserError(f"data directory {directory} lacks {name}; prepare the data again")
        values = {name: head.pop(name) for name in names}
        values["arrays"] = {name: (int(rank), str(dtype)) for name, (rank, dtype) in values["arrays"].items()}
        return cls(directory, Meta(**values), index, head, files)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> dict[str, Any]:
        """Record i (an index into `.index`)."""
        entry = self.index[i]
        if entry["file"] not in self._readers:
            self._local(entry["file"])  # a download must not keep other threads from reading
        with self._lock:
            if (reader := self._readers.get(entry["file"])) is None:
                reader = ArrayRecordReader(str(self._local(entry["file"])), "readahead_buffer_size:0")
                self._readers[entry["file"]] = reader
        try:
            return decode(reader.read([entry["row"]])[0], self.meta.arrays)
        except Exception:
            with self._lock:
                self._readers.pop(entry["file"], None)  # the next attempt reopens it
                if self._files:
                    self._files.drop(entry["file"])  # and downloads it again
            raise

    def fingerprint(self) -> str:
        """Hex sha256 of all metadata that affects batches; independent of the directory's path.

        Covers sizes, encoders, the digest of the inputs and the index in order, but not the arrays.
        """
        digest = hashlib.sha256(json.dumps([dataclasses.asdict(self.meta), self.extra], sort_keys=True).encode())
        for entry in self.index:
            relevant = {key: value for key, value in entry.items() if key not in ("file", "row")}
            digest.update(json.dumps(relevant, sort_keys=True).encode())
        return digest.hexdigest()

    def clip_path(self, i: int) -> pathlib.Path:
        """The prepared mp4 of record i (may be absent)."""
        return self._local(f"clips/{clip_filename(self.index[i]['id'])}")

    def _local(self, name: str) -> pathlib.Path:
        return self._files.local(name) if self._files else self.directory / name

    def __getstate__(self) -> dict[str, Any]:
        # Readers and locks cannot be pickled; the other process creates its own.
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())
