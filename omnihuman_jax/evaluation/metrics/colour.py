"""Do the colours match the reference picture?"""

import numpy as np

from omnihuman_jax.evaluation.colours import colour_difference, region_colours
from omnihuman_jax.evaluation.metrics.metric import REFERENCE_ROWS, TALKING, Metric, Sample

EVERY = 4  # frames; colours change slowly


def measure(sample: Sample) -> float:
    """Mean colour difference from the reference picture, over regions and every fourth frame."""
    clip, points = sample.clip, sample.probe.named_points
    wanted = region_colours(clip.reference, points(sample.reference.keypoints[0], clip.size))
    frames = zip(sample.frames[::EVERY], sample.reading.keypoints[::EVERY])
    found = np.stack([region_colours(frame, points(keypoints, clip.size)) for frame, keypoints in frames])
    return float(np.nanmean(colour_difference(found, wanted[None])))


METRIC = Metric(
    name="colour",
    title="Reference: do the colours match the picture?",
    explanation=(
        "Mean colour of skin, hair, clothes and background, in boxes placed by the keypoints that the probe finds, "
        "against the same boxes of the right reference picture. About 2 is just noticeable."
    ),
    unit="CIE76 colour difference from the reference picture",
    better="lower",
    eligibility=TALKING,
    rows=REFERENCE_ROWS,
    measure=measure,
)
