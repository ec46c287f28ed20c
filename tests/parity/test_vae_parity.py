"""The VAE against diffusers' `AutoencoderKLWan`, on files that it wrote, read by our importer.

Theirs streams the clip in chunks with caches; ours takes it whole. Weights are random.
"""

import copy
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-all installs it)")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (make test-all installs it)")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import safetensors.numpy  # noqa: E402
from flax import nnx  # noqa: E402

from omnihuman_jax.models.vae.streaming import decode_clip  # noqa: E402
from omnihuman_jax.models.vae.vae import VAE, load_vae  # noqa: E402
from omnihuman_jax.weights import wan_vae  # noqa: E402
from omnihuman_jax.weights.read import open_files  # noqa: E402

pytestmark = pytest.mark.slow

WAN21 = {
    "base_dim": 8,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "z_dim": 4,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.0, 2.0, 0.5, 1.5],
}
PATCHED = WAN21 | {
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
}


SETTINGS = {"wan2.1": WAN21, "patched": PATCHED}


@pytest.fixture(scope="module", params=list(SETTINGS))
def pair(request, tmp_path_factory):
    """diffusers' module with random weights (norms and zero-initialised layers too), the directory it wrote, ours."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(**SETTINGS[request.param]).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if "gamma" in name else 0.03 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    return theirs, folder, wan_vae.load(folder)


def to_torch(x: np.ndarray):
    return torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy())


def relative_error(ours, theirs) -> float:
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 4, 1)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


def clip(frames: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(frames)
    video = rng.uniform(-1, 1, (1, frames, 32, 48, 3)).astype(np.float32)
    return video, rng.normal(size=(1, 1 + (frames - 1) // 4, 4, 6, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("pair", "frames"), [("wan2.1", 1), ("wan2.1", 13), ("patched", 5)], indirect=["pair"], scope="module"
)
def test_whole_clip_equals_the_chunked_reference(pair, frames):
    theirs, _, ours = pair
    video, latents = clip(frames)
    with torch.no_grad():
        posterior = theirs.encode(to_torch(video)).latent_dist
        decoded = theirs.decode(to_torch(latents)).sample
    graph, state = nnx.split(ours)
    run = jax.jit(lambda s, v, z: (nnx.merge(graph, s).encode_moments(v), nnx.merge(graph, s).decode_raw(z)))
    (mean, logvar), output = run(state, video, latents)
    errors = {
        "mean": relative_error(mean, posterior.mean),
        "logvar": relative_error(logvar, posterior.logvar),
        "decoded": relative_error(jnp.clip(output, -1, 1), decoded),
    }
    print(frames, errors)
    assert decoded.abs().lt(1).float().mean() > 0.5, (
        "most of the output is not clipped, so the comparison means something"
    )
    assert max(errors.values()) < 1e-4, errors


def test_gradients_of_the_input_and_of_every_parameter_agree(pair):
    theirs, folder, ours = pair
    video, latents = clip(5)
    x, z = to_torch(video).requires_grad_(), to_torch(latents).requires_grad_()
    theirs.zero_grad()
    (theirs.encode(x).latent_dist.mean.square().sum() + theirs.decode(z).sample.square().sum()).backward()
    graph, state = nnx.split(ours)

    @jax.jit
    def gradients(state, video, latents):
        def loss(state, video, latents):
            vae = nnx.merge(graph, state)
            decoded = jnp.clip(vae.decode_raw(latents), -1, 1)
            return jnp.square(vae.encode_moments(video)[0]).sum() + jnp.square(decoded).sum()

        return jax.grad(loss, (0, 1, 2))(state, video, latents)

    of_state, of_video, of_latents = gradients(state, video, latents)
    assert relative_error(of_video, x.grad) < 1e-3
    assert relative_error(of_latents, z.grad) < 1e-3
    flat = {".".join(map(str, keys)): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(of_state)}
    reference = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    errors = {}
    for entry in wan_vae.entries(ours.config, "diffusers"):
        expected, name = entry.layout.to_ours(reference.pop(entry.theirs), entry.patch), entry.ours[0]
        errors[name] = float(np.linalg.norm(flat[name] - expected) / np.linalg.norm(expected))
    worst = max(errors, key=errors.get)
    print(
        "input", relative_error(of_video, x.grad), "latents", relative_error(of_latents, z.grad), worst, errors[worst]
    )
    assert errors[worst] < 1e-3, worst
    assert not reference


def test_bfloat16_agrees_as_well_as_the_reference_with_itself(pair):
    theirs, folder, ours = pair
    video, latents = clip(5)
    half = copy.deepcopy(theirs).to(torch.bfloat16)
    with torch.no_grad():
        exact = theirs.encode(to_torch(video)).latent_dist.mean, theirs.decode(to_torch(latents)).sample
        rounded = (
            half.encode(to_torch(video).to(torch.bfloat16)).latent_dist.mean.float(),
            half.decode(to_torch(latents).to(torch.bfloat16)).sample.float(),
        )
    vae = VAE(dataclasses.replace(ours.config, dtype="bfloat16"), rngs=nnx.Rngs(0))
    nnx.update(vae, nnx.state(ours))
    graph, state = nnx.split(vae)
    run = jax.jit(lambda s, v, z: (nnx.merge(graph, s).encode_moments(v)[0], nnx.merge(graph, s).decode_raw(z)))
    mean, decoded = run(state, video, latents)
    for name, got, whole, reference in zip(
        ("encode", "decode"), (mean, jnp.clip(decoded, -1, 1)), exact, rounded, strict=True
    ):
        error = relative_error(got.astype(jnp.float32), whole)
        between = float((reference - whole).norm() / whole.norm())
        print(f"{name} in bfloat16 against float32: ours {error:.1e}, theirs {between:.1e}")
        assert error < max(2 * between, 0.02), name


def test_both_namings_and_the_way_back_are_exact(pair, tmp_path, monkeypatch):
    theirs, folder, ours = pair
    wan_vae.save(tmp_path / "back", ours)
    original = safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert original.keys() == written.keys()
    assert all(np.array_equal(original[name], written[name]) for name in original)
    again = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "back")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values(), strict=True)
    )
    assert again.config.latents_std == theirs.config.latents_std

    native = {
        b.theirs: original[a.theirs].reshape(b.shape)
        for a, b in zip(*(wan_vae.entries(ours.config, naming) for naming in ("diffusers", "native")), strict=True)
    }
    (tmp_path / "native").mkdir()
    safetensors.numpy.save_file(native, tmp_path / "native" / "Wan2.1_VAE.safetensors")
    assert wan_vae.naming_of(open_files(tmp_path / "native")) == "native"
    monkeypatch.setattr(wan_vae, "WAN21", ours.config)
    other = wan_vae.load(tmp_path / "native" / "Wan2.1_VAE.safetensors")
    for a, b in zip(*(jax.tree.leaves(nnx.state(vae)) for vae in (ours, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_command_writes_a_file_that_decodes_as_the_reference_does(pair, tmp_path):
    theirs, folder, _ = pair
    output = tmp_path / "vae.safetensors"
    command = [sys.executable, "-m", "experiments.import_vae", f"--input={folder}", f"--output={output}"]
    subprocess.run(command, check=True)
    _, latents = clip(5)
    mean, std = (np.array(theirs.config[name], np.float32) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        decoded = theirs.decode(to_torch(latents * std + mean)).sample
    assert relative_error(decode_clip(load_vae(output), latents, latents=1), decoded) < 1e-4
