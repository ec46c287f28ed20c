"""The collectives of an optimised TPU program, for tests of shardings."""

import dataclasses
import math
import re

from tpu import hlo


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program on one device.

    Attributes:
      opcode: "all-gather", …
      shapes: (dtype, dimensions) of each output array.
      runs: number of runs; a loop of unknown length counts as one trip.
      in_loop: whether it runs in a loop.
      source: its operation's name in JAX.
    """

    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    runs: int
    in_loop: bool
    source: str

    @property
    def bytes(self) -> int:
        """Bytes of the outputs of all runs on one device."""
        return self.runs * sum(_bytes(dtype) * math.prod(dims) for dtype, dims in self.shapes)


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimised program."""
    entry, computations = hlo.parse(text)
    found: list[Collective] = []

    def walk(name: str, runs: int, in_loop: bool) -> None:
        for item in computations[name].values():
            opcode = item.opcode.removesuffix("-start")
            if opcode in hlo.COLLECTIVES:
                source = re.search(r'op_name="([^"]*)"', item.attributes)
                found.append(Collective(opcode, _outputs(item), runs, in_loop, source[1] if source else ""))
            elif opcode == "while":
                trips = hlo.trip_count(item, computations[name], computations)
                walk(item.attribute("body"), runs * (1 if trips is None else trips), True)
            else:
                called = [*hlo.branches(item), item.attribute("calls")]
                called += [item.attribute("to_apply")] if item.opcode == "call" else []
                for other in called:
                    if other in computations:
                        walk(other, runs, in_loop)

    walk(entry, 1, False)
    return found


def _outputs(item: hlo.Instruction) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Output arrays of a collective. An asynchronous start also lists its inputs; its output is the largest."""
    shapes = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", item.shape)
    ]
    if item.opcode in ("all-gather-start", "collective-permute-start"):
        shapes = [max(shapes, key=lambda shape: math.prod(shape[1]))]
    return tuple(shapes)


def _bytes(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1
