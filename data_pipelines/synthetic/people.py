"""Builds a posable mesh from a look: body shape, clothes, hair, colours, face units, joints."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

from data_pipelines.synthetic import body as body_lib
from data_pipelines.synthetic import clothes, extras
from data_pipelines.synthetic.appearance import Appearance
from data_pipelines.synthetic.body import FACE_UNITS, ZONE, Body

UNITS = (*FACE_UNITS, "gazeRight", "gazeUp")
# Template vertices (hm08) of each keypoint on the face; mouth_top and mouth_bottom are the inner edges of the lips.
LANDMARKS = {
    "nose": [297], "mouth_top": [537], "mouth_bottom": [540], "mouth_left": [7272], "mouth_right": [527],
    "chin": [5225], "left_eye": range(14598, 14670), "right_eye": range(14670, 14742),
}  # fmt: skip
# Depth offsets (dm towards the camera) of zones that painting by depth would otherwise draw in the wrong order.
BIAS = {"eye": -0.06, "mouth": -0.05, "tongue": -0.15, "tooth": -0.16}


@dataclasses.dataclass
class Person:
    """A posable mesh. Letters: V vertices, Q quads, U units, W vertices that units move, B bones.

    rest (V,3) dm; quads (Q,4); albedo (Q,3); bias (Q,) dm towards the camera; two_sided (Q,) bool; units (U,W,3) with
    unit_vertices (W,); weights (V,B); heads, tails (B,3) joints at rest; shade (V,) darkening of hollows; landmarks:
    keypoint name -> vertex indices to average; lip_gap: of the lips at rest; jaw_open: its growth at jawOpen 1, dm.
    """

    look: Appearance
    bones: tuple[str, ...]
    parents: np.ndarray
    rest: np.ndarray
    quads: np.ndarray
    albedo: np.ndarray
    bias: np.ndarray
    two_sided: np.ndarray
    units: np.ndarray
    unit_vertices: np.ndarray
    weights: np.ndarray
    heads: np.ndarray
    tails: np.ndarray
    shade: np.ndarray
    landmarks: dict[str, np.ndarray]
    lip_gap: float
    jaw_open: float


def quad_normals(points: np.ndarray, quads: np.ndarray) -> np.ndarray:
    """Normals (...,Q,3) of quads with twice their area as length; outward for the body's quads."""
    a, b, c, d = (points[..., quads[:, i], :] for i in range(4))
    return np.cross(c - a, d - b)


def vertex_sum(quads: np.ndarray, count: int) -> scipy.sparse.csr_matrix:
    """Sparse (V,Q) matrix that sums the values of the quads around each vertex."""
    rows = quads.ravel()
    columns = np.repeat(np.arange(len(quads)), 4)
    return scipy.sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (count, len(quads)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-9)


def _levels(value: float) -> dict[str, float]:
    """Weights of min, average and max for a value in 0..1."""
    high, low = max(2 * value - 1, 0.0), max(1 - 2 * value, 0.0)
    return {"min": low, "average": 1 - low - high, "max": high}


def shape_weights(look: Appearance) -> dict[str, float]:
    """Target name -> weight; products of the traits, as in MakeHuman."""
    weights = {}
    for age, by_age in (("young", 1 - look.age), ("old", look.age)):
        for race, by_race in zip(body_lib.RACES, look.races, strict=True):
            weights[f"{race}-{look.gender}-{age}"] = by_age * by_race
        for muscle, by_muscle in _levels(look.muscle).items():
            for weight, by_weight in _levels(look.weight).items():
                weights[f"{look.gender}-{age}-{muscle}muscle-{weight}weight"] = by_age * by_muscle * by_weight
    for name, value in look.details.items():
        weights[name + ("+" if value > 0 else "-")] = abs(value)
    return weights


