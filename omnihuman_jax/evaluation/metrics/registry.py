"""The metrics, in the order of the report. To add one, write a file and add a line here."""

from collections.abc import Sequence

from omnihuman_jax.errors import UserError, nearest
from omnihuman_jax.evaluation.metrics import borders, colour, identity, mouth, pose, silence
from omnihuman_jax.evaluation.metrics.metric import Metric

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (mouth.METRIC, silence.METRIC, pose.METRIC, colour.METRIC, identity.METRIC, borders.METRIC)
}


def select(names: Sequence[str] = ()) -> tuple[Metric, ...]:
    """The metrics with these names, in the order of the registry; all of them if no name is given.

    Raises:
      UserError: there is no metric of that name.
    """
    for name in names:
        if name not in METRICS:
            raise UserError(f"--metrics={name}: unknown metric{nearest(name, METRICS)}")
    return tuple(metric for name, metric in METRICS.items() if name in names or not names)
