"""Cycles of an optimised TPU program: the compiler's estimate for each operation times the trips of its loops.

`cost_analysis()` counts the body of a loop once, and its `optimal_seconds` is unusable for several generations. The
program's text has `estimated_cycles` for every operation that XLA schedules itself. Pallas kernels and collectives have
none, so they are counted but not timed.
"""

import math
import operator
import re
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_STARTS = re.compile(r"^(HloModule |ENTRY |%|\s+(ROOT )?%?[\w.\-]+ = )")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return _NAME.findall(self.arguments)

    def attribute(self, key: str) -> str | None:
        """The computation named by an attribute such as body=%name."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


class Estimate(NamedTuple):
    """Cost of one run of a program on one device, with loops multiplied out."""

    cycles: float = 0.0  # estimated by the TPU compiler, without Pallas kernels and collectives
    kernels: float = 0.0  # Pallas calls
    collectives: float = 0.0
    unknown_loops: int = 0  # with an unknown number of trips; their bodies are counted once

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(*map(operator.add, self, other))


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """The name of the entry computation, and all computations by name."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            if instruction:
                current[instruction.name] = instruction
    return entry, computations


def _logical_lines(text: str) -> list[str]:
    """The text's lines, with the multi-line attributes of Pallas calls joined to their line."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line or line == "}" or line.startswith("}, execution_thread") or _STARTS.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line
    return lines


def _instruction(name: str, rest: str, root: bool) -> Instruction | None:
    """Parses "TYPE opcode(ARGUMENTS), ATTRIBUTES"; a tuple's TYPE is in parentheses."""
    start = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opening = rest.find("(", start)
    if start <= 0 or opening < 0:
        return None
    end = _closing(rest, opening)
    return Instruction(name, rest[:start], rest[start:opening].strip(), rest[opening + 1 : end], rest[end + 1 :], root)


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def branches(item: Instruction) -> list[str]:
    """The branch computations of a conditional."""
    if found := re.search(r"branch_computations=\{([^}]*)\}", item.attributes):
        return _NAME.findall(found[1])
    return [name for key in ("true", "false") if (name := item.attribute(f"{key}_computation"))]


def estimate(text: str) -> Estimate:
    """Cost of an optimised program (`compiled.as_text()`); a conditional costs as much as its worst branch."""
    entry, computations = parse(text)
    done: dict[str, Estimate] = {}

    def total(name: str) -> Estimate:
        if name not in done:
            done[name] = sum((one(item, computations[name]) for item in computations[name].values()), Estimate())
        return done[name]

    def one(item: Instruction, inside: Computation) -> Estimate:
        if item.opcode == "while":
            trips = trip_count(item, inside, computations)
            body = total(item.attribute("body")) + total(item.attribute("condition"))
            if trips is None:
                return body + Estimate(unknown_loops=1)
            return Estimate(*(trips * count for count in body[:3]), body.unknown_loops)
        if item.opcode == "call":
            return total(item.attribute("to_apply"))
        if item.opcode == "conditional":
            return max((total(name) for name in branches(item)), key=lambda e: e.cycles)
        if item.opcode.removesuffix("-start") in COLLECTIVES:
            return Estimate(collectives=1)
        if item.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in item.attributes:
            return Estimate(kernels=1)
        cycles = _CYCLES.search(item.attributes)
        return Estimate(cycles=float(cycles[1])) if cycles else Estimate()

    return total(entry)


def trip_count(loop: Instruction, inside: Computation, computations: dict[str, Computation]) -> int | None:
    """Trips of a counted loop, from its initial value, step and bound; None if they are unknown."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = computations[loop.attribute("condition")], computations[loop.attribute("body")]
    compare = next((item for item in condition.values() if item.root and item.opcode == "compare"), None)
    if compare is None:
        return None
    direction = re.search(r"direction=(\w+)", compare.attributes)[1]
    counter, bound = (_resolve(name, condition) for name in compare.operands)
    index, limit = _tuple_index(counter), _constant(bound)
    if index is None or limit is None:
        return None
    start, step = _constant(_element(inside.get(loop.operands[0]), index, inside)), _step(body, index)
    if start is None or not step:
        return None
    last = {"LT": limit - 1, "LE": limit, "GT": limit + 1, "GE": limit, "NE": limit - step}.get(direction)
    return None if last is None else max(0, math.floor((last - start) / step) + 1)


def _resolve(name: str, computation: Computation) -> Instruction | None:
    """The instruction that a copy, bitcast or conversion takes its value from."""
    item = computation.get(name)
    while item is not None and item.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
        item = computation.get(item.operands[0])
    return item


def _constant(item: Instruction | None) -> int | None:
    if item is None or item.opcode != "constant" or not re.fullmatch(r"-?\d+", item.arguments):
        return None
    return int(item.arguments)


def _tuple_index(item: Instruction | None) -> int | None:
    if item is None or item.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", item.attributes)[1])


def _element(item: Instruction | None, index: int, computation: Computation) -> Instruction | None:
    """What a tuple holds at an index."""
    return _resolve(item.operands[index], computation) if item is not None and item.opcode == "tuple" else None


def _step(body: Computation, index: int) -> int | None:
    """Increment of the counter per trip."""
    added, total = _element(next((item for item in body.values() if item.root), None), index, body), 0
    while added is not None and added.opcode == "add":
        operands = [_resolve(name, body) for name in added.operands]
        constants = [value for value in map(_constant, operands) if value is not None]
        if len(constants) != 1:
            return None
        total += constants[0]
        added = next(item for item in operands if _constant(item) is None)
    return total if _tuple_index(added) == index else None
