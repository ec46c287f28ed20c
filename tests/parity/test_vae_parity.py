"""The VAE against diffusers' `AutoencoderKLWan`, which streams the clip in chunks with caches, on random weights."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-all installs it)")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (make test-all installs it)")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from omnihuman_jax.models.vae import VAE, VAEConfig  # noqa: E402

pytestmark = pytest.mark.slow

WAN21 = {
    "dim": 8,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "z_dim": 4,
    "temporal_downsample": (False, True, True),
}
PATCHED = {
    "dim": 8,
    "dim_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "z_dim": 4,
    "temporal_downsample": (True, True),
    "patch_size": 2,
}

# Their names -> ours; decoder.up_blocks is renumbered first, because theirs nests what ours lists flat.
RULES = (
    (r"^quant_conv", "conv1"),
    (r"^post_quant_conv", "conv2"),
    (r"conv_in", "conv1"),
    (r"norm_out", "head_norm"),
    (r"conv_out", "head"),
    (r"down_blocks", "downsamples"),
    (r"mid_block\.attentions\.0", "middle.1"),
    (r"mid_block\.resnets\.0", "middle.0"),
    (r"mid_block\.resnets\.1", "middle.2"),
    (r"conv_shortcut", "shortcut"),
    (r"resample\.1", "resample"),
    (r"weight$", "kernel"),
)


def our_name(name: str, num_res_blocks: int) -> str:
    nested = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", name)
    if nested:
        block, kind, index, rest = int(nested[1]), nested[2], int(nested[3]), nested[4]
        flat = block * (num_res_blocks + 2) + (index if kind == "resnets" else num_res_blocks + 1)
        name = f"decoder.upsamples.{flat}.{rest}"
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def our_layout(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(out, in, [t,] h, w) -> (t, h, w, in, out); a norm's (C, 1, 1, 1) -> (C,)."""
    if len(shape) == 1:
        return value.reshape(shape)
    value = value if value.ndim == 5 else value[:, :, None]
    return value.transpose(2, 3, 4, 1, 0)


def pair(settings: dict):
    """diffusers' module with random weights (norms and zero-initialised layers too), and ours with the same ones."""
    torch.manual_seed(0)
    channels = 3 * settings.get("patch_size", 1) ** 2
    theirs = diffusers.AutoencoderKLWan(
        base_dim=settings["dim"],
        z_dim=settings["z_dim"],
        dim_mult=list(settings["dim_mult"]),
        num_res_blocks=settings["num_res_blocks"],
        temperal_downsample=list(settings["temporal_downsample"]),
        in_channels=channels,
        out_channels=channels,
        patch_size=settings.get("patch_size"),
        latents_mean=[0.0] * settings["z_dim"],
        latents_std=[1.0] * settings["z_dim"],
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if "gamma" in name else 0.03 * torch.randn_like(parameter))
    ours = VAE(VAEConfig(**settings), rngs=nnx.Rngs(1))
    mapped = {our_name(k, settings["num_res_blocks"]): v.numpy() for k, v in theirs.state_dict().items()}
    state = nnx.state(ours, nnx.Param)
    for keys, leaf in nnx.to_flat_state(state):
        value = our_layout(mapped.pop(".".join(map(str, keys))), leaf.shape)
        assert value.shape == leaf.shape, keys
        leaf.set_value(jnp.asarray(value))
    assert not mapped, f"not taken over: {sorted(mapped)}"
    nnx.update(ours, state)
    return theirs, ours


def relative_error(ours, theirs) -> float:
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 4, 1)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("settings", [WAN21, PATCHED], ids=["wan2.1", "patched"])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_whole_clip_equals_the_chunked_reference(settings, frames):
    theirs, ours = pair(settings)
    rng = np.random.default_rng(frames)
    video = rng.uniform(-1, 1, (1, frames, 32, 48, 3)).astype(np.float32)
    latents = rng.normal(size=(1, 1 + (frames - 1) // 4, 4, 6, 4)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())).latent_dist
        decoded = theirs.decode(torch.from_numpy(latents.transpose(0, 4, 1, 2, 3).copy())).sample
    mean, logvar = ours.encode_moments(jnp.asarray(video))
    assert relative_error(mean, posterior.mean) < 1e-4
    assert relative_error(logvar, posterior.logvar) < 1e-4
    assert decoded.abs().lt(1).float().mean() > 0.5, (
        "most of the output is not clipped, so the comparison means something"
    )
    assert relative_error(ours.decode(jnp.asarray(latents)), decoded) < 1e-4
