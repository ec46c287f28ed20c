"""wav2vec 2.0 from Hugging Face: `Wav2Vec2Model`, or `ForCTC` and `ForPreTraining` without their heads."""

from __future__ import annotations

import re
from pathlib import Path

from flax import nnx

from omnihuman_jax.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from omnihuman_jax.weights import modules
from omnihuman_jax.weights.names import LINEAR, Entry, expanded, one_to_one
from omnihuman_jax.weights.read import open_files

# Parts that the features do not need: training masks and heads.
UNUSED = (
    r"(wav2vec2\.)?masked_spec_embed",
    r"lm_head\.(weight|bias)",
    r"quantizer\.(codevectors|weight_proj\.(weight|bias))",
    r"project_(hid|q)\.(weight|bias)",
)
# Our path -> theirs. Theirs has two sets of names for the weight-normed convolution, by version.
NAMES = ((r"pos_conv_embed\.bias$", "pos_conv_embed.conv.bias"), (r"\.(kernel|scale)$", ".weight"))
WEIGHT_NORM = (
    {"length": "conv.parametrizations.weight.original0", "direction": "conv.parametrizations.weight.original1"},
    {"length": "conv.weight_g", "direction": "conv.weight_v"},
)


def entries(config: Wav2Vec2Config, prefix: str = "", *, old_weight_norm: bool = False) -> list[Entry]:
    """One entry per parameter: (in, out) <- (out, in), (k, in, out) <- (out, in, k), lengths (k,) <- (1, 1, k)."""
    made = []
    for ours, shape in modules.parameter_shapes(lambda: Wav2Vec2(config, rngs=nnx.Rngs(0))).items():
        theirs = ours
        for pattern, replacement in NAMES:
            theirs = re.sub(pattern, replacement, theirs)
        for name, other in WEIGHT_NORM[old_weight_norm].items():
            theirs = theirs.replace(f"pos_conv_embed.{name}", f"pos_conv_embed.{other}")
        layout = expanded((0, 1)) if ours.endswith("pos_conv_embed.length") else LINEAR
        made.append(one_to_one(prefix + theirs, ours, shape, layout))
    return made


def load(path: str | Path) -> Wav2Vec2:
    """Reads a checkpoint directory (config.json and safetensors), or a file in it.

    Raises UserError if it is unreadable, another model, or a tensor is missing, unexpected, misshapen or not finite.
    """
    files = open_files(path, UNUSED)
    settings, extractor = files.settings(), files.settings("preprocessor_config.json")
    if "do_normalize" in extractor:
        settings["do_normalize"] = extractor["do_normalize"]
    config = Wav2Vec2Config.from_hf(settings)
    prefix = "wav2vec2." if any(name.startswith("wav2vec2.") for name in files.stored) else ""
    old = any(name.endswith(".weight_g") for name in files.stored)
    table = entries(config, prefix, old_weight_norm=old)
    return modules.load(lambda: Wav2Vec2(config, rngs=nnx.Rngs(0)), files, table)
