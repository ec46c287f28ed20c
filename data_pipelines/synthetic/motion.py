"""The motion of a rendered person: face units, head, torso and arms in every frame of a clip."""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.synthetic import skeleton, visemes
from data_pipelines.synthetic.people import Person
from data_pipelines.synthetic.speech import SAMPLE_RATE, Speech

# Position of the left wrist relative to the shoulder (x outward, y up, z forward), in arm lengths.
HANDS = {
    "hang": (0.16, -0.95, 0.10),
    "belly": (-0.22, -0.60, 0.42),
    "chest": (-0.16, -0.34, 0.50),
    "open": (0.34, -0.46, 0.46),
    "front": (0.05, -0.25, 0.62),
    "raised": (0.30, 0.12, 0.42),
    "wave": (0.42, 0.50, 0.22),
    "hip": (0.26, -0.60, 0.06),
    "side": (0.78, -0.20, 0.20),
}
ELBOW = (0.75, -0.55, -0.40)
STYLES = ("still", "beat", "random", "wave")


@dataclasses.dataclass(frozen=True)
class Motion:
    """units: face unit -> (F,); rotations: bone -> (F,3,3); shift: (F,3) of the pelvis in dm."""

    units: dict[str, np.ndarray]
    rotations: skeleton.Rotations
    shift: np.ndarray


def smooth_noise(rng: np.random.Generator, times: np.ndarray, low: float = 0.15, high: float = 0.9) -> np.ndarray:
    """Slow random curve (F,) of about unit amplitude: five sinusoids between `low` and `high` Hz."""
    rates, phases = rng.uniform(low, high, 5), rng.uniform(0, 2 * np.pi, 5)
    return np.sin(2 * np.pi * rates * times[:, None] + phases).sum(1) / np.sqrt(2.5)


def energy(speech: Speech | None, times: np.ndarray) -> np.ndarray:
    """Loudness (F,) around each time, smoothed over 0.2 s, about 1 for loud syllables; 0 without speech."""
    if speech is None:
        return np.zeros(len(times))
    power = np.concatenate([[0.0], np.cumsum(speech.wave.astype(np.float64) ** 2)])
    edges = ((times[:, None] + [-0.1, 0.1]) * SAMPLE_RATE).astype(int).clip(0, len(speech.wave))
    mean = (power[edges[:, 1]] - power[edges[:, 0]]) / (0.2 * SAMPLE_RATE)
    return np.clip(np.sqrt(mean) / 0.12, 0, 1.2)


