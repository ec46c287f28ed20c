"""Whisper's encoder, from Hugging Face's safetensors or from a CTranslate2 model.bin."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
from flax import nnx

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.speech.whisper import WhisperConfig, WhisperEncoder
from omnihuman_jax.weights import modules
from omnihuman_jax.weights.names import PLAIN, Entry, account, one_to_one
from omnihuman_jax.weights.read import open_files

# Parts that the features do not need.
UNUSED = (r"(model\.)?decoder\..*", r"proj_out\.weight")
PREFIXES = ("model.encoder.", "encoder.", "")


def entries(config: WhisperConfig, prefix: str = "model.encoder.") -> list[Entry]:
    """One a parameter: kernels (in, out) <- (out, in), (k, in, out) <- (out, in, k)."""
    made = []
    for ours, shape in modules.parameter_shapes(lambda: WhisperEncoder(config, rngs=nnx.Rngs(0))).items():
        if ours == "embed_positions":
            made.append(one_to_one(prefix + "embed_positions.weight", ours, shape, PLAIN))
            continue
        made.append(one_to_one(prefix + re.sub(r"\.(kernel|scale)$", ".weight", ours), ours, shape))
    return made


def load(path: str | Path) -> WhisperEncoder:
    """Reads a Hugging Face checkpoint directory (config.json, safetensors), or a file in it, without the decoder.

    Raises:
      UserError: it cannot be read, is another model, or a tensor is missing, left over, misshapen, or not finite.
    """
    files = open_files(path, UNUSED)
    config = WhisperConfig.from_hf(files.settings())
    prefix = next((p for p in PREFIXES if p + "conv1.weight" in files.stored), PREFIXES[0])
    return modules.load(lambda: WhisperEncoder(config, rngs=nnx.Rngs(0)), files, entries(config, prefix))


# CTranslate2's ids of data types (include/ctranslate2/types.h), as far as they are needed.
_CT2_TYPES = {0: np.dtype("<f4"), 1: np.dtype("i1"), 2: np.dtype("<i2"), 3: np.dtype("<i4"), 4: np.dtype("<f2")}
_CT2_VERSION = 6


class _Bytes:
    """Reads little-endian values one after another, never beyond the end."""

    def __init__(self, path: Path):
        empty = not path.stat().st_size  # which cannot be mapped
        self.path, self.at = path, 0
        self.data = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")

    def take(self, count: int, what: str) -> bytes | np.ndarray:
        if self.at + count > len(self.data):
            raise UserError(f"{self.path}: truncated: {what} ends beyond the file of {len(self.data)} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str, what: str) -> int:
        return struct.unpack("<" + form, self.take(struct.calcsize(form), what).tobytes())[0]

    def text(self, what: str) -> str:
        return self.take(self.number("H", what), what).tobytes().rstrip(b"\0").decode("utf-8", "replace")


def read_ctranslate2(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a CTranslate2 model.bin (binary version 6), views of its memory map. No code is run.

    Layout: version, specification's name, its revision, number of tensors; of each: name, rank, dimensions, type,
    number of bytes, data.

    Raises:
      UserError: another format, or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the model.bin of a CTranslate2 Whisper")
    data = _Bytes(path)
    version = data.number("I", "the version")
    if version != _CT2_VERSION:
        raise UserError(f"{path}: not a CTranslate2 model.bin of version {_CT2_VERSION} (found {version})")
    kind = data.text("the model's name")
    if kind != "WhisperSpec":
        raise UserError(f"{path}: holds a {kind}, not a WhisperSpec")
    data.number("I", "the revision")
    tensors = {}
    for i in range(data.number("I", "the number of tensors")):
        name = data.text(f"the name of tensor {i}")
        shape = tuple(data.number("I", name) for _ in range(data.number("B", name)))
        dtype, size = data.number("B", name), data.number("I", name)
        raw = data.take(size, f"tensor {name}")
        if dtype not in _CT2_TYPES:
            raise UserError(f"{path}: tensor {name} has CTranslate2 type {dtype}, which is not supported")
        if size != _CT2_TYPES[dtype].itemsize * int(np.prod(shape)):
            raise UserError(f"{path}: tensor {name}: {size} bytes do not make {shape}")
        tensors[name] = np.frombuffer(raw, _CT2_TYPES[dtype]).reshape(shape)
    return tensors


def _hf_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The encoder's tensors under Hugging Face's names, the fused q, k, v apart."""
    found = {}
    parts = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
    layer = {
        "self_attention/layer_norm": "self_attn_layer_norm",
        "self_attention/linear_1": "self_attn.out_proj",
        "ffn/layer_norm": "final_layer_norm",
        "ffn/linear_0": "fc1",
        "ffn/linear_1": "fc2",
    }
    for name, value in tensors.items():
        inside = re.fullmatch(r"encoder/layer_(\d+)/(.+)/(\w+)", name)
        outside = re.fullmatch(r"encoder/(conv1|conv2|layer_norm)/(\w+)", name)
        if name == "encoder/position_encodings/encodings":
            found["embed_positions.weight"] = value
        elif outside and outside[2] in parts:
            found[f"{outside[1]}.{parts[outside[2]]}"] = value
        elif inside and inside[2] == "self_attention/linear_0" and inside[3] in parts:
            for part, piece in zip("qkv", np.split(value, 3), strict=True):
                if (part, inside[3]) != ("k", "bias"):  # zeros there: the original has none
                    found[f"layers.{inside[1]}.self_attn.{part}_proj.{inside[3]}"] = piece
        elif inside and inside[2] in layer and inside[3] in parts:
            found[f"layers.{inside[1]}.{layer[inside[2]]}.{parts[inside[3]]}"] = value
    return found


def load_ctranslate2(path: str | Path) -> WhisperEncoder:
    """Reads the encoder of a CTranslate2 model.bin in float32 or float16.

    Raises:
      UserError: it cannot be read, or a tensor is missing or misshapen (a quantised one).
    """
    tensors = read_ctranslate2(path)
    found = _hf_names(tensors)
    if "conv1.weight" not in found or "encoder/num_heads" not in tensors:
        raise UserError(f"{path}: tensor encoder/conv1/weight or encoder/num_heads is missing; not a Whisper encoder")
    width, channels, _ = found["conv1.weight"].shape
    layers = len({name.split(".")[1] for name in found if name.startswith("layers.")})
    config = WhisperConfig(
        num_mel_bins=channels,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        encoder_ffn_dim=len(found.get("layers.0.fc1.bias", ())),
        max_source_positions=len(found.get("embed_positions.weight", ())),
    )
    table, ours = entries(config, ""), {}
    account(table, {name: value.shape for name, value in found.items()}, path, "another model, or a quantised one")
    for held in table:
        value, name = found[held.theirs], held.ours[0]
        if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            raise UserError(f"{path}: tensor {held.theirs} (here {name}) is quantised or not finite")
        ours[name] = held.layout.to_ours(value, held.patch).astype(np.float32)
    return modules.build_with(lambda: WhisperEncoder(config, rngs=nnx.Rngs(0)), ours)
