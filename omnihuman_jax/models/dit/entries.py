"""How each condition enters the network: the model's side of the table in `omnihuman_jax.conditions`."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Protocol

import jax
from flax import nnx

from omnihuman_jax import conditions
from omnihuman_jax.models.dit.audio import AudioAdapter
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.pose import PoseGuider


class Way(enum.Enum):
    """Ways into the network. What an encoder returns for values (B, ...) and present (B,) bool:

    TEXT: no encoder; the token states of the text stream (`models.dit.text`).
    TOKENS: `Tokens` beside the video in every attention, clean (modulated at t = 0). Without an encoder the values are
      latents (B, H, W, C), which share the video's own patch embedding.
    CROSS_ATTENTION: `Tokens` with their latent frame (in patches) as position t; every block has a frame-wise
      cross-attention to them.
    CHANNELS: (B, T, rows, columns, channels), called with rows and columns too; stacked on the noisy latents.
    ADDITION: (B, T / patch, hidden), added to all video tokens of the latent frame.
    """

    TEXT = "text stream"
    TOKENS = "tokens beside the video"
    CROSS_ATTENTION = "frame-wise cross-attention"
    CHANNELS = "channels on the noisy latents"
    ADDITION = "addition to the video tokens"


class Encoder(Protocol):
    """An `nnx.Module` made of (config, *, rngs). Absent samples must not depend on the values, and add nothing."""

    def __call__(self, values: jax.Array, present: jax.Array, *grid: int) -> object: ...

    @staticmethod
    def flops(config: ModelConfig, frames: int, rows: int, columns: int) -> int:
        """Forward FLOPs of one sample of a window (T, H, W) of latents."""

    @staticmethod
    def width(config: ModelConfig) -> int:
        """CHANNELS: channels; CROSS_ATTENTION: tokens of a latent frame. Others need not have it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """The way of a condition into the network and the module that encodes it."""

    way: Way
    encoder: Callable[..., nnx.Module] | None = None


_ENTRIES: dict[str, Entry] = {
    "text": Entry(Way.TEXT),
    "reference": Entry(Way.TOKENS),
    "audio": Entry(Way.CROSS_ATTENTION, AudioAdapter),
    "pose": Entry(Way.CHANNELS, PoseGuider),
}


def register(name: str, entry: Entry) -> None:
    """Says how a registered condition enters."""
    _ENTRIES[name] = entry


def entering(way: Way, *, encoded: bool = True) -> dict[str, Entry]:
    """Condition name -> entry, weak to strong, of those that enter this way (and have an encoder).

    Raises:
      KeyError: a condition of the table has no entry.
    """
    return {
        name: _ENTRIES[name]
        for name in conditions.names()
        if _ENTRIES[name].way is way and (_ENTRIES[name].encoder is not None or not encoded)
    }


def condition_modules() -> frozenset[str]:
    """Names in the parameter tree that belong to conditions, not to the base network."""
    modules: set[str] = set()
    for condition in conditions.table():
        modules |= set(condition.parameters)
        if _ENTRIES[condition.name].encoder is not None:
            modules |= {condition.name, f"{condition.name}_embed"}
    return frozenset(modules)
