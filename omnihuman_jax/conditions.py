"""The conditions of OmniHuman-1 as one ordered table, and every rule about them, for training and inference alike.

A sample's conditions are one boolean row in the order of the table (weak to strong motion correlation, paper section
3.2). The two training principles, the stage ratios, dropping and the inference rules are pure functions of it. All that
lists conditions reads the table: records, batches, mixture, metrics, weight files, inference and the report.
docs/extending.md adds one.
"""

import dataclasses
import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from omnihuman_jax import frames
from omnihuman_jax.errors import UserError, nearest


class Kind(enum.Enum):
    """What a record holds of a condition, and what a batch gets from it."""

    TOKENS = "tokens"  # (n, *row), any n -> (length, *row), cut or padded with zeros, and FIELD_mask (length,) bool
    IMAGE = "image"  # latents of single frames (R, H, W, C) -> one of them (H, W, C)
    TRACK = "track"  # a row a pixel frame (F, *row); (0, *row) where absent -> (4T + 2 * context, *row)


@dataclasses.dataclass(frozen=True)
class Condition:
    """One row of the table.

    Attributes:
      name: of the condition: in ratios, in logs, in the stage table.
      kind: see `Kind`. An absent one is all zeros in a batch (and a mask that is all false).
      field: its array in a batch.
      record: its array in a record of a data set.
      dtype: of that array.
      row: shape of one token or frame. A string is a key of the model's config, and a size that data set and model have
        to agree on.
      length: key of the model's config: tokens of a batch (TOKENS).
      context: key of the model's config: pixel frames beyond each end of the window (TRACK); "" = none.
      selects: only records that have it can take part; else every record can (principle 1).
      guided: classifier-free guidance drops it (paper section 3.3: audio and text).
      parameters: parameters of the network that belong to it beside those of its encoder (`models.dit.entries`).
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
    parameters: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[str, ...]:
        """Keys of the sizes that data set and model have to agree on."""
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
        """Name -> (shape without the batch axis, dtype) of its arrays in a batch.

        Args:
          model: the model's config.
          window: latent frames T, rows H and columns W.
        """
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
              guided=True),
    Condition("pose", Kind.TRACK, "keypoints", "keypoints", np.float32, ("num_keypoints", 3), selects=True),
]  # fmt: skip

# Per-stage ratios (share of samples that keep the condition) of the two published recipes; see docs/architecture.md.
# "published" is the final version of the paper (progressively halved), "v2" the arXiv v2 text.
RECIPES: dict[str, dict[str, dict[str, float]]] = {
    "published": {
        "stage1": {"text": 0.9, "reference": 0.7},
        "stage2": {"text": 0.9, "reference": 0.7, "audio": 0.5},
        "stage3": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.25},
    },
    "v2": {
        "stage1": {"text": 0.9, "reference": 0.7},
        "stage2": {"text": 0.9, "reference": 0.7, "audio": 0.5},
        "stage3": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.5},
    },
}


def table() -> tuple[Condition, ...]:
    """All conditions, weak to strong."""
    return tuple(_TABLE)


def register(condition: Condition, *, after: str) -> None:
    """Adds a condition to the table, one place stronger than `after`; before anything else reads the table.

    Raises:
      UserError: the name is taken, or there is no condition `after`.
    """
    if condition.name in names():
        raise UserError(f"condition {condition.name!r} is in the table already; register another name")
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
    """The condition of that name; errors as `index`."""
    return _TABLE[index(name)]


def row(active: Iterable[str]) -> np.ndarray:
    """Boolean row [conditions] for a collection of condition names."""
    wanted = {index(name) for name in active}
    return np.array([i in wanted for i in range(len(_TABLE))], bool)


def active_names(active: Sequence[bool] | np.ndarray) -> tuple[str, ...]:
    """Names of the active conditions of a boolean row, weak to strong."""
    return tuple(name for name, on in zip(names(), active, strict=True) if on)


def eligibility(has: Mapping[str, Any]) -> np.ndarray:
    """Conditions that a record can take part in, bool [conditions].

    Principle 1: a clip rejected for lip-sync or pose visibility still trains the weaker conditions.

    Args:
      has: condition name -> whether the record has it, for those that select records; others may be left out.
    """
    return np.array([not c.selects or bool(has.get(c.name, False)) for c in _TABLE], bool)


def complete_ratios(ratios: Mapping[str, float]) -> dict[str, float]:
    """The ratios with 0 for every condition that is left out."""
    return dict.fromkeys(names(), 0.0) | dict(ratios)


def check_ratios(ratios: Mapping[str, float], *, where: str, allow_inverted: bool = False) -> None:
    """Principle 2: the stronger the condition, the lower its ratio.

    A ratio of 0 means "not trained in this stage" and takes no part in the comparison.

    Raises:
      UserError: unknown or missing condition, ratio outside 0..1, or a stronger condition with a higher ratio than a
        weaker one while `allow_inverted` is false.
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

    Turning a condition on turns on every weaker one, but for those that select records, which are on where they are
    given: when pose alone drives, audio is off. Text is always on: an empty caption is one.
    """
    strongest = max((index(name) for name in given), default=0)
    return np.array([c.name in given if c.selects else i <= strongest for i, c in enumerate(_TABLE)], bool)


def without(active: np.ndarray, *dropped: str) -> np.ndarray:
    """The active row(s) [..., conditions] with the named conditions switched off: one pass of guidance."""
    return np.asarray(active) & ~row(dropped)
