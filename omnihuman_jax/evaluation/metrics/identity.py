"""Is it the same person?"""

import numpy as np

from omnihuman_jax.evaluation.metrics.metric import REFERENCE_ROWS, TALKING, Metric, Sample
from omnihuman_jax.evaluation.probe import Probe

NOT_THE_PERSON = ("background", "trousers")  # ignored attributes; trousers are rarely in the picture


def attribute_distance(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Root mean square difference of attributes (…,A) in units of `scale` (A,), their spread over people -> (…,)."""
    difference = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) / np.asarray(scale, np.float64)
    return np.sqrt((difference**2).mean(-1))


def _used(probe: Probe) -> np.ndarray:
    """Mask (A,) of the attributes that describe the person and that the probe can read."""
    return probe.readable & np.array([not name.startswith(NOT_THE_PERSON) for name in probe.config.attributes])


def measure(sample: Sample) -> float:
    """Distance of the appearance in the frames from the person's true appearance; NaN if the record lacks it."""
    used, scale = _used(sample.probe), np.array(sample.probe.config.attribute_std)
    truth = sample.clip.record["attributes"]
    if len(truth) != len(scale):
        return float("nan")
    return float(attribute_distance(sample.reading.attributes.mean(0)[used], truth[used], scale[used]))


def _attributes(probe: Probe) -> list[str]:
    return [name for name, used in zip(probe.config.attributes, _used(probe)) if used]


METRIC = Metric(
    name="identity",
    title="Reference: is it the same person?",
    explanation=(
        "The appearance that the probe reads (the attributes listed below the table) against the true attributes of "
        "the right person, in units of their spread over people: 0 is the same person, about 1.4 a random other one. "
        "It is a proxy that knows only rendered people. With the wrong reference the caption is still the right one."
    ),
    unit="appearance distance, in spreads over people",
    better="lower",
    eligibility=TALKING,
    rows=REFERENCE_ROWS,
    measure=measure,
    attributes=_attributes,
)
