"""Ids of records that cannot collide, nor can the names of their files: decided before the first clip is decoded."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.raw.manifest import RawClip
from data_pipelines.schema import FACE, flat_name


class Name(NamedTuple):
    """The record id of a whole clip, and what stands between it and the number of a cut."""

    whole: str
    separator: str = "-"

    def cut(self, number: int) -> str:
        """The id of one of several cuts."""
        return f"{self.whole}{self.separator}{number}"


def of(clip: RawClip) -> Name:
    """The name of a clip that is alone: "source/id", and "source/id-0" for its first cut."""
    return Name(f"{clip.source}/{clip.id}")


def assign(clips: Sequence[RawClip]) -> list[Name]:
    """One name for each clip, in order.

    A later clip whose name is taken gets "~2" or more appended. Where the cut of a clip could have the name of another
    clip ("talk" beside "talk-1"), its cuts are numbered "talk-c0" instead of "talk-0".
    """
    taken: set[str] = set()
    wholes = []
    for clip in clips:
        base = whole = of(clip).whole
        number = 2
        while flat_name(whole) in taken or flat_name(whole).endswith(f"@{FACE}"):
            whole, number = f"{base}~{number}", number + 1
        taken.add(flat_name(whole))
        wholes.append(whole)
    stems = {stem for key in taken if (stem := key.rstrip(string.digits)) != key}
    names = []
    for whole in wholes:
        separator = "-"
        while flat_name(whole) + separator in stems:
            separator += "c"
        names.append(Name(whole, separator))
    return names
