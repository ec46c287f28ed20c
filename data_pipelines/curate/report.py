"""report.html: hours in and kept, a histogram of each score with its thresholds, thumbnails, throughput."""

from __future__ import annotations

import base64
import pathlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from data_pipelines.curate import manifest, scores
from data_pipelines.curate.eligibility import GENERAL, KEPT, Clip, Fate
from data_pipelines.curate.store import Store
from omnihuman_jax import stores
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS

FILE = "report.html"
SHOWN = 6  # thumbnails of what a filter dropped, and as many of what it nearly dropped
BINS, WIDTH, HEIGHT = 40, 420, 110
STYLE = """
:root { color-scheme: light; --ink: #23262b; --soft: #5c636e; --line: #e3e6ea; --bar: #7aa7cf; --limit: #b4571f; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fafbfc; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 80px; }
h1 { font-size: 1.6rem; margin: 0 0 8px; } h2 { margin: 40px 0 8px; font-size: 1.25rem; }
h3 { margin: 26px 0 2px; font-size: 1.02rem; } p { max-width: 80ch; margin: 4px 0 10px; }
.soft { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; background: #fff; font-size: .9rem; margin: 8px 0; }
th, td { padding: 5px 11px; border: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; } thead th { background: #f1f3f5; }
svg { background: #fff; border: 1px solid var(--line); max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.thumbs { display: flex; flex-wrap: wrap; gap: 10px; margin: 6px 0; } figure { margin: 0; max-width: 330px; }
figure img { height: 72px; max-width: 330px; display: block; border: 1px solid var(--line); }
figcaption { font-size: .78rem; color: var(--soft); overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
"""


def write(
    directory: pathlib.Path,
    clips: Sequence[Clip],
    fates: Sequence[Fate],
    config: Mapping[str, Any],
    store: Store,
    seconds: float,
) -> None:
    """Writes the page, with its pictures inside, atomically. UserError if that is impossible.

    Args:
      seconds: that this run spent on scoring; 0 if nothing was left to score.
    """
    parts = [
        _summary(clips, fates),
        _reasons(fates),
        *(_group(group, clips, fates, config[group], store) for group in (GENERAL, "audio", "pose")),
        _others(clips, fates, config, store),
        _throughput(clips, seconds),
        _notes(clips, fates),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Curation</title>'
        f"<style>{STYLE}</style></head><body><main><h1>Curation</h1>{''.join(parts)}</main></body></html>\n"
    )
    try:
        stores.write_whole(directory / FILE, page.encode())
    except OSError as error:
        raise UserError(f"cannot write {directory / FILE}: {error.strerror}; free some space") from error


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _summary(clips: Sequence[Clip], fates: Sequence[Fate]) -> str:
    found, counts = manifest.hours(clips, fates), Counter(fate.fate for fate in fates)
    able = Counter(name for fate in fates for name in fate.conditions)
    whole = found["in"] or 1.0
    rows = [["in", str(len(clips)), f"{found['in']:.4f}", ""]]
    for name, label in ((KEPT, "kept: text, reference"), ("audio", "of these, audio"), ("pose", "of these, pose")):
        number = counts[KEPT] if name == KEPT else able[name]
        rows.append([label, str(number), f"{found[name]:.4f}", f"{100 * found[name] / whole:.1f} %"])
    unreadable = sum(count for name, count in counts.items() if name == "unreadable")
    note = f"<p>{unreadable} sources or clips could not be read; the manifest says why.</p>" if unreadable else ""
    return f"<h2>Hours</h2>{_table(('', 'clips', 'hours', 'share of hours in'), rows)}{note}"


def _reasons(fates: Sequence[Fate]) -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for fate in fates:
        for name, reasons in fate.reasons.items():
            counts[name][manifest.first_reason(reasons)] += 1
    rows = [[name, what, str(count)] for name in counts for what, count in counts[name].most_common(12)]
    return f"<h2>First reason</h2>{_table(('filter', 'reason', 'clips'), rows)}" if rows else ""


def _group(group: str, clips: Sequence[Clip], fates: Sequence[Fate], ranges: Mapping, store: Store) -> str:
    meaning = {
        GENERAL: "A clip outside of one of these ranges is dropped.",
        "audio": "Of the clips that are kept, those inside of all these ranges train audio.",
        "pose": "Of the clips that are kept, those inside of all these ranges train pose.",
    }[group]
    judged = [
        (clip, fate) for clip, fate in zip(clips, fates) if fate.scores and (group == GENERAL or fate.fate == KEPT)
    ]
    parts = [f"<h2>{escape(group.capitalize())} filters</h2><p>{meaning}</p>"]
    for name, limits in ranges.items():
        parts.append(_filter(name, limits["min"], limits["max"], judged, store))
    return "".join(parts)