def build(body: Body, look: Appearance, rng: np.random.Generator) -> Person:
    """The mesh of a person; `rng` draws details such as strands of hair."""
    mixed = np.zeros(len(body.target_names), np.float32)
    for name, weight in shape_weights(look).items():
        mixed[body.target_names.index(name)] = weight
    # Keep only the mixed target, which makes cutting seams cheap.
    shape = np.tensordot(mixed, body.targets, 1)[None]
    body = clothes.cut_seams(dataclasses.replace(body, targets=shape, target_names=("person",)), look)
    rest = body.vertices + body.targets[0]
    heads, tails = rest[body.heads].mean(1), rest[body.tails].mean(1)
    normals = _unit(vertex_sum(body.quads, len(rest)) @ quad_normals(rest, body.quads))
    albedo, lift = clothes.paint(body, look, rng)
    hollow = _hollows(rest, normals, body.quads)
    rest = rest + lift[:, None] * normals
    units = np.zeros((len(UNITS), len(body.face_vertices), 3), np.float32)
    units[: len(FACE_UNITS)] = body.face_units
    person = Person(
        look=look,
        bones=body.bones,
        parents=body.parents,
        rest=rest.astype(np.float32),
        quads=body.quads,
        albedo=albedo,
        bias=np.select([body.zones == ZONE[name] for name in BIAS], list(BIAS.values()), 0.0).astype(np.float32),
        two_sided=body.zones == ZONE["lash"],
        units=units,
        unit_vertices=body.face_vertices,
        weights=body.weights,
        heads=heads,
        tails=tails,
        shade=hollow,
        landmarks={name: np.array(ids) for name, ids in LANDMARKS.items()},
        lip_gap=0.0,
        jaw_open=1.0,
    )
    ears = np.unique(body.quads[body.zones == ZONE["ear"]])
    person.landmarks["left_ear"] = ears[body.vertices[ears, 0] > 0]
    person.landmarks["right_ear"] = ears[body.vertices[ears, 0] < 0]
    _add_extras(person, body, rng)
    gaps = lip_gap(person, person.rest + unit_offsets(person, {"jawOpen": np.array([0.0, 1.0])}, 2))
    person.lip_gap, person.jaw_open = float(gaps[0]), float(gaps[1] - gaps[0])
    return person


def unit_offsets(person: Person, values: dict[str, np.ndarray], frames: int) -> np.ndarray:
    """Offsets (F,V,3) of the face for unit values (F,) in 0..1 (gaze in -1..1 radians)."""
    names = [name for name in UNITS if name in values]
    selected = person.units[[UNITS.index(name) for name in names]]
    weights = np.stack([np.broadcast_to(values[name], frames) for name in names], 1).astype(np.float32)
    offsets = np.zeros((frames, len(person.rest), 3), np.float32)
    moved = weights @ selected.reshape(len(names), -1)
    offsets[:, person.unit_vertices] = moved.reshape(frames, -1, 3)
    return offsets


def lip_gap(person: Person, points: np.ndarray) -> np.ndarray:
    """Distance (F,) in dm between the inner edges of the lips of posed points (F,V,3)."""
    top, bottom = (points[:, person.landmarks[n]].mean(1) for n in ("mouth_top", "mouth_bottom"))
    return np.linalg.norm(top - bottom, axis=-1)


def _hollows(rest: np.ndarray, normals: np.ndarray, quads: np.ndarray) -> np.ndarray:
    """Light (V,) that reaches each vertex, less in hollows (nostrils, lids, between the lips)."""
    corners = vertex_sum(quads, len(rest))
    centre = (corners @ rest[quads].mean(1)) / np.maximum(np.asarray(corners.sum(1)), 1)
    size = np.sqrt(np.maximum(corners @ np.linalg.norm(quad_normals(rest, quads), axis=-1), 1e-6) / 4)
    hollow = ((centre - rest) * normals).sum(-1) / np.maximum(size, 0.02)
    light = 1 - 1.6 * np.clip(hollow, 0, 0.35)
    smooth = (corners @ light[quads].mean(1)) / np.maximum(np.asarray(corners.sum(1)).ravel(), 1)
    return (0.5 * light + 0.5 * smooth).astype(np.float32)


