"""Converts phonemes to mouth shapes: articulation targets, blended over time, mapped to ARKit face units.

The blending uses dominance functions (Cohen and Massaro 1993, "Modeling coarticulation in synthetic visual speech"):
each phoneme pulls each articulator towards its target with a strength that decays away from its centre, and closures
(p, b, m) pull hardest.
"""

# ruff: noqa: RUF001 (IPA letters look like others)
from __future__ import annotations

import numpy as np

from data_pipelines.synthetic.speech import Speech

# Targets in 0..1: jaw open, lips rounded, lips spread, lips closed, lower lip against the teeth; then the strength.
_SHAPES = {
    "silence": ((0.00, 0.0, 0.0, 0.3, 0.0), 0.7),
    "aa": ((1.00, 0.0, 0.1, 0.0, 0.0), 1.2),
    "ae": ((0.85, 0.0, 0.5, 0.0, 0.0), 1.2),
    "ah": ((0.62, 0.0, 0.1, 0.0, 0.0), 1.0),
    "ao": ((0.80, 0.6, 0.0, 0.0, 0.0), 1.2),
    "eh": ((0.58, 0.0, 0.4, 0.0, 0.0), 1.0),
    "ih": ((0.35, 0.0, 0.5, 0.0, 0.0), 0.9),
    "iy": ((0.25, 0.0, 0.9, 0.0, 0.0), 1.0),
    "uh": ((0.32, 0.7, 0.0, 0.0, 0.0), 1.0),
    "uw": ((0.22, 1.0, 0.0, 0.0, 0.0), 1.2),
    "schwa": ((0.38, 0.1, 0.1, 0.0, 0.0), 0.6),
    "er": ((0.32, 0.5, 0.0, 0.0, 0.0), 0.8),
    "pbm": ((0.00, 0.1, 0.0, 1.0, 0.0), 3.0),
    "fv": ((0.10, 0.0, 0.1, 0.0, 1.0), 2.2),
    "w": ((0.12, 1.0, 0.0, 0.0, 0.0), 1.5),
    "th": ((0.20, 0.0, 0.2, 0.0, 0.0), 0.8),
    "tdn": ((0.16, 0.0, 0.2, 0.0, 0.0), 0.6),
    "sz": ((0.08, 0.0, 0.4, 0.0, 0.0), 1.0),
    "sh": ((0.14, 0.7, 0.0, 0.0, 0.0), 1.1),
    "kg": ((0.25, 0.0, 0.1, 0.0, 0.0), 0.5),
    "h": ((0.30, 0.0, 0.0, 0.0, 0.0), 0.3),
    "l": ((0.30, 0.0, 0.2, 0.0, 0.0), 0.5),
}
# First IPA letter (stress marks removed) -> shapes over the length of the phoneme; two for a diphthong.
_IPA = {
    "aɪ": ("aa", "ih"),
    "aʊ": ("aa", "uw"),
    "eɪ": ("eh", "iy"),
    "ɔɪ": ("ao", "ih"),
    "oʊ": ("ao", "uw"),
    "əʊ": ("ah", "uw"),
    "tʃ": ("sh",),
    "dʒ": ("sh",),
    **dict.fromkeys("aɑä", ("aa",)),
    **dict.fromkeys("æ", ("ae",)),
    **dict.fromkeys("ʌɐ", ("ah",)),
    **dict.fromkeys("ɔɒo", ("ao",)),
    **dict.fromkeys("ɛe", ("eh",)),
    **dict.fromkeys("ɪᵻy", ("ih",)),
    **dict.fromkeys("ijʲ", ("iy",)),
    **dict.fromkeys("ʊ", ("uh",)),
    **dict.fromkeys("uʉɯ", ("uw",)),
    **dict.fromkeys("ə", ("schwa",)),
    **dict.fromkeys("ɜɚɝɹrɻ", ("er",)),
    **dict.fromkeys("pbm", ("pbm",)),
    **dict.fromkeys("fv", ("fv",)),
    **dict.fromkeys("wʍ", ("w",)),
    **dict.fromkeys("θð", ("th",)),
    **dict.fromkeys("tdnɾʔɲ", ("tdn",)),
    **dict.fromkeys("sz", ("sz",)),
    **dict.fromkeys("ʃʒ", ("sh",)),
    **dict.fromkeys("kɡgŋxç", ("kg",)),
    **dict.fromkeys("hɦ", ("h",)),
    **dict.fromkeys("lɫ", ("l",)),
}


