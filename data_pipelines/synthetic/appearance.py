"""The random look of a rendered person: shape numbers, colours with names for the caption, and a voice."""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.synthetic import body, speech

Colour = tuple[float, float, float]  # red, green, blue in 0..1

SKINS: tuple[Colour, ...] = (
    (0.96, 0.80, 0.69),
    (0.91, 0.72, 0.58),
    (0.86, 0.66, 0.50),
    (0.76, 0.55, 0.40),
    (0.62, 0.43, 0.30),
    (0.47, 0.32, 0.23),
    (0.36, 0.24, 0.18),
)
HAIRS: dict[str, Colour] = {
    "black": (0.09, 0.08, 0.09),
    "dark brown": (0.22, 0.14, 0.09),
    "brown": (0.38, 0.24, 0.14),
    "blond": (0.80, 0.64, 0.36),
    "red": (0.60, 0.24, 0.10),
    "grey": (0.62, 0.62, 0.63),
}
CLOTHES: dict[str, Colour] = {
    "red": (0.78, 0.13, 0.14),
    "blue": (0.15, 0.30, 0.72),
    "green": (0.16, 0.50, 0.24),
    "yellow": (0.90, 0.76, 0.20),
    "white": (0.92, 0.92, 0.90),
    "black": (0.13, 0.13, 0.14),
    "grey": (0.48, 0.49, 0.50),
    "orange": (0.90, 0.48, 0.12),
    "purple": (0.46, 0.20, 0.58),
    "pink": (0.92, 0.54, 0.66),
    "turquoise": (0.12, 0.60, 0.62),
}
TROUSERS: dict[str, Colour] = {
    "black": (0.12, 0.12, 0.13),
    "blue": (0.17, 0.25, 0.43),
    "grey": (0.38, 0.39, 0.41),
    "brown": (0.38, 0.28, 0.19),
    "beige": (0.72, 0.64, 0.50),
}
EYES: tuple[Colour, ...] = ((0.28, 0.17, 0.08), (0.20, 0.12, 0.07), (0.25, 0.42, 0.62), (0.30, 0.44, 0.26))
HAIR_STYLES = {"female": ("long", "bob", "bun", "short", "afro"), "male": ("short", "buzz", "bald", "afro", "short")}
HAIR_LENGTH = {"bald": 0.0, "buzz": 0.1, "short": 0.3, "afro": 0.5, "bun": 0.4, "bob": 0.7, "long": 1.0}
NECKLINES = ("crew", "v", "scoop", "turtle")
SLEEVES = ("long", "short", "cap")
ATTRIBUTE_NAMES = tuple(
    [f"{part}_{c}" for part in ("skin", "hair", "top", "trousers", "background") for c in "rgb"]
    + ["gender", "age", "muscle", "weight", *body.RACES, "hair_length", "beard", "glasses"]
)


@dataclasses.dataclass(frozen=True)
class Appearance:
    """One person. Body numbers lie in 0..1 (gender 0 female, 1 male); details in -1..1; colours are RGB in 0..1."""

    gender: str
    age: float
    muscle: float
    weight: float
    races: tuple[float, float, float]
    details: dict[str, float]
    skin: Colour
    hair_name: str
    hair: Colour
    hair_style: str
    hairline: float
    brow: float
    beard: float
    glasses: bool
    eye: Colour
    top_name: str
    top: Colour
    stripes: Colour | None
    jacket: Colour | None
    neckline: str
    sleeves: str
    trousers_name: str
    trousers: Colour
    shorts: bool
    shoes: Colour
    voice: speech.Voice

    @property
    def noun(self) -> str:
        young = {"female": "woman", "male": "man"}[self.gender]
        return f"old {young}" if self.age > 0.6 else young

    def attributes(self, background: np.ndarray) -> np.ndarray:
        """Ground truth (A,) in the order of ATTRIBUTE_NAMES; `background`: mean colour (3,)."""
        numbers = [*self.skin, *self.hair, *self.top, *self.trousers, *background]
        numbers += [float(self.gender == "male"), self.age, self.muscle, self.weight, *self.races]
        numbers += [HAIR_LENGTH[self.hair_style], self.beard, float(self.glasses)]
        return np.array(numbers, np.float32)


