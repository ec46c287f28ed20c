"""LPIPS against a reimplementation in PyTorch with random weights, in the naming of the `lpips` package."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-all installs it)")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import safetensors.torch  # noqa: E402

from omnihuman_jax.weights import lpips  # noqa: E402

pytestmark = pytest.mark.slow

WIDTHS = (4, 6, 8, 10, 12)
# torchvision's VGG-16: widths by level, M a pooling; slices end after these layers.
LAYERS = [0, 0, "M", 1, 1, "M", 2, 2, 2, "M", 3, 3, 3, "M", 4, 4, 4]
ENDS = (4, 9, 16, 23, 30)


def vgg() -> torch.nn.Sequential:
    modules, inputs = [], 3
    for layer in LAYERS:
        if layer == "M":
            modules.append(torch.nn.MaxPool2d(2, 2))
            continue
        modules += [torch.nn.Conv2d(inputs, WIDTHS[layer], 3, padding=1), torch.nn.ReLU()]
        inputs = WIDTHS[layer]
    return torch.nn.Sequential(*modules)


def reference(net: torch.nn.Sequential, weights: list[torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    a, b, total, begin = (a - shift) / scale, (b - shift) / scale, 0, 0
    for end, weight in zip(ENDS, weights, strict=True):
        a, b = net[begin:end](a), net[begin:end](b)
        one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        total = total + torch.nn.functional.conv2d((one - other).square(), weight).mean((1, 2, 3))
        begin = end
    return total


def test_distances_and_their_gradients_agree(tmp_path):
    torch.manual_seed(0)
    net, weights = vgg(), [torch.rand(1, width, 1, 1) for width in WIDTHS]
    tensors = {f"lin{i}.model.1.weight": weight for i, weight in enumerate(weights)}
    for i, value in enumerate(net):
        if isinstance(value, torch.nn.Conv2d):
            number = 1 + next(k for k, end in enumerate(ENDS) if i < end)
            tensors |= {f"net.slice{number}.{i}.{name}": p.detach() for name, p in value.named_parameters()}
    tensors["scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    safetensors.torch.save_file(tensors, tmp_path / "lpips.safetensors")
    ours = lpips.load(tmp_path / "lpips.safetensors", WIDTHS)

    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 2, 3, 33, 48)).astype(np.float32)
    x = torch.from_numpy(b).requires_grad_()
    expected = reference(net, weights, torch.from_numpy(a), x)
    expected.sum().backward()
    a, b = jnp.asarray(a.transpose(0, 2, 3, 1)), jnp.asarray(b.transpose(0, 2, 3, 1))
    got, gradient = jax.jit(lambda a, b: (ours(a, b), jax.grad(lambda b: ours(a, b).sum())(b)))(a, b)
    theirs = x.grad.numpy().transpose(0, 2, 3, 1)
    print(float(np.abs(got / expected.detach().numpy() - 1).max()))
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=1e-4)
    assert np.linalg.norm(gradient - theirs) / np.linalg.norm(theirs) < 1e-3


def test_the_published_sizes_have_the_names_of_the_package():
    names = {entry.theirs: entry.shape for entry in lpips.entries()}
    assert len(names) == 2 * 13 + 5
    assert names["net.slice1.0.weight"] == (64, 3, 3, 3) and names["net.slice5.28.weight"] == (512, 512, 3, 3)
    assert names["net.slice3.14.bias"] == (256,) and names["lin4.model.1.weight"] == (1, 512, 1, 1)
