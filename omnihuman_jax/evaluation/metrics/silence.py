"""Does the mouth rest when nobody speaks?"""

import numpy as np

from omnihuman_jax.evaluation.metrics.metric import (
    MIN_FACE,
    REAL,
    RECONSTRUCTION,
    Eligibility,
    Generated,
    HeldOutClip,
    Metric,
    Row,
    Sample,
)

CLOSED = 0.1  # largest true opening of a mouth at rest


def _is_silent(clip: HeldOutClip) -> bool:
    mouth = clip.track("mouth")
    has_both = len(clip.record["audio"]) > 0 and len(mouth) > 0
    return has_both and float(mouth.max()) <= CLOSED and clip.reading.face >= MIN_FACE


def measure(sample: Sample) -> float:
    """Mean distance of the mouth opening in the frames from the true one, which is closed."""
    return float(np.abs(sample.reading.mouth - sample.clip.track("mouth")).mean())


METRIC = Metric(
    name="silence",
    title="Silence: does the mouth rest when nobody speaks?",
    explanation=(
        "Clips whose sound is silence and whose mouth stays closed: how far from closed the probe reads the mouth, "
        "where 1 is wide open. The probe itself errs, see the real frames."
    ),
    unit="mean distance from the closed mouth",
    better="lower",
    eligibility=Eligibility("of one size have sound but a closed mouth", _is_silent),
    rows=(Row("right", "with the silent sound", Generated()), REAL, RECONSTRUCTION),
    measure=measure,
)
