"""The two steps as Apache Beam transforms; elements are paths and spans, results go to the store.

Without `--runner` it runs on this machine in several processes. Beam's DirectRunner tries Prism first since 2.68 and
falls back without a word, so the runner is named; its in-memory mode would ignore the number of workers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import cv2
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo, FnApiRunner

from data_pipelines.curate import scenes, score
from data_pipelines.curate.sources import Settings, Source, is_final
from data_pipelines.curate.store import Store
from data_pipelines.encoders import pose
from data_pipelines.raw.manifest import RawClip
from omnihuman_jax.errors import UserError

_USER_ERROR = re.compile(r"(?:UserError|DetectorError): (.+?)(?: \[while running .*)?$", re.MULTILINE)
GROUP = 8  # clips of a source that one element scores: the source's sound is decoded once for them


def find_scenes(source: Source, settings: Settings) -> Iterator[tuple[Source, list[scenes.Span]]]:
    """Writes the source's shots to the store, and yields its clips that are to be scored in groups."""
    store, key = Store(settings.directory), source.key(settings.cuts)
    found = store.read(key)
    if not is_final(found):
        begin = time.perf_counter()
        found = _guarded(lambda: scenes.find(source.clip, settings.cuts), source.clip)
        store.write(key, found | {"seconds": {"cuts": round(time.perf_counter() - begin, 4)}}, {})
    if "problem" in found:
        return
    spans = [span for span in scenes.spans(source.clip, found, settings.cuts) if not span.problem]
    spans = [span for span in spans if not is_final(store.read(source.clip_key(span, settings.detect)))]
    for first in range(0, len(spans), GROUP):
        yield source, spans[first : first + GROUP]


def score_clips(element: tuple[Source, list[scenes.Span]], settings: Settings) -> int:
    """Scores a group of a source's clips into the store; returns their number."""
    source, spans = element
    store = Store(settings.directory)
    found = store.read(source.key(settings.cuts))
    size, sound = (found["height"], found["width"]), score.read_sound(source.clip, found["frames"])
    for span in spans:
        key = source.clip_key(span, settings.detect)
        with _detector(settings.detect and not source.annotations) as detector:
            tools = score.Tools(detector, pathlib.Path(settings.voice_model))
            result = _guarded(lambda: score.score(source.clip, span, size, sound, tools), source.clip)  # noqa: B023
        if isinstance(result, score.Scored):
            store.write(key, *result)
        else:
            store.write(key, result, {})
    return len(spans)


def _guarded(work, clip: RawClip) -> Any:
    """The result, or {"problem": reason}: whatever a strange file does to a library is that file's row."""
    try:
        return work()
    except pose.DetectorError as error:  # not the file's fault
        return {"problem": str(error), "again": True}
    except UserError as error:
        text, again = str(error), {}
    except Exception as error:
        text, again = f"{clip.path}: {type(error).__name__}: {error}", {"again": True}
    for path in filter(None, (clip.path, clip.annotations)):  # results hold no paths of this machine
        text = text.replace(str(path), path.name)
    return {"problem": " ".join(text.split())} | again


class _Detector:
    """The detector of this process, started when first needed and again after it failed."""

    def __init__(self):
        self._lock, self._stack, self._running = threading.RLock(), contextlib.ExitStack(), None

    @contextlib.contextmanager
    def __call__(self, wanted: bool) -> Iterator[pose.PoseDetector | None]:
        if not wanted:
            yield None
            return
        with self._lock:  # one detector serves all threads
            if self._running is None:
                self._running = self._stack.enter_context(pose.PoseDetector())
            yield _Watched(self._running, self.stop)

    def stop(self) -> None:
        with self._lock:
            self._running = None
            self._stack.close()


class _Watched:
    """Stops the detector after an error, because it then waits for the rest of a clip."""

    def __init__(self, detector, stop):
        self._detector, self._stop = detector, stop

    def detect_people(self, *arguments):
        try:
            return self._detector.detect_people(*arguments)
        except BaseException:
            self._stop()
            raise


_detector = _Detector()
atexit.register(_detector.stop)


class _Worker(beam.DoFn):
    """Calls a function in a process whose OpenCV uses one thread: there are as many processes as cores."""

    def __init__(self, function, driver: int):
        self._function, self._driver = function, driver

    def setup(self):
        if self._driver != os.getpid():
            cv2.setNumThreads(1)
            _end_with(self._driver)

    def process(self, element):
        return self._function(element)


@functools.cache
def _end_with(driver: int) -> None:
    """Ends this process soon after the one that started the run, which Beam's workers would outlive; 0: never."""

    def watch() -> None:
        while pathlib.Path(f"/proc/{driver}").exists():
            time.sleep(2)
        os._exit(1)

    if driver and pathlib.Path("/proc/self").exists():
        threading.Thread(target=watch, daemon=True).start()


class FindScenes(beam.PTransform):
    """Sources -> (source, spans of clips that are not scored yet)."""

    def __init__(self, settings: Settings):
        super().__init__()
        self._settings = settings

    def expand(self, sources):
        find = functools.partial(find_scenes, settings=self._settings)
        return sources | "spread sources" >> beam.Reshuffle() | beam.ParDo(_Worker(find, self._settings.driver))


class ScoreClips(beam.PTransform):
    """(source, spans) -> the number of clips scored."""

    def __init__(self, settings: Settings):
        super().__init__()
        self._settings = settings

    def expand(self, groups):
        settings = self._settings
        return (
            groups
            | "spread clips" >> beam.Reshuffle()
            | beam.ParDo(_Worker(lambda g: [score_clips(g, settings)], settings.driver))
        )


def _local_runner() -> FnApiRunner:
    """Beam's own runner on this machine, whose processes log errors only."""
    info = beam_provision_api_pb2.ProvisionInfo(retrieval_token="unused-retrieval-token")
    info.pipeline_options.update({"default_sdk_harness_log_level": "ERROR"})
    return FnApiRunner(provision_info=ExtendedProvisionInfo(info))


def run(sources: Sequence[Source], settings: Settings, runner: str, workers: int, options: Sequence[str]) -> None:
    """Finds the scenes of the sources and scores their clips; what is in the store already is left out.

    Args:
      runner: name of a Beam runner; "" for `workers` processes on this machine.
      options: more options of Beam.

    Raises UserError if a worker did.
    """
    mode = "multi_processing" if workers > 1 else "in_memory"  # the latter ignores the number of workers
    local = [f"--direct_num_workers={workers}", f"--direct_running_mode={mode}"]
    chosen = PipelineOptions([*([] if runner else local), *options])
    try:
        with beam.Pipeline(runner or _local_runner(), options=chosen) as pipeline:
            created = pipeline | beam.Create(list(sources), reshuffle=False)
            _ = created | FindScenes(settings) | ScoreClips(settings)
    except Exception as error:
        text = f"UserError: {error}" if isinstance(error, UserError) else str(error)
        if found := _USER_ERROR.search(text):  # Beam gives the worker's traceback as text
            raise UserError(found[1]) from error
        raise
