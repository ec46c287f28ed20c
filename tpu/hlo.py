"""Cycles in an optimised TPU program: the compiler's estimate of each operation times the trips of the loops around it.

`cost_analysis()` counts the body of a loop once, and its `optimal_seconds` is not usable for several generations; the
program's text carries `estimated_cycles` for every operation that XLA itself schedules. Pallas kernels and collectives
carry none, so they are counted but not timed.
"""

import dataclasses
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_STARTS = re.compile(r"^(HloModule |ENTRY |%|\s+(ROOT )?%?[\w.\-]+ = )")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
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


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one run of a program costs on one device.

    Attributes:
      cycles: estimated by the TPU compiler, without Pallas kernels and collectives.
      kernels: Pallas calls made, loops multiplied out.
      collectives: collectives made, loops multiplied out.
      unknown_loops: loops whose number of trips could not be read; their bodies are counted once.
    """

    cycles: float = 0.0
    kernels: float = 0.0
    collectives: float = 0.0
    unknown_loops: int = 0

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            self.cycles + other.cycles,
            self.kernels + other.kernels,
            self.collectives + other.collectives,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, trips: int) -> "Estimate":
        """The same, run `trips` times."""
        return Estimate(self.cycles * trips, self.kernels * trips, self.collectives * trips, self.unknown_loops)


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """Name of the entry computation, and every computation by name."""
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
    """Lines, with the attributes of Pallas calls joined to theirs: those are printed over several lines."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line or line == "}" or line.startswith("}, execution_thread") or _STARTS.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line
    return lines


def _instruction(name: str, rest: str, root: bool) -> Instruction | None:
    """Splits "TYPE opcode(ARGUMENTS), ATTRIBUTES"; a tuple's TYPE is in parentheses."""
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


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program, on one device.

    Attributes:
      opcode: "all-gather", …
      shapes: (dtype, dimensions) of each array that it makes.
      runs: how often it runs; in a loop of unknown length once a trip of the loops around that.
      in_loop: whether a loop runs it.
      source: where it comes from, as JAX names it.
    """

    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    runs: int
    in_loop: bool
    source: str

    @property
    def bytes(self) -> int:
        """Bytes that all its runs make on a device."""
        return self.runs * sum(_bytes(dtype) * math.prod(dims) for dtype, dims in self.shapes)


def collectives(text: str) -> list[Collective]:
    """Every collective of an optimised program, those of loops with the loops' trips."""
    entry, computations = parse(text)
    found: list[Collective] = []

    def walk(name: str, runs: int, in_loop: bool) -> None:
        for item in computations[name].values():
            opcode = item.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                source = re.search(r'op_name="([^"]*)"', item.attributes)
                found.append(Collective(opcode, _made(item), runs, in_loop, source[1] if source else ""))
            elif opcode == "while":
                trips = trip_count(item, computations[name], computations)
                walk(item.attribute("body"), runs * (1 if trips is None else trips), True)
            else:
                for called in _called(item):
                    if called in computations:
                        walk(called, runs, in_loop)

    walk(entry, 1, False)
    return found


def _called(item: Instruction) -> list[str]:
    """Computations that an instruction runs once: of calls, fusions, asynchronous pairs and conditionals."""
    branches = re.search(r"branch_computations=\{([^}]*)\}", item.attributes)
    names = _NAME.findall(branches[1]) if branches else []
    keys = ("calls", "true_computation", "false_computation") + (("to_apply",) if item.opcode == "call" else ())
    return names + [called for key in keys if (called := item.attribute(key))]


def _made(item: Instruction) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Arrays that a collective makes. An asynchronous start also names what it reads; its result is the largest."""
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


def estimate(text: str) -> Estimate:
    """Adds up an optimised program, as `compiled.as_text()` gives it."""
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
            return body.times(trips) if trips is not None else body + Estimate(unknown_loops=1)
        if item.opcode == "call":
            return total(item.attribute("to_apply"))
        if item.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", item.attributes)
            names = (
                _NAME.findall(branches[1])
                if branches
                else [item.attribute(f"{b}_computation") for b in ("true", "false")]
            )
            return max((total(name) for name in names), key=lambda e: e.cycles)
        if item.opcode.removesuffix("-start") in COLLECTIVES:
            return Estimate(collectives=1)
        if item.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in item.attributes:
            return Estimate(kernels=1)
        cycles = _CYCLES.search(item.attributes)
        return Estimate(cycles=float(cycles[1])) if cycles else Estimate()

    return total(entry)


def trip_count(loop: Instruction, inside: Computation, computations: dict[str, Computation]) -> int | None:
    """Trips of a counted loop: from its initial value by its step while it is below (or at, or above) its bound."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = computations[loop.attribute("condition")], computations[loop.attribute("body")]
    compare = next((item for item in condition.values() if item.root and item.opcode == "compare"), None)
    if compare is None:
        return None
    direction = re.search(r"direction=(\w+)", compare.attributes)[1]
    counter, bound = (_resolve(name, condition) for name in compare.operands)
    index, limit = _tuple_index(counter), _constant(bound)
    start, step = _initial(loop, inside, index), _step(body, index)
    if None in (index, limit, start, step) or step == 0:
        return None
    last = {"LT": limit - 1, "LE": limit, "GT": limit + 1, "GE": limit, "NE": limit - step}.get(direction)
    return None if last is None else max(0, math.floor((last - start) / step) + 1)


def _resolve(name: str, computation: Computation) -> Instruction | None:
    """The instruction behind copies and bitcasts."""
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


def _initial(loop: Instruction, inside: Computation, index: int | None) -> int | None:
    """Value of the counter before the first trip."""
    state = inside.get(loop.operands[0])
    if index is None or state is None or state.opcode != "tuple":
        return None
    return _constant(_resolve(state.operands[index], inside))


def _step(body: Computation, index: int | None) -> int | None:
    """What one trip adds to the counter."""
    root = next((item for item in body.values() if item.root), None)
    if index is None or root is None or root.opcode != "tuple":
        return None
    added, total = _resolve(root.operands[index], body), 0
    while added is not None and added.opcode == "add":
        operands = [_resolve(name, body) for name in added.operands]
        constants = [value for value in map(_constant, operands) if value is not None]
        if len(constants) != 1:
            return None
        total += constants[0]
        added = next(item for item in operands if _constant(item) is None)
    return total if _tuple_index(added) == index else None
