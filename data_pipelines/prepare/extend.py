"""A data set that grows: curated clips are encoded in parts, and what is in it already is left alone.

Each part is complete in itself, so an interrupted run continues after the last one. The parts follow from the order of
the clips alone, so that a continued run writes the same bytes as one without a break. Until the first run is over, the
data set is in the sibling `.NAME.partial`.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from data_pipelines.prepare import features, names, pipeline
from data_pipelines.prepare.summary import Summary
from data_pipelines.raw.manifest import RawClip
from data_pipelines.schema import Dataset, DatasetWriter
from omnihuman_jax.errors import UserError

PART = 64  # raw clips
DONE, SETTINGS = "done", "settings_sha256"


class Item(NamedTuple):
    """A clip to be in the data set.

    Attributes:
      clip: as `pipeline.run` takes it.
      identity: of its content, for the curation; "" if it was not curated.
      inputs: digest of everything that its records depend on, besides the settings.
    """

    clip: RawClip
    identity: str
    inputs: str

    @property
    def name(self) -> str:
        """Of the clip in the data set."""
        return names.of(self.clip).whole


def item(clip: RawClip, identity: str, content: Callable[[pathlib.Path], str]) -> Item:
    """An item; `content` gives the digest of a file."""
    digest = hashlib.sha256(pipeline.clip_values(clip, content).encode()).hexdigest()
    return Item(clip, identity, digest)


def done_in(output: pathlib.Path) -> dict[str, list[str]]:
    """Name -> [identity, inputs, why it has no record or ""] of every clip that went into a data set, or its partial.

    Raises UserError if `output` holds something else.
    """
    for directory in (output, partial_of(output)):
        if directory.is_dir() and any(directory.iterdir()):
            done = Dataset.open(directory, empty=True).extra.get(DONE)
            if done is None:
                raise UserError(f"{directory} was not made by a curated run; delete it or choose another --output")
            return done
    return {}


def partial_of(output: pathlib.Path) -> pathlib.Path:
    """Where a data set is until its first run is over."""
    return output.absolute().with_name(f".{output.name}.partial")


def pending(
    items: Sequence[Item], dropped: Sequence[str], done: dict[str, list[str]], output: pathlib.Path
) -> list[Item]:
    """Items that are not in the data set yet.

    Args:
      dropped: names of clips that the present thresholds drop.

    Raises UserError if it holds clips that are dropped now, or were prepared otherwise: what is in it stays as it is.
    """
    changed = [entry.name for entry in items if entry.name in done and done[entry.name][1] != entry.inputs]
    gone = [name for name in dropped if name in done]
    for what, found in (("changed since", changed), ("are dropped now", gone)):
        if found:
            raise UserError(
                f"{output} holds {len(found)} clips that {what}, as {found[0]} (other thresholds, captions or files); "
                "choose another --output or delete it"
            )
    return [entry for entry in items if entry.name not in done]


def run(
    items: Sequence[Item],
    output: pathlib.Path,
    settings: pipeline.Settings,
    encoders: features.Encoders,
    encode: Callable[[Any], Any],
    *,
    latent_channels: int,
    extra: dict[str, Any],
    workers: int = 2,
    batch: int = 8,
) -> Summary:
    """Encodes items in parts and appends them to the data set.

    Args:
      items: those that `pending` gave.
      extra: more entries of dataset.json, equal for all its parts; a data set with others is refused.

    Raises UserError if the output cannot be written, was made with other settings, or has no record in the end.
    """
    output, summary = output.absolute(), Summary()
    work = output if output.is_dir() and any(output.iterdir()) else partial_of(output)
    done = {}
    if work.is_dir():
        head = Dataset.open(work, empty=True).extra
        if {key: head.get(key) for key in extra} != extra:
            raise UserError(f"{work} was made with other settings or encoders; choose another --output or delete it")
        done = dict(head[DONE])
    meta = pipeline.meta_of(settings, encoders, latent_channels)
    for first in range(0, len(items), PART):
        part = items[first : first + PART]
        assigned = names.assign([entry.clip for entry in part])
        head = dict(extra) | {DONE: done}
        with DatasetWriter(work, meta, head, extend=True) as writer:
            rows = list(zip([entry.clip for entry in part], assigned, strict=True))
            pipeline.fill(writer, rows, settings, encoders, encode, summary, workers=workers, batch=batch)
            unused = summary.unused()
            done |= {entry.name: [entry.identity, entry.inputs, unused.get(entry.name, "")] for entry in part}
    if not len(Dataset.open(work, empty=True)):
        raise UserError(f"no clip could be used; nothing was written to {output}{summary.reasons()}")
    if work != output:
        if output.is_dir():
            output.rmdir()  # it is empty
        work.rename(output)
    return summary
