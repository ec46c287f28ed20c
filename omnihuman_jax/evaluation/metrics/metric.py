"""What a metric is: a question about held-out clips, the frames that answer it, and a number per clip.

A metric compares frames from several sources with the truth of the clip. If the model follows a condition, the number
is good for a clip generated with the right one and bad for the wrong one. The other sources show how good or bad it can
get.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from omnihuman_jax import conditions
from omnihuman_jax.evaluation.probe import Probe, Reading

MIN_FACE = 18.0  # pixels from eyes to chin; the probe misreads the mouth of a smaller face


@dataclasses.dataclass(frozen=True)
class HeldOutClip:
    """One held-out rendered clip, cut to the F frames that are generated.

    Attributes:
      record: the whole record of the data set.
      index: of the record in the data set.
      frames: uint8 (F,height,width,3), decoded from the clip's mp4.
      reference: uint8 (height,width,3), the picture that the reference latent encodes.
      reading: the probe's reading of `frames`.
    """

    record: Mapping[str, Any]
    index: int
    frames: np.ndarray
    reference: np.ndarray
    reading: Reading

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frames.shape[1:3]

    def track(self, field: str) -> np.ndarray:
        """A record field with one row per pixel frame, cut to the F frames."""
        return self.record[field][: len(self.frames)]


@dataclasses.dataclass(frozen=True)
class Generated:
    """Frames generated with the clip's own text, reference and audio, unless another clip supplies one of them.

    Attributes:
      also: an additional condition; "" for none.
      foreign: the condition that another clip supplies; "" for none.
      differs_in: the record field in which the other clip must differ from this one.
      silent: the audio is silence.
    """

    also: str = ""
    foreign: str = ""
    differs_in: str = ""
    silent: bool = False

    def __post_init__(self):
        if bool(self.foreign) != bool(self.differs_in) or not {self.also, self.foreign} <= {"", *conditions.names()}:
            raise ValueError(f"{self}: also and foreign are names of conditions, and foreign comes with differs_in")


class Limit(enum.Enum):
    """Frames that no model generates."""

    REAL = "real frames"
    RECONSTRUCTION = "real frames through the VAE"
    STILL = "the reference picture, held still"
    OTHER_PICTURE = "another person's reference picture, held still"


Source = Generated | Limit


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a metric's table. The gap of a metric is between the rows named "right" and "wrong"."""

    name: str
    label: str
    source: Source


@dataclasses.dataclass(frozen=True)
class Eligibility:
    """Which clips a metric can use. `text` completes "only 1 held-out clips …"."""

    text: str
    test: Callable[[HeldOutClip], bool]


@dataclasses.dataclass(frozen=True)
class Sample:
    """The frames of one clip from one source.

    Attributes:
      clip: the clip, with the truth.
      frames: uint8 (F,height,width,3).
      reading: the probe's reading of `frames`.
      reference: the probe's reading of the clip's reference picture (one frame).
      probe: the probe.
    """

    clip: HeldOutClip
    frames: np.ndarray
    reading: Reading
    reference: Reading
    probe: Probe


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric, for the evaluation and the report.

    Attributes:
      name: key in results and in `--metrics`.
      title: the question it answers.
      explanation: how it is computed and what it means, in full sentences.
      unit: of its values.
      better: which direction is better.
      eligibility: which clips it can use.
      rows: of its table, in order.
      measure: the value of one sample; NaN leaves the clip out of that row.
      attributes: names of the probe's attributes that it compares, for the report; None if it compares none.
    """

    name: str
    title: str
    explanation: str
    unit: str
    better: Literal["higher", "lower"]
    eligibility: Eligibility
    rows: tuple[Row, ...]
    measure: Callable[[Sample], float]
    attributes: Callable[[Probe], list[str]] | None = None


def _talks(clip: HeldOutClip) -> bool:
    return len(clip.record["audio"]) > 0 and len(clip.record["mouth"]) > 0 and clip.reading.face >= MIN_FACE


TALKING = Eligibility("of one size show a talking face", _talks)

REAL = Row("real", "real frames (limit of the probe)", Limit.REAL)
RECONSTRUCTION = Row("reconstruction", "real frames through the VAE", Limit.RECONSTRUCTION)
# Shared by the metrics that judge the reference.
REFERENCE_ROWS = (
    Row("right", "right reference", Generated()),
    Row("wrong", "another person's reference", Generated(foreign="reference", differs_in="speaker")),
    REAL,
    RECONSTRUCTION,
    Row("other person", "the other person's picture itself", Limit.OTHER_PICTURE),
)
