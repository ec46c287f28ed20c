"""Whisper's encoder, from Hugging Face."""

from __future__ import annotations

import re
from pathlib import Path

from flax import nnx

from omnihuman_jax.models.speech.whisper import WhisperConfig, WhisperEncoder
from omnihuman_jax.weights import modules
from omnihuman_jax.weights.names import PLAIN, Entry, one_to_one
from omnihuman_jax.weights.read import open_files

# Parts that the features do not need.
UNUSED = (r"(model\.)?decoder\..*", r"proj_out\.weight")
PREFIXES = ("model.encoder.", "encoder.", "")


def entries(config: WhisperConfig, prefix: str = "model.encoder.") -> list[Entry]:
    """One entry per parameter: kernels (in, out) <- (out, in), (k, in, out) <- (out, in, k)."""
    made = []
    for ours, shape in modules.parameter_shapes(lambda: WhisperEncoder(config, rngs=nnx.Rngs(0))).items():
        if ours == "embed_positions":
            made.append(one_to_one(f"{prefix}{ours}.weight", ours, shape, PLAIN))
        else:
            made.append(one_to_one(prefix + re.sub(r"\.(kernel|scale)$", ".weight", ours), ours, shape))
    return made


def load(path: str | Path) -> WhisperEncoder:
    """Reads a Hugging Face checkpoint directory (config.json, safetensors), or a file in it, without the decoder.

    Raises:
      UserError: it cannot be read, is another model, or a tensor is missing, unexpected, misshapen or not finite.
    """
    files = open_files(path, UNUSED)
    config = WhisperConfig.from_hf(files.settings())
    prefix = next((p for p in PREFIXES if p + "conv1.weight" in files.stored), PREFIXES[0])
    return modules.load(lambda: WhisperEncoder(config, rngs=nnx.Rngs(0)), files, entries(config, prefix))
