"""Names and layouts: the rows of a table, expanded to one entry per tensor, and the check of every tensor.

"Ours" are this repository's tensors, "theirs" those of another format. Our dotted names are like
`dual.blocks.3.img_q.kernel`; in memory the blocks of a kind are stacked (`dual/img_q/kernel` with a leading layer
axis). Their linear layers are (out, in), ours (in, out). One tensor of theirs can hold several of ours (fused query,
key and value). Models without such layers need no table: `one_to_one` makes their entries.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from omnihuman_jax.errors import UserError
from omnihuman_jax.models.dit.entries import module_conditions

STACKED = ("dual", "single", "decoder")  # groups whose parameters carry a leading layer axis in memory
LISTED = 12  # tensors that an error names per kind of mistake

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How one of our tensors is laid out in theirs; `patch` is the model's patch size.

    Attributes:
      parameter: our name for their `weight`.
      shape: (our shape, patch) -> their shape.
      to_ours: (their array, patch) -> ours.
      to_theirs: (our array, patch) -> theirs.
    """

    parameter: str
    shape: Callable[[Shape, Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray, Shape], np.ndarray]


def _swap(x: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(x, 2)[::-1])


def _regroup(x: np.ndarray, groups: int) -> np.ndarray:
    """Rows (groups, n) -> (n, groups)."""
    return x.reshape(groups, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _reversed(shape: Shape, _: Shape) -> Shape:
    return shape[::-1]


# Axes in reverse order. A bias is its own transpose, so a linear layer's layout serves its bias too.
LINEAR = Layout("kernel", _reversed, lambda x, _: x.T, lambda x, _: x.T)
PLAIN = Layout("", lambda shape, _: shape, lambda x, _: x, lambda x, _: x)
NORM, TABLE = PLAIN._replace(parameter="scale"), PLAIN._replace(parameter="embedding")
# adaLN halves in the other order: (scale, shift) there, (shift, scale) here.
SWAPPED = Layout("kernel", _reversed, lambda x, _: _swap(x).T, lambda x, _: _swap(x.T))
# The output projection: a patch is (C, pt, ph, pw) there, (pt, ph, pw, C) here.
UNPATCH = Layout(
    "kernel",
    _reversed,
    lambda x, patch: _regroup(x, x.shape[0] // math.prod(patch)).T,
    lambda x, patch: _regroup(x.T, math.prod(patch)),
)


def _patch_to_ours(x: np.ndarray, patch: Shape) -> np.ndarray:
    return x if x.ndim == 1 else x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def _patch_to_theirs(x: np.ndarray, patch: Shape) -> np.ndarray:
    return x if x.ndim == 1 else x.reshape(*patch, -1, x.shape[1]).transpose(4, 3, 0, 1, 2)


def _patch_shape(shape: Shape, patch: Shape) -> Shape:
    return shape if len(shape) == 1 else (shape[1], shape[0] // math.prod(patch), *patch)


# The patch embedding: a convolution (out, C, pt, ph, pw) there, a linear layer over flat patches here.
PATCH = Layout("kernel", _patch_shape, _patch_to_ours, _patch_to_theirs)


def _views(to_ours: Callable[[np.ndarray], np.ndarray], to_theirs: Callable[[np.ndarray], np.ndarray]) -> Layout:
    """A layout of views of the array, independent of the patch; its shape is that of a view of zeros."""
    return Layout(
        "",
        lambda shape, _: to_theirs(np.broadcast_to(np.int8(0), shape)).shape,
        lambda x, _: to_ours(x),
        lambda x, _: to_theirs(x),
    )


def permuted(axes: Sequence[int], squeezed: Shape = ()) -> Layout:
    """Their axis i is our axis axes[i]; then their axes `squeezed`, of length 1, are removed."""
    back = np.argsort(axes)
    return _views(lambda x: np.expand_dims(x, squeezed).transpose(back), lambda x: x.transpose(axes).squeeze(squeezed))


def expanded(axes: Shape) -> Layout:
    """Theirs has additional axes of length 1, at the positions `axes`."""
    return _views(lambda x: x.squeeze(axes), lambda x: np.expand_dims(x, axes))


@dataclasses.dataclass(frozen=True)
class Row:
    """One rule of a table: a layer of theirs and the layers of ours that it holds.

    Attributes:
      theirs: name without `.weight` and `.bias`; `{}` stands for the block's number.
      ours: our names, likewise. Layers that the model does not have are skipped.
      layout: of each of ours in theirs.
      axis: axis of their weight along which ours are concatenated.
      offset: their first block number.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = LINEAR
    axis: int = 0
    offset: int = 0


def row(theirs: str, *ours: str, layout: Layout = LINEAR, axis: int = 0, offset: int = 0) -> Row:
    """A `Row` with our names as arguments."""
    return Row(theirs, ours, layout, axis, offset)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of theirs and those of ours that it holds, in order, with our shapes; see `Row` and `Layout`."""

    theirs: str
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layout: Layout
    axis: int
    patch: Shape

    @property
    def parts(self) -> list[Shape]:
        """Shape of each of ours in their layout."""
        return [self.layout.shape(shape, self.patch) for shape in self.shapes]

    @property
    def shape(self) -> Shape:
        """Shape of theirs."""
        first = list(self.parts[0])
        first[self.axis] = sum(part[self.axis] for part in self.parts)
        return tuple(first)

    def span(self, name: str) -> slice:
        """Range of our tensor along `axis`."""
        sizes = [part[self.axis] for part in self.parts]
        index = self.ours.index(name)
        return slice(sum(sizes[:index]), sum(sizes[: index + 1]))


class OnAccess(Mapping[str, np.ndarray]):
    """Tensors that `__getitem__` makes on each access, by the names of what they are made from."""

    def __init__(self, entries: Mapping[str, Any]):
        self._entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def our_shapes(abstract: Any) -> dict[str, Shape]:
    """Dotted name -> shape of every tensor of a parameter tree, with the blocks unstacked."""
    shapes: dict[str, Shape] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        shapes |= dict.fromkeys(leaf_names(path, leaf.shape), block_shape(path, leaf.shape))
    return shapes


def leaf_names(path: tuple[Any, ...], shape: Shape) -> list[str]:
    """Dotted names of the tensors in a leaf of the parameter tree: one, or one per layer."""
    group, *rest = (str(key.key) for key in path)
    if group not in STACKED:
        return [".".join((group, *rest))]
    return [".".join((group, "blocks", str(i), *rest)) for i in range(shape[0])]


def block_shape(path: tuple[Any, ...], shape: Shape) -> Shape:
    """Shape of one tensor in a leaf of the parameter tree."""
    return tuple(shape[1:] if str(path[0].key) in STACKED else shape)


def is_condition(name: str) -> bool:
    """Whether one of our tensors belongs to what OmniHuman adds to a base: the conditions and the null text."""
    return not module_conditions().keys().isdisjoint(name.split("."))


def expand(rows: Iterable[Row], shapes: Mapping[str, Shape], patch: Shape) -> list[Entry]:
    """The rows of a table as one entry per tensor, for a model whose tensors have these shapes."""
    entries = []
    for rule in rows:
        numbers = range(max((_count(name, shapes) for name in rule.ours), default=0)) if "{}" in rule.theirs else [0]
        for i in numbers:
            for suffix, parameter in (("weight", rule.layout.parameter), ("bias", "bias")):
                ours = [name for n in rule.ours if (name := f"{n.format(i)}.{parameter}") in shapes]
                if not ours:
                    continue
                # Layers concatenated along their inputs share one bias, which is that of the first.
                axis = rule.axis if suffix == "weight" else 0
                theirs = f"{rule.theirs.format(i + rule.offset)}.{suffix}"
                sizes = tuple(shapes[name] for name in ours)
                entries.append(Entry(theirs, tuple(ours), sizes, rule.layout, axis, tuple(patch)))
    return entries


def _count(pattern: str, shapes: Mapping[str, Shape]) -> int:
    """The number of blocks whose names match a pattern with `{}`."""
    before, after = pattern.split("{}")
    found = (name[len(before) :].split(".")[0] for name in shapes if name.startswith(before) and f"{after}." in name)
    return 1 + max((int(number) for number in found if number.isdigit()), default=-1)


def one_to_one(theirs: str, ours: str, shape: Shape, layout: Layout = LINEAR) -> Entry:
    """The `Entry` of a tensor that holds one of ours, whose shape here is `shape`."""
    return Entry(theirs, (ours,), (tuple(shape),), layout, 0, ())


def same_names(shapes: Mapping[str, Shape]) -> list[Entry]:
    """Entries of tensors stored under our own names."""
    return [one_to_one(name, name, shape, PLAIN) for name, shape in shapes.items()]


def check_complete(entries: Sequence[Entry], names: Iterable[str]) -> None:
    """Raises ValueError unless the entries hold each of our tensors exactly once."""
    held = [name for entry in entries for name in entry.ours]
    wrong = set(names) ^ set(held) or {name for name in held if held.count(name) > 1}
    if wrong:
        raise ValueError(f"name table: {', '.join(sorted(wrong))} not held exactly once")


def account(entries: Sequence[Entry], found: Mapping[str, Shape], where: Any, hint: str = "") -> None:
    """Raises UserError, from `where` to `hint`, unless a file's tensors (`found`: name -> shape) are the entries'."""
    missing, misshapen, wanted = [], [], {entry.theirs for entry in entries}
    for entry in entries:
        ours = "" if entry.ours == (entry.theirs,) else f" (here {', '.join(entry.ours)})"
        if entry.theirs not in found:
            missing.append(f"{entry.theirs}{ours} is missing")
        elif tuple(found[entry.theirs]) != entry.shape:
            misshapen.append(f"{entry.theirs}{ours} has shape {tuple(found[entry.theirs])}, should be {entry.shape}")
    extra = [f"{name} is not part of the model" for name in sorted(set(found) - wanted)]
    problems = []
    for lines in (missing, misshapen, extra):
        problems += [f"tensor {line}" for line in lines[:LISTED]]
        problems += [f"{len(lines) - LISTED} more like this"] * (len(lines) > LISTED)
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}{f'; {hint}' if hint else ''}")
