"""Writes report.html and report.json of a run, and their media under media/."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines import schema
from data_pipelines.raw import media
from experiments.common.files import write_whole
from experiments.evaluate.rendered import Comparison, Evaluation
from experiments.report import page, plots
from omnihuman_jax import conditions
from omnihuman_jax.errors import UserError
from omnihuman_jax.frames import FPS

STRIPS = 3  # clips shown per metric


@dataclasses.dataclass(frozen=True)
class Video:
    """A generated mp4 with a title and a description."""

    path: Path
    title: str
    text: str


def summarise_data(dataset: schema.Dataset, missing: Sequence[str] = ()) -> dict[str, Any]:
    """Counts of clips by source and split, and the encoders; `missing` names what could not be fetched."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in dataset.index:
        groups.setdefault((entry["source"], entry["split"]), []).append(entry)
    rows = []
    for (source, split), records in sorted(groups.items()):
        sizes = sorted({(8 * e["shape"][1], 8 * e["shape"][2]) for e in records})
        entries = [e for e in records if e["view"] == schema.FULL]
        rows.append(
            {
                "source": source,
                "split": split,
                "clips": len(entries),
                "with": {name: sum(e.get(name, False) for e in entries) for name in conditions.selecting()},
                "crops": len(records) - len(entries),
                "seconds": sum(e["frames"] for e in entries) / FPS,
                "sizes": ", ".join(f"{h}x{w}" for h, w in sizes),
            }
        )
    return {"groups": rows, "missing": list(missing), "encoders": dict(dataset.meta.encoders)}


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Logged steps in order, each once even if it ran again after a restart; UserError if there are none."""
    path, remedy = workdir / "metrics.jsonl", "train first, or name another --workdir"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}); {remedy}") from error
    if not lines:
        raise UserError(f"{path} is empty; {remedy}")
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def read_gains(workdir: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, condition gain) of evaluation.jsonl in order, each step once; empty if none was measured."""
    path = workdir / "evaluation.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]  # a killed process may leave half a line
    return sorted({line["step"]: line["condition_gain"] for line in lines if "condition_gain" in line}.items())


def summarise_training(lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """Per stage: first and last loss, step time, target and realised ratios."""
    stages = {}
    for name in dict.fromkeys(line["stage"] for line in lines):
        part = [line for line in lines if line["stage"] == name]
        tenth = max(1, len(part) // 10)
        stages[name] = {
            "steps": config["stages"][name]["steps"],
            "first_loss": float(np.mean([line["loss"] for line in part[:tenth]])),
            "last_loss": float(np.mean([line["loss"] for line in part[-tenth:]])),
            "step_seconds": float(np.median([line["step_seconds"] for line in part])),
            "target": dict(config["stages"][name]["ratios"]),
            "realised": part[-1]["scheduled_ratio"],
            "after guidance dropout": part[-1]["active_ratio"],
        }
    return {"stages": stages}


def describe_device() -> str:
    """Devices and cores of this machine, in words."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = devices[0].device_kind if devices[0].platform != "cpu" else f"CPU ({platform.machine()})"
    many = f", {len(devices)} simulated devices" if devices[0].platform == "cpu" and len(devices) > 1 else ""
    return f"{kind} on {cores} cores{many}; JAX {jax.__version__}"


def write_comparisons(
    workdir: Path, dataset: schema.Dataset, evaluation: Evaluation
) -> dict[str, list[dict[str, Any]]]:
    """Strips and side-by-side videos of the first clips, under media/; metric -> descriptions of its strips."""
    strips: dict[str, list[dict[str, Any]]] = {}
    for name, comparisons in evaluation.comparisons.items():
        strips[name] = [_write_comparison(workdir, dataset, name, i, c) for i, c in enumerate(comparisons[:STRIPS])]
    return strips


def _write_comparison(workdir: Path, dataset: schema.Dataset, name: str, i: int, made: Comparison) -> dict[str, Any]:
    image, video = (workdir / "media" / f"evaluation_{name}_{i}.{kind}" for kind in ("png", "mp4"))
    rows = list(made.videos.values())
    plots.write_strip(image, rows)
    path, seconds = dataset.clip_path(made.clip.index), len(rows[0]) / FPS
    sound = media.read_audio(path, end=seconds) if media.has_audio(path) else None
    media.write_mp4(video, np.concatenate(rows, axis=2), audio=sound)
    return {
        "id": made.clip.record["id"],
        "rows": list(made.videos),
        "image": f"media/{image.name}",
        "video": f"media/{video.name}",
    }


def _place_video(workdir: Path, video: Video) -> dict[str, str]:
    """Path of a video relative to the report; copied into media/ when it lies elsewhere."""
    path = Path(video.path).absolute()
    if not path.is_relative_to(workdir):
        (workdir / "media").mkdir(exist_ok=True)
        path = Path(shutil.copy2(path, workdir / "media" / path.name))
    return {"path": path.relative_to(workdir).as_posix(), "title": video.title, "text": video.text}


def write_report(
    workdir: str | Path,
    dataset: schema.Dataset,
    *,
    evaluation: Evaluation | None,
    videos: Sequence[Video] = (),
    phases: Mapping[str, float] | None = None,
    missing: Sequence[str] = (),
    notes: Sequence[str] = (),
    device: str | None = None,
) -> Path:
    """Writes report.json, report.html and their media; returns the path of report.html.

    Args:
      workdir: of the run, with config.json and metrics.jsonl.
      dataset: the training data.
      evaluation: from `evaluate_checkpoint`, or None if nothing was measured.
      videos: generated videos to embed.
      phases: wall seconds of each phase, in order.
      missing: packages or clips that could not be fetched.
      notes: sentences for the top of the page.
      device: the machine, in words; default: from JAX.

    Raises:
      UserError: the run has no config or metrics.
    """
    workdir = Path(workdir).absolute()
    lines = read_metrics(workdir)
    try:
        config = json.loads((workdir / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {workdir}/config.json ({type(error).__name__}); train first") from error
    training = summarise_training(lines, config)
    gains = read_gains(workdir)
    strips = write_comparisons(workdir, dataset, evaluation) if evaluation else {}
    size = config["model"]
    blocks = f"{size['num_dual_blocks']} dual-stream and {size['num_single_blocks']} single-stream blocks"
    report = {
        "title": f"OmniHuman-1 in JAX: the run in {workdir.name}",
        "device": device or describe_device(),
        "model": f"{blocks}, width {size['hidden_size']}",
        "notes": list(notes),
        "videos": [_place_video(workdir, video) for video in videos],
        "evaluation": evaluation.result if evaluation else None,
        "training": training,
        "condition_gain": [{"step": step, "gain": gain} for step, gain in gains],
        "data": summarise_data(dataset, missing),
        "phases": dict(phases or {}),
    }
    html = page.page(
        report,
        strips=strips,
        loss_svg=plots.loss_curves(lines),
        gain_svg=plots.gain_curves(gains) if gains else "",
        ratio_svg=plots.ratio_bars(training["stages"]),
        time_svg=plots.time_bar(report["phases"]) if report["phases"] else "<p>Not recorded.</p>",
    )
    write_whole(workdir / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_whole(workdir / "report.html", html)
    return workdir / "report.html"
