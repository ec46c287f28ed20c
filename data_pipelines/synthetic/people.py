"""From a look to a mesh that can be posed: mixed body shape, clothes, hair, colours, face units, joints."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

from data_pipelines.synthetic import body as body_lib
from data_pipelines.synthetic import extras
from data_pipelines.synthetic.body import FACE_UNITS, ZONE, Body
from data_pipelines.synthetic.looks import Look

UNITS = (*FACE_UNITS, "gazeRight", "gazeUp")
# Vertices of the template (hm08): the nose tip, the inner edges of the lips, the corners of the mouth, the chin.
LANDMARKS = {
    "nose": (297,),
    "mouth_top": (537,),
    "mouth_bottom": (540,),
    "mouth_left": (7272,),
    "mouth_right": (527,),
    "chin": (5225,),
}
EYE_VERTICES = {"left_eye": range(14598, 14670), "right_eye": range(14670, 14742)}


@dataclasses.dataclass
class Person:
    """A mesh to pose. Letters: V vertices, Q quads, U units, W vertices that units move, B bones.

    rest (V,3) dm; quads (Q,4); albedo (Q,3); bias (Q,) dm towards the camera; two_sided (Q,) bool; units (U,W,3) with
    unit_vertices (W,); weights (V,B); heads, tails (B,3) joints at rest; shade (V,) darkening of hollows;
    landmarks: keypoint name -> vertex indices whose mean it is; jaw_open: gap of the lips at jawOpen = 1, dm.
    """

    look: Look
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
    """Normals (...,Q,3) of quads, as long as twice their area; outward for the body's own quads."""
    a, b, c, d = (points[..., quads[:, i], :] for i in range(4))
    return np.cross(c - a, d - b)


def vertex_sum(quads: np.ndarray, count: int) -> scipy.sparse.csr_matrix:
    """Sparse (V,Q) matrix that adds up the values of the quads around each vertex."""
    rows = quads.ravel()
    columns = np.repeat(np.arange(len(quads)), 4)
    return scipy.sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (count, len(quads)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-9)


def _levels(value: float) -> dict[str, float]:
    """Weights of min, average and max for a value in 0..1."""
    high, low = max(2 * value - 1, 0.0), max(1 - 2 * value, 0.0)
    return {"min": low, "average": 1 - low - high, "max": high}


def shape_weights(look: Look) -> dict[str, float]:
    """Target name -> weight, as MakeHuman mixes its body types (products of the traits)."""
    ages = {"young": 1 - look.age, "old": look.age}
    weights = {}
    for age, by_age in ages.items():
        for race, by_race in zip(body_lib.RACES, look.races, strict=True):
            weights[f"{race}-{look.gender}-{age}"] = by_age * by_race
        for muscle, by_muscle in _levels(look.muscle).items():
            for weight, by_weight in _levels(look.weight).items():
                weights[f"{look.gender}-{age}-{muscle}muscle-{weight}weight"] = by_age * by_muscle * by_weight
    for name, value in look.details.items():
        weights[name + ("+" if value > 0 else "-")] = abs(value)
    return weights


