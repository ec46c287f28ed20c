"""Which clip shows what: a pure function of (seed, clip index), so that any worker can make any clip.

Splits and the conditions that a clip lacks follow fixed patterns of the index, so the shares hold for every number of
clips and every combination occurs among the first clips already.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.synthetic.sentences import HELDOUT, TRAIN
from omnihuman_jax.errors import UserError

SIZES = ((96, 96), (128, 80), (80, 112))  # height, width in pixels
FRAMINGS = ("close-up", "head and shoulders", "half body", "full body")
# Upright pictures show whole bodies more often, wide ones never: the face would be four pixels high.
FRAMING_SHARES = {
    (96, 96): (0.27, 0.37, 0.23, 0.13),
    (128, 80): (0.27, 0.35, 0.20, 0.18),
    (80, 112): (0.27, 0.40, 0.33, 0.0),
}
# What the n-th training clip gives, repeated: b both, a no audio, p no pose, n neither. 7 of 20 lack something.
GIVES = "bapnbbbbabbpbbnabbbb"
CLIPS_PER_SPEAKER = {"train": 3, "heldout": 2}
STREAMS = {"clip": 1, "train": 2, "heldout": 3}  # first number of each random generator's key


@dataclasses.dataclass(frozen=True)
class ClipPlan:
    """One clip before it is rendered. `speaks`: the mouth follows `sentence`; has_audio: the sound is in the file."""

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
    """The random numbers of one clip or of one speaker."""
    return np.random.default_rng([seed, STREAMS[stream], number])


def plan(seed: int, index: int, size: tuple[int, int] | None = None, can_speak: bool = True) -> ClipPlan:
    """The plan of clip `index`.

    Args:
      size: height and width of every clip, or None for the mixture.
      can_speak: False where no speech synthesis is to be had; then nobody speaks.
    """
    rng = generator(seed, "clip", index)
    heldout = is_heldout(index)
    split = "heldout" if heldout else "train"
    ordinal = _heldout_before(index) if heldout else index - _heldout_before(index)
    gives = "b" if heldout else GIVES[ordinal % len(GIVES)]
    sentences = HELDOUT if heldout else TRAIN
    number = int(rng.integers(len(sentences)))
    # Clips without sound show silent talkers and people who do not speak, half each.
    speaks = can_speak and (gives in "bp" or rng.random() < 0.5)
    # Held-out clips fall on every eighth index: a pattern of the index alone would give them one size only.
    mixture = SIZES[(ordinal if heldout else index + ordinal) % 3] if size is None else size
    shares = FRAMING_SHARES.get(mixture, FRAMING_SHARES[(96, 96)])
    framing = FRAMINGS[int(rng.choice(4, p=shares))]
    return ClipPlan(
        index=index,
        split=split,
        speaker=ordinal // CLIPS_PER_SPEAKER[split],
        sentence_id=f"{split}-{number:02d}" if speaks else "",
        sentence=sentences[number] if speaks else "",
        speaks=speaks,
        has_audio=speaks and gives in "bp",
        has_pose=gives in "ba",
        height=mixture[0],
        width=mixture[1],
        framing=framing,
    )


def parse_size(text: str) -> tuple[int, int] | None:
    """ "mix" -> None, "96x96" -> (96, 96), height first.

    Raises:
      UserError: not of that form, or not a multiple of 16 between 48 and 1024.
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
