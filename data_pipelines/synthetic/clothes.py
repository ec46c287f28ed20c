"""Clothes, hair and beard: their regions on the template and their colours.

Regions are signed fields over template points (N,3), positive inside. Numbers are decimetres (see body.py): the neck
joint is at y = 5.9, the shoulder at 5.25, the waist at about 2, the chin at 6.2, the top of the skull at 8.5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_pipelines.synthetic import mesh_cut
from data_pipelines.synthetic.appearance import Appearance
from data_pipelines.synthetic.body import ZONE, Body

WAIST = 1.05
STRIPE = 0.42
SLEEVE_ENDS = {"short": 0.62, "cap": 0.34}  # of the way from shoulder to elbow
COLLAR = 6.02  # upper edge of a turtleneck
HAIR_THICKNESS = {"bald": 0.0, "buzz": 0.03, "short": 0.13, "afro": 0.48, "bun": 0.08, "bob": 0.15, "long": 0.12}
PALETTE = {
    "mouth": (0.09, 0.02, 0.02),
    "eye": (0.93, 0.92, 0.90),
    "lash": (0.16, 0.11, 0.09),
    "tooth": (0.86, 0.84, 0.78),
    "tongue": (0.30, 0.09, 0.09),
}


def hair_field(points: np.ndarray, look: Appearance) -> np.ndarray:
    """Height (N,) above the hairline in dm, for points of the head."""
    x, y, z = points.T
    fringe = 0.2 if look.hair_style == "bob" else 0.0
    front = 7.92 + look.hairline - fringe - 0.25 * np.clip(np.abs(x) - 0.35, 0, 1)
    s = np.clip((z - 0.62) / (1.28 - 0.62), 0, 1)
    line = 6.95 + (front - 6.95) * s * s * (3 - 2 * s)
    nape = 6.45 + (6.95 - 6.45) * np.clip((z - 0.40) / 0.12, 0, 1)
    return y - np.where(z > 0.62, line, nape)


def beard_field(points: np.ndarray) -> np.ndarray:
    """Positive (N,) on jaw and upper lip, for points of head and neck."""
    x, y, z = points.T
    across = np.abs(x)
    jaw = np.minimum.reduce([6.60 + 0.55 * np.clip(across - 0.28, 0, 0.6) - y, z - 0.60, y - 6.12])
    # No beard on the lower lip and the skin right below it.
    jaw = np.minimum(jaw, np.maximum(across - 0.25, 6.42 - y))
    moustache = np.minimum.reduce([0.30 - across, y - 6.67, 6.81 - y, z - 1.35])
    return np.maximum(jaw, moustache)


def neck_opening(points: np.ndarray, neckline: str) -> np.ndarray:
    """Positive (N,) on the neck and chest that a top leaves bare."""
    x, y, z = points.T
    ring = np.hypot(x, z - 0.05)
    if neckline == "turtle":
        return y - COLLAR
    crew = np.minimum((1.02 if neckline == "scoop" else 0.84) - ring, y - 5.0)
    above = np.minimum(y - 5.95, 1.2 - ring)  # the neck itself
    bare = np.maximum(crew, above)
    if neckline == "v":
        bare = np.maximum(bare, np.minimum(z - 0.2, 0.5 * (y - 4.45) - np.abs(x)))
    if neckline == "scoop":
        bare = np.maximum(bare, np.minimum.reduce([z, 1.0 - np.abs(x), y - 4.95]))
    return bare


def _jacket_opening(points: np.ndarray) -> np.ndarray:
    x, y, z = points.T
    return np.minimum(z - 0.3, 0.18 + 0.14 * np.clip(y - 1.0, 0, 5) - np.abs(x))


def _along_arm(points: np.ndarray, body: Body) -> np.ndarray:
    """Position (N,) of points along the upper arm: 0 at the shoulder, 1 at the elbow."""
    i = body.bones.index("upperarm_l")
    shoulder, elbow = body.vertices[body.heads[i]].mean(0)[:2], body.vertices[body.tails[i]].mean(0)[:2]
    bone = elbow - shoulder
    offset = np.stack([np.abs(points[:, 0]) - shoulder[0], points[:, 1] - shoulder[1]], 1)
    return offset @ bone / (bone @ bone)


def _dominant(body: Body) -> Callable[..., np.ndarray]:
    """A function from bone names (without side) to the mask (Q,) of quads on which one of them has the most weight."""
    bone = body.weights[body.quads].mean(1).argmax(1)

    def of(*names: str) -> np.ndarray:
        return np.isin(bone, [i for i, n in enumerate(body.bones) if n in names or n.rsplit("_", 1)[0] in names])

    return of


def cut_seams(body: Body, look: Appearance) -> Body:
    """The template with quads split along the edges of the person's hair, beard and clothes."""

    def along(field: np.ndarray, *zones: str) -> None:
        nonlocal body
        body = mesh_cut.cut(body, field, np.isin(body.zones, [ZONE[zone] for zone in zones]))

    if look.hair_style != "bald":
        along(hair_field(body.vertices, look), "head")
    if look.beard:
        along(beard_field(body.vertices), "head", "skin")
    along(neck_opening(body.vertices, look.neckline), "skin", "head")
    along(body.vertices[:, 1] - WAIST, "skin")
    if look.sleeves in SLEEVE_ENDS:
        along(_along_arm(body.vertices, body) - SLEEVE_ENDS[look.sleeves], "skin")
    if look.stripes is not None:
        along(np.sin(np.pi * body.vertices[:, 1] / STRIPE), "skin")
    if look.jacket is not None:
        along(_jacket_opening(body.vertices), "skin")
    return body


