"""Configuration of the multi-modal diffusion transformer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.frames import STRIDE
from omnihuman_jax.sharding.mesh import SEQUENCE_ATTENTION

CHOICES = {
    "mlp_activation": ("gelu_tanh", "swiglu"),
    "qk_norm": ("rms", "none"),
    "text_embed": ("linear", "mlp"),
    "attention": ("xla", "splash", "flash"),
    "sequence_attention": SEQUENCE_ATTENTION,
    "remat": ("none", "full", "dots", "attention"),
    "param_dtype": ("float32", "bfloat16"),
    "dtype": ("float32", "bfloat16"),
}

# Inputs of open bases that no data set here holds: the setting that adds one -> what it is in the original, and what it
# is here. Its weights are loaded and exported.
BASE_ONLY_INPUTS = {
    "pooled_text_dim": "HunyuanVideo: CLIP's pooled vector of the prompt; here zero",
    "guidance_embed": "HunyuanVideo: the scale of its distilled guidance; here always `guidance_default`",
    "text2_dim": "HunyuanVideo-1.5: Glyph-ByT5 states of the words to be written in the picture; here absent",
    "image_embed_dim": "Motif-Video, HunyuanVideo-1.5: an image encoder's states of the first frame; here absent",
    "first_frame_channels": "Motif-Video, HunyuanVideo-1.5: the first frame's latents and a mask; here zero",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of `OmniHuman`; the defaults are demo-sized.

    Attributes:
      family: the network class, a name of `models.registry`.
      latent_channels: channels C of the VAE latents, in and out.
      patch_size: latent (frames, rows, columns) of one token.
      hidden_size: width of the residual streams.
      num_heads: attention heads.
      head_dim: head size D; 0 means hidden_size / num_heads.
      num_dual_blocks: dual-stream blocks (separate visual and text weights), which run first.
      num_single_blocks: single-stream blocks (parallel attention and MLP), which run next.
      num_decoder_blocks: single-stream blocks of the decoder tail (Motif-Video). They start from the embedded visual
        tokens; the output of the earlier blocks takes the place of text.
      mlp_hidden: inner width of the MLPs.
      mlp_activation: "gelu_tanh" or "swiglu" (which adds a gate projection).
      qk_norm: "rms" (per head) or "none".
      norm_eps: epsilon of every norm.
      qkv_bias: bias on the query, key and value projections.
      rope_axes: head dimensions rotated by (t, h, w), summing to head_dim; () derives them (1/8, 7/16, 7/16).
      rope_theta: base of the RoPE frequencies.
      rope_on_text: rotate text tokens too (token l at (l, l, l)).
      text_dim: width of the text encoder's token states.
      text_len: text tokens L.
      text_embed: "linear" or "mlp" projection of the text states.
      text_refiner_depth: blocks of the HunyuanVideo token refiner (0: none).
      pooled_text_dim: width of a pooled text vector added to the modulation (0: none).
      pooled_required: False lets a caller omit the pooled vector, which is then zero.
      guidance_embed: add an embedded guidance scale to the modulation (guidance-distilled bases).
      guidance_default: guidance scale if the caller gives none; 0: the caller must give it.
      text_cross_attention_dual, text_cross_attention_single: a separate cross-attention from visual to text tokens in
        the dual or the single blocks (Motif-Video); never in the decoder tail.
      text2_dim: width of a second text encoder's states in the batch's `text2`, which join the text tokens
        (HunyuanVideo-1.5; 0: none).
      first_frame_channels: channels stacked on the noisy latents from the batch's `first_frame`: the first frame's
        latents and a mask (Motif-Video, HunyuanVideo-1.5). If absent they are zero, which is text-to-video.
      image_embed_dim: width of the image encoder's states in the batch's `image`, which join the text tokens (0: none).
      token_kinds: add a learned embedding to text, second-text and image tokens; a sample whose image states are all
        zero then has no image (HunyuanVideo-1.5).
      reference_time_slot: RoPE time of the reference tokens (0: the paper's zeroed temporal component).
      motion_frames: clean latent frames M ahead of the noisy ones.
      audio_dim: width of the audio features per 25 fps frame.
      audio_context: pixel frames of audio on each side of a latent frame's own four.
      audio_tokens: audio tokens A per latent frame.
      audio_hidden: width inside the audio adapter.
      num_keypoints: keypoints K.
      pose_channels: pose channels stacked on the noisy latents.
      pose_widths: channels of the pose guider's convolutions.
      pose_scale: heatmap resolution over latent resolution, a power of two.
      pose_sigma: standard deviation of a keypoint's Gaussian, in heatmap cells.
      attention: "xla" (any device), "flash" (our TPU kernels) or "splash" (JAX's TPU kernel).
      sequence_attention: what the sequence axis of a mesh divides in self-attention: "ulysses" = heads, "all_gather" =
        queries. A config sets it as `mesh.sequence_attention`.
      remat: what a block saves for its backward pass: "none" = everything (no rematerialisation), "full" = nothing,
        "dots" = matmul outputs without batch dimensions, "attention" = attention outputs only.
      scan_blocks: run equal blocks in one `lax.scan` (faster to compile) or unrolled.
      param_dtype: dtype of the parameters.
      dtype: dtype of matmuls and activations; norms, RoPE, softmax and modulation are always float32.
    """

    family: str = "mmdit"
    latent_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hidden_size: int = 256
    num_heads: int = 4
    head_dim: int = 0
    num_dual_blocks: int = 2
    num_single_blocks: int = 4
    num_decoder_blocks: int = 0
    mlp_hidden: int = 1024
    mlp_activation: str = "gelu_tanh"
    qk_norm: str = "rms"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    rope_axes: tuple[int, ...] = ()
    rope_theta: float = 256.0
    rope_on_text: bool = False
    text_dim: int = 384
    text_len: int = 32
    text_embed: str = "linear"
    text_refiner_depth: int = 0
    pooled_text_dim: int = 0
    pooled_required: bool = True
    guidance_embed: bool = False
    guidance_default: float = 0.0
    text_cross_attention_dual: bool = False
    text_cross_attention_single: bool = False
    text2_dim: int = 0
    first_frame_channels: int = 0
    image_embed_dim: int = 0
    token_kinds: bool = False
    reference_time_slot: float = 0
    motion_frames: int = 2
    audio_dim: int = 384
    audio_context: int = 2
    audio_tokens: int = 4
    audio_hidden: int = 256
    num_keypoints: int = 28
    pose_channels: int = 16
    pose_widths: tuple[int, ...] = (16, 32, 64)
    pose_scale: int = 2
    pose_sigma: float = 1.0
    attention: str = "xla"
    sequence_attention: str = "ulysses"
    remat: str = "none"
    scan_blocks: bool = True
    param_dtype: str = "float32"
    dtype: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _typed(field, getattr(self, field.name)))
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise UserError(
                    f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}; "
                    "change one of them or set model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if not self.rope_axes:
            spatial = 2 * (7 * self.head_dim // 32)
            object.__setattr__(self, "rope_axes", (self.head_dim - 2 * spatial, spatial, spatial))
        self._check()

    def _check(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"model.{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}")
        if len(self.rope_axes) != 3 or sum(self.rope_axes) != self.head_dim or any(n % 2 for n in self.rope_axes):
            raise UserError(f"model.rope_axes={self.rope_axes}: needs three even sizes summing to {self.head_dim}")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise UserError(f"model.patch_size={self.patch_size}: needs three positive sizes (frames, rows, columns)")
        if self.motion_frames % self.patch_size[0]:
            raise UserError(f"model.motion_frames={self.motion_frames} is not divisible by the temporal patch size")
        if self.num_dual_blocks + self.num_single_blocks < 1:
            raise UserError("model: num_dual_blocks + num_single_blocks must be at least 1")
        if self.text_cross_attention_single and self.attention_dim != self.hidden_size:
            raise UserError(
                f"model.text_cross_attention_single needs num_heads x head_dim = hidden_size, but they are "
                f"{self.attention_dim} and {self.hidden_size}; change one of them"
            )
        if self.pose_scale < 1 or self.pose_scale & (self.pose_scale - 1):
            raise UserError(f"model.pose_scale={self.pose_scale}: must be a power of two")
        if len(self.pose_widths) < self.pose_scale.bit_length():
            raise UserError(
                f"model.pose_widths={self.pose_widths}: needs more convolutions for pose_scale={self.pose_scale}"
            )

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "ModelConfig":
        """Builds a config from a mapping; lists become tuples.

        Raises:
          UserError: unknown key or invalid value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in mapping:
            if key not in names:
                raise UserError(f"model.{key}: unknown key{nearest(key, names)}")
        return cls(**mapping)

    @property
    def attention_dim(self) -> int:
        """Total width of the heads."""
        return self.num_heads * self.head_dim

    @property
    def compute_dtype(self) -> Any:
        """dtype of matmuls and activations as a jax dtype."""
        return jnp.dtype(self.dtype)

    @property
    def audio_window(self) -> int:
        """25 fps feature frames that one latent frame sees: its own four and the context."""
        return STRIDE + 2 * self.audio_context


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """The value converted to the type of the field's default; UserError if it is of another type."""
    default = field.default
    if isinstance(default, tuple) and isinstance(value, list | tuple) and all(_is_int(v) for v in value):
        return tuple(int(v) for v in value)
    if isinstance(default, bool) and isinstance(value, bool):
        return value
    if field.type in (int, "int") and _is_int(value):
        return int(value)
    if field.type in (float, "float") and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, str) and isinstance(value, str):
        return value
    raise UserError(f"model.{field.name}={value!r}: must be a value like {default!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
