"""The conditions of OmniHuman-1 as one ordered table, and every rule about them, for training and inference.

A sample's conditions are one boolean row in the order of the table: weak to strong motion correlation (paper section
3.2). The training principles, stage ratios, dropping and inference rules are pure functions of that row. Records,
batches, the mixture, metrics, weight files, inference and the report all read the table. docs/extending.md adds one.
"""

import dataclasses
import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from omnihuman_jax import frames, regions
from omnihuman_jax.errors import UserError, nearest


class Kind(enum.Enum):
    """Array of a condition in a record -> in a batch."""

    TOKENS = "tokens"  # (n, *row), any n -> (length, *row), cut or zero-padded, and FIELD_mask (length,) bool
    IMAGE = "image"  # latents of single frames (R, H, W, C) -> one of them (H, W, C)
    TRACK = "track"  # one row per pixel frame (F, *row), (0, *row) if absent -> (4T + 2 * context, *row)


@dataclasses.dataclass(frozen=True)
class Condition:
    """One row of the table.

    Attributes:
      name: in ratios, in logs, in the stage table.
      kind: see `Kind`. An absent condition is all zeros in a batch, with a mask that is all false.
      field: its array in a batch.
      record: its array in a record of a data set.
      dtype: of that array.
      row: shape of one token or frame. A string is a key of the model's config: a size that data set and model share.
      length: key of the model's config: tokens of a batch (TOKENS).
      context: key of the model's config: pixel frames beyond each end of the window (TRACK); "" = none.
      selects: only records that have it can train it; otherwise every record can (principle 1).
      guided: classifier-free guidance drops it (paper section 3.3: audio and text).
      region: where in the picture it shows, see `omnihuman_jax.regions`; "" = everywhere.
      parameters: its parameters in the network, apart from those of its encoder (`models.dit.entries`).
    """

    name: str
    kind: Kind
    field: str
    record: str
    dtype: type = np.float16
    row: tuple[str | int, ...] = ()
    length: str = ""
    context: str = ""
    selects: bool = False
    guided: bool = False
    region: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[str, ...]:
        """Keys of the sizes that data set and model share."""
        return tuple(size for size in self.row if isinstance(size, str))

    @property
    def rank(self) -> int:
        """Dimensions of the array in a record."""
        return 4 if self.kind is Kind.IMAGE else 1 + len(self.row)

    def row_shape(self, sizes: Any) -> tuple[int, ...]:
        """Shape of one token or frame; `sizes` is a model config, or a mapping with the keys that `row` names."""
        return tuple(_setting(sizes, size) if isinstance(size, str) else size for size in self.row)

    def context_frames(self, model: Any) -> int:
        """Pixel frames beyond each end of a window."""
        return _setting(model, self.context) if self.context else 0

    def batch_fields(self, model: Any, window: tuple[int, int, int]) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape without the batch axis, dtype) of its arrays in a batch; `window` is latent (T, H, W)."""
        if self.kind is Kind.IMAGE:
            return {self.field: ((*window[1:], _setting(model, "latent_channels")), np.float32)}
        row = self.row_shape(model)
        if self.kind is Kind.TRACK:
            count = frames.STRIDE * window[0] + 2 * self.context_frames(model)
            return {self.field: ((count, *row), np.float32)}
        length = _setting(model, self.length)
        return {self.field: ((length, *row), np.float32), f"{self.field}_mask": ((length,), np.bool_)}


def _setting(config: Any, key: str) -> int:
    return config[key] if isinstance(config, Mapping) else getattr(config, key)


_TABLE: list[Condition] = [
    Condition("text", Kind.TOKENS, "text", "text", row=("text_dim",), length="text_len", guided=True,
              parameters=("null_text",)),
    Condition("reference", Kind.IMAGE, "reference", "references"),
    Condition("audio", Kind.TRACK, "audio", "audio", row=("audio_dim",), context="audio_context", selects=True,
              guided=True, region="mouth"),
    Condition("pose", Kind.TRACK, "keypoints", "keypoints", np.float32, ("num_keypoints", 3), selects=True,
              region="limbs"),
]  # fmt: skip

# Per-stage ratios (share of samples that keep the condition) of the two published recipes; see docs/architecture.md.
# "published" is the final version of the paper (progressively halved), "v2" the arXiv v2 text.
_STAGES: dict[str, dict[str, float]] = {
    "stage1": {"text": 0.9, "reference": 0.7},
    "stage2": {"text": 0.9, "reference": 0.7, "audio": 0.5},
    "stage3": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.25},
}
RECIPES = {"published": _STAGES, "v2": _STAGES | {"stage3": _STAGES["stage3"] | {"pose": 0.5}}}


def table() -> tuple[Condition, ...]:
    """All conditions, weak to strong."""
    return tuple(_TABLE)


def register(condition: Condition, *, after: str) -> None:
    """Adds a condition to the table, one place stronger than `after`. Call it before anything reads the table.

    Raises:
      UserError: the name is taken, or there is no condition `after` or no such region.
    """
    if condition.name in names():
        raise UserError(f"condition {condition.name!r} is already in the table; register another name")
    if condition.region:
        regions.index(condition.region)
    _TABLE.insert(index(after) + 1, condition)


def names() -> tuple[str, ...]:
    """Names of all conditions, weak to strong."""
    return tuple(condition.name for condition in _TABLE)


def selecting() -> tuple[str, ...]:
    """Names of the conditions that only some records have."""
    return tuple(condition.name for condition in _TABLE if condition.selects)


def guided() -> tuple[str, ...]:
    """Names of the conditions that classifier-free guidance drops."""
    return tuple(condition.name for condition in _TABLE if condition.guided)


def index(name: str) -> int:
    """Position of a condition in the table and in every row.

    Raises:
      UserError: there is no such condition.
    """
    if name not in names():
        raise UserError(f"unknown condition {name!r}{nearest(name, names())}")
    return names().index(name)


def get(name: str) -> Condition:
    """The condition with that name; raises as `index` does."""
    return _TABLE[index(name)]


def row(active: Iterable[str]) -> np.ndarray:
    """Boolean row [conditions] of some condition names."""
    wanted = {index(name) for name in active}
    return np.array([i in wanted for i in range(len(_TABLE))], bool)


def active_names(active: Sequence[bool] | np.ndarray) -> tuple[str, ...]:
    """Names of the active conditions of a boolean row, weak to strong."""
    return tuple(name for name, on in zip(names(), active, strict=True) if on)


def eligibility(has: Mapping[str, Any]) -> np.ndarray:
    """Conditions that a record can train, bool [conditions].

    Principle 1: a clip rejected for lip-sync or pose visibility still trains the weaker conditions.

    Args:
      has: condition name -> whether the record has it; only needed for conditions that select records.
    """
    return np.array([not c.selects or bool(has.get(c.name, False)) for c in _TABLE], bool)


def complete_ratios(ratios: Mapping[str, float]) -> dict[str, float]:
    """The ratios, with 0 for every condition that is missing."""
    return dict.fromkeys(names(), 0.0) | dict(ratios)


def check_ratios(ratios: Mapping[str, float], *, where: str, allow_inverted: bool = False) -> None:
    """Principle 2: the stronger the condition, the lower its ratio.

    A ratio of 0 means "not trained in this stage" and is not compared.

    Raises:
      UserError: unknown or missing condition, ratio outside 0..1, or (unless `allow_inverted`) a stronger condition
        with a higher ratio than a weaker one.
    """
    for name in ratios:
        if name not in names():
            raise UserError(f"{where}.{name}: unknown condition{nearest(name, names())}")
    for name in names():
        if name not in ratios:
            raise UserError(f"{where}.{name}: missing; every stage gives a ratio for {', '.join(names())}")
        value = ratios[name]
        if not (isinstance(value, int | float) and 0.0 <= value <= 1.0):
            raise UserError(f"{where}.{name}={value}: a ratio must lie between 0 and 1")
    if allow_inverted:
        return
    used = [name for name in names() if ratios[name] > 0]
    for weak, strong in zip(used, used[1:], strict=False):
        if ratios[strong] > ratios[weak]:
            raise UserError(
                f"{where}: {strong}={ratios[strong]} is above the weaker {weak}={ratios[weak]}, against principle 2 "
                f"(the stronger the condition, the lower its ratio); lower it, or set allow_inverted_ratios=true"
            )


def for_inference(given: Collection[str]) -> np.ndarray:
    """Active row [conditions] at inference (paper section 3.3).

    Turning a condition on turns on every weaker one, except that conditions that select records are on only if given:
    with pose alone, audio is off. Text is always on, if only with an empty caption.
    """
    strongest = max((index(name) for name in given), default=0)
    return np.array([c.name in given if c.selects else i <= strongest for i, c in enumerate(_TABLE)], bool)


def without(active: np.ndarray, *dropped: str) -> np.ndarray:
    """The active row(s) [..., conditions] with the named conditions switched off."""
    return np.asarray(active) & ~row(dropped)
