"""What goes through the graph: sources, settings, and the keys of their results in the store."""

from __future__ import annotations

import dataclasses
from typing import Any

from data_pipelines.curate import scenes, score, voice
from data_pipelines.curate.store import key_of
from data_pipelines.encoders import pose
from data_pipelines.raw.manifest import RawClip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the steps need besides their elements.

    Attributes:
      directory: of the store.
      cuts: the section of the config.
      detect: whether to detect people.
      voice_model: ONNX file of the voice activity.
      driver: id of the process on this machine with which the workers are to end; 0 for workers elsewhere.
    """

    directory: str
    cuts: dict[str, Any]
    detect: bool
    voice_model: str
    driver: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A raw clip and the digests of its file and its annotations."""

    clip: RawClip
    digest: str
    annotations: str = ""

    def key(self, cuts: dict[str, Any]) -> str:
        """Of its shots in the store."""
        setting = [cuts["detector"], cuts[f"{cuts['detector']}_threshold"]]
        return key_of("scenes", scenes.VERSION, *self._content(), setting)

    def clip_key(self, span: scenes.Span, detect: bool) -> str:
        """Of one of its clips in the store."""
        detector = "annotations" if self.annotations else pose.NAME if detect else "none"
        place = [span.first, span.last, span.box and list(span.box)]
        return key_of("score", score.VERSION, *self._content(), self.annotations, detector, voice.NAME, place)

    def _content(self) -> list[Any]:
        return [self.digest, self.clip.start, self.clip.end, self.clip.crop and list(self.clip.crop)]


def is_final(result: dict[str, Any] | None) -> bool:
    """Whether a result need not be made (again); one that failed for no fault of the file is tried in every run."""
    return result is not None and not result.get("again")
