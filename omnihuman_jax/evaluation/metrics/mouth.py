"""Does the mouth follow the voice?"""

import numpy as np

from omnihuman_jax.evaluation.metrics.metric import REAL, RECONSTRUCTION, TALKING, Generated, Metric, Row, Sample
from omnihuman_jax.evaluation.statistics import pearson

MIN_STD = 0.05  # of the true opening; below it a clip is (nearly) silent, and its correlation means nothing


def correlation(read: np.ndarray, truth: np.ndarray) -> float:
    """Correlation of the read and the true opening (F,); NaN if the truth is flat, 0 if only the reading is."""
    if np.std(truth) < MIN_STD:
        return float("nan")
    value = pearson(read, truth)
    return value if np.isfinite(value) else 0.0


def measure(sample: Sample) -> float:
    """Correlation of the mouth opening in the frames with the true one."""
    return correlation(sample.reading.mouth, sample.clip.track("mouth"))


METRIC = Metric(
    name="mouth",
    title="Audio: does the mouth follow the voice?",
    explanation=(
        "The mouth opening that the probe reads in the frames of a clip, correlated with the true opening for the "
        "right audio. Clips whose true mouth hardly moves are left out and counted; a generated mouth that does not "
        "move counts as 0."
    ),
    unit="Pearson correlation over the frames of a clip",
    better="higher",
    eligibility=TALKING,
    rows=(
        Row("right", "right audio", Generated()),
        Row("wrong", "another sentence's audio", Generated(foreign="audio", differs_in="sentence")),
        REAL,
        RECONSTRUCTION,
    ),
    measure=measure,
)
