"""Generates a clip of any length from a reference image and other conditions.

The latents of all segments are decoded as one causal stream, chunk by chunk, so there are no seams and memory does not
grow with the clip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from omnihuman_jax.errors import UserError
from omnihuman_jax.inference import images
from omnihuman_jax.inference.inputs import Inputs, active_row, check_given
from omnihuman_jax.inference.sampling import Progress, Settings, sample_latents
from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.functional import Network
from omnihuman_jax.models.vae.streaming import Tiling, decode_clip, encode_clip
from omnihuman_jax.models.vae.vae import VAE
from omnihuman_jax.pixels import to_model


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
      reference: uint8 (h, w, 3), any size; it is scaled to cover the output and centre-cropped.
      height, width: pixels, multiples of `pixel_multiple`.
      frames: pixel frames, at 25 fps.
      given: other conditions by name: the prompt's token states (L, Dt) for "text", speech features (F, Da) for
        "audio", keypoints in the output frame (F, K, 3) for "pose".
    """

    reference: np.ndarray
    height: int
    width: int
    frames: int
    given: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    seed: int = 0

    @property
    def active(self) -> np.ndarray:
        """The active conditions, bool (conditions,)."""
        return active_row({"reference", *self.given})


def check_request(model: ModelConfig, request: Request, multiple: int) -> None:
    """Raises UserError for a size that is no multiple (`pixel_multiple`), no frames, or what `check_given` refuses."""
    images.check_size(request.height, request.width, multiple)
    if request.frames < 1:
        raise UserError(f"frames={request.frames}; a clip needs at least one frame")
    check_given(model, request.given)


def pixel_multiple(model: ModelConfig, vae: VAE) -> int:
    """Pixels per token along a side; output sizes are multiples of it."""
    return vae.config.spatial_stride * model.patch_size[1]


def decode_latents(vae: VAE, latents: jax.Array, tiling: Tiling | None = None) -> np.ndarray:
    """Frames (B, F, height, width, 3) in [-1, 1] of normalised latents (B, T, H, W, C), as one causal stream.

    Raises UserError if the latents or the frames are not finite: there is nothing to show.
    """
    frames = decode_clip(vae, latents, tiling=tiling)
    for name, values in (("latents", latents), ("decoded frames", frames)):
        if not np.isfinite(values).all():
            raise UserError(
                f"the {name} hold NaN or infinity; use another checkpoint, or compute in float32 (model.dtype)"
            )
    return frames


def generate(
    network: Network,
    params: Any,
    vae: VAE,
    request: Request,
    settings: Settings,
    on_step: Progress | None = None,
    tiling: Tiling | None = None,
) -> np.ndarray:
    """Generates one clip: float32 frames (F, height, width, 3) in [-1, 1], F = `request.frames`.

    `vae` must be the one that made the training latents. Raises UserError as `check_request` and `decode_latents` do.
    """
    model = network.config
    check_request(model, request, pixel_multiple(model, vae))
    picture = to_model(images.cover(request.reference, request.height, request.width))
    reference = encode_clip(vae, picture[None, None], tiling=tiling)[0, 0]
    inputs = Inputs.of(model, [{**request.given, "reference": reference}])
    latents = sample_latents(
        network, params, inputs, settings, frames=request.frames, seeds=[request.seed], on_step=on_step
    )
    return decode_latents(vae, latents, tiling=tiling)[0, : request.frames]
