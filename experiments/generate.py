"""Generates a talking or moving person from a portrait.

python -m experiments.generate --checkpoint=DIR --reference=IMAGE [--audio=FILE] [--pose=VIDEO] [--text=…] \
    [--seconds=…] [--height=… --width=…] [--seed=…] --output=FILE.mp4

Audio alone drives the speech, pose alone the movement, both together both; neither leaves it to text and reference.
"""

from absl import flags

from experiments import cli
from experiments.generation import Options, run
from omnihuman_jax.diffusion import guidance, sampler

_FLAGS = (
    flags.DEFINE_string(
        "checkpoint", None, "Workdir, checkpoints/STEP or stages/NAME of a run, or a directory of experiments.export."
    ),
    flags.DEFINE_string("reference", None, "Portrait image of any size."),
    flags.DEFINE_string("audio", None, "Speech that drives the clip: any sound file, or a video with sound."),
    flags.DEFINE_string("pose", None, "Video whose movement drives the clip, or an .npz with keypoints (F,K,3)."),
    flags.DEFINE_string("text", None, "What happens; without it, a plain sentence that is printed."),
    flags.DEFINE_float("seconds", None, "Length; default: the audio's, else the pose video's, else one segment."),
    flags.DEFINE_integer("height", None, "Pixels; default: the trained size nearest to the portrait's shape."),
    flags.DEFINE_integer("width", None, "Pixels; likewise."),
    flags.DEFINE_integer("seed", 0, "Of the noise; the same seed gives the same clip.", lower_bound=0),
    flags.DEFINE_string("output", None, "The .mp4 to write: H.264 and, with --audio, AAC."),
    flags.DEFINE_integer("steps", None, "Sampling steps per segment; default: the checkpoint's sample.steps."),
    flags.DEFINE_enum("solver", "euler", list(sampler.SOLVERS), "ODE solver."),
    flags.DEFINE_float("guidance_scale", None, "Guidance on text and audio at the first step; 1 is none."),
    flags.DEFINE_float("final_guidance_scale", None, "Guidance scale at the last step."),
    flags.DEFINE_enum("guidance_mode", None, list(guidance.MODES), "Text and audio jointly, or each by its scale."),
    flags.DEFINE_float("text_guidance_scale", None, "Text's own scale, in separate mode."),
    flags.DEFINE_integer(
        "vae_tile", 0, "Large frames: side in pixels of the VAE's tiles; 0 takes frames whole.", lower_bound=0
    ),
    flags.DEFINE_bool("ema", None, "The EMA of the parameters (default), or the raw ones with --noema."),
)


def main(_: list[str]) -> None:
    """Entry point."""
    run(Options(**{flag.name: flag.value for flag in _FLAGS}))


if __name__ == "__main__":
    cli.run_main(main)