def build(body: Body, look: Look, rng: np.random.Generator) -> Person:
    """The mesh of a person; `rng` decides strands of hair and the like."""
    mixed = np.zeros(len(body.target_names), np.float32)
    for name, weight in shape_weights(look).items():
        mixed[body.target_names.index(name)] = weight
    rest = body.vertices + np.tensordot(mixed, body.targets, 1)
    heads, tails = rest[body.heads].mean(1), rest[body.tails].mean(1)
    normals = _unit(vertex_sum(body.quads, len(rest)) @ quad_normals(rest, body.quads))
    albedo, cloth = _dress(body, look, rng)
    head_zone = np.zeros(len(rest), bool)
    head_zone[body.quads[body.zones == ZONE["head"]]] = True
    thickness = _hair_thickness(look)
    mask = extras.hair_mask(body.vertices, look.hairline, look.hair_style == "bob")
    swell = np.where(head_zone, thickness * np.sqrt(np.clip(mask, 0, 1)), 0) + cloth
    hollow = _hollows(rest, normals, body.quads)
    rest = rest + swell[:, None] * normals
    units = np.zeros((len(UNITS), len(body.face_vertices), 3), np.float32)
    units[: len(FACE_UNITS)] = body.face_units
    person = Person(
        look=look,
        bones=body.bones,
        parents=body.parents,
        rest=rest.astype(np.float32),
        quads=body.quads,
        albedo=albedo,
        bias=np.select([body.zones == ZONE["eye"], body.zones == ZONE["mouth"]], [-0.06, -0.05], 0.0).astype(np.float32),
        two_sided=body.zones == ZONE["lash"],
        units=units,
        unit_vertices=body.face_vertices,
        weights=body.weights,
        heads=heads,
        tails=tails,
        shade=hollow,
        landmarks={name: np.array(list(ids)) for name, ids in (LANDMARKS | EYE_VERTICES).items()},
        lip_gap=0.0,
        jaw_open=1.0,
    )
    ears = np.unique(body.quads[body.zones == ZONE["ear"]])
    person.landmarks["left_ear"] = ears[body.vertices[ears, 0] > 0]
    person.landmarks["right_ear"] = ears[body.vertices[ears, 0] < 0]
    _add_extras(person, body, rng, head_zone)
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


def _hair_thickness(look: Look) -> float:
    return {"bald": 0.0, "buzz": 0.03, "short": 0.14, "afro": 0.5, "bun": 0.08, "bob": 0.16, "long": 0.12}[look.hair_style]


def _hollows(rest: np.ndarray, normals: np.ndarray, quads: np.ndarray) -> np.ndarray:
    """Light (V,) that reaches each vertex: less where the surface is hollow (nostrils, lids, the line of the lips)."""
    corners = vertex_sum(quads, len(rest))
    centre = (corners @ rest[quads].mean(1)) / np.maximum(np.asarray(corners.sum(1)), 1)
    size = np.sqrt(np.maximum(corners @ np.linalg.norm(quad_normals(rest, quads), axis=-1), 1e-6) / 4)
    hollow = ((centre - rest) * normals).sum(-1) / np.maximum(size, 0.02)
    light = 1 - 1.6 * np.clip(hollow, 0, 0.35)
    smooth = (corners @ light[quads].mean(1)) / np.maximum(np.asarray(corners.sum(1)).ravel(), 1)
    return (0.5 * light + 0.5 * smooth).astype(np.float32)


