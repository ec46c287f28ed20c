"""Does a grid lie over the picture?"""

import numpy as np

from omnihuman_jax.evaluation.metrics.metric import REAL, RECONSTRUCTION, TALKING, Generated, Metric, Row, Sample

CELL = 8  # pixels of a latent cell of the VAEs here; the network's patches are of 2 x 2 cells


def border_ratio(frames: np.ndarray, cell: int = CELL) -> float:
    """Mean |difference| of neighbouring pixels across the borders of cells, over that inside; frames (F,h,w,3).

    NaN for a picture without differences.
    """
    across, inside = [], []
    for axis in (1, 2):
        steps = np.abs(np.diff(frames.astype(np.float64), axis=axis)).mean(tuple(i for i in range(4) if i != axis))
        at_border = np.arange(1, len(steps) + 1) % cell == 0
        across.append(steps[at_border].mean())
        inside.append(steps[~at_border].mean())
    return float(np.mean(across) / np.mean(inside)) if np.mean(inside) > 0 else float("nan")


def measure(sample: Sample) -> float:
    """The ratio of the frames."""
    return border_ratio(sample.frames)


METRIC = Metric(
    name="borders",
    title="Does a grid of squares lie over the picture?",
    explanation=(
        "How much more neighbouring pixels differ across the borders of the VAE's cells of 8 x 8 pixels than inside. "
        "Without a grid it is 1; the compression of the videos themselves adds a little, see the real frames."
    ),
    unit="ratio of mean pixel differences",
    better="lower",
    eligibility=TALKING,
    rows=(Row("right", "generated", Generated()), REAL, RECONSTRUCTION),
    measure=measure,
)
