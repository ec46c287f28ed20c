"""Causal 3D VAE, in the form of Wan2.1's: 1+4n pixel frames become 1+n latent frames, 8 x 8 pixels one latent pixel.

The first frame is encoded alone, so an image is a clip of one frame, and a reference is encoded like a first frame.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jax import lax

from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.models.vae.layers import (
    CausalConv3d,
    Downsample,
    FrameAttention,
    ResidualBlock,
    RMSNorm,
    Stream,
    Upsample,
)
from omnihuman_jax.weights.modules import build_with, parameter_shapes, parameters
from omnihuman_jax.weights.write import save_tensors


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE; the defaults are Wan2.1's.

    Attributes:
      dim: channels of the first level.
      dim_mult: channels of each level, in units of `dim`; each level but the last halves rows and columns.
      num_res_blocks: residual blocks per level of the encoder (the decoder has one more).
      z_dim: latent channels C.
      temporal_downsample: for each level but the last, whether it also halves frames. Two of them give 1+4n -> 1+n.
      patch_size: pixels folded into channels before the first level (1 in Wan2.1, 2 in Wan2.2).
      linear_path: add a linear map from each latent pixel's block of pixels to the latent, and one back; the network
        then starts at zero. Initialised to the data's principal components, as by experiments.train_vae, it makes a
        small VAE useful from the first step. False in Wan2.1.
      linear_context: latent pixels on each side that the linear path back also reads. With 0 every block of pixels is
        made from one latent pixel, and errors of generated latents show as a grid of squares.
      latent_mean: mean of each latent channel over the data; None means 0.
      latent_std: standard deviation of each latent channel; None means 1.
      dtype: compute dtype; parameters are float32.
    """

    dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1
    linear_path: bool = False
    linear_context: int = 0
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("dim_mult", "temporal_downsample", "latent_mean", "latent_std"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"vae.temporal_downsample has {len(self.temporal_downsample)} values, but vae.dim_mult has "
                f"{len(self.dim_mult)} levels; give one value less than there are levels"
            )
        for name in ("latent_mean", "latent_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.z_dim:
                raise UserError(f"vae.{name} has {len(value)} values; vae.z_dim={self.z_dim} needs {self.z_dim}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VAEConfig":
        """Builds the config from a mapping; raises UserError for an unknown key."""
        names = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in names:
                raise UserError(f"vae.{key}: unknown setting{nearest(key, names)}")
        return cls(**values)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent pixel, along rows and along columns."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    def check_clip(self, frames: int, height: int, width: int, *, first: bool = True) -> None:
        """Raises UserError unless a clip of this size (frames, pixels), or a later chunk of one, can be encoded."""
        s, t = self.spatial_stride, self.temporal_stride
        if height < s or width < s or height % s or width % s:
            fitting = f"{max(s, height // s * s)}x{max(s, width // s * s)}"
            raise UserError(f"size {height}x{width} pixels: the VAE needs multiples of {s}; for example {fitting}")
        if not first and (frames < 1 or frames % t):
            raise UserError(f"a chunk of {frames} frames: after the first chunk the VAE needs a multiple of {t}")
        if first and (frames < 1 or (frames - 1) % t):
            fitting = 1 + max(frames - 1, 0) // t * t
            raise UserError(f"{frames} frames: the VAE needs 1 + a multiple of {t}; use {fitting}")


class Encoder(nnx.Module):
    """(B, F, Hp, Wp, 3 * patch^2) -> (B, T, H, W, 2 * z_dim)."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        make = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        widths = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3 * config.patch_size**2, widths[0], (3, 3, 3), **make)
        layers = []
        for level, (cin, cout) in enumerate(itertools.pairwise(widths)):
            for block in range(config.num_res_blocks):
                layers.append(ResidualBlock(cin if block == 0 else cout, cout, **make))
            if level < len(config.temporal_downsample):
                layers.append(Downsample(cout, config.temporal_downsample[level], **make))
        self.downsamples = nnx.List(layers)
        self.middle = _middle(widths[-1], make)
        self.head_norm = RMSNorm(widths[-1])
        self.head = CausalConv3d(widths[-1], 2 * config.z_dim, (3, 3, 3), zero=config.linear_path, **make)

    def __call__(self, x: jax.Array, stream: Stream) -> jax.Array:
        x = self.conv1(x, stream)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, stream)
        return self.head(jax.nn.silu(self.head_norm(x)), stream)


class Decoder(nnx.Module):
    """(B, T, H, W, z_dim) -> (B, F, Hp, Wp, 3 * patch^2)."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        make = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        mult = config.dim_mult[::-1]
        widths = [config.dim * m for m in (mult[0], *mult)]
        temporal = config.temporal_downsample[::-1]
        self.conv1 = CausalConv3d(config.z_dim, widths[0], (3, 3, 3), **make)
        self.middle = _middle(widths[0], make)
        layers = []
        for level, (cin, cout) in enumerate(itertools.pairwise(widths)):
            cin = cin if level == 0 else cin // 2  # the upsampling before this level halved the channels
            for block in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(cin if block == 0 else cout, cout, **make))
            if level < len(temporal):
                layers.append(Upsample(cout, temporal[level], **make))
        self.upsamples = nnx.List(layers)
        self.head_norm = RMSNorm(widths[-1])
        self.head = CausalConv3d(widths[-1], 3 * config.patch_size**2, (3, 3, 3), zero=config.linear_path, **make)

    def __call__(self, z: jax.Array, stream: Stream) -> jax.Array:
        x = self.conv1(z, stream)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, stream)
        return self.head(jax.nn.silu(self.head_norm(x)), stream)


