"""Does the mouth rest when nobody speaks?"""

from omnihuman_jax.evaluation.metrics.metric import REAL, TALKING, Generated, Metric, Row, Sample


def measure(sample: Sample) -> float:
    """Mean mouth opening over the frames, 0..1."""
    return float(sample.reading.mouth.mean())


METRIC = Metric(
    name="silence",
    title="Silence: does the mouth rest when nobody speaks?",
    explanation=(
        "How far the mouth is open on average, 0 closed and 1 wide open, when the recording of a talking clip is "
        "replaced by silence, and with the recording. The probe reads closed mouths as a little open."
    ),
    unit="mean mouth opening",
    better="lower",
    eligibility=TALKING,
    rows=(
        Row("right", "silence", Generated(silent=True)),
        Row("speech", "the clip's speech", Generated()),
        REAL,
    ),
    measure=measure,
)
