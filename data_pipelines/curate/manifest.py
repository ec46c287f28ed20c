"""What the curation writes about each clip: manifest.jsonl (its fate) and scores.jsonl (its scores)."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.curate import scores
from data_pipelines.curate.eligibility import GENERAL, KEPT, Clip, Fate
from omnihuman_jax import stores
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS

MANIFEST, SCORES = "manifest.jsonl", "scores.jsonl"
NOT_ENCODED = "not encoded"  # the fate of a clip that was kept and then made no record


def rows(clips: Sequence[Clip], fates: Sequence[Fate], not_encoded: Mapping[str, str]) -> list[dict[str, Any]]:
    """One object a clip, without paths of this machine, so that the same input gives the same bytes anywhere."""
    found = []
    for clip, fate in zip(clips, fates, strict=True):
        problem = not_encoded.get(clip.name, "") if fate.fate == KEPT else ""
        row = {
            "clip": clip.name,
            "source": clip.clip.source,
            "start": round(clip.clip.start + clip.span.first / FPS, 3),
            "seconds": round((clip.span.last - clip.span.first) / FPS, 3),
            "fate": NOT_ENCODED if problem else fate.fate,
            "conditions": [] if problem else list(fate.conditions),
            "reasons": fate.reasons | ({GENERAL: [problem]} if problem else {}),
            "notes": fate.notes,
        }
        if clip.span.box:
            row["crop"] = list(clip.span.box)
        if fate.sound_late:
            row["sound_late_seconds"] = round(fate.sound_late, 3)
        if fate.scores:
            row["framing"] = clip.result["framing"]
        found.append(row)
    return found


def write(
    directory: pathlib.Path, clips: Sequence[Clip], fates: Sequence[Fate], not_encoded: Mapping[str, str] | None = None
) -> None:
    """Writes both files; UserError if that is impossible.

    Args:
      not_encoded: name -> reason of clips that were kept and then made no record.
    """
    scored = [{"clip": clip.name, "scores": fate.scores} for clip, fate in zip(clips, fates) if fate.scores]
    write_lines(directory / MANIFEST, rows(clips, fates, not_encoded or {}))
    write_lines(directory / SCORES, scored)


def write_lines(path: pathlib.Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines, atomically."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        stores.write_whole(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or choose another") from error


def hours(clips: Sequence[Clip], fates: Sequence[Fate]) -> dict[str, float]:
    """Hours that came in, that were kept, and that may train audio and pose."""
    found = dict.fromkeys(("in", KEPT, "audio", "pose"), 0.0)
    for clip, fate in zip(clips, fates, strict=True):
        length = (clip.span.last - clip.span.first) / FPS / 3600
        found["in"] += length
        for name in ("audio", "pose"):
            found[name] += length * (name in fate.conditions)
        found[KEPT] += length * (fate.fate == KEPT)
    return found


def table(clips: Sequence[Clip], fates: Sequence[Fate], most: int = 40) -> str:
    """What was kept, which filter decided how often, and the fates of the first clips, for the terminal."""
    found = hours(clips, fates)
    counts = Counter(fate.fate for fate in fates)
    lines = ["clips: " + ", ".join(f"{count} {fate}" for fate, count in sorted(counts.items()))]
    for name, value in found.items():
        share = "" if name == "in" else f", {100 * value / (found['in'] or 1):.1f} %"
        lines.append(f"hours {name}: {value:.4f}{share}")
    for name in (GENERAL, "audio", "pose"):
        firsts = Counter(first_reason(fate.reasons[name]) for fate in fates if name in fate.reasons)
        if firsts:
            lines.append(f"first reason, {name}: " + ", ".join(f"{what} {n}" for what, n in firsts.most_common(8)))
    lines += [_line(clip, fate) for clip, fate in list(zip(clips, fates))[:most]]
    return "\n".join(lines)


def first_reason(reasons: Sequence[str]) -> str:
    """The kind of the first reason: the name of a score, or a few words."""
    word = reasons[0].split(" ")[0]
    if reasons[0].startswith("cannot read"):  # each names its file
        return "cannot be read"
    return word if word in scores.TABLE else reasons[0].split(": ")[0].split(" (")[0].split(";")[0][:60]


def _line(clip: Clip, fate: Fate) -> str:
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in fate.reasons.items())
    parts = [f"{clip.name}: {fate.fate}", " ".join(fate.conditions), reasons, *(f"[{note}]" for note in fate.notes)]
    return " | ".join(filter(None, parts))