class LinearPath(nnx.Module):
    """A fixed linear map between latents and blocks of temporal_stride frames of spatial_stride^2 pixels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        size = 3 * config.temporal_stride * config.spatial_stride**2
        init = nnx.initializers.orthogonal()
        self.encode_matrix = nnx.Param(init(rngs.params(), (size, config.z_dim), jnp.float32))
        self.encode_bias = nnx.Param(jnp.zeros((config.z_dim,), jnp.float32))
        inputs = config.z_dim * (2 * config.linear_context + 1) ** 2
        self.decode_matrix = nnx.Param(init(rngs.params(), (inputs, size), jnp.float32))
        self.decode_bias = nnx.Param(jnp.zeros((size,), jnp.float32))

    def blocks(self, video: jax.Array, first: bool = True) -> jax.Array:
        """(B, F, Hp, Wp, 3) -> (B, T, H, W, size); the clip's `first` frame is repeated to a whole block."""
        t, s = self.config.temporal_stride, self.config.spatial_stride
        if first:
            video = jnp.concatenate([video[:, :1]] * (t - 1) + [video], axis=1)
        b, f, h, w, c = video.shape
        video = video.reshape(b, f // t, t, h // s, s, w // s, s, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        return video.reshape(b, f // t, h // s, w // s, t * s * s * c)

    def encode(self, video: jax.Array, first: bool = True) -> jax.Array:
        """(B, F, Hp, Wp, 3) -> (B, T, H, W, z_dim)."""
        matrix, bias = lax.stop_gradient((self.encode_matrix[...], self.encode_bias[...]))
        return self.blocks(video, first) @ matrix + bias

    def decode(self, z: jax.Array, first: bool = True) -> jax.Array:
        """(B, T, H, W, z_dim) -> (B, F, Hp, Wp, 3); keeps only the last frame of the clip's `first` block."""
        t, s = self.config.temporal_stride, self.config.spatial_stride
        b, frames, h, w, _ = z.shape
        matrix, bias = lax.stop_gradient((self.decode_matrix[...], self.decode_bias[...]))
        video = (self.neighbours(z) @ matrix + bias).reshape(b, frames, h, w, t, s, s, 3)
        video = video.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, frames * t, h * s, w * s, 3)
        return video[:, t - 1 :] if first else video

    def neighbours(self, z: jax.Array) -> jax.Array:
        """(B, T, H, W, z_dim) -> (B, T, H, W, (2c+1)^2 z_dim), c = `linear_context`; borders repeat the edge."""
        c = self.config.linear_context
        rows, columns = z.shape[2:4]
        z = jnp.pad(z, ((0, 0), (0, 0), (c, c), (c, c), (0, 0)), mode="edge")
        window = range(2 * c + 1)
        return jnp.concatenate([z[:, :, i : i + rows, j : j + columns] for i in window for j in window], axis=-1)

    def principal_components(self, blocks: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters that encode blocks (n, size) as their first principal components with unit variance."""
        mean = blocks.mean(0)
        variance, axes = np.linalg.eigh(np.cov(blocks.T.astype(np.float64)))
        variance, axes = variance[::-1][: self.config.z_dim], axes[:, ::-1][:, : self.config.z_dim]
        scale = np.sqrt(np.maximum(variance, 1e-8))
        values = {"encode_matrix": axes / scale, "encode_bias": -mean @ (axes / scale)}
        return {name: value.astype(np.float32) for name, value in values.items()}

    def least_squares(self, neighbours: np.ndarray, blocks: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters that decode neighbours (n, inputs) to blocks (n, size) with the smallest squared error."""
        x = np.concatenate([neighbours, np.ones((len(blocks), 1))], axis=1, dtype=np.float64)
        # The ridge only matters for latents that never vary.
        solution = np.linalg.solve(x.T @ x + 1e-6 * len(x) * np.eye(x.shape[1]), x.T @ blocks.astype(np.float64))
        values = {"decode_matrix": solution[:-1], "decode_bias": solution[-1]}
        return {name: value.astype(np.float32) for name, value in values.items()}


def _middle(width: int, make: dict[str, Any]) -> nnx.List:
    first, attention = ResidualBlock(width, width, **make), FrameAttention(width, **make)
    return nnx.List([first, attention, ResidualBlock(width, width, **make)])


class VAE(nnx.Module):
    """The causal 3D VAE: 194 tensors at the default sizes, one for each in Wan2.1's checkpoint.

    Letters: F = 1 + 4 (T - 1) pixel frames, Hp = 8 H and Wp = 8 W pixels, C latent channels. The methods are pure and
    traceable. With a `Stream` they take a chunk of a clip instead of a whole one; see `streaming`.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        make = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.encoder = Encoder(config, rngs=rngs)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), **make)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1), **make)
        self.decoder = Decoder(config, rngs=rngs)
        if config.linear_path:
            self.linear = LinearPath(config, rngs=rngs)
            # Latents start with unit variance; the posterior's noise should be well below that.
            self.conv1.bias[...] = self.conv1.bias[...].at[config.z_dim :].set(-6.0)

    def encode_moments(self, video: jax.Array, stream: Stream | None = None) -> tuple[jax.Array, jax.Array]:
        """(B, F, Hp, Wp, 3) in [-1, 1] -> mean and log variance of the posterior, both (B, T, H, W, C), float32.

        Raises UserError if the VAE does not divide the size.
        """
        stream = stream or Stream()
        self.config.check_clip(*video.shape[1:4], first=stream.first)
        moments = self.conv1(self.encoder(_fold(video, self.config.patch_size), stream)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        if self.config.linear_path:
            mean = mean + self.linear.encode(video, stream.first)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def normalise(self, mean: jax.Array) -> jax.Array:
        """(x - latent_mean) / latent_std, per channel."""
        shift, scale = self._statistics()
        return (mean - shift) / scale

    def encode(self, video: jax.Array, stream: Stream | None = None) -> jax.Array:
        """(B, F, Hp, Wp, 3) in [-1, 1] -> normalised latents (B, T, H, W, C): the posterior's mean, not a sample."""
        return self.normalise(self.encode_moments(video, stream)[0])

    def decode_raw(self, z: jax.Array, stream: Stream | None = None) -> jax.Array:
        """Latents (B, T, H, W, C), not normalised -> video (B, F, Hp, Wp, 3), float32, not clipped."""
        stream = stream or Stream()
        video = _unfold(self.decoder(self.conv2(z), stream).astype(jnp.float32), self.config.patch_size)
        return video + self.linear.decode(z, stream.first) if self.config.linear_path else video

    def decode(self, latents: jax.Array, stream: Stream | None = None) -> jax.Array:
        """Normalised latents (B, T, H, W, C) -> video (B, F, Hp, Wp, 3) in [-1, 1]."""
        shift, scale = self._statistics()
        return jnp.clip(self.decode_raw(latents * scale + shift, stream), -1.0, 1.0)

    def _statistics(self) -> tuple[jax.Array, jax.Array]:
        c = self.config
        mean = jnp.zeros((c.z_dim,)) if c.latent_mean is None else jnp.asarray(c.latent_mean, jnp.float32)
        return mean, jnp.ones((c.z_dim,)) if c.latent_std is None else jnp.asarray(c.latent_std, jnp.float32)


def _fold(x: jax.Array, p: int) -> jax.Array:
    """(B, F, H, W, 3) -> (B, F, H/p, W/p, 3 p p), channels ordered (colour, column, row) as in Wan2.2."""
    if p == 1:
        return x
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h // p, p, w // p, p, c).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(b, f, h // p, w // p, c * p * p)


def _unfold(x: jax.Array, p: int) -> jax.Array:
    """The inverse of `_fold`."""
    if p == 1:
        return x
    b, f, h, w, c = x.shape
    x = x.reshape(b, f, h, w, c // (p * p), p, p).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, f, h * p, w * p, c // (p * p))


def compiled(vae: VAE) -> tuple[Callable[[Any], jax.Array], Callable[[Any], jax.Array]]:
    """Jitted (encode, decode) of `vae`."""
    graph, state = nnx.split(vae)
    encode = jax.jit(lambda state, video: nnx.merge(graph, state).encode(video))
    decode = jax.jit(lambda state, latents: nnx.merge(graph, state).decode(latents))
    return (lambda video: encode(state, video)), (lambda latents: decode(state, latents))


def save_vae(
    path: str | Path,
    vae: VAE,
    *,
    dtype: str = "float32",
    notes: Mapping[str, str] | None = None,
    encoder: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a safetensors file: parameters by dotted path, and the config (with latent statistics) as JSON metadata.

    Parameters are stored in `dtype`, "float32" or "float16"; `notes` are further metadata. `encoder` (of
    `encoder_tensors`) is stored as it is instead: rounding it would make other latents, and another digest.
    """
    tensors = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in parameters(vae).items()}
    tensors |= encoder or {}
    config = {**dataclasses.asdict(vae.config), "dtype": "float32"}
    metadata = {**(notes or {}), "format": "omnihuman_jax.vae", "config": json.dumps(config)}
    save_tensors(path, tensors, metadata)


def encoder_sha256(path: str | Path) -> str:
    """Hex digest of what decides the latents: the encoder of a VAE file and its latent statistics.

    Files that differ only in the decoder have one digest: either decodes the latents of the other.

    Raises UserError for a file that is no VAE.
    """
    config, tensors = _read(Path(path))
    deciding = ("latent_mean", "latent_std", "patch_size", "temporal_downsample")
    digest = hashlib.sha256(json.dumps([config.get(key) for key in deciding]).encode())
    for name in sorted(filter(is_of_encoder, tensors)):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return digest.hexdigest()


def encoder_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """What decides the latents in a VAE file, by dotted name and in the file's dtype; UserError as `load_vae`."""
    return {name: value for name, value in _read(Path(path))[1].items() if is_of_encoder(name)}


def is_of_encoder(name: str) -> bool:
    """Whether a parameter, by dotted path, decides the latents."""
    return name.startswith(("encoder.", "conv1.", "linear.encode_"))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors of a VAE file."""
    if not path.is_file():
        raise UserError(f"vae.checkpoint={str(path)!r}: no such file; train one with python -m experiments.train_vae")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise UserError(f"vae.checkpoint={path}: not a readable safetensors file ({error}); give a VAE file") from error
    if metadata.get("format") != "omnihuman_jax.vae" or "config" not in metadata:
        raise UserError(f"vae.checkpoint={path}: has no VAE config; give a file from experiments.train_vae")
    return json.loads(metadata["config"]), tensors


def load_vae(source: str | Path | Mapping[str, Any]) -> VAE:
    """Reads a VAE that `save_vae` wrote, from its path or from a `vae` config ("checkpoint" and optionally "dtype").

    Raises UserError if the file is missing, is no VAE, or its tensors do not fit its config.
    """
    settings = source if isinstance(source, Mapping) else {"checkpoint": source}
    path = Path(settings.get("checkpoint") or "")
    config, tensors = _read(path)
    if settings.get("dtype"):
        config["dtype"] = settings["dtype"]
    sizes = VAEConfig.from_dict(config)

    def build() -> VAE:
        return VAE(sizes, rngs=nnx.Rngs(0))

    for name, shape in parameter_shapes(build).items():
        if name not in tensors:
            raise UserError(f"vae.checkpoint={path}: tensor {name} is missing; the file does not fit its own config")
        if tensors[name].shape != shape:
            raise UserError(f"vae.checkpoint={path}: tensor {name} is {tensors[name].shape}, should be {shape}")
        if not np.isfinite(tensors[name]).all():
            raise UserError(f"vae.checkpoint={path}: tensor {name} holds NaN or infinity; give another VAE file")
    return build_with(build, {name: value.astype(np.float32) for name, value in tensors.items()})
