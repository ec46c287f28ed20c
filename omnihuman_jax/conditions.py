"""The ordered conditions of OmniHuman-1 and every rule about them, for training and inference alike.

A sample's conditions are one boolean row in the order of `CONDITIONS` (weak to strong motion correlation, paper
section 3.2). The two training principles, the stage ratios, dropping and the inference rules are pure functions of it.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from omnihuman_jax.errors import UserError, nearest

CONDITIONS = ("text", "reference", "audio", "pose")
TEXT, REFERENCE, AUDIO, POSE = range(len(CONDITIONS))

# Per-stage ratios (share of samples that keep the condition) of the two published recipes; see docs/architecture.md.
# "published" is the final version of the paper (progressively halved), "v2" the arXiv v2 text.
RECIPES: dict[str, dict[str, dict[str, float]]] = {
    "published": {
        "stage1": {"text": 0.9, "reference": 0.7, "audio": 0.0, "pose": 0.0},
        "stage2": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.0},
        "stage3": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.25},
    },
    "v2": {
        "stage1": {"text": 0.9, "reference": 0.7, "audio": 0.0, "pose": 0.0},
        "stage2": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.0},
        "stage3": {"text": 0.9, "reference": 0.7, "audio": 0.5, "pose": 0.5},
    },
}


def row(active: Iterable[str]) -> np.ndarray:
    """Boolean row [4] for a collection of condition names."""
    active = list(active)
    for name in active:
        if name not in CONDITIONS:
            raise UserError(f"unknown condition {name!r}{nearest(name, CONDITIONS)}")
    return np.array([name in active for name in CONDITIONS], bool)


def names(active: Sequence[bool] | np.ndarray) -> tuple[str, ...]:
    """Names of the active conditions of a boolean row [4], weak to strong."""
    return tuple(name for name, on in zip(CONDITIONS, active, strict=True) if on)


def eligibility(has_audio: bool, has_pose: bool) -> np.ndarray:
    """Conditions a record can take part in, [4].

    Principle 1: a clip rejected for lip-sync or pose visibility still trains the weaker conditions, so text and
    reference are always possible.
    """
    return np.array([True, True, has_audio, has_pose], bool)


def check_ratios(ratios: Mapping[str, float], *, where: str, allow_inverted: bool = False) -> None:
    """Principle 2: the stronger the condition, the lower its ratio.

    A ratio of 0 means "not trained in this stage" and takes no part in the comparison.

    Raises:
      UserError: unknown or missing condition, ratio outside 0..1, or a stronger condition with a higher ratio than a
        weaker one while `allow_inverted` is false.
    """
    for name in ratios:
        if name not in CONDITIONS:
            raise UserError(f"{where}.{name}: unknown condition{nearest(name, CONDITIONS)}")
    for name in CONDITIONS:
        if name not in ratios:
            raise UserError(f"{where}.{name}: missing; every stage gives a ratio for {', '.join(CONDITIONS)}")
        value = ratios[name]
        if not (isinstance(value, int | float) and 0.0 <= value <= 1.0):
            raise UserError(f"{where}.{name}={value}: a ratio must lie between 0 and 1")
    if allow_inverted:
        return
    used = [name for name in CONDITIONS if ratios[name] > 0]
    for weak, strong in zip(used, used[1:], strict=False):
        if ratios[strong] > ratios[weak]:
            raise UserError(
                f"{where}: {strong}={ratios[strong]} is above the weaker {weak}={ratios[weak]}, against principle 2 "
                f"(the stronger the condition, the lower its ratio); lower it, or set allow_inverted_ratios=true"
            )


def for_inference(*, text: bool, reference: bool, audio: bool, pose: bool) -> np.ndarray:
    """Active row [4] at inference (paper section 3.3).

    Turning a condition on turns on every weaker one; when pose alone drives, audio is off. An empty text still counts
    as the text condition (an empty caption), and the reference image is always given.
    """
    strongest = max((i for i, on in enumerate((text, reference, audio, pose)) if on), default=TEXT)
    active = np.arange(len(CONDITIONS)) <= strongest
    active[AUDIO] = audio
    return active


# Classifier-free guidance applies to audio and text only (paper section 3.3); the reference and the pose stay on.
GUIDED = ("text", "audio")


def without(active: np.ndarray, *dropped: str) -> np.ndarray:
    """The active row(s) [..., 4] with the named conditions switched off: one pass of classifier-free guidance."""
    return np.asarray(active) & ~row(dropped)
