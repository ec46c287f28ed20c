"""The VAE comparison with PyTorch, at a size that only shows that it runs."""

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed (make test-all installs it)")
pytest.importorskip("diffusers", reason="diffusers is not installed (make test-all installs it)")

from benchmarks.vae_torch import TASKS, Sizes, compare, write_weights  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", TASKS)
def test_both_compute_the_same_and_are_measured(task, tmp_path):
    sizes = Sizes(dim=8, frames=5, height=32, width=32)
    write_weights(sizes, str(tmp_path))
    result = compare(task, sizes, str(tmp_path), "float32", repeats=1)
    assert result["agreement"] < 1e-3
    assert result["ratio"] == pytest.approx(result["theirs_seconds"] / result["ours_seconds"])
    assert result["ours_peak_bytes"] > 0 and result["theirs_peak_bytes"] > 0
