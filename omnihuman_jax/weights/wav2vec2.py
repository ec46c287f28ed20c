"""wav2vec 2.0 from Hugging Face: `Wav2Vec2Model`, or with the heads of `ForCTC` and `ForPreTraining` (left out)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from flax import nnx

from omnihuman_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from omnihuman_jax.weights.safetensors_files import Checkpoint, Rule, build_with, fit, parameter_shapes, reordered

# Parts that the features do not need: training masks and heads.
UNUSED = (
    r"(wav2vec2\.)?masked_spec_embed",
    r"lm_head\.(weight|bias)",
    r"quantizer\.(codevectors|weight_proj\.(weight|bias))",
    r"project_(hid|q)\.(weight|bias)",
)
# Our path -> theirs. The lengths of the weight-normed convolution have had two names.
NAMES = (
    (r"pos_conv_embed\.bias$", "pos_conv_embed.conv.bias"),
    (r"\.(kernel|scale)$", ".weight"),
)
WEIGHT_NORM = (
    {"length": "conv.parametrizations.weight.original0", "direction": "conv.parametrizations.weight.original1"},
    {"length": "conv.weight_g", "direction": "conv.weight_v"},
)


def rules(config: Wav2Vec2Config, prefix: str = "", *, old_weight_norm: bool = False) -> list[Rule]:
    """One rule a parameter: kernels (in, out) <- (out, in), (k, in, out) <- (out, in, k), lengths (k,) <- (1, 1, k)."""
    made = []
    for ours, shape in parameter_shapes(lambda: Wav2Vec2(config, rngs=nnx.Rngs(0))).items():
        theirs = ours
        for pattern, replacement in NAMES:
            theirs = re.sub(pattern, replacement, theirs)
        for name, other in WEIGHT_NORM[old_weight_norm].items():
            theirs = theirs.replace(f"pos_conv_embed.{name}", f"pos_conv_embed.{other}")
        theirs = prefix + theirs
        if ours.endswith("pos_conv_embed.length"):
            made.append(Rule(ours, theirs, (1, 1, *shape), np.ravel, lambda x: x[None, None]))
        else:
            made.append(reordered(ours, theirs, shape, range(len(shape))[::-1]))
    return made


def load(path: str | Path) -> Wav2Vec2:
    """Reads a checkpoint directory (config.json and safetensors), or a file in it.

    Raises:
      UserError: it cannot be read, is another model, or a tensor is missing, left over, misshapen, or not finite.
    """
    checkpoint = Checkpoint(path)
    settings = dict(checkpoint.config)
    extractor = checkpoint.directory / "preprocessor_config.json"
    if extractor.is_file():
        settings["do_normalize"] = json.loads(extractor.read_text()).get("do_normalize", True)
    config = Wav2Vec2Config.from_hf(settings)
    prefix = "wav2vec2." if any(name.startswith("wav2vec2.") for name in checkpoint.names) else ""
    old = any(name.endswith(".weight_g") for name in checkpoint.names)
    table = rules(config, prefix, old_weight_norm=old)
    return build_with(lambda: Wav2Vec2(config, rngs=nnx.Rngs(0)), fit(checkpoint, table, unused=UNUSED))
