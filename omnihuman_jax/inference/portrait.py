"""Reads a portrait in any pixel format as the 8-bit sRGB picture that a viewer shows."""

from __future__ import annotations

import io
import pathlib

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from omnihuman_jax.errors import UserError


def read_portrait(path: str | pathlib.Path) -> np.ndarray:
    """A picture as uint8 sRGB (h, w, 3), upright, on white if transparent.

    16-bit grey values are divided by 257. Floats must be in [0, 1], or whole numbers in [0, 255] with one
    above 1. Raises UserError if the file cannot be read, or its values are outside their range.
    """
    try:
        with Image.open(path) as opened:
            image = _to_srgb(_to_8_bits(ImageOps.exif_transpose(opened)), opened.info.get("icc_profile"))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no such file" if not pathlib.Path(path).exists() else f"not a readable image ({type(error).__name__})"
        raise UserError(f"{path}: {reason}; give a PNG, JPEG or WebP picture") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Modes of more bits, which Pillow would clip instead of scale."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            span = f"{values.min():g} to {values.max():g}"
            raise UserError(f"values are {span}, not 0 to 65535; save it with 8 or 16 bits")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        whole = np.array_equal(values, np.rint(values)) and values.max() > 1
        scale = 1 if whole else 255
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255 / scale:
            span = f"{values.min():g} to {values.max():g}"
            raise UserError(f"values are {span}, not 0 to 1; save it with 8 or 16 bits")
        return Image.fromarray(np.rint(values * scale).astype(np.uint8))
    return image


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts from the colour space of an ICC profile; a damaged profile, or one of other modes, is ignored."""
    if not profile:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image if image.mode in ("RGB", "L", "CMYK") else image.convert("L" if image.mode == "LA" else "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted
