"""Are the keypoints where the pose put them?"""

from omnihuman_jax.evaluation.keypoints import keypoint_error
from omnihuman_jax.evaluation.metrics.metric import (
    REAL,
    RECONSTRUCTION,
    Eligibility,
    Generated,
    HeldOutClip,
    Limit,
    Metric,
    Row,
    Sample,
)


def _has_pose(clip: HeldOutClip) -> bool:
    return len(clip.record["keypoints"]) > 0 and len(clip.record["audio"]) > 0


def measure(sample: Sample) -> float:
    """Mean distance of the keypoints in the frames from the true ones, in % of the frame diagonal."""
    return keypoint_error(sample.reading.keypoints, sample.clip.track("keypoints"), sample.clip.size)


METRIC = Metric(
    name="pose",
    title="Pose: are the keypoints where the pose puts them?",
    explanation="Mean distance of the keypoints that the probe finds from those of the right clip, over visible ones.",
    unit="mean keypoint distance in % of the frame diagonal",
    better="lower",
    eligibility=Eligibility("of one size have keypoints and audio", _has_pose),
    rows=(
        Row("right", "right pose", Generated(also="pose")),
        Row("wrong", "another clip's pose", Generated(also="pose", foreign="pose", differs_in="id")),
        REAL,
        RECONSTRUCTION,
        Row("still", "reference picture held still", Limit.STILL),
    ),
    measure=measure,
)