def blinks(rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """How far the eyelids are closed (F,) in 0..1: a blink of about 0.25 s every two to four seconds."""
    closed = np.zeros(len(times))
    at = times[0] - 2 + rng.uniform(0, 3)
    while at < times[-1]:
        closed = np.maximum(closed, np.clip(1.25 - np.abs(times - at) / 0.10, 0, 1))
        at += rng.uniform(1.6, 3.8)
    return closed


def face(rng: np.random.Generator, speech: Speech | None, times: np.ndarray, strength: float) -> dict[str, np.ndarray]:
    """Face units (F,): speech, blinks, gaze, brows and some expression."""
    units = {name: np.zeros(len(times)) for name in ("jawOpen", "mouthPressLeft", "mouthPressRight")}
    if speech is not None:
        units |= visemes.face_units(visemes.articulate(speech, times), strength)
    else:
        press = 0.25 * np.clip(smooth_noise(rng, times), 0, 1)
        units |= {"mouthPressLeft": press, "mouthPressRight": press}
    mood, loud = rng.uniform(-0.25, 0.6), energy(speech, times)
    smile = np.clip(mood * (0.7 + 0.3 * smooth_noise(rng, times)), 0, 1)
    lid = blinks(rng, times)
    brow = np.clip(0.25 * smooth_noise(rng, times, 0.3, 1.2) + 0.35 * (loud - 0.4), -0.6, 0.9)
    for side in ("Left", "Right"):
        units[f"mouthSmile{side}"] = 0.5 * smile
        units[f"eyeBlink{side}"] = lid
        units[f"eyeSquint{side}"] = 0.3 * smile
        units[f"browOuterUp{side}"] = np.clip(brow, 0, 1)
        units[f"browDown{side}"] = np.clip(-brow, 0, 1) * 0.7
    units["browInnerUp"] = np.clip(brow, 0, 1)
    # The gaze rests on a point for a while, then jumps to the next.
    jumps = np.cumsum(rng.random(len(times)) < 0.04)
    targets = rng.normal(0, 1, (jumps[-1] + 1, 2)).clip(-1.6, 1.6) * [0.16, 0.08]
    units["gazeRight"], units["gazeUp"] = targets[jumps].T
    return units


def hand_path(rng: np.random.Generator, times: np.ndarray, places: list[str], every: float, size: float) -> np.ndarray:
    """Wrist positions (F,3) moving smoothly between random `places`, a new one every `every` seconds on average."""
    knots, at = [], times[0] - rng.uniform(0, every)
    while at < times[-1] + 2 * every:
        knots.append((at, np.array(HANDS[places[rng.integers(len(places))]]) + rng.normal(0, 0.06 * size, 3)))
        at += every * rng.uniform(0.7, 1.4)
    starts = np.array([k[0] for k in knots])
    spots = np.stack([k[1] for k in knots])
    i = np.clip(np.searchsorted(starts, times, "right") - 1, 0, len(starts) - 2)
    # Minimum-jerk moves (Flash and Hogan 1985) that take most of the time between two places.
    t = np.clip((times - starts[i]) / (0.85 * (starts[i + 1] - starts[i])), 0, 1)
    s = (t**3 * (10 - 15 * t + 6 * t * t))[:, None]
    return spots[i] * (1 - s) + spots[i + 1] * s


def arms(
    rng: np.random.Generator, person: Person, style: str, loud: np.ndarray, times: np.ndarray
) -> skeleton.Rotations:
    """Rotations of both arms. "beat" follows the loudness, "random" and "wave" do not, "still" does not move."""
    rotations: skeleton.Rotations = {}
    active = rng.random() < 0.5  # the hand that always gestures
    for index, (side, sign) in enumerate((("l", 1.0), ("r", -1.0))):
        busy = style != "still" and (index == int(active) or rng.random() < 0.6)
        if not busy:
            base = HANDS[("hang", "hip", "belly")[rng.choice(3, p=[0.7, 0.15, 0.15])]]
            path = np.tile(np.array(base) + rng.normal(0, 0.03, 3), (len(times), 1))
        elif style == "wave":
            path = np.array(HANDS["wave"]) + 0 * times[:, None]
            path = path + np.outer(np.sin(2 * np.pi * rng.uniform(1.2, 2.0) * times), [0.16, 0.0, 0.04])
        elif style == "beat":
            path = hand_path(rng, times, ["belly", "open", "chest", "front"], 0.9, 1.0)
            # The hand goes down when the voice is loud.
            path[:, 1] -= 0.22 * (loud - 0.5)
            path[:, 2] += 0.10 * (loud - 0.5)
        else:
            path = hand_path(rng, times, [n for n in HANDS if n != "wave"], 0.7, 1.3)
        path[:, 1] += 0.012 * smooth_noise(rng, times)
        path = path * [sign, 1, 1]
        rotations |= skeleton.reach(person, side, path, np.array(ELBOW) * [sign, 1, 1])
        rotations |= _fingers(rng, person, side, sign)
    frames = len(times)
    return {name: np.broadcast_to(turn, (frames, 3, 3)) for name, turn in rotations.items()}


def _fingers(rng: np.random.Generator, person: Person, side: str, sign: float) -> skeleton.Rotations:
    """Slightly curled fingers: each joint turns about the axis across the hand."""
    rotations = {}
    index, pinky = (person.heads[person.bones.index(f"{finger}_01_{side}")] for finger in ("index", "pinky"))
    axis = (index - pinky) / np.linalg.norm(index - pinky)
    curl = rng.uniform(0.05, 0.5)
    for finger in ("index", "middle", "ring", "pinky"):
        for joint in ("01", "02", "03"):
            angle = sign * curl * (0.5 if finger == "index" else 1.0)
            rotations[f"{finger}_{joint}_{side}"] = skeleton.axis_angle(axis, np.array([angle]))
    return rotations


def move(
    rng: np.random.Generator,
    person: Person,
    speech: Speech | None,
    times: np.ndarray,
    style: str,
    turn: float,
    sway: float = 1.0,
) -> Motion:
    """The motion of one clip.

    Args:
      speech: the sentence, or None if the person does not speak.
      times: (F,) time of each frame's middle in the sentence, seconds.
      turn: rotation of the body about the vertical axis, radians.
      sway: factor on the motion of head and torso, but not on their mean position, nor on arms and face.
    """
    loud = energy(speech, times)
    noise = [sway * smooth_noise(rng, times) for _ in range(9)]
    liveliness = rng.uniform(0.5, 1.3) * (1.0 if speech is not None or style == "still" else 1.4)
    pitch = 0.05 * liveliness * noise[0] + 0.10 * liveliness * sway * (loud - 0.4) + rng.uniform(-0.05, 0.08)
    yaw = 0.11 * liveliness * noise[1] - 0.6 * turn + rng.uniform(-0.12, 0.12)
    roll = 0.06 * liveliness * noise[2] + rng.uniform(-0.06, 0.06)
    lean = skeleton.euler(0.015 * noise[3], 0.03 * noise[4], 0.02 * noise[5])
    rotations = {
        "pelvis": skeleton.euler(np.zeros_like(yaw), np.full_like(yaw, turn), np.zeros_like(yaw)),
        "spine_02": lean,
        "neck_01": skeleton.euler(0.4 * pitch, 0.4 * yaw, 0.4 * roll),
        "head": skeleton.euler(0.6 * pitch, 0.6 * yaw, 0.6 * roll),
    }
    # Lower the shoulders, which the template raises for its spread arms.
    for side, sign in (("l", 1.0), ("r", -1.0)):
        drop = -0.10 * sign + 0.02 * noise[6]
        rotations[f"clavicle_{side}"] = skeleton.axis_angle(np.array([0.0, 0, 1]), drop)
    rotations |= arms(rng, person, style, loud, times)
    shift = np.stack([0.08 * noise[7], 0.02 * noise[8], np.zeros_like(yaw)], 1)
    return Motion(face(rng, speech, times, rng.uniform(0.85, 1.15)), rotations, shift)
