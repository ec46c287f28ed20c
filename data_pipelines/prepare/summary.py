"""Counts accepted and rejected clips for the table printed at the end."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.raw.manifest import RawClip
from data_pipelines.schema import FACE, clip_id
from omnihuman_jax import conditions
from omnihuman_jax.frames import FPS


class Summary:
    """Accepted clips and face crops by source, and rejected raw clips with their reasons."""

    def __init__(self):
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._sizes: dict[str, Counter[str]] = defaultdict(Counter)
        self.rejected: list[tuple[str, str]] = []
        self._captions: Counter[str] = Counter()
        self._used: set[str] = set()

    def add_captions(self, captions: Iterable[str], encoder: Any) -> None:
        """Counts the captions of clips that the encoder does not read as they are; see `TextEncoder.problem`."""
        problem = getattr(encoder, "problem", lambda _: "")  # states from a file are of any length
        for caption, count in Counter(captions).items():
            self._captions["all"] += count
            self._captions[problem(caption)] += count

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds an accepted record."""
        whole = clip_id(record["id"])
        self._used |= {whole, re.sub("-c*[0-9]+$", "", whole)}  # a cut's number, see `names.Name`
        self._sizes[record["source"]][f"{record['height']}x{record['width']}"] += 1
        counts = self._counts[record["source"]]
        if record["view"] == FACE:  # a crop shares its seconds and conditions with a clip that is counted
            counts["faces"] += 1
            return
        counts["clips"] += 1
        counts["frames"] += record["frames"]
        for name in conditions.selecting():
            counts[name] += len(record[conditions.get(name).record]) > 0
        counts["heldout"] += record["split"] == "heldout"

    def reject(self, clip: RawClip, reason: str) -> None:
        """Adds a raw clip of which nothing, or not all, is used."""
        self.rejected.append((f"{clip.source}/{clip.id}", " ".join(reason.split())))

    def unused(self) -> dict[str, str]:
        """Name -> reason of the raw clips that have no record at all."""
        return {name: reason for name, reason in self.rejected if name not in self._used}

    def reasons(self) -> str:
        """ "; rejected: ..." with the first rejected clip, or "" if there is none."""
        return f"; rejected: {self.rejected[0][0]}: {self.rejected[0][1]}" if self.rejected else ""

    def table(self) -> str:
        """One line per source, then one line per rejected clip, and their number."""
        counted = (*conditions.selecting(), "heldout", "faces")
        columns = ("source", "clips", "seconds", *counted, "sizes")
        rows = [columns]
        for source, counts in sorted(self._counts.items()):
            sizes = ", ".join(f"{count} of {size}" for size, count in sorted(self._sizes[source].items()))
            numbers = [str(counts[name]) for name in counted]
            rows.append((source, str(counts["clips"]), f"{counts['frames'] / FPS:.1f}", *numbers, sizes))
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"rejected {name}: {reason}" for name, reason in self.rejected]
        if self.rejected:
            lines.append(f"clips rejected: {len({name for name, _ in self.rejected})}")
        for problem, count in sorted(self._captions.items()):
            if problem not in ("", "all"):
                whole = self._captions["all"]
                lines.append(f"captions {problem}: {count} of {whole} ({100 * count / whole:.1f} %)")
        return "\n".join(lines)