def paint(body: Body, look: Appearance, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours (Q,3) of the quads of a cut body, and thickness (V,) of clothes and hair in dm."""
    where, zones = body.vertices[body.quads].mean(1), body.zones
    skin = np.array(look.skin)
    albedo = np.tile(skin, (len(zones), 1)) * (1 + 0.01 * rng.standard_normal((len(zones), 1)))
    for name, colour in PALETTE.items():
        albedo[zones == ZONE[name]] = colour
    albedo[zones == ZONE["ear"]] = skin * [0.97, 0.90, 0.88]
    red = [0.88, 0.58, 0.58] if look.gender == "female" else [0.90, 0.68, 0.66]
    albedo[zones == ZONE["lip"]] = skin * red
    on_head = zones == ZONE["head"]
    cheek = (
        np.exp(-((np.abs(where[:, 0]) - 0.45) ** 2 + (where[:, 1] - 6.95) ** 2) / 0.05) * on_head * (where[:, 2] > 0.7)
    )
    albedo *= 1 + cheek[:, None] * [0.02, -0.06, -0.07]
    if look.beard:
        beard = (on_head | (zones == ZONE["skin"])) & (beard_field(where) > 0)
        albedo[beard] = (1 - look.beard) * skin + look.beard * np.array(look.hair)
    lift = np.zeros(len(body.vertices))
    if look.hair_style != "bald":
        hair = on_head & (hair_field(where, look) > 0)
        mix = 0.75 if look.hair_style == "buzz" else 1.0
        strands = np.clip(1 + 0.03 * rng.standard_normal((hair.sum(), 1)), 0.85, 1.15)
        albedo[hair] = (1 - mix) * skin + mix * np.array(look.hair) * strands
        rise = np.clip(hair_field(body.vertices, look) / 0.45, 0, 1)
        on_hair = np.zeros(len(lift), bool)
        on_hair[body.quads[hair]] = True
        on_hair[body.quads[zones == ZONE["ear"]]] = False  # keep the shape of ears that share vertices with hair
        lift = np.where(on_hair, HAIR_THICKNESS[look.hair_style] * np.sqrt(rise * (2 - rise)), 0.0)
    for garment, thickness in _clothes(body, look, where, albedo):
        lift[body.quads[garment]] = thickness
    return albedo.astype(np.float32), lift.astype(np.float32)


def _clothes(body: Body, look: Appearance, where: np.ndarray, albedo: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Paints clothes into `albedo`; returns (mask of quads, thickness in dm) of each garment."""
    zones, y = body.zones, where[:, 1]
    cloth = np.isin(zones, [ZONE["skin"], ZONE["foot"]])
    of = _dominant(body)
    torso = of("spine_01", "spine_02", "spine_03", "clavicle", "neck_01") & (y > WAIST) & cloth
    torso |= (zones == ZONE["head"]) & (y < 6.1) & (neck_opening(where, look.neckline) <= 0)
    upper, lower = of("upperarm") & cloth, of("lowerarm") & cloth
    sleeves = upper & (_along_arm(where, body) < SLEEVE_ENDS[look.sleeves]) if look.sleeves != "long" else upper | lower
    top = (torso & (neck_opening(where, look.neckline) <= 0)) | sleeves
    albedo[top] = look.top
    if look.stripes is not None:
        albedo[top & (np.sin(np.pi * y / STRIPE) > 0)] = look.stripes
    if look.jacket is not None:
        albedo[top & ~((_jacket_opening(where) > 0) & torso)] = look.jacket
    legs = (of("pelvis", "spine_01", "spine_02") & (y <= WAIST)) | of("pelvis", "thigh")
    legs = cloth & ~top & (legs if look.shorts else legs | of("calf"))
    albedo[legs] = look.trousers
    feet = of("foot", "ball") & cloth
    albedo[feet] = look.shoes
    return [(legs, 0.07), (top, 0.10), (feet, 0.05)]
