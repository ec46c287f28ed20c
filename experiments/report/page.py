"""report.html from the data of report.json, the texts of the metrics, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from experiments.report import plots
from omnihuman_jax.evaluation.metrics.metric import Metric
from omnihuman_jax.evaluation.metrics.registry import METRICS

STYLE = """
:root { color-scheme: light; --ink: #23262b; --soft: #5c636e; --line: #e3e6ea; --accent: #1f6fb2; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: #fafbfc; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; } h2 { margin: 44px 0 8px; font-size: 1.3rem; }
h3 { margin: 26px 0 4px; font-size: 1.05rem; }
p { max-width: 75ch; margin: 6px 0 12px; } .soft { color: var(--soft); font-size: .92rem; }
table { border-collapse: collapse; background: #fff; font-size: .92rem; margin: 8px 0; }
th, td { padding: 6px 12px; border: 1px solid var(--line); text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } thead th { background: #f1f3f5; font-weight: 600; }
.scroll { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 16px; }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figure video, figure img { width: 100%; display: block; border-radius: 4px; background: #000; }
figcaption { font-size: .88rem; color: var(--soft); margin-top: 6px; } figcaption b { color: var(--ink); }
.strip { margin: 12px 0; } .strip img { background: #fff; image-rendering: auto; }
.right td:first-child { color: #1f6fb2; font-weight: 600; } .wrong td:first-child { color: #b4571f; font-weight: 600; }
.verdict { border-left: 4px solid var(--accent); padding: 4px 12px; background: #fff; } nav a { margin-right: 16px; }
"""


def number(value: float | None, digits: int = 2) -> str:
    """A number as text; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """An HTML table of plain-text cells."""
    marks = list(classes) + [""] * (len(rows) - len(classes))
    body = "".join(
        f'<tr class="{escape(mark)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for mark, row in zip(marks, rows)
    )
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def verdict(gap: Mapping[str, Any]) -> str:
    """A sentence on whether right differs from wrong, from the gap of a metric."""
    if gap["low"] is None:
        return "Too few pairs of clips to say whether the model follows this condition."
    span = f"{number(gap['mean'])} (95 % interval {number(gap['low'])} to {number(gap['high'])}, {gap['n']} clips)"
    if gap["low"] > 0:
        return f"Right is better than wrong by {span}: the condition has a measurable effect."
    if gap["high"] < 0:
        return f"Right is worse than wrong (difference {span}): something is off."
    return f"Right and wrong differ by {span}: no measurable effect of this condition in this run."


def metric_section(metric: Metric, measure: Mapping[str, Any], strips: Sequence[Mapping[str, Any]]) -> str:
    """A metric: its texts, the verdict, the numbers (`evaluate_rendered`) as table and plot, strips of frames."""
    labels, rows = {row.name: row.label for row in metric.rows}, []
    for name, row in measure["rows"].items():
        interval = "-" if row["low"] is None else f"{number(row['low'])} … {number(row['high'])}"
        numbers = [number(row["mean"]), number(row["std"]), interval, str(row["n"]), str(row["left_out"])]
        rows.append([labels[name], *numbers])
    head = ("frames", "mean", "std", "95 % interval of the mean", "clips", "left out")
    parts = [f"<h3>{escape(metric.title)}</h3><p>{escape(metric.explanation)}</p>"]
    if "gap" in measure:
        parts.append(f'<p class="verdict">{escape(verdict(measure["gap"]))}</p>')
    parts += [
        f'<p class="soft">{escape(metric.unit)}; {metric.better} is better.</p>',
        table(head, rows, list(measure["rows"])),
        plots.metric_dots(measure, labels),
    ]
    if "attributes" in measure:
        parts.append(f'<p class="soft">Compared: {escape(", ".join(measure["attributes"]))}.</p>')
    return "".join(parts) + "".join(strip_figure(strip) for strip in strips)


def strip_figure(strip: Mapping[str, Any]) -> str:
    """A strip of frames with the names of its rows and its side-by-side video."""
    names = ", ".join(strip["rows"])
    video = f' <a href="{escape(strip["video"])}">side by side as a video</a>' if strip.get("video") else ""
    return (
        f'<figure class="strip"><img loading="lazy" alt="frames of {escape(strip["id"])}: {escape(names)}" '
        f'src="{escape(strip["image"])}"><figcaption><b>{escape(strip["id"])}</b>, rows from the top: '
        f"{escape(names)}.{video}</figcaption></figure>"
    )


def video_cards(videos: Sequence[Mapping[str, str]]) -> str:
    """Embedded videos with their descriptions."""
    cards = "".join(
        f'<figure><video controls loop playsinline preload="metadata" src="{escape(v["path"])}"></video>'
        f"<figcaption><b>{escape(v['title'])}</b><br>{escape(v['text'])}</figcaption></figure>"
        for v in videos
    )
    return f'<div class="cards">{cards}</div>'


def evaluation_section(evaluation: Mapping[str, Any] | None, strips: Mapping[str, Sequence[Any]]) -> str:
    """The section on how well the model follows each condition."""
    if evaluation is None:
        return '<h2 id="conditions">How well does the model follow each condition?</h2><p>Not measured in this run.</p>'
    sampling = ", ".join(f"{key} {value}" for key, value in evaluation.get("sampling", {}).items())
    parts = [
        '<h2 id="conditions">How well does the model follow each condition?</h2>',
        f"<p>On held-out <b>rendered</b> (synthetic) speakers and sentences that were not in the training data: "
        f"{evaluation['frames']} frames ({evaluation['frames'] / 25:.2f} s) of each clip, generated with its own "
        f"conditions and again with one condition of another clip, always compared with its own truth. "
        f"Settings: {escape(sampling)}.</p>",
        "<p>The numbers come from a small network, the <i>probe</i>, which reads keypoints, mouth opening and "
        "appearance in the frames. It was trained on rendered frames, so they are proxies for rendered people at this "
        "size; they are not the published metrics and cannot be compared with other work. Two rows show the limits: "
        "what the probe reads in the real frames, and in the real frames through the VAE, which no model on these "
        "latents can beat.</p>",
        probe_table(evaluation.get("probe", {})),
    ]
    for note in evaluation["notes"]:
        parts.append(f'<p class="verdict">Not measured: {escape(note)}.</p>')
    for name, measure in evaluation["measures"].items():
        parts.append(metric_section(METRICS[name], measure, strips.get(name, ())))
    return "".join(parts)


def probe_table(header: Mapping[str, Any]) -> str:
    """The probe's own accuracy on held-out rendered frames."""
    accuracy = header.get("accuracy", {})
    if not accuracy:
        return '<p class="soft">The accuracy of this probe was not recorded.</p>'
    head = (
        "probe on held-out rendered clips",
        "mouth correlation",
        "mouth error (0 to 1)",
        "keypoint error, % of diagonal",
        "visibility correct",
        "attributes it can read",
        "clips",
    )
    names = {"rendered": "as rendered", "reconstructed": "through the VAE"}
    rows = [
        [
            names.get(kind, kind),
            f"{number(a['mouth_correlation'], 3)} ± {number(a['mouth_correlation_std'], 3)}",
            number(a["mouth_error"], 3),
            number(a["keypoint_error_percent"]),
            f"{100 * a['visibility_accuracy']:.1f} %",
            f"{sum(v >= 1 / 3 for v in a['attribute_r2'].values())} of {len(a['attribute_r2'])}",
            str(a["clips"]),
        ]
        for kind, a in accuracy.items()
    ]
    return table(head, rows)


def training_section(training: Mapping[str, Any], loss_svg: str, ratio_svg: str) -> str:
    """Loss curves and ratios."""
    rows = []
    for stage, info in training["stages"].items():
        for condition, target in info["target"].items():
            shares = (target, info["realised"].get(condition), info["after guidance dropout"].get(condition))
            rows.append([stage, condition, *(number(share, 3) for share in shares)])
    losses = [
        [stage, str(info["steps"]), *(number(info[f"{end}_loss"], 4) for end in ("first", "last"))]
        + [number(info["step_seconds"])]
        for stage, info in training["stages"].items()
    ]
    return (
        '<h2 id="training">Training</h2>'
        "<p>Each stage adds a stronger condition. First and last loss are means over the first and last tenth of the "
        "logged steps; stages see different mixtures, so their losses are not comparable with one another.</p>"
        + table(("stage", "steps", "first loss", "last loss", "seconds a step (median)"), losses)
        + loss_svg
        + "<h3>Realised against target ratios</h3><p>Share of training samples that had each condition. “After "
        "guidance dropout” is what the network saw: some text and audio is dropped for classifier-free guidance.</p>"
        + ratio_svg
        + table(("stage", "condition", "target", "realised", "after guidance dropout"), rows)
    )


def gain_section(gain_svg: str) -> str:
    """The curves of the condition gain, or that they were not measured."""
    if not gain_svg:
        return '<h3 id="gain">Condition gain</h3><p>Not measured in this run (evaluation.gain_every).</p>'
    return (
        '<h3 id="gain">Condition gain</h3><p>By how much the right condition lowers the loss on held-out clips at '
        "fixed noise, against that of another clip and against none: mean of three noise levels and its standard "
        "error, where the condition shows. A condition is being learned where both curves are above zero.</p>"
        + gain_svg
    )


def obeyed(evaluation: Mapping[str, Any] | None) -> str:
    """One paragraph that says in words what the generated videos obey, from the gaps of the metrics."""
    if evaluation is None:
        return ""
    words = {"obeyed": [], "not shown to be obeyed": [], "not measured": []}
    for name, measure in evaluation["measures"].items():
        if "gap" not in measure:  # a metric of the picture, not of a condition
            continue
        low = measure["gap"]["low"]
        key = "not measured" if low is None else "obeyed" if low > 0 else "not shown to be obeyed"
        condition, _, question = METRICS[name].title.rstrip("?").partition(": ")
        words[key].append(f"{condition.lower()} ({question})" if question else condition)
    told = "; ".join(f"<b>{key}</b>: {escape(', '.join(names))}" for key, names in words.items() if names)
    return f'<p class="verdict">On held-out people, {told}.</p>' if told else ""


def data_section(data: Mapping[str, Any]) -> str:
    """The training data."""
    rows = [
        [g["source"], g["split"], str(g["clips"]), *map(str, g["with"].values())]
        + [str(g["crops"]), f"{g['seconds']:.0f}", g["sizes"]]
        for g in data["groups"]
    ]
    having = [f"with {name}" for name in data["groups"][0]["with"]]
    head = ("source", "split", "clips", *having, "also cropped to the face", "seconds", "sizes (height x width)")
    encoders = "; ".join(f"{name} by <b>{escape(encoder)}</b>" for name, encoder in data["encoders"].items())
    missing = "; ".join(data["missing"]) or "none"
    return (
        '<h2 id="data">Data</h2><p>“real” clips are recordings of people; “synthetic” clips are rendered people who '
        "speak synthesised speech, with exact keypoints and mouth opening.</p>"
        + table(head, rows)
        + f"<p>Features: {encoders}. Captions of the real clips were written by hand; those of rendered "
        f"clips are made from the renderer's settings.</p><p>Packages or clips that could not be fetched: "
        f"{escape(missing)}.</p>"
    )


def page(
    report: Mapping[str, Any],
    *,
    strips: Mapping[str, Sequence[Any]],
    loss_svg: str,
    gain_svg: str,
    ratio_svg: str,
    time_svg: str,
) -> str:
    """The page, from the content of report.json, strips for `strip_figure` by metric, and plots as SVG."""
    total = sum(report["phases"].values())
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report["title"])}</title><style>{STYLE}</style></head><body><main>
<h1>{escape(report["title"])}</h1>
<p class="soft">{escape(report["device"])} · {total / 60:.1f} minutes in all · {escape(report["model"])}</p>
<nav><a href="#videos">Videos</a><a href="#conditions">Conditions</a><a href="#training">Training</a>
<a href="#data">Data</a><a href="#time">Time</a></nav>
<p>A small model of the OmniHuman-1 design, trained for minutes rather than for days: it shows that every part is there
and works together, not how good the method is at full size. The numbers below say how far it got.</p>
{f"<ul>{notes}</ul>" if notes else ""}
{obeyed(report["evaluation"])}
<h2 id="videos">Generated videos</h2>
{video_cards(report["videos"]) if report["videos"] else "<p>None were generated in this run.</p>"}
{evaluation_section(report["evaluation"], strips)}
{training_section(report["training"], loss_svg, ratio_svg)}
{gain_section(gain_svg)}
{data_section(report["data"])}
<h2 id="time">Time</h2>{time_svg}
<p class="soft">The same numbers, for programs: <a href="report.json">report.json</a>.</p>
</main></body></html>
"""