def _add_extras(person: Person, body: Body, rng: np.random.Generator) -> None:
    look = person.look
    head_zone = np.zeros(len(body.vertices), bool)
    head_zone[body.quads[body.zones == ZONE["head"]]] = True
    front = np.flatnonzero(head_zone & (body.vertices[:, 2] > 0.7))
    skull = np.flatnonzero(head_zone)
    colour = np.array(look.hair)
    # Bounding box of the person's head without hair.
    low, high = extras.HEAD_LOW.copy(), extras.HEAD_HIGH.copy()
    moved = body.targets[0, skull]
    for axis in range(3):
        for bound, pick in ((low, np.argmin), (high, np.argmax)):
            bound[axis] += moved[pick(body.vertices[skull, axis]), axis]
    brow = extras.brows(0.75 * colour + 0.25 * np.array(look.skin) * 0.4, look.brow, body.vertices, front)
    shift = person.rest[brow.tied] - body.vertices[brow.tied]
    _append(person, brow, brow.points + shift)
    iris = extras.irises(look.eye)
    half = len(iris.points) // 2
    for side, part in (("left_eye", slice(0, half)), ("right_eye", slice(half, None))):
        centre = body.vertices[person.landmarks[side]].mean(0)
        eye = person.rest[person.landmarks[side]]
        scale = np.ptp(eye, 0).mean() / np.ptp(body.vertices[person.landmarks[side]], 0).mean()
        iris.points[part] = eye.mean(0) + (iris.points[part] - centre) * scale
    _append(person, iris, iris.points)
    parts = [extras.glasses()] if look.glasses else []
    if look.hair_style in ("long", "bob"):
        parts.append(extras.curtain(colour, 4.6 if look.hair_style == "long" else 6.2, rng))
    if look.hair_style == "bun":
        parts.append(extras.bun(colour))
    for part in parts:
        _append(person, part, extras.fit_head(part.points, low, high))
    brows = person.landmarks.pop("added")[0]
    person.landmarks["brow_left"], person.landmarks["brow_right"] = brows[:14], brows[14:]


def _append(person: Person, part: extras.Part, points: np.ndarray) -> None:
    """Adds a part to the mesh, at points (N,3) already fitted to the person."""
    first = len(person.rest)
    ids = np.arange(first, first + len(points))
    head, chest = person.bones.index("head"), person.bones.index("spine_03")
    weights = np.zeros((len(points), len(person.bones)), np.float32)
    weights[:, head] = 1 if part.head is None else part.head
    weights[:, chest] = 1 - weights[:, head]
    units = np.zeros((len(UNITS), len(points), 3), np.float32)
    if part.tied is not None:
        weights = person.weights[part.tied]
        column = {vertex: i for i, vertex in enumerate(person.unit_vertices)}
        for n, vertex in enumerate(part.tied):
            if vertex in column:
                units[:, n] = person.units[:, column[vertex]]
    if part.gaze is not None:
        units[len(FACE_UNITS) :] = part.gaze
    person.units = np.concatenate([person.units, units], 1)
    person.unit_vertices = np.concatenate([person.unit_vertices, ids])
    person.rest = np.concatenate([person.rest, points.astype(np.float32)])
    person.weights = np.concatenate([person.weights, weights])
    person.shade = np.concatenate([person.shade, np.ones(len(points), np.float32)])
    person.quads = np.concatenate([person.quads, part.quads + first])
    person.albedo = np.concatenate([person.albedo, part.albedo.astype(np.float32)])
    person.bias = np.concatenate([person.bias, np.full(len(part.quads), part.bias, np.float32)])
    person.two_sided = np.concatenate([person.two_sided, np.full(len(part.quads), part.two_sided)])
    person.landmarks.setdefault("added", []).append(ids)
