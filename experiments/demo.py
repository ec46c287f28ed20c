"""All of OmniHuman at small size: data, three stages of training, generated videos, a report.

    python -m experiments.demo --workdir=runs/demo

runs the commands that a user would run, and prints each. Restarted, it continues where it stopped.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from data_pipelines.raw import media
from data_pipelines.schema import FACE, Dataset
from experiments.common import cli
from omnihuman_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory of all outputs.")
_CONFIG = flags.DEFINE_string("config", "experiments/configs/demo.py", "Preset to train, PRESET.py[:ARG].")
_CLIPS = flags.DEFINE_integer("clips", 320, "Rendered clips to make.", lower_bound=8)
_SEED = flags.DEFINE_integer("seed", 0, "Of the rendered clips.")
_EVALUATION_CLIPS = flags.DEFINE_integer("evaluation_clips", 6, "Held-out clips per metric in the report.")

CROPS = "48x48"  # of faces, beside the full frames


@dataclasses.dataclass
class Journal:
    """Wall seconds of each phase and what could not be fetched, saved in a file for a restart."""

    path: Path
    phases: dict[str, float]
    missing: list[str]

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Reads the journal, or starts a new one."""
        saved = json.loads(path.read_text()) if path.is_file() else {"phases": {}, "missing": []}
        return cls(path, **saved)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase; repetitions add up."""
        print(f"==> {name}", flush=True)
        start = time.monotonic()
        yield
        self.phases[name] = round(self.phases.get(name, 0.0) + time.monotonic() - start, 1)
        self.path.write_text(json.dumps({"phases": self.phases, "missing": self.missing}, indent=1) + "\n")


def command(*words: Any) -> list[str]:
    """Runs `python -m words…` and prints it and its output; returns the lines of the output.

    Raises:
      UserError: it failed.
    """
    words = [str(word) for word in words]
    print("$ python -m " + " ".join(words), flush=True)
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    if process.wait():
        raise UserError(f"`python -m {words[0]}` failed with status {process.returncode}; see its message above")
    return lines


def make_data(workdir: Path, vae: str, journal: Journal) -> None:
    """Makes rendered and real raw clips, then records. Real clips that cannot be fetched are listed and skipped."""
    raw = [workdir / "raw" / "rendered"]
    with journal.phase("rendering people"):
        arguments = (f"--output={raw[0]}", f"--clips={_CLIPS.value}", f"--seed={_SEED.value}")
        lines = command("data_pipelines.synthetic", *arguments)
        missing = [line for line in lines if line.startswith("going on without")]
    with journal.phase("fetching real clips"):
        try:
            lines = command("data_pipelines.raw.real", f"--output={workdir / 'raw' / 'real'}")
            missing += [line for line in lines if line.startswith("going on without")]
            raw.append(workdir / "raw" / "real")
        except UserError as error:
            missing.append(f"real clips: {error}")
    journal.missing = missing
    if list((workdir / "checkpoints").glob("[0-9]*")) and (workdir / "data" / "dataset.json").is_file():
        print(f"{workdir} has already trained on {workdir / 'data'}, which is used unchanged")
        return
    with journal.phase("preparing records"):
        inputs = ",".join(map(str, raw))
        arguments = (f"--input={inputs}", f"--output={workdir / 'data'}", f"--vae={vae}", f"--face_crops={CROPS}")
        lines = command("data_pipelines.prepare", *arguments)
        journal.missing += [line for line in lines if line.startswith(("clips without keypoints", "speech encoder"))]


def held_out(workdir: Path) -> list[dict[str, Any]]:
    """Manifest entries of the held-out rendered clips; those that speak and show a large face come first."""
    manifest = json.loads((workdir / "raw" / "rendered" / "manifest.json").read_text())
    rank = {"close-up": 0, "head and shoulders": 1}
    clips = [c for c in manifest["clips"] if c["split"] == "heldout"]
    return sorted(clips, key=lambda c: (not c["speaks"], rank.get(c["framing"], 2)))


def portrait(video: Path, output: Path, frame: int = 0) -> Path:
    """One frame of a video as a PNG."""
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(media.read_video(video)[frame])).save(output)
    return output


def generate_videos(workdir: Path) -> list[dict[str, str]]:
    """Generates an audio-driven clip, a pose-driven one, and one of a real person."""
    folder, clips = workdir / "media", held_out(workdir)
    rendered = workdir / "raw" / "rendered"
    first, other = clips[0], next((c for c in clips if c["speaker"] != clips[0]["speaker"]), clips[-1])
    face = portrait(rendered / first["file"], folder / "portrait_rendered.png")
    audio, other_audio = ([f"--audio={rendered / c['file']}"] if c["has_audio"] else [] for c in (first, other))
    jobs = [
        {
            "name": "audio_driven",
            "title": "Audio-driven, rendered person",
            "text": "A held-out rendered speaker, driven by a held-out sentence of that voice, in several segments.",
            "flags": [f"--reference={face}", *audio, f"--text={first['caption']}"],
        },
        {
            "name": "audio_wrong",
            "title": "The same portrait, another sentence",
            "text": "The mouth should now follow this sentence; compare it with the video before.",
            "flags": [f"--reference={face}", *other_audio, f"--text={first['caption']}"],
        },
        {
            "name": "pose_driven",
            "title": "Pose-driven, rendered person",
            "text": "The same portrait, moved by the keypoints of another held-out clip; audio is off.",
            "flags": [f"--reference={face}", f"--pose={rendered / other['annotations']}", "--seconds=0.96"],
        },
    ]
    real = workdir / "raw" / "real" / "clips"
    if (real / "testMovie.mp4").is_file() and (real / "jwpIntro.mp4").is_file():
        man = portrait(real / "testMovie.mp4", folder / "portrait_real.png", 50)
        jobs.append(
            {
                "name": "real_person",
                "title": "Audio-driven, real person",
                "text": "Portrait from one recording of a man, speech from another of his; both were trained on.",
                "flags": [f"--reference={man}", f"--audio={real / 'jwpIntro.mp4'}", "--seconds=3"],
            }
        )
        astronaut = workdir / "raw" / "real" / "portraits" / "astronaut.png"
        if astronaut.is_file():
            jobs.append(
                {
                    "name": "stranger",
                    "title": "Audio-driven, a portrait that nobody trained on",
                    "text": "Photograph of an astronaut (NASA), speech from a recording of another person.",
                    "flags": [f"--reference={astronaut}", f"--audio={real / 'jwpIntro.mp4'}", "--seconds=2"],
                }
            )
    for job in jobs:
        path = folder / f"{job['name']}.mp4"
        command("experiments.generate", f"--checkpoint={workdir}", *job["flags"], f"--output={path}")
        job["path"] = str(path)
    return jobs


def write_report(workdir: Path, jobs: list[dict[str, str]], journal: Journal, *, config: Any) -> None:
    """Evaluates the newest checkpoint on held-out rendered clips and writes report.html."""
    # Imported here, because these import JAX and the model.
    from experiments.evaluate.checkpoint import Options, evaluate_checkpoint
    from experiments.report import write

    dataset = Dataset.open(workdir / "data")
    with journal.phase("evaluation"):
        evaluation = evaluate_checkpoint(workdir, dataset, Options(clips=_EVALUATION_CLIPS.value))
    videos = [write.Video(Path(job["path"]), job["title"], job["text"]) for job in jobs]
    notes = [
        "Rendered people are synthetic. Captions of the real clips were written by hand.",
        "This is the smallest run with every part of the method: minutes of training, not days. The tables show how "
        "far it got.",
    ]
    path = write.write_report(
        workdir,
        dataset,
        evaluation=evaluation,
        videos=videos,
        phases=journal.phases,
        missing=journal.missing,
        notes=notes,
        device=f"{write.describe_device()}; trained on {config.simulated_devices or 'no'} simulated devices",
    )
    print(f"report: {path}")


def main(_: list[str]) -> None:
    """Entry point."""
    workdir = cli.make_workdir(_WORKDIR.value)
    config = cli.load_preset(_CONFIG.value)
    journal = Journal.open(workdir / "phases.json")
    begin = time.monotonic()
    make_data(workdir, config.vae.checkpoint, journal)
    with journal.phase("training"):
        data = Dataset.open(workdir / "data")
        # If the speech encoder could not be fetched, log-mel features of another width replace its own.
        width = f"--config.model.audio_dim={data.meta.sizes['audio_dim']}"
        places = [f"--workdir={workdir}", f"--config.data.dir={data.directory}"]
        steps = sum(config.stages[name].steps for name in config.stage_order)
        places.append(f"--config.evaluation.gain_every={max(1, steps // 3)}")
        if config.stages.stage1.init_from and data.meta.sizes["audio_dim"] != config.model.audio_dim:
            print("going on without the pretrained base: its speech features have another width", flush=True)
            places.append("--config.stages.stage1.init_from=")
        if not any(entry["view"] == FACE and entry["audio"] and entry["split"] == "train" for entry in data.index):
            print("going on without the warm-up of speech: there are no crops of speaking faces", flush=True)
            places.append("--config.stages.stage2_warmup.steps=0")
        command("experiments.train", f"--config={_CONFIG.value}", *places, width)
    with journal.phase("generating"):
        jobs = generate_videos(workdir)
    write_report(workdir, jobs, journal, config=config)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    print(f"demo finished in {time.monotonic() - begin:.0f} s; largest process {peak / 1024:.0f} MiB")


if __name__ == "__main__":
    cli.run_main(main)
