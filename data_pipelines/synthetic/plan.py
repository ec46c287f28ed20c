"""The content of each clip: a pure function of (seed, clip index), so that any worker can render any clip.

The split and the missing conditions follow fixed patterns of the index. So their shares hold for any number of clips,
and the first few clips contain every combination.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.synthetic.sentences import HELDOUT, TRAIN
from omnihuman_jax.errors import UserError

SIZES = ((96, 96), (128, 80), (80, 112))  # height, width in pixels
FRAMINGS = ("close-up", "head and shoulders", "half body", "full body")
# The first two show a mouth that can be read. Tall pictures show whole bodies more often, wide ones never: the face
# would be four pixels high.
FRAMING_SHARES = {
    (96, 96): (0.32, 0.40, 0.18, 0.10),
    (128, 80): (0.32, 0.38, 0.16, 0.14),
    (80, 112): (0.32, 0.42, 0.26, 0.0),
}
CALM_SHARE = 0.4
CALM = 0.25  # factor on the motion of a calm person's head and body
PAUSE_SHARE = 0.1  # of the speaking clips
PAUSES = ("begin", "end")
# Conditions of the n-th training clip, repeated: b both, a no audio, p no pose, n neither. 7 of 20 lack something.
PATTERN = "bapnbbbbabbpbbnabbbb"
CLIPS_PER_SPEAKER = {"train": 3, "heldout": 2}
STREAMS = {"clip": 1, "train": 2, "heldout": 3}  # first number of each random generator's key


@dataclasses.dataclass(frozen=True)
class ClipPlan:
    """A clip to render.

    Attributes:
      speaks: the mouth follows `sentence`.
      has_audio: the file contains the sound.
      sway: factor on the motion of head and body.
      pause: where a good part of the clip is silence before or after the sentence: "begin", "end", or "" for nowhere.
    """

    index: int
    split: str
    speaker: int
    sentence_id: str
    sentence: str
    speaks: bool
    has_audio: bool
    has_pose: bool
    height: int
    width: int
    framing: str
    sway: float
    pause: str

    @property
    def id(self) -> str:
        return f"{self.index:06d}"

    @property
    def speaker_id(self) -> str:
        return f"{self.split}-{self.speaker:05d}"


def is_heldout(index: int) -> bool:
    """Every eighth clip, and every second of the first eight: at least 4 of 8, about 12.5 % of many."""
    return index % 8 == 7 or (index < 8 and index % 2 == 1)


def _heldout_before(index: int) -> int:
    return index // 2 if index < 8 else 4 + (index - 8) // 8


def generator(seed: int, stream: str, number: int) -> np.random.Generator:
    """The random generator of one clip or speaker."""
    return np.random.default_rng([seed, STREAMS[stream], number])


def plan(seed: int, index: int, size: tuple[int, int] | None = None, can_speak: bool = True) -> ClipPlan:
    """The plan of clip `index`.

    Args:
      size: height and width of every clip, or None for the mixture.
      can_speak: False without speech synthesis; then nobody speaks.
    """
    rng = generator(seed, "clip", index)
    heldout = is_heldout(index)
    split = "heldout" if heldout else "train"
    ordinal = _heldout_before(index) if heldout else index - _heldout_before(index)
    has = "b" if heldout else PATTERN[ordinal % len(PATTERN)]
    sentences = HELDOUT if heldout else TRAIN
    number = int(rng.integers(len(sentences)))
    # In half of the clips without sound people speak inaudibly, in the others they are silent.
    speaks = can_speak and (has in "bp" or rng.random() < 0.5)
    # Held-out clips are every eighth index, so a size pattern of the index alone would give them all the same size.
    mixture = SIZES[(ordinal if heldout else index + ordinal) % 3] if size is None else size
    shares = FRAMING_SHARES.get(mixture, FRAMING_SHARES[(96, 96)])
    framing = FRAMINGS[int(rng.choice(4, p=shares))]
    sway = CALM if rng.random() < CALM_SHARE else 1.0
    pause = PAUSES[int(2 * rng.random())] if rng.random() < PAUSE_SHARE else ""
    return ClipPlan(
        index=index,
        split=split,
        speaker=ordinal // CLIPS_PER_SPEAKER[split],
        sentence_id=f"{split}-{number:04d}" if speaks else "",
        sentence=sentences[number] if speaks else "",
        speaks=speaks,
        has_audio=speaks and has in "bp",
        has_pose=has in "ba",
        height=mixture[0],
        width=mixture[1],
        framing=framing,
        sway=sway,
        pause=pause if speaks else "",
    )


def parse_size(text: str) -> tuple[int, int] | None:
    """ "mix" -> None, "96x96" -> (96, 96), height first.

    Raises:
      UserError: malformed, or not a multiple of 16 between 48 and 1024.
    """
    if text == "mix":
        return None
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise UserError(f"--size={text}: not a size; give mix or HEIGHTxWIDTH, as 96x96")
    height, width = (int(part) for part in parts)
    for value in (height, width):
        if value % 16 or not 48 <= value <= 1024:
            raise UserError(f"--size={text}: {value} is not a multiple of 16 between 48 and 1024")
    return height, width
