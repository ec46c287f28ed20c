"""Analytic FLOPs of the network: two per multiply-add of every matmul and convolution.

Forward, for one sample with N = (1 + M/pt + T/pt) * P visual tokens, V = T/pt * P video tokens, L text tokens, width d,
heads' width a, MLP width m (times 3/2 for swiglu's gate), A tokens per latent frame of each cross-attended condition:

  dual block    2 (N + L) (4 d a + 2 d m) + 4 (N + L)^2 a + cross + 2 * 2 * 12 d^2
  single block  2 (N + L) (4 d a + 2 d m) + 4 (N + L)^2 a + cross + 2 * 2 * 3 d^2
  decoder block the same with N in place of L
  text cross    2 (2 N d a + 2 L d a) + 4 N L a in each block that has it
  cross         2 (2 V d a + 2 T A d a) + 4 V pt A a

The last term of a block is its modulation (two vectors per sample). Attention counts every pair of tokens, as if all
conditions were present. Backward is twice the forward; recomputation under remat is not counted.
"""

import math

from omnihuman_jax.models.dit.config import ModelConfig
from omnihuman_jax.models.dit.entries import Way, entering

# Dense bfloat16 FLOP/s of one device by `jax.Device.device_kind`, as published; half a chip on TPU7x.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def forward_breakdown(config: ModelConfig, frames: int, rows: int, columns: int) -> dict[str, int]:
    """Forward FLOPs of one sample by part, for a noisy window (frames, rows, columns) = (T, H, W) of latents."""
    text = config.text_len
    pt, ph, pw = config.patch_size
    per_frame = (rows // ph) * (columns // pw)
    video = frames // pt * per_frame
    visual = video + (1 + config.motion_frames // pt) * per_frame
    d, a, tokens = config.hidden_size, config.attention_dim, visual + text
    mlp = config.mlp_hidden * (3 if config.mlp_activation == "swiglu" else 2)
    keys = {name: entry.encoder.width(config) for name, entry in entering(Way.CROSS_ATTENTION).items()}
    channels = sum(entry.encoder.width(config) for entry in entering(Way.CHANNELS).values())
    encoders = {name: entry.encoder for way in Way for name, entry in entering(way).items()}
    decoder, depth = config.num_decoder_blocks, config.num_dual_blocks + config.num_single_blocks
    crossed = config.text_cross_attention_dual * config.num_dual_blocks
    crossed += config.text_cross_attention_single * config.num_single_blocks
    patch = math.prod(config.patch_size)
    return {
        "projections": (depth * tokens + decoder * 2 * visual) * 2 * (4 * d * a + d * mlp),
        "attention": (depth * tokens**2 + decoder * (2 * visual) ** 2) * 4 * a,
        "text_attention": crossed * (4 * tokens * d * a + 4 * visual * text * a),
        **{
            f"{name}_attention": (depth + decoder)
            * (2 * (2 * video + 2 * frames * count) * d * a + 4 * video * pt * count * a)
            for name, count in keys.items()
        },
        "modulation": 4 * d**2 * (12 * config.num_dual_blocks + 3 * (config.num_single_blocks + decoder) + 2),
        "embedding": 2 * d * patch * (visual * config.latent_channels + video * channels),
        "final": 2 * d * patch * video * config.latent_channels,
        "vectors": 2 * 2 * (256 * d + d * d),
        "text": _text(config, text),
        **{f"{name}_encoder": encoder.flops(config, frames, rows, columns) for name, encoder in encoders.items()},
    }


def _text(config: ModelConfig, text: int) -> int:
    d, a = config.hidden_size, config.attention_dim
    total = 2 * text * (config.text_dim * d + (d * d if config.text_embed == "mlp" else 0))
    block = 2 * text * (4 * d * a + 2 * d * config.mlp_hidden) + 4 * text**2 * a + 4 * d * d
    return total + config.text_refiner_depth * block


def train_step_flops(config: ModelConfig, batch: int, bucket: tuple[int, int, int]) -> int:
    """FLOPs of forward and backward over a global batch of a bucket (T, H, W) in latent units."""
    return 3 * batch * sum(forward_breakdown(config, *bucket).values())
