"""The report's pictures: SVG plots by matplotlib, and strips of frames."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from omnihuman_jax import conditions
from omnihuman_jax.training import condition_gain

RIGHT, WRONG, LIMIT, INK = "#1f6fb2", "#d5702a", "#8a8f98", "#30343b"
STAGE_COLOURS = ("#3a7ca5", "#6a9a3b", "#a8557f", "#8d7a3c", "#5d5aa6")
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same data give the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def _svg(figure: Figure) -> str:
    """A figure as an <svg> element without XML head."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def smooth(values: Sequence[float], span: int) -> np.ndarray:
    """Centred running mean over up to `span` values, shorter at the ends."""
    values, half = np.asarray(values, np.float64), max(0, span // 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def loss_curves(lines: Sequence[Mapping[str, Any]]) -> str:
    """Loss over steps, with its running mean: by stage on the left, by condition on the right."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 3.0))
        left, right = figure.subplots(1, 2, sharey=True)
        stages = list(dict.fromkeys(line["stage"] for line in lines))
        for stage, colour in zip(stages, itertools.cycle(STAGE_COLOURS)):
            part = [line for line in lines if line["stage"] == stage]
            steps, losses = [line["step"] for line in part], [line["loss"] for line in part]
            left.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
            left.plot(steps, smooth(losses, max(3, len(losses) // 8)), color=colour, linewidth=2, label=stage)
        selecting = conditions.selecting()
        without = "_".join(f"no_{name}" for name in selecting)
        labels = {without: "none of " + ", ".join(selecting)} | {name: name for name in selecting}
        for (name, label), colour in zip(labels.items(), (LIMIT, RIGHT, WRONG, *STAGE_COLOURS)):
            known = [(x["step"], x["loss_by_condition"][name]) for x in lines if name in x["loss_by_condition"]]
            if known:
                steps, losses = zip(*known)
                right.plot(steps, smooth(losses, max(3, len(losses) // 8)), color=colour, linewidth=2, label=label)
        left.set_title("loss by stage", loc="left")
        right.set_title("loss of the samples that had …", loc="left")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.grid(alpha=0.25)
            if axes.lines:
                axes.legend(frameon=False)
        left.set_ylabel("flow-matching loss")
        return _svg(figure)


def gain_curves(gains: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """Condition gain over steps, a panel a condition: against another clip's and none, mean of the noise levels.

    Args:
      gains: (step, what `omnihuman_jax.training.condition_gain.ConditionGain` returned), in order.
    """
    names = [name for name in conditions.names() if any(name in gain for _, gain in gains)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 2.6))
        for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names):
            means = [(step, *condition_gain.mean_gains(gain)[name]) for step, gain in gains if name in gain]
            for variant, label, colour in (("wrong", "another clip's", RIGHT), ("none", "none", WRONG)):
                known = [(step, *by_variant[variant]) for step, _, by_variant in means if variant in by_variant]
                if known:
                    steps, mean, error = np.array(known).T
                    axes.plot(steps, mean, color=colour, linewidth=2, label=f"against {label}")
                    axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
            axes.axhline(0, color=LIMIT, linewidth=1)
            axes.set_title(f"{name} ({means[-1][1]})", loc="left")
            axes.set_xlabel("step")
            axes.grid(alpha=0.25)
        figure.axes[0].set_ylabel("gain, % of the loss")
        figure.axes[0].legend(frameon=False, fontsize=8)  # text: every clip has it
        figure.tight_layout()
        return _svg(figure)


def ratio_bars(stages: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Target, realised and (after guidance dropout) effective share of each condition, one panel per stage."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 2.4))
        panels = np.atleast_1d(figure.subplots(1, max(1, len(stages)), sharey=True))
        where = np.arange(len(conditions.table()))
        kinds = (("target", "#c9ccd1"), ("realised", RIGHT), ("after guidance dropout", "#8fb8d9"))
        for axes, (stage, ratios) in zip(panels, stages.items()):
            for i, (kind, colour) in enumerate(kinds):
                values = [ratios[kind].get(name, 0.0) for name in conditions.names()]
                axes.bar(where + (i - 1) * 0.28, values, 0.26, color=colour, label=kind)
            axes.set_xticks(where, conditions.names())
            axes.set_title(stage, loc="left")
            axes.set_ylim(0, 1)
        panels[0].set_ylabel("share of samples")
        if stages:
            panels[-1].legend(frameon=False, loc="upper right", fontsize=8)
        return _svg(figure)


def metric_dots(measure: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """The rows of a metric, top to bottom: a dot for each clip, the mean as a bar, its 95 % interval as a line."""
    colours = {"right": RIGHT, "wrong": WRONG}
    rng = np.random.default_rng(0)  # spreads dots that would overlap
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.42 * len(measure["rows"]) + 0.7))
        axes = figure.subplots()
        for y, (name, row) in enumerate(measure["rows"].items()):
            colour = colours.get(name, LIMIT)
            values = [v for v in row["values"] if v is not None]
            axes.scatter(values, y + rng.uniform(-0.16, 0.16, len(values)), s=14, color=colour, alpha=0.45, linewidth=0)
            if row["mean"] is not None:
                axes.plot([row["mean"]] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2.5)
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
        axes.set_yticks(range(len(measure["rows"])), [labels[name] for name in measure["rows"]])
        axes.set_ylim(len(measure["rows"]) - 0.5, -0.5)
        axes.set_xlabel(f"{measure['unit']} ({measure['better']} is better)")
        axes.grid(axis="x", alpha=0.25)
        return _svg(figure)


def time_bar(phases: Mapping[str, float]) -> str:
    """Wall time of each phase, in seconds, as horizontal bars."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.3 * len(phases) + 0.6))
        axes = figure.subplots()
        axes.barh(range(len(phases)), list(phases.values()), color=RIGHT, height=0.6)
        for y, seconds in enumerate(phases.values()):
            axes.text(seconds, y, f" {seconds:.0f} s", va="center")
        axes.set_yticks(range(len(phases)), list(phases))
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        return _svg(figure)


def write_strip(path: str | Path, videos: Sequence[np.ndarray], *, count: int = 8) -> Path:
    """Writes a PNG with a row for each video (F,h,w,3) uint8 of one size: `count` frames from the first to the last."""
    gap, rows = 2, []
    for video in videos:
        shown = video[np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)]
        padded = np.pad(shown, ((0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=255)
        rows.append(np.concatenate(list(padded), axis=1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
    return path