def _filter(name: str, low: float, high: float, judged: Sequence[tuple[Clip, Fate]], store: Store) -> str:
    measured = [(clip, fate) for clip, fate in judged if fate.scores.get(name) is not None]
    what = scores.TABLE[name]
    limits = " and ".join(
        f"{word} {value:g}" for word, value in (("at least", low), ("at most", high)) if np.isfinite(value)
    )
    title = f"<h3>{escape(name)}</h3><p class='soft'>{escape(what.meaning)}; {escape(what.unit)}"
    title += f"; must be {limits}. " if limits else "; no limit. "
    if not measured:
        return f"{title}Measured in none of {len(judged)} clips.</p>"
    values = np.array([fate.scores[name] for _, fate in measured])
    out = (values < low) | (values > high)
    title += f"Outside: {out.sum()} of {len(measured)} clips; not measured: {len(judged) - len(measured)}.</p>"
    margin = np.minimum(values - low, high - values)  # negative outside
    dropped = [i for i in np.argsort(margin) if out[i]][:SHOWN]
    near = [i for i in np.argsort(margin) if not out[i] and np.isfinite(margin[i])][:SHOWN]
    rows = [_thumbs("Outside", [(measured[i][0], f"{values[i]:.3g}") for i in dropped], store)]
    rows.append(_thumbs("Nearly outside", [(measured[i][0], f"{values[i]:.3g}") for i in near], store))
    return title + histogram(values, low, high) + "".join(rows)


def histogram(values: np.ndarray, low: float, high: float) -> str:
    """SVG of how often values occur; thresholds that are finite are lines. The axis holds values and thresholds."""
    ends = [*values, *(limit for limit in (low, high) if np.isfinite(limit))]
    first, last = min(ends), max(ends)
    pad = 0.03 * (last - first) or 0.5
    first, last = first - pad, last + pad
    counts, _ = np.histogram(values, BINS, (first, last))
    step, top = WIDTH / BINS, max(counts.max(), 1)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{HEIGHT * (1 - n / top):.1f}" width="{step - 1:.1f}" '
        f'height="{HEIGHT * n / top:.1f}" fill="var(--bar)"/>'
        for i, n in enumerate(counts)
        if n
    )
    lines = ""
    for limit in (low, high):
        if np.isfinite(limit):
            x = WIDTH * (limit - first) / (last - first)
            lines += f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{HEIGHT}" stroke="var(--limit)" stroke-width="2"/>'
    labels = (
        f'<text x="2" y="{HEIGHT + 14}">{first:.3g}</text>'
        f'<text x="{WIDTH - 2}" y="{HEIGHT + 14}" text-anchor="end">{last:.3g}</text>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT + 14}" text-anchor="middle">highest bar: {top} clips</text>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 20}" width="{WIDTH}" role="img">{bars}{lines}{labels}</svg>'


def _thumbs(title: str, shown: Sequence[tuple[Clip, str]], store: Store) -> str:
    if not shown:
        return ""
    figures = ""
    for clip, text in shown:
        path = store.path(clip.key, ".jpg")
        picture = base64.b64encode(path.read_bytes()).decode() if path.is_file() else ""
        figures += (
            f'<figure><img alt="three frames of {escape(clip.name)}" src="data:image/jpeg;base64,{picture}">'
            f"<figcaption>{escape(clip.name)}: {escape(text)}</figcaption></figure>"
        )
    return f'<p class="soft">{escape(title)}:</p><div class="thumbs">{figures}</div>'


def _others(clips: Sequence[Clip], fates: Sequence[Fate], config: Mapping[str, Any], store: Store) -> str:
    copies = [
        (clip, reason)
        for clip, fate in zip(clips, fates)
        for reason in fate.reasons.get(GENERAL, ())
        if reason.startswith("a copy") and fate.scores
    ]
    short = [clip for clip in clips if clip.span.problem]
    parts = [f"<h2>Copies and short shots</h2><p>{len(copies)} clips are copies of others. "]
    length, least = sum(clip.span.last - clip.span.first for clip in short) / FPS, config["cuts"]["min_seconds"]
    parts.append(f"{len(short)} shots ({length:.1f} s) are shorter than {least:g} s and were not scored.</p>")
    parts.append(_thumbs("Copies", copies[:SHOWN], store))
    return "".join(parts)


def _throughput(clips: Sequence[Clip], seconds: float) -> str:
    """Seconds a step took in all runs that made these scores, by the process that did the work."""
    steps: dict[str, float] = defaultdict(float)
    frames = count = 0
    for clip in {clip.key: clip for clip in clips if clip.result and "seconds" in clip.result}.values():
        count += 1
        frames += clip.result["frames"]
        for step, spent in clip.result["seconds"].items():
            steps[step] += spent
    if not count:
        return ""
    rows = [
        [step, f"{spent:.1f}", f"{3600 * count / max(spent, 1e-9):,.0f}", f"{frames / FPS / max(spent, 1e-9):.1f}"]
        for step, spent in steps.items()
    ]
    total = sum(steps.values())
    rows.append(["together", f"{total:.1f}", f"{3600 * count / total:,.0f}", f"{frames / FPS / total:.1f}"])
    now = f" This run spent {seconds:.1f} s on scoring." if seconds else " This run scored nothing anew."
    head = ("step", "process seconds", "clips per core-hour", "times real time")
    return f"<h2>Throughput</h2><p>{count} clips, {frames / FPS / 3600:.4f} hours.{now}</p>{_table(head, rows)}"


def _notes(clips: Sequence[Clip], fates: Sequence[Fate], most: int = 200) -> str:
    rows = []
    for clip, fate in zip(clips, fates):
        why = [f"{name}: {reason}" for name, reasons in fate.reasons.items() for reason in reasons]
        rows.append([clip.name, fate.fate, ", ".join(fate.conditions), "; ".join(why), "; ".join(fate.notes)])
    more = f"<p>The first {most} of {len(rows)}; manifest.jsonl has all.</p>" if len(rows) > most else ""
    return f"<h2>Clips</h2>{more}{_table(('clip', 'fate', 'conditions', 'reasons', 'notes'), rows[:most])}"
