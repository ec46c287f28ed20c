"""Portraits of every kind come as the 8-bit sRGB picture that a viewer shows."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from omnihuman_jax.errors import UserError
from omnihuman_jax.inference.portrait import read_portrait


def display_p3():
    """A matrix profile with the primaries of Display P3 adapted to D50, and a gamma of 2.2 (as sRGB's, nearly)."""

    def number(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"para\0\0\0\0\0\3\0\0" + b"".join(map(number, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 3) + b"P3\0" + bytes(79),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.51512, 0.2412, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.1571, 0.06657, 0.78407),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
        b"cprt": b"text\0\0\0\0x\0",
    }
    table, data, offset = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    head = struct.pack(">I", offset + len(data)) + bytes(4) + struct.pack(">I", 0x02400000) + b"mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + number(0.9642) + number(1.0) + number(0.8249)
    return head + bytes(128 - len(head)) + table + data


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    Image.fromarray(np.array([[0, 257, 30000, 65535]], np.uint16)).save(tmp_path / f"a.{suffix}")
    assert read_portrait(tmp_path / f"a.{suffix}")[0].tolist() == [[0] * 3, [1] * 3, [117] * 3, [255] * 3]


def test_floats_are_scaled_or_refused(tmp_path):
    for values, expected in (([0, 0.5, 1], [0, 128, 255]), ([0, 200, 255], [0, 200, 255])):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tiff")
        assert read_portrait(tmp_path / "a.tiff")[0, :, 0].tolist() == expected
    for values in ([0, 0.5, 1000], [-0.5, 0, 1], [np.nan, 0, 1]):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tiff")
        with pytest.raises(UserError, match="a.tiff: values are"):
            read_portrait(tmp_path / "a.tiff")


def test_profiles_are_applied_and_transparency_is_white(tmp_path):
    picture = Image.new("RGB", (4, 4), (230, 120, 90))
    picture.save(tmp_path / "p3.png", icc_profile=display_p3())
    np.testing.assert_allclose(read_portrait(tmp_path / "p3.png")[0, 0].astype(int), (247, 113, 80), atol=2)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("srgb", srgb), ("damaged", b"no profile"), ("none", None)):
        picture.save(tmp_path / f"{name}.png", icc_profile=profile)
        np.testing.assert_allclose(read_portrait(tmp_path / f"{name}.png")[0, 0].astype(int), (230, 120, 90), atol=1)
    Image.new("RGBA", (4, 4), (230, 120, 90, 0)).save(tmp_path / "clear.png", icc_profile=display_p3())
    assert (read_portrait(tmp_path / "clear.png") == 255).all()
