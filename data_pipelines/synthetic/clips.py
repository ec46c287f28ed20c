"""Renders one clip from its plan: person, speech, motion, camera, frames, ground truth, files."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from data_pipelines import keypoints as kp
from data_pipelines.raw import media
from data_pipelines.synthetic import appearance, backgrounds, motion, people, plan, render, skeleton, speech
from data_pipelines.synthetic.body import Body
from data_pipelines.synthetic.plan import ClipPlan
from omnihuman_jax.frames import FPS

# Visible height at the person's depth in dm, for a square picture.
VISIBLE = {"close-up": (3.0, 3.5), "head and shoulders": (3.9, 4.9), "half body": (8.2, 10.0)}
MOUTH_PIXELS = 15.5  # width of the mouth in a close-up of 96 x 96 pixels
CORNERS = ("mouth_left", "mouth_right")
STYLE_SHARES = {
    "close-up": (0.8, 0.2, 0.0, 0.0),
    "head and shoulders": (0.45, 0.35, 0.1, 0.1),
    "half body": (0.08, 0.46, 0.34, 0.12),
    "full body": (0.08, 0.34, 0.44, 0.14),
}
JOINTS = {  # keypoint -> (bone, 0 head or 1 tail)
    "shoulder": ("upperarm", 0),
    "elbow": ("lowerarm", 0),
    "wrist": ("hand", 0),
    "hip": ("thigh", 0),
    "knee": ("calf", 0),
    "ankle": ("foot", 0),
    "index_tip": ("index_03", 1),
    "thumb_tip": ("thumb_03", 1),
}


@dataclasses.dataclass(frozen=True)
class Clip:
    """frames (F,H,W,3) uint8; audio (N,) at 16 kHz or None; keypoints (F,K,3); mouth (F,); attributes (A,); caption."""

    plan: ClipPlan
    frames: np.ndarray
    audio: np.ndarray | None
    keypoints: np.ndarray
    mouth: np.ndarray
    attributes: np.ndarray
    caption: str
    style: str


def make(body: Body, engine: speech.Engine | None, clip: ClipPlan, seed: int, frames: int) -> Clip:
    """Renders a clip; a pure function of its arguments.

    Raises:
      UserError: the speech synthesis fails.
    """
    rng = plan.generator(seed, "clip", clip.index)
    rng.random(16)  # skip numbers, since the plan draws from the same stream
    speaker = plan.generator(seed, clip.split, clip.speaker)
    look = appearance.draw(speaker)
    person = people.build(body, look, speaker)
    spoken = speech.speak(engine, clip.sentence, look.voice) if clip.speaks else None
    first = _first_frame(rng, spoken, frames, clip.pause)
    times = (first + np.arange(frames) + 0.5) / FPS
    style = str(rng.choice(motion.STYLES, p=STYLE_SHARES[clip.framing]))
    moved = motion.move(rng, person, spoken, times, style, rng.uniform(-0.4, 0.4), clip.sway)
    camera, light = _camera(rng, person, clip), _light(rng)
    background, words = backgrounds.draw(rng, render.SUPERSAMPLE * clip.height, render.SUPERSAMPLE * clip.width)
    person = render.reduce(person, _ever_seen(person, moved, camera))
    at_rest = people.unit_offsets(person, moved.units, frames) + person.rest
    points, joints = skeleton.skin(person, at_rest, moved.rotations, moved.shift)
    painter = render.Painter(person, camera, light, background)
    gap = (people.lip_gap(person, at_rest) - person.lip_gap) / person.jaw_open
    return Clip(
        plan=clip,
        frames=np.stack([painter.frame(p) for p in points]),
        audio=_cut(spoken, first, frames) if clip.has_audio else None,
        keypoints=keypoints(person, points, joints, camera),
        mouth=np.clip(gap, 0, 1).astype(np.float32),
        attributes=look.attributes(background.mean((0, 1))),
        caption=caption(look, clip, style, words),
        style=style,
    )


def _first_frame(rng: np.random.Generator, spoken: speech.Speech | None, frames: int, pause: str) -> int:
    """First frame of the clip within the sentence; cutting at frame boundaries keeps sound and picture in sync.

    With a pause, 30 to 60 % of the clip lie before or after the sentence.
    """
    total = 0 if spoken is None else int(spoken.seconds * FPS)
    if pause:
        silent = int(frames * rng.uniform(0.3, 0.6))
        return -silent if pause == "begin" else total - (frames - silent)
    return int(rng.integers(-5, max(total - frames + 4, -4)))


def _cut(spoken: speech.Speech, first: int, frames: int) -> np.ndarray:
    """The sound (N,) of frames first..first+frames-1, silence outside the sentence."""
    step = speech.SAMPLE_RATE // FPS
    sound = np.zeros(frames * step, np.float32)
    begin = first * step
    source = spoken.wave[max(begin, 0) : begin + len(sound)]
    sound[max(-begin, 0) :][: len(source)] = source
    return sound


def _camera(rng: np.random.Generator, person: people.Person, clip: ClipPlan) -> render.Camera:
    """A camera that shows the head, some space above it, and as much of the body as the framing needs."""
    head = person.landmarks["nose"]
    top = float(person.rest[:, 1].max())
    if clip.framing == "full body":
        tall = top - float(person.rest[:, 1].min())
        visible = tall * rng.uniform(1.07, 1.2)
        scale = clip.height / visible
        above = visible * 0.04
    else:
        low, high = VISIBLE[clip.framing]
        # Pictures of any aspect ratio show the face at the same size.
        scale = np.sqrt(clip.height * clip.width) / rng.uniform(low, high)
        if clip.framing == "close-up":
            # Close enough to read the lips of small mouths, but without cutting off the face.
            lips = np.linalg.norm(np.diff(person.rest[[person.landmarks[n][0] for n in CORNERS]], axis=0))
            scale = max(scale, min(MOUTH_PIXELS / lips, 35.0) * np.sqrt(clip.height * clip.width) / 96)
        visible = clip.height / scale
        above = visible * rng.uniform(0.03, 0.09)
    if clip.framing == "close-up":
        # Tall hair may leave the picture, the mouth must not.
        chin = float(person.rest[person.landmarks["chin"], 1].mean())
        above = min(above, max(visible - (top - chin) - 0.45, above - 0.8))
    x = float(person.rest[head, 0].mean()) + rng.uniform(-0.06, 0.06) * clip.width / scale
    centre = (x, top + above - visible / 2)
    return render.Camera(clip.height, clip.width, centre, float(scale), 12 * visible**0.5 + 18)


def _light(rng: np.random.Generator) -> render.Light:
    direction = np.array([rng.uniform(-0.8, 0.8), rng.uniform(0.2, 0.8), 1.0])
    lamp = rng.uniform(0.45, 0.65)
    tint = 1 + 0.04 * rng.uniform(-1, 1) * np.array([1.0, 0.0, -1.0])
    return render.Light(direction / np.linalg.norm(direction), lamp, 1.12 - lamp, tint)


def _ever_seen(person: people.Person, moved: motion.Motion, camera: render.Camera) -> np.ndarray:
    """Mask (Q,) of the quads that are visible or nearly visible in every sixth frame."""
    some = slice(None, None, 6)
    units = {name: values[some] for name, values in moved.units.items()}
    rotations = {name: turns[some] for name, turns in moved.rotations.items()}
    shift = moved.shift[some]
    at_rest = people.unit_offsets(person, units, len(shift)) + person.rest
    points, _ = skeleton.skin(person, at_rest, rotations, shift)
    normals = people.quad_normals(points, person.quads)
    facing = (normals[..., 2] > -0.6 * np.linalg.norm(normals, axis=-1)).any(0)
    place = camera.project(points)
    margin = 0.12 * camera.width
    inside = ((place > -margin) & (place < np.array([camera.width, camera.height]) + margin)).all(-1).any(0)
    near = inside[person.quads].any(1)
    return (person.two_sided | facing) & near


def keypoints(person: people.Person, points: np.ndarray, joints: np.ndarray, camera: render.Camera) -> np.ndarray:
    """Ground-truth keypoints (F,K,3) of posed points (F,V,3) and joints (F,B,2,3)."""
    places = np.empty((len(points), kp.NUM_KEYPOINTS, 3))
    for name, i in kp.INDEX.items():
        if name in person.landmarks:
            places[:, i] = points[:, person.landmarks[name]].mean(1)
        else:
            side, joint = name.split("_", 1)
            bone, end = JOINTS[joint]
            places[:, i] = joints[:, person.bones.index(f"{bone}_{side[0]}"), end]
    pixels = camera.project(places) / [camera.width, camera.height]
    return kp.hide_outside(np.concatenate([pixels, np.ones_like(pixels[..., :1])], -1))


def caption(look: appearance.Appearance, clip: ClipPlan, style: str, background: str) -> str:
    """One sentence about the person, the action, the background and the framing."""
    hair = {"bald": "a bald head", "bun": f"{look.hair_name} hair in a bun", "afro": f"a {look.hair_name} afro"}.get(
        look.hair_style, f"{'long' if look.hair_style == 'long' else 'short'} {look.hair_name} hair"
    )
    extras = (" and a beard" if look.beard else "") + (" and glasses" if look.glasses else "")
    does = "speaks" if clip.speaks else "is silent"
    if style != "still" and clip.framing in ("half body", "full body"):
        does += " and waves" if style == "wave" else " and moves the arms"
    article = "an" if look.noun[0] == "o" else "a"
    top = f"{'an' if look.top_name[0] == 'o' else 'a'} {look.top_name} top"
    return f"{article} {look.noun} with {hair}{extras} in {top} {does} in front of {background}, {clip.framing}"


def write(clip: Clip, directory: pathlib.Path) -> dict[str, Any]:
    """Writes clips/ID.mp4 and annotations/ID.npz to `directory`; returns the clip's manifest entry."""
    name, p = clip.plan.id, clip.plan
    media.write_mp4(directory / "clips" / f"{name}.mp4", clip.frames, audio=clip.audio)
    arrays = {
        "truth_keypoints": clip.keypoints,  # for evaluation only
        "mouth": clip.mouth,
        "attributes": clip.attributes,
        "attribute_names": np.array(appearance.ATTRIBUTE_NAMES),
        "keypoint_names": np.array(kp.KEYPOINTS),
    }
    if p.has_pose:
        arrays["keypoints"] = clip.keypoints
    np.savez(directory / "annotations" / f"{name}.npz", **arrays)
    return {
        "id": name,
        "file": f"clips/{name}.mp4",
        "annotations": f"annotations/{name}.npz",
        "split": p.split,
        "speaker": p.speaker_id,
        "sentence": p.sentence_id,
        "text": p.sentence,
        "caption": clip.caption,
        "speech": p.has_audio,
        "pose": p.has_pose,
        "has_audio": p.has_audio,
        "has_pose": p.has_pose,
        "speaks": p.speaks,
        "gestures": clip.style,
        "height": p.height,
        "width": p.width,
        "frames": len(clip.frames),
        "fps": FPS,
        "framing": p.framing,
    }
