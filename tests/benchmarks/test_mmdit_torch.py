"""The comparison with PyTorch, at a size that only shows that it runs."""

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed (make test-all installs it)")
pytest.importorskip("diffusers", reason="diffusers is not installed (make test-all installs it)")

from benchmarks.mmdit_torch import Sizes, compare  # noqa: E402

pytestmark = pytest.mark.slow


def test_both_compute_the_same_gradients_and_are_timed():
    sizes = Sizes(tokens=16, text=4, heads=2, head_dim=16, dual=1, single=1)
    result = compare(sizes, "float32", repeats=1)
    assert result["agreement"] < 1e-4
    assert result["ours_seconds"] > 0 and result["theirs_seconds"] > 0
    assert result["ratio"] == pytest.approx(result["theirs_seconds"] / result["ours_seconds"])
