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
    TOKENS: clean `Tokens` (modulated at t = 0) that join the video in every attention. Without an encoder the values
      are latents (B, H, W, C), which use the video's patch embedding.
    CROSS_ATTENTION: `Tokens` whose position t is their latent frame, in patches; every block has a frame-wise
      cross-attention to them.
    CHANNELS: (B, T, rows, columns, channels), stacked on the noisy latents; also called with rows and columns.
    ADDITION: (B, T / patch, hidden), added to all video tokens of the latent frame.
    """

    TEXT = "text stream"
    TOKENS = "tokens joining the video"
    CROSS_ATTENTION = "frame-wise cross-attention"
    CHANNELS = "channels on the noisy latents"
    ADDITION = "addition to the video tokens"


class Encoder(Protocol):
    """An `nnx.Module` built from (config, *, rngs). For absent samples it must ignore the values and add nothing."""

    def __call__(self, values: jax.Array, present: jax.Array, *grid: int) -> object: ...

    @staticmethod
    def flops(config: ModelConfig, frames: int, rows: int, columns: int) -> int:
        """Forward FLOPs of one sample of a window (T, H, W) of latents."""

    @staticmethod
    def width(config: ModelConfig) -> int:
        """CHANNELS: channels; CROSS_ATTENTION: tokens per latent frame. Not needed for other ways."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a condition enters the network, and the module that encodes it."""

    way: Way
    encoder: Callable[..., nnx.Module] | None = None


_ENTRIES: dict[str, Entry] = {
    "text": Entry(Way.TEXT),
    "reference": Entry(Way.TOKENS),
    "audio": Entry(Way.CROSS_ATTENTION, AudioAdapter),
    "pose": Entry(Way.CHANNELS, PoseGuider),
}


def register(name: str, entry: Entry) -> None:
    """Sets how a registered condition enters."""
    _ENTRIES[name] = entry


def entering(way: Way, *, encoded: bool = True) -> dict[str, Entry]:
    """Condition name -> entry, weak to strong, of those that enter this way (and, if `encoded`, have an encoder).

    Raises:
      KeyError: a condition of the table has no entry.
    """
    return {
        name: _ENTRIES[name]
        for name in conditions.names()
        if _ENTRIES[name].way is way and (_ENTRIES[name].encoder is not None or not encoded)
    }


def module_conditions() -> dict[str, str]:
    """Name in the parameter tree -> the condition that it belongs to; all others are of the base network."""
    modules: dict[str, str] = {}
    for condition in conditions.table():
        modules |= dict.fromkeys(condition.parameters, condition.name)
        if _ENTRIES[condition.name].encoder is not None:
            modules |= {condition.name: condition.name, f"{condition.name}_embed": condition.name}
    return modules
