"""Distance between appearances."""

import numpy as np
import pytest

from omnihuman_jax.evaluation.metrics import identity


def test_attribute_distance_is_in_spreads():
    assert identity.attribute_distance([1.0, 4.0], [0.0, 0.0], [1.0, 2.0]) == pytest.approx(np.sqrt((1 + 4) / 2))