def _dress(body: Body, look: Look, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours (Q,3) of the body's quads, and how far (V,) clothes lift the surface, dm."""
    where = body.vertices[body.quads].mean(1)
    zones = body.zones
    skin = np.array(look.skin)
    albedo = np.tile(skin, (len(zones), 1)) * (1 + 0.015 * rng.standard_normal((len(zones), 1)))
    colours = {
        "ear": skin * [0.97, 0.90, 0.88],
        "lip": skin * [0.90, 0.62, 0.62] * (1.0 if look.gender == "female" else 1.08),
        "mouth": np.array([0.16, 0.04, 0.04]),
        "eye": np.array([0.93, 0.92, 0.90]),
        "lash": np.array([0.10, 0.07, 0.06]),
        "tooth": np.array([0.88, 0.86, 0.80]),
        "tongue": np.array([0.50, 0.20, 0.20]),
    }
    for name, colour in colours.items():
        albedo[zones == ZONE[name]] = colour
    on_head = zones == ZONE["head"]
    cheek = on_head & (np.hypot(np.abs(where[:, 0]) - 0.45, where[:, 1] - 6.9) < 0.25) & (where[:, 2] > 0.9)
    albedo[cheek] *= [1.02, 0.94, 0.93]
    if look.beard:
        beard = (on_head | (zones == ZONE["skin"])) & extras.beard_mask(where)
        albedo[beard] = (1 - look.beard) * skin + look.beard * np.array(look.hair)
    hair = on_head & (extras.hair_mask(where, look.hairline, look.hair_style == "bob") > 0)
    if look.hair_style != "bald":
        mix = 0.75 if look.hair_style == "buzz" else 1.0
        strands = np.clip(1 + 0.09 * rng.standard_normal((hair.sum(), 1)), 0.7, 1.3)
        albedo[hair] = (1 - mix) * skin + mix * np.array(look.hair) * strands
    cloth = _clothes(body, look, where, albedo)
    lift = np.zeros(len(body.vertices), np.float32)
    for quads, height in cloth:
        lift[body.quads[quads]] = height
    return albedo.astype(np.float32), lift


def _clothes(body: Body, look: Look, where: np.ndarray, albedo: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Paints clothes into `albedo`; returns (mask of quads, thickness in dm) of each garment."""
    bone = body.weights[body.quads].mean(1).argmax(1)

    def of(*names: str) -> np.ndarray:
        ids = [i for i, bone_name in enumerate(body.bones) if bone_name.rsplit("_", 1)[0] in names or bone_name in names]
        return np.isin(bone, ids) & np.isin(body.zones, [ZONE["skin"], ZONE["foot"], ZONE["hand"], ZONE["head"]])

    x, y, z = where.T
    torso = of("spine_01", "spine_02", "spine_03", "clavicle") & (y > 1.05)
    ring = np.hypot(x, z - 0.05)
    bare = {
        "crew": (ring < 0.78) & (y > 5.45),
        "turtle": np.zeros(len(x), bool),
        "v": ((z > 0.2) & (np.abs(x) < 0.5 * (y - 4.45))) | ((ring < 0.85) & (y > 5.4)),
        "scoop": ((z > 0) & (np.abs(x) < 1.0) & (y > 4.95)) | ((ring < 1.0) & (y > 5.3)),
    }[look.neckline]
    upper, lower = of("upperarm"), of("lowerarm")
    i = body.bones.index("upperarm_l")
    shoulder, elbow = body.vertices[body.heads[i]].mean(0), body.vertices[body.tails[i]].mean(0)
    along = ((np.abs(x) - shoulder[0]) * (elbow - shoulder)[0] + (y - shoulder[1]) * (elbow - shoulder)[1]) / np.sum(
        (elbow - shoulder)[:2] ** 2
    )
    hand = body.zones == ZONE["hand"]
    reach = {"long": upper | (lower & ~hand), "short": upper & (along < 0.62), "none": upper & (along < 0.06)}
    top = (torso & ~bare) | reach[look.sleeves]
    if look.neckline == "turtle":
        top |= of("neck_01") & (y < 6.05) & (body.zones != ZONE["head"])
    albedo[top] = look.top
    if look.stripes is not None:
        albedo[top & (np.floor(y / 0.42) % 2 == 0)] = look.stripes
    if look.jacket is not None:
        albedo[top & ~((z > 0.3) & (np.abs(x) < 0.18 + 0.14 * np.clip(y - 1.0, 0, 5)) & torso)] = look.jacket
    legs = (of("pelvis", "spine_01") & (y <= 1.05)) | of("pelvis", "thigh")
    legs |= of("calf") if not look.shorts else legs
    legs &= ~top
    albedo[legs] = look.trousers
    feet = of("foot", "ball") | ((body.zones == ZONE["foot"]) & (y < -7.0))
    albedo[feet] = look.shoes
    return [(legs, 0.07), (top, 0.10), (feet, 0.05)]


def _add_extras(person: Person, body: Body, rng: np.random.Generator, head_zone: np.ndarray) -> None:
    look = person.look
    front = np.flatnonzero(head_zone & (body.vertices[:, 2] > 0.7))
    skull = np.flatnonzero(head_zone)
    colour = np.array(look.hair)
    # The box of the bare skull on this person: hair swells the surface, so the template's swelling is not in it.
    low, high = extras.HEAD_LOW.copy(), extras.HEAD_HIGH.copy()
    moved = person.rest[skull] - body.vertices[skull]
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
    """Adds a part's points (N,3), already fitted to the person, to the mesh."""
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
