"""The log files of a run: `metrics.jsonl`, `data_log.jsonl`, `evaluation.jsonl` and TensorBoard."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import register_writer_factory

from omnihuman_jax import stores
from omnihuman_jax.sharding import processes
from omnihuman_jax.stores import AnyPath
from omnihuman_jax.training.object_logs import EventFiles, ObjectFile


def last_step_in(path: AnyPath, key: str = "step") -> int:
    """The last step in metrics.jsonl or evaluation.jsonl whose line has `key`; 0 if there is none."""
    if stores.is_remote(path):
        tail = stores.read_tail(path, _LONGEST_LINE)
    elif not path.exists():
        return 0
    else:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _LONGEST_LINE))
            tail = file.read()
    whole = tail.rpartition(b"\n")[0]  # a killed process may leave half a line
    lines = [line for line in whole.split(b"\n") if line.startswith(b"{") and f'"{key}"'.encode() in line]
    return max((json.loads(line)["step"] for line in lines[-20:]), default=0)


_LONGEST_LINE = 1 << 24


def _to_json(line: Mapping[str, Any]) -> bytes:
    """A line of JSON; NaN and infinity, which JSON lacks, become null."""
    plain = json.loads(json.dumps(line), parse_constant=lambda _: None)
    return (json.dumps(plain) + "\n").encode()


class LineFile:
    """A file of lines that survives a full disk: unwritten lines stay in memory and are retried with the next line.

    Args:
      path: opened for appending at the first write; the half line that a killed process may leave is removed.
      log: called once when writing starts to fail, with the reason, and once when it works again.
    """

    def __init__(self, path: pathlib.Path, log: Callable[[str], None]):
        self._path, self._log, self._left, self._failing = path, log, b"", False
        self._file = -1

    def _open(self) -> int:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        tail = max(0, os.fstat(file).st_size - _LONGEST_LINE)
        os.ftruncate(file, tail + os.pread(file, _LONGEST_LINE, tail).rfind(b"\n") + 1)
        return file

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line of JSON (`_to_json`)."""
        self._left += _to_json(line)
        try:
            self._flush()
        except OSError as error:
            if not self._failing:
                self._log(f"{self._path}: {error.strerror}; lines are kept in memory until there is room")
            self._failing = True
        else:
            if self._failing:
                self._log(f"{self._path}: writable again, nothing is missing")
            self._failing = False

    def _flush(self) -> None:
        self._file = self._open() if self._file < 0 else self._file
        while self._left:
            self._left = self._left[os.write(self._file, self._left) :]

    def sync(self) -> None:
        """Does nothing: every line is written at once, as far as that is possible."""

    def close(self) -> None:
        """Closes the file; logs how many bytes could not be written."""
        if self._left:
            with contextlib.suppress(OSError):
                self._flush()
        if self._left:
            self._log(f"{self._path}: the last {len(self._left)} bytes could not be written")
        if self._file >= 0:
            os.close(self._file)


class ObjectLines(ObjectFile):
    """A `LineFile` in an object store."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line of JSON (`_to_json`)."""
        super().write(_to_json(line))


class _Board:
    """TensorBoard events; stops after a failed write. (With a full queue, SummaryWriter would block.)"""

    def __init__(self, folder: AnyPath, log: Callable[[str], None]):
        if scheme := stores.scheme_of(folder):
            register_writer_factory(scheme, EventFiles(log))
        else:
            folder.mkdir(parents=True, exist_ok=True)
        self._events, self._log = EventsWriter(str(folder / "events")), log

    def add(self, step: int, *values: Summary.Value) -> None:
        """Adds values of a step."""
        if self._events is None:
            return
        try:
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._events.flush()
        except OSError as error:
            self._log(f"TensorBoard: {error.strerror}; no more events until a restart (metrics.jsonl has all)")
            self._events = None

    def close(self) -> None:
        """Closes the file."""
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()


def _flat(values: Mapping[str, Any], tag: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{tag}/{name}")
        else:
            yield f"{tag}/{name}", value


class MetricsWriter:
    """Appends JSON lines and TensorBoard events in a run directory; only process 0 writes.

    Args:
      workdir: run directory, also in an object store.
      log_records: whether to write data_log.jsonl.
      enabled: whether this process writes.
      log: reports what cannot be written; the run continues.
    """

    def __init__(
        self,
        workdir: str | AnyPath,
        *,
        log_records: bool,
        enabled: bool = True,
        log: Callable[[str], None] = processes.log,
    ):
        workdir = stores.get_path(workdir)
        kind = ObjectLines if stores.is_remote(workdir) else LineFile

        def lines(name: str, wanted: bool = True) -> LineFile | ObjectLines | None:
            return kind(workdir / name, log) if enabled and wanted else None

        self._metrics, self._evaluation = lines("metrics.jsonl"), lines("evaluation.jsonl")
        self._records = lines("data_log.jsonl", log_records)
        self._board = _Board(workdir / "tensorboard", log) if enabled else None

    def step(self, line: Mapping[str, Any], targets: Mapping[str, float]) -> None:
        """Writes one logged step; `targets` are the ratios of the stage, shown beside the realised ones."""
        if not self._metrics:
            return
        self._metrics.write(line)
        scalars = {}
        for name, value in line.items():
            if isinstance(value, dict) and name not in ("active_ratio", "scheduled_ratio"):
                scalars |= {f"{name}/{key}": part for key, part in value.items() if part is not None}
            elif isinstance(value, float):
                scalars[f"train/{name}"] = value
        for name, value in line.get("scheduled_ratio", {}).items():
            scalars |= {f"ratio/{name}": value, f"ratio/{name}_target": targets[name]}
        self._board.add(line["step"], *(Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()))

    def evaluation(self, step: int, name: str, values: Mapping[str, Any]) -> None:
        """Writes evaluation results, numbers by (nested) names, to evaluation.jsonl and TensorBoard."""
        if not self._evaluation:
            return
        self._evaluation.write({"step": step, name: dict(values)})
        scalars = _flat(values, name)
        self._board.add(step, *(Summary.Value(tag=tag, simple_value=value) for tag, value in scalars))

    def records(self, step: int, described: Mapping[str, Any]) -> None:
        """Writes the record in each global row of a step, and its active conditions if the task has conditions."""
        if self._records:
            fields = {name: list(described[name]) for name in ("records", "active") if name in described}
            self._records.write({"step": step} | fields)

    def video(self, tag: str, path: str | AnyPath, size: tuple[int, int], step: int) -> None:
        """Adds an animated GIF file of (height, width) to the image tab of TensorBoard."""
        if not self._board:
            return
        data = stores.get_path(path).read_bytes()
        image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=data)
        self._board.add(step, Summary.Value(tag=tag, image=image))

    def sync(self) -> None:
        """Waits until all lines are where a killed process leaves them."""
        for file in (self._metrics, self._evaluation, self._records):
            if file:
                file.sync()

    def close(self) -> None:
        """Flushes and closes every file."""
        for file in (self._metrics, self._evaluation, self._records, self._board):
            if file:
                file.close()
