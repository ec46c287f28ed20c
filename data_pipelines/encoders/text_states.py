"""Token states from a file that another program wrote, for instance with a Hugging Face encoder; docs/encoders.md.

The file is safetensors. Tensors "0", "1", … (L, Dt) are the unpadded token states of caption 0, 1, …; the header entry
"captions" is the JSON list of captions. The encoder's name is "states:FILE".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors

from omnihuman_jax.errors import UserError
from omnihuman_jax.weights.write import save_tensors

PREFIX = "states:"


class StatesFile:
    """Text encoder that looks captions up in a file; `name` and `dim` as in `text.TextEncoder`."""

    def __init__(self, path: str | Path):
        """Raises UserError if the file is missing or malformed."""
        self.path, self.name = Path(path), f"{PREFIX}{path}"
        if not self.path.is_file():
            raise UserError(f"text encoder {self.name}: no such file; docs/encoders.md shows how to make one")
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:
                captions = json.loads((file.metadata() or {})["captions"])
                shapes = [tuple(file.get_slice(str(i)).get_shape()) for i in range(len(captions))]
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            message = f"text encoder {self.name}: not a file of token states ({error}); see docs/encoders.md"
            raise UserError(message) from error
        self._number = {caption: i for i, caption in enumerate(captions)}
        widths = {shape[-1] for shape in shapes if len(shape) == 2 and shape[0]}
        if len(widths) != 1 or any(len(shape) != 2 or not shape[0] for shape in shapes):
            raise UserError(f"text encoder {self.name}: tensors must be (L, Dt) of one width, L of at least 1")
        self.dim = widths.pop()

    def encode(self, caption: str) -> np.ndarray:
        """Caption -> (L, Dt) float32 states of its tokens; UserError if it has none, or they are not finite."""
        if caption not in self._number:
            raise UserError(f"{self.name} has no states of {caption!r}; encode it with the same model and add it")
        with safetensors.safe_open(self.path, framework="numpy") as file:
            states = np.asarray(file.get_tensor(str(self._number[caption])), np.float32)
        if not np.isfinite(states).all():
            raise UserError(f"text encoder {self.name}: the states of {caption!r} are not finite; encode it again")
        return states


def write(path: str | Path, states: Mapping[str, np.ndarray]) -> None:
    """Writes caption -> (L, Dt) states, as float16 if that is lossless, else as float32."""
    tensors = {}
    for i, value in enumerate(states.values()):
        value = np.asarray(value, np.float32)
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        tensors[str(i)] = half if np.array_equal(half.astype(np.float32), value) else value
    save_tensors(path, tensors, {"captions": json.dumps(list(states))})