def shapes_of(symbol: str) -> tuple[str, ...]:
    """Mouth shapes of espeak-ng's IPA symbol; silence for an empty one.

    Raises:
      ValueError: the table has no shape for the symbol.
    """
    letters = symbol.strip("ˈˌː_ \u0329\u0303")
    if not letters:
        return ("silence",)
    for length in (2, 1):
        if letters[:length] in _IPA:
            found = _IPA[letters[:length]]
            # r-coloured vowels as in "for": first the vowel, then the r.
            return (*found, "er") if len(letters) > length and letters[-1] in "ɹrɚ" else found
    raise ValueError(f"no mouth shape for the phoneme {symbol!r}")


def articulate(speech: Speech, times: np.ndarray) -> np.ndarray:
    """Articulators (F,5) in 0..1 at the given times (seconds)."""
    ends = np.append(speech.starts[1:], max(speech.seconds, speech.starts[-1] + 0.05))
    centres, widths, targets, strengths = [-0.3], [0.4], [_SHAPES["silence"][0]], [1.0]
    for start, end, symbol in zip(speech.starts, ends, speech.symbols, strict=True):
        shapes = shapes_of(symbol)
        step = (end - start) / len(shapes)
        for i, shape in enumerate(shapes):
            centres.append(start + (i + 0.5) * step)
            widths.append(np.clip(step, 0.03, 0.6))
            targets.append(_SHAPES[shape][0])
            strengths.append(_SHAPES[shape][1])
    centres.append(ends[-1] + 0.3)
    widths.append(0.4)
    targets.append(_SHAPES["silence"][0])
    strengths.append(1.0)
    distance = np.abs(times[:, None] - np.array(centres)) / np.array(widths)
    # The floor makes the nearest phoneme win at times far from all phonemes.
    pull = np.array(strengths) * np.exp(-np.minimum(1.6 * distance**2, 60.0)) + 1e-9 / (1e-3 + distance)
    return (pull @ np.array(targets)) / pull.sum(1, keepdims=True)


def face_units(articulators: np.ndarray, strength: float = 1.0) -> dict[str, np.ndarray]:
    """ARKit face units (F,) from articulators (F,5); `strength` scales how clearly the person speaks."""
    jaw, rounded, spread, close, bite = articulators.T
    closed = np.clip(close * 1.15, 0, 1)
    jaw = jaw * strength * (1 - 0.9 * closed)
    units = {
        "jawOpen": np.clip(0.85 * jaw, 0, 1),
        "mouthFunnel": np.clip(0.55 * rounded * (0.4 + jaw), 0, 1),
        "mouthPucker": np.clip(0.75 * rounded * strength, 0, 1),
        "mouthRollLower": np.clip(0.6 * bite + 0.35 * closed, 0, 1),
        "mouthRollUpper": np.clip(0.35 * closed, 0, 1),
    }
    for side in ("Left", "Right"):
        units[f"mouthStretch{side}"] = np.clip(0.55 * spread, 0, 1)
        units[f"mouthPress{side}"] = np.clip(0.4 * closed, 0, 1)
        units[f"mouthUpperUp{side}"] = np.clip(0.3 * jaw * (1 - rounded), 0, 1)
        units[f"mouthLowerDown{side}"] = np.clip(0.35 * jaw * (1 - rounded) - 0.2 * bite, 0, 1)
    return units
