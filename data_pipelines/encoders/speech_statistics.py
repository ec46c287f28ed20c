"""Measures the constants that normalise Whisper's features; was run once, the result is in the repository.

    python -m data_pipelines.encoders.speech_statistics

Mean and standard deviation of each of the 384 features over read English speech (LibriVox, public domain, from Debian's
pocketsphinx-testdata), in windows as `speech.py` makes them, after averaging pairs of rows.
"""

import json

import numpy as np

from data_pipelines.encoders import speech
from data_pipelines.raw import fetch, media
from omnihuman_jax.command import run_main

RECORDINGS = fetch.Package(
    "debian",
    "pocketsphinx-testdata",
    "0.8+5prealpha+1-15",
    "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0",
)
FOLDER = "./usr/share/pocketsphinx/test/data/librivox/"


def main() -> None:
    encoder = speech.SpeechEncoder("raw", 384, speech.whisper_rows(), "average")
    rows = []
    for path in sorted((fetch.fetch_tree(RECORDINGS, FOLDER) / FOLDER).glob("*.wav")):
        wave = media.read_audio(path)
        wave *= 0.9 / np.abs(wave).max()
        rows.append(encoder.encode(wave, wave.size // speech.SAMPLES_PER_FRAME))
    features = np.concatenate(rows)
    result = {
        "what": __doc__.splitlines()[4] + " " + __doc__.splitlines()[5],
        "frames": len(features),
        "mean": [round(float(value), 4) for value in features.mean(0)],
        "std": [round(float(value), 4) for value in features.std(0)],
    }
    speech.STATISTICS.write_text(json.dumps(result) + "\n")
    print(f"{len(features)} frames -> {speech.STATISTICS}")


if __name__ == "__main__":
    run_main(main)