def _jitter(rng: np.random.Generator, colour: Colour, amount: float = 0.04) -> Colour:
    return tuple(float(c) for c in np.clip(np.array(colour) + rng.uniform(-amount, amount, 3), 0.02, 0.98))


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def draw(rng: np.random.Generator) -> Appearance:
    """A random person."""
    gender = _pick(rng, body.GENDERS)
    races = rng.dirichlet([0.35, 0.35, 0.35])
    # Skin tone only loosely follows the mixture, so that every tone occurs with every face shape.
    tone = float(races @ [5.0, 1.4, 0.9] + rng.normal(0, 0.6))
    tone = min(max(tone, 0.0), len(SKINS) - 1.001)
    low = int(tone)
    skin = np.array(SKINS[low]) * (1 - tone + low) + np.array(SKINS[low + 1]) * (tone - low)
    age = float(rng.beta(1.1, 2.0) * 0.9)
    chances = np.array([3.0, 3.0, 2.0, 2.0, 1.0, 0.2] if tone < 3 else [9.0, 6.0, 0.6, 0.0, 0.0, 0.2])
    hair_name = str(rng.choice(list(HAIRS), p=chances / chances.sum()))
    if age > 0.6 and rng.random() < 0.75:
        hair_name = "grey"
    top_name, trousers_name = _pick(rng, list(CLOTHES)), _pick(rng, list(TROUSERS))
    details = {name: float(np.clip(rng.normal(0, 0.45), -1, 1)) for name in (*body.DETAILS, *body.PAIRED_DETAILS)}
    details["eye_size"] = max(details["eye_size"], -0.4)
    man = gender == "male"
    extra = rng.random(5)
    return Appearance(
        gender=gender,
        age=age,
        muscle=float(rng.uniform(0.3, 0.9) if man else rng.uniform(0.2, 0.7)),
        weight=float(rng.beta(2.2, 2.2)),
        races=tuple(float(r) for r in races),
        details=details,
        skin=_jitter(rng, tuple(skin), 0.02),
        hair_name=hair_name,
        hair=_jitter(rng, HAIRS[hair_name], 0.02),
        hair_style=_pick(rng, HAIR_STYLES[gender]),
        hairline=float(rng.uniform(-0.12, 0.16) + (0.12 * age if man else 0)),
        brow=float(rng.uniform(0.6, 1.1) * (1.15 if man else 0.85)),
        beard=float(rng.uniform(0.35, 0.8)) if man and extra[0] < 0.35 else 0.0,
        glasses=bool(extra[1] < 0.15),
        eye=_pick(rng, EYES[:2] if tone > 3 else EYES),
        top_name=top_name,
        top=_jitter(rng, CLOTHES[top_name]),
        stripes=_jitter(rng, _pick(rng, list(CLOTHES.values()))) if extra[2] < 0.15 else None,
        jacket=_jitter(rng, _pick(rng, list(TROUSERS.values()))) if extra[3] < 0.15 else None,
        neckline=_pick(rng, NECKLINES),
        sleeves=str(rng.choice(SLEEVES, p=[0.5, 0.4, 0.1])),
        trousers_name=trousers_name,
        trousers=_jitter(rng, TROUSERS[trousers_name]),
        shorts=bool(extra[4] < 0.12),
        shoes=_jitter(rng, _pick(rng, [CLOTHES["black"], CLOTHES["white"], TROUSERS["brown"]])),
        voice=_voice(rng, gender, age),
    )


def _voice(rng: np.random.Generator, gender: str, age: float) -> speech.Voice:
    name = f"{_pick(rng, speech.ACCENTS)}+{_pick(rng, speech.VARIANTS[gender])}"
    pitch = rng.uniform(45, 75) if gender == "female" else rng.uniform(25, 55)
    rate = rng.uniform(135, 175) - 15 * age
    return speech.Voice(name, round(rate), round(pitch), round(rng.uniform(30, 75)))
