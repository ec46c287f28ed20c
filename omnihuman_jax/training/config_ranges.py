"""Valid range of every number in a config: one table, checked before compilation."""

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from omnihuman_jax.errors import UserError


class Range(NamedTuple):
    """Finite numbers that are valid for a key.

    Attributes:
      words: description for error messages.
      holds: whether a finite number is in the range.
      whole: whether it must be a whole number.
    """

    words: str
    holds: Callable[[float], bool]
    whole: bool = False

    def has(self, value: Any) -> bool:
        """Whether a value of any type is in the range."""
        kind = int if self.whole else int | float
        return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and self.holds(value)


COUNT = Range("a whole number of at least 1", lambda x: x >= 1, whole=True)
COUNT_OR_NONE = Range("a whole number of at least 0", lambda x: x >= 0, whole=True)
AXIS = Range("a whole number of at least 1, or -1 for the rest", lambda x: x >= 1 or x == -1, whole=True)
POSITIVE = Range("a finite number above 0", lambda x: x > 0)
NOT_NEGATIVE = Range("a finite number of at least 0", lambda x: x >= 0)
SHARE = Range("a number from 0 to 1", lambda x: 0 <= x <= 1)
PART = Range("a number above 0 and at most 1", lambda x: 0 < x <= 1)
DECAY = Range("a number of at least 0 and below 1", lambda x: 0 <= x < 1)
FINITE = Range("a finite number", lambda x: True)
# Sample videos use this seed and the next ones, and JAX truncates seeds to 32 bits.
SEED = Range(f"a whole number from 0 to {2**32 - 4}", lambda x: 0 <= x <= 2**32 - 4, whole=True)

# (section, range, keys): fnmatch patterns of dotted keys, with tuple elements numbered. The first match applies.
RANGES = (
    ("", SEED, "seed"),
    ("", COUNT, "global_batch_size steps log_every"),
    ("", COUNT_OR_NONE, "simulated_devices"),
    ("", DECAY, "ema_decay"),
    ("mesh.", AXIS, "data fsdp sequence tensor"),
    ("model.", COUNT, "latent_channels patch_size.* hidden_size num_heads mlp_hidden text_dim text_len"),
    ("model.", COUNT, "audio_dim audio_tokens audio_hidden num_keypoints pose_channels pose_widths.* pose_scale"),
    ("model.", COUNT_OR_NONE, "head_dim num_dual_blocks num_single_blocks num_decoder_blocks rope_axes.*"),
    ("model.", COUNT_OR_NONE, "text_refiner_depth motion_frames audio_context"),
    ("model.", COUNT_OR_NONE, "pooled_text_dim text2_dim first_frame_channels image_embed_dim"),
    ("model.", POSITIVE, "norm_eps rope_theta pose_sigma"),
    ("model.", NOT_NEGATIVE, "guidance_default"),
    ("model.", FINITE, "reference_time_slot"),
    ("vae.", COUNT, "dim dim_mult.* num_res_blocks z_dim patch_size"),
    ("vae.", COUNT_OR_NONE, "linear_context"),
    ("data.", COUNT, "latent_frames short_side"),
    ("data.", COUNT_OR_NONE, "cache_mb"),
    ("data.", SHARE, "drop_* heldout"),
    ("data.", PART, "min_scale"),
    ("data.", NOT_NEGATIVE, "buckets.*.4"),  # the share of the steps
    ("data.", COUNT, "buckets.*"),
    ("stages.*.", COUNT_OR_NONE, "steps warmup_steps latent_frames"),
    ("stages.*.", POSITIVE, "learning_rate time_std"),
    ("stages.*.", FINITE, "time_mean"),
    ("stages.*.", SHARE, "ratios.* motion_ratio"),
    ("optimizer.", DECAY, "b1 b2"),
    ("optimizer.", POSITIVE, "learning_rate eps clip"),
    ("optimizer.", NOT_NEGATIVE, "weight_decay muon_learning_rate"),
    ("optimizer.", COUNT_OR_NONE, "warmup_steps"),
    ("optimizer.", COUNT, "accumulate"),
    ("diffusion.", NOT_NEGATIVE, "shift"),
    ("loss.", NOT_NEGATIVE, "edge kl lpips_weight latent_noise"),
    ("loss.", COUNT, "scales"),
    ("adversarial.", NOT_NEGATIVE, "weight"),
    ("adversarial.", COUNT_OR_NONE, "start_step"),
    ("adversarial.", POSITIVE, "learning_rate"),
    ("adversarial.", COUNT, "width"),
    ("checkpoint.", COUNT, "every keep"),
    ("checkpoint.", COUNT_OR_NONE, "keep_every"),
    ("faults.", COUNT, "max_bad_steps"),
    ("faults.", NOT_NEGATIVE, "watchdog_seconds"),
    ("evaluation.", COUNT_OR_NONE, "every gain_every"),
    ("evaluation.", COUNT, "batches frames height width clips"),
    ("guidance.", NOT_NEGATIVE, "scale final_scale"),
    ("sample.", COUNT, "steps count"),
    ("plan.", COUNT_OR_NONE, "buckets.*.0"),  # latent frames; 0 = the stage's
    ("plan.", COUNT, "buckets.*"),
    ("output.", COUNT, "statistics_clips"),
    ("output.", SHARE, "spectrum"),
)
# Differences for experiments.train_vae: it always evaluates.
VAE_RANGES = (("evaluation.", COUNT, "every"), *RANGES)


def range_of(key: str, ranges: Sequence[tuple[str, Range, str]] = RANGES) -> Range | None:
    """The range of a dotted key; None if the table has no entry."""
    for section, allowed, keys in ranges:
        if any(fnmatch.fnmatchcase(key, section + pattern) for pattern in keys.split()):
            return allowed
    return None


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a config; elements of tuples and lists are numbered from 0."""
    if isinstance(tree, ConfigDict):
        items = tree.items()
    elif isinstance(tree, tuple | list):
        items = enumerate(tree)
    else:
        yield key, tree
        return
    for name, value in items:
        yield from leaves(value, f"{key}.{name}" if key else str(name))


def check(config: ConfigDict, ranges: Sequence[tuple[str, Range, str]] = RANGES) -> None:
    """Checks every number of a resolved config that is listed in the table.

    Raises:
      UserError: the first value out of range, with its key and the valid range.
    """
    for key, value in leaves(config):
        allowed = range_of(key, ranges)
        if allowed is not None and not allowed.has(value):
            name = re.sub(r"\.(\d+)", r"[\1]", key)
            raise UserError(f"{name}={value}: must be {allowed.words}")
