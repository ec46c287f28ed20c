"""Log files in an object store, whose objects cannot be written to as a program goes on."""

import concurrent.futures
import time
from collections.abc import Callable

from omnihuman_jax import stores
from omnihuman_jax.stores import AnyPath

UPLOAD_SECONDS = 15.0  # between uploads of one file; a store takes about one change of an object a second


class ObjectFile:
    """Bytes appended to an object in the background, every `UPLOAD_SECONDS` and when `sync` or `close` is called.

    What cannot be uploaded stays in memory and is tried again with what is written next. The object always ends where a
    write ended. A process that is killed loses what it wrote since the last upload, so `sync` before a checkpoint is
    saved: what is lost then is what a continued run writes again. Where the store did what it had reported as failed,
    bytes come twice.

    Args:
      path: of the object; made at the first write.
      log: called once when uploads start to fail, with the reason, and once when they work again.
    """

    def __init__(self, path: AnyPath, log: Callable[[str], None]):
        self._path, self._log = path, log
        self._left = self._sent = b""  # not yet given to an upload, and being uploaded
        self._upload: concurrent.futures.Future[None] | None = None
        self._due, self._failing = 0.0, False
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "upload")

    def write(self, data: bytes) -> None:
        """Appends bytes; does not wait for the store."""
        self._left += data
        if time.monotonic() >= self._due and (self._upload is None or self._upload.done()):
            self._finish()
            self._start()

    def flush(self) -> None:
        """Does nothing: writers of TensorBoard events call it after every event."""

    def sync(self) -> None:
        """Uploads all that was written, and waits for it."""
        self._finish()
        self._start()
        self._finish()

    def close(self) -> None:
        """Uploads the rest; logs how many bytes could not be."""
        self.sync()
        if self._left:
            self._log(f"{self._path}: the last {len(self._left)} bytes could not be written")
        self._worker.shutdown()

    def _start(self) -> None:
        if self._left:
            self._due = time.monotonic() + UPLOAD_SECONDS
            self._sent, self._left = self._left, b""
            self._upload = self._worker.submit(stores.append, self._path, self._sent)

    def _finish(self) -> None:
        """Waits for an upload that is under way."""
        upload, self._upload = self._upload, None
        if upload is None:
            return
        try:
            upload.result()
        except OSError as error:
            self._left = self._sent + self._left
            if not self._failing:
                self._log(f"{self._path}: {error.strerror}; what is written is kept in memory until it can be uploaded")
            self._failing = True
        else:
            if self._failing:
                self._log(f"{self._path}: writable again, nothing is missing")
            self._failing = False


class EventFiles:
    """Makes TensorBoard event files of `ObjectFile`; tensorboardX's own for stores upload all at every event."""

    def __init__(self, log: Callable[[str], None]):
        self._log = log

    def open(self, path: str) -> ObjectFile:
        """The event file of a path in a store."""
        return ObjectFile(stores.get_path(path), self._log)
