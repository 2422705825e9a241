"""Kernels over data sets: tiles of pairs, within a memory budget, into memory or a store, here or on a cluster."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from anywidth.errors import StoreError
from anywidth.examples import Dataset, dataset
from anywidth.grams import here
from anywidth.grams.evaluate import Job, compiled, outputs, padded, traffic, transposed
from anywidth.grams.filling import QUEUE, GramStore
from anywidth.grams.identity import differences, identity
from anywidth.grams.plan import Piece, Tile, at, between_groups, even, panels, squares
from anywidth.grams.progress import Meter, bar
from anywidth.grams.store import Header, create, read_header
from anywidth.kernels import Errors, Kernels
from anywidth.memory import free_memory, parse_bytes, readable
from anywidth.network import Network

__all__ = ["gram"]

_LARGEST = 512  # examples on a side of a tile of a store: beyond it nothing is gained
_LARGEST_IN_MEMORY = 1024  # likewise, where each tile is copied and a matrix that is one tile is not
_STREAMED = 2**22  # bytes of an array with a number or two for each pair: such kernels are passes over a few of them
_CACHE = 2**19  # bytes of an array that the caches of a core hold together with a few others
_SMALLEST = 8  # examples on a side of a tile that is smaller only if memory asks for it
_SMALLEST_SPLIT = 64  # a symmetric matrix is cut into tiles at least this wide, to skip half of them
_LARGEST_MIXED = 2048  # of a tile with examples of many shapes, each of which is a computation of its own
_WORTHWHILE = 2**27  # bytes that the pairs of a tile move in twice the time that a tile costs beyond its pairs
_THERE = 2**25  # bytes that are taken to be free: finding out how many are takes as long as a small tile


def gram(
    kernel: Callable[[Any, Any], PyTree[jax.Array]],
    X: Any,
    Y: Any = None,
    *,
    store: str | os.PathLike[str] | None = None,
    memory: int | str | None = None,
    client: Any = None,
    progress: bool = True,
) -> PyTree[Any]:
    """The matrix of a kernel over all pairs of examples.

    Args:
        kernel: a pure function of a pair of examples, such as `ntk(net)`, `nngp(net)` or `kernels(net)`. For
            examples with outputs of shapes S and S' it returns an array of shape S + S', or a pytree of them. It
            must be symmetric, kernel(y, x) = kernel(x, y) with S and S' exchanged, if Y is None. The arrays of a
            `functools.partial(kernel, params)` are passed on: other params of these shapes compile nothing anew.
        X: N examples: an array with a leading example axis, a pytree of such arrays, or a list of examples
            (arrays or pytrees of arrays), whose shapes may differ.
        Y: M examples, likewise. None for X itself: then only one triangle is computed, and mirrored.
        store: a directory in which to keep the matrix, as a zarr v3 array written tile by tile (a group of arrays for
            a kernel that returns several), which may be larger than memory. The same call goes on with a store that is
            not finished, whatever stopped it, and checks one that is: damaged tiles are computed again. Several
            processes may work on one store, and share the tiles.
        memory: bytes the computation may use beyond a result in memory, as a number or like "1 GiB"; by default a
            quarter of what is free.
        client: a `dask.distributed.Client`, on whose workers to compute the tiles. They need not see the store.
        progress: show a progress bar on standard error if it is a terminal, rich is installed and the work lasts.

    Returns:
        In place of each array returned by the kernel, an array of shape (N, M) + S + S', which with a `store` is a
        read-only `zarr.Array` (slice it to get NumPy arrays; what is not written yet is NaN). The errors in `Kernels`
        are scalar zeros if nothing had to be sampled. If the examples of a list have outputs of different shapes,
        a nested list instead of an array, whose entry [i][j] has shape S_i + S'_j.

    Raises:
        TypeError: if X or Y does not hold arrays of numbers, or is being traced: `gram` runs outside `jit`.
        ValueError: if X or Y is empty or holds NaN or infinite numbers, if their examples do not resemble one
            another, or the kernel does not return shapes S + S'.
        MemoryError: if one pair does not fit in `memory`, or the result in what is free.
        StoreError: if the store holds another matrix (it says what differs) or is no store, or if outputs have
            different shapes, for which there is no one array.
        OSError: if the disk is full or the store cannot be written to.
        KeyboardInterrupt: on Ctrl-C; with a store, what was computed is kept.
    """
    if not callable(kernel):
        what = "a Network: write gram(ntk(net), X)" if isinstance(kernel, Network) else f"a {type(kernel).__name__}"
        raise TypeError(f"gram takes a kernel, a function of a pair of examples such as ntk(net), not {what}")
    xs = dataset(X)
    ys = xs if Y is None else dataset(Y, "Y", like=xs)
    symmetric = Y is None
    pairs = [(g, h) for g in range(len(xs.groups)) for h in range(len(ys.groups)) if not symmetric or g <= h]
    shapes = {(g, h): outputs(kernel, xs.groups[g].spec, ys.groups[h].spec) for g, h in pairs}
    if exact := _exact(kernel, xs, ys, pairs):
        kernel = exact
        shapes = {(g, h): outputs(kernel, xs.groups[g].spec, ys.groups[h].spec) for g, h in pairs}
    ranks = _output_ranks(shapes, len(xs.groups)) if symmetric else []
    work = _Work(kernel, xs, ys, symmetric, shapes, ranks, None if memory is None else parse_bytes(memory))
    compute = _computed_by(client)
    out = _in_memory(work, compute, progress) if store is None else _in_store(work, compute, progress, store)
    if exact and isinstance(out, Kernels):
        zero = np.zeros((), jax.tree.leaves(shapes[0, 0])[0].dtype)
        return Kernels(out.nngp, out.ntk, Errors(zero, zero))
    return out


@dataclass(frozen=True)
class _Work:
    """What is to be computed, and with how much memory."""

    kernel: Callable[[Any, Any], Any]
    xs: Dataset
    ys: Dataset
    symmetric: bool
    shapes: dict[tuple[int, int], Any]
    ranks: Sequence[int]
    memory: int | None

    @cached_property
    def free(self) -> int:
        """Bytes that are free, at least those that are taken to be."""
        return max(free_memory(), _THERE)

    @property
    def budget(self) -> int:
        """Bytes that the computation may use."""
        return max(self.free // 4, _THERE) if self.memory is None else self.memory

    def affords(self, need: int) -> bool:
        """Whether that is within the budget."""
        return (self.memory is None and need <= _THERE) or need <= self.budget

    def need(self, g: int, h: int, size: tuple[int, int], copies: int) -> int:
        """Bytes that a tile takes with `copies` of its output around."""
        program = compiled(self.kernel, self.xs.groups[g].spec, self.ys.groups[h].spec, size)
        return program.working + copies * program.output

    def examples(self, side: int, piece: Piece) -> Any:
        """The padded examples of a piece of the rows (0) or columns (1)."""
        stack = (self.xs, self.ys)[side].groups[piece.group].stack
        return padded(stack, piece.start, piece.stop, piece.padded)

    def job(
        self, tiles: Iterable[Tile | None], put: Callable[[Tile, list[Any]], None], idle: Callable[[], None]
    ) -> Job:
        """Some of its tiles, for whoever computes them."""
        return Job(self.kernel, self.ranks, tiles, self.examples, put, idle)


Compute = Callable[[Job], None]


def _computed_by(client: Any) -> Compute:
    if client is None:
        return here.run
    from anywidth.grams import cluster

    return partial(cluster.run, client)


# --- into memory ------------------------------------------------------------------------------------------


def _in_memory(work: _Work, compute: Compute, progress: bool) -> PyTree[Any]:
    xs, ys = work.xs, work.ys
    _fits(work)
    treedef = jax.tree.structure(work.shapes[0, 0])
    columns = list(zip(*(jax.tree.leaves(tree) for tree in work.shapes.values()), strict=True))
    nested = any(len({leaf.shape for leaf in column}) > 1 for column in columns)
    out: list[Any] = []

    def room() -> list[Any]:
        if nested:
            return [[[None] * len(ys) for _ in range(len(xs))] for _ in columns]
        return [_empty((len(xs), len(ys), *column[0].shape), column[0].dtype) for column in columns]

    def place(target: Any, rows: Any, cols: Any, values: np.ndarray) -> None:
        if not nested:
            target[at(rows, cols)] = values
            return
        for a, i in enumerate(np.arange(len(xs))[rows]):
            for b, j in enumerate(np.arange(len(ys))[cols]):
                target[i][j] = jnp.array(values[a, b])

    with bar(progress) as meter:
        tiles = list(_plan_in_memory(work))
        meter.total(len(tiles))

        def put(tile: Tile, leaves: list[np.ndarray]) -> None:
            if len(tiles) == 1 and not nested:  # it is the matrix: nothing is copied, nor moved
                out.extend(leaves)
                return meter.advance(tile.pairs)
            if not out:
                out.extend(room())
            for target, values in zip(out, leaves, strict=True):
                place(target, tile.rows.rows, tile.cols.rows, values)
                if tile.mirrored:
                    rank = work.ranks[tile.rows.pieces[0].group]
                    place(target, tile.cols.rows, tile.rows.rows, transposed(values, rank))
            meter.advance(tile.pairs)

        compute(work.job(tiles, put, lambda: None))
    if not nested and not all(isinstance(leaf, jax.Array) for leaf in out):
        out = jax.device_put(out, may_alias=True)
    return jax.tree.unflatten(treedef, out)


def _plan_in_memory(work: _Work) -> Iterator[Tile]:
    """The tiles between two groups at a time, as large as the budget allows for them."""
    for g, h in work.shapes:
        rows, cols = work.xs.groups[g], work.ys.groups[h]
        size = (
            _side(len(rows), work.symmetric, _LARGEST_IN_MEMORY),
            _side(len(cols), work.symmetric, _LARGEST_IN_MEMORY),
        )
        if work.symmetric:
            size = _worthwhile(work, (g, h), size)
        size = _cached(work, (g, h), size)
        # two outputs are alive at a time: the tile being computed and the one being copied out
        while not work.affords(need := work.need(g, h, size, 2)):
            size = _smaller(size, need, work.budget)
        yield from between_groups((g, rows), (h, cols), size, work.symmetric)


def _side(n: int, symmetric: bool, most: int = _LARGEST) -> int:
    return even(n, min(most, max(_SMALLEST_SPLIT, -(-n // 8))) if symmetric else most)


def _worthwhile(work: _Work, groups: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The tile of a symmetric matrix made larger where the triangle it skips would cost less than more tiles do.

    Cut into t by t, a matrix that costs c takes c (1 + 1/t) / 2 for its triangle and t (t + 1) / 2 times what a tile
    costs beyond its pairs, o: least at about t^3 = c / 2o.
    """
    rows, cols = work.xs.groups[groups[0]], work.ys.groups[groups[1]]
    share = len(rows) * len(cols) / (size[0] * size[1])
    cuts = round((share * traffic(work.kernel, rows.spec, cols.spec, size).total / _WORTHWHILE) ** (1 / 3))
    least = [even(len(side), min(_LARGEST_IN_MEMORY, -(-len(side) // max(1, cuts)))) for side in (rows, cols)]
    return max(size[0], least[0]), max(size[1], least[1])


def _cached(work: _Work, groups: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The tile made smaller where what is computed on the way would leave the cache; not so small that what depends
    on one example alone, which every tile computes anew, counts.
    """
    rows, cols = work.xs.groups[groups[0]], work.ys.groups[groups[1]]
    most = max(1, traffic(work.kernel, rows.spec, cols.spec, size).largest)
    streamed = most <= 8 * size[0] * size[1]
    shrink = ((_STREAMED if streamed else _CACHE) / most) ** 0.5
    if shrink >= (1 if streamed else 0.5) or min(size) <= _SMALLEST:  # a little beyond the caches costs nothing
        return size
    rows_size, cols_size = (max(_SMALLEST, int(n * shrink)) for n in size)
    return even(len(rows), rows_size), even(len(cols), cols_size)


def _smaller(size: tuple[int, int], need: int, budget: int) -> tuple[int, int]:
    if size == (1, 1):
        raise MemoryError(
            f"one pair of examples takes {readable(need)} and the memory budget is {readable(budget)}. "
            "Pass a larger memory= to gram, or compute an output that needs less of the kernel."
        )
    # Memory goes with the area of a tile, or with its side; 0.8 for what goes with neither.
    shrink = max(0.8 * (budget / need) ** 0.5, 1 / max(size))
    return max(1, int(size[0] * shrink)), max(1, int(size[1] * shrink))


def _fits(work: _Work) -> None:
    size = 0
    for (g, h), tree in work.shapes.items():
        pairs = len(work.xs.groups[g]) * len(work.ys.groups[h]) * (2 if work.symmetric and g != h else 1)
        size += pairs * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    if size > _THERE and size > work.free:
        raise MemoryError(
            f"the kernel of {len(work.xs)} x {len(work.ys)} examples takes {readable(size)} and {readable(work.free)} "
            'is free. Keep it on disk with store="K.zarr", use fewer examples at a time, or an output with fewer axes.'
        )


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array aligned so that JAX can take it over on the CPU without a copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


# --- into a store -----------------------------------------------------------------------------------------


def _in_store(work: _Work, compute: Compute, progress: bool, store: str | os.PathLike[str]) -> PyTree[Any]:
    path = Path(store)
    arrays = _stored_arrays(work)
    dtypes = [dtype for _, dtype in arrays.values()]
    what = identity(work.kernel, work.xs, None if work.symmetric else work.ys, dtypes)
    header = _held(path, what, arrays)
    with bar(progress) as meter:
        if header is None:
            create(path, Header(what, arrays, _plan_store(work, None), work.symmetric))
            header = _held(path, what, arrays)  # read again: another process may have been faster, with other tiles
            assert header is not None
        tile = _plan_store(work, header.tile)
        rows = panels(work.xs, tile[0])
        cols = rows if work.symmetric else panels(work.ys, tile[1])
        total = len(rows) * (len(rows) + 1) // 2 if work.symmetric else len(rows) * len(cols)
        target = GramStore(path, header)
        meter.total(total)
        try:
            with target:
                put = partial(_put, target, meter)
                tiles = target.todo(squares(rows, cols, work.symmetric), meter)
                compute(work.job(tiles, put, target.idle))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: {target.done} of {total} tiles are in {path}, and the same call goes on from there"
            ) from None
    return jax.tree.unflatten(jax.tree.structure(work.shapes[0, 0]), list(target.arrays().values()))


def _held(path: Path, what: dict, arrays: dict[str, tuple[tuple[int, ...], str]]) -> Header | None:
    """What the store holds, if it is this matrix; None if there is nothing."""
    found = read_header(path)
    if found is None:
        return None
    different = differences(found.identity, what)
    if not different and found.arrays != arrays:
        different = ["the arrays of the kernel"]
    if different:
        raise StoreError(
            f"the store {path} holds another Gram matrix, and nothing in it was touched. What differs:\n  - "
            + "\n  - ".join(different)
            + "\nChoose another path, or delete it."
        )
    return found


def _put(target: GramStore, meter: Meter, tile: Tile, leaves: list[np.ndarray]) -> None:
    target.put(tile, leaves, meter)


def _plan_store(work: _Work, given: tuple[int, int] | None) -> tuple[int, int]:
    """Examples on each side of a tile; the store's own if there is one."""
    # what is computed, fetched, being written, and the copies that writing makes
    copies = 4 + 2 * QUEUE
    several = max(len(work.xs.groups), len(work.ys.groups)) > 1
    most = _LARGEST_MIXED if several else _LARGEST
    tile = given or (_side(len(work.xs), work.symmetric, most), _side(len(work.ys), work.symmetric, most))
    while True:
        need = 0
        if several:
            leaves = jax.tree.leaves(work.shapes[0, 0])
            need = copies * tile[0] * tile[1] * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        if work.affords(need):
            left, right = _padded_sizes(work.xs, tile[0]), _padded_sizes(work.ys, tile[1])
            need += max(work.need(g, h, (left[g], right[h]), 0 if several else copies) for g, h in work.shapes)
        if work.affords(need):
            return tile
        if given:
            raise MemoryError(
                f"the tiles of this store, {tile[0]} x {tile[1]} examples, take {readable(need)} and the memory budget "
                f"is {readable(work.budget)}. Pass a larger memory= to gram."
            )
        tile = _smaller(tile, need, work.budget)


def _padded_sizes(data: Dataset, side: int) -> dict[int, int]:
    return {piece.group: piece.padded for panel in panels(data, side) for piece in panel.pieces}


def _stored_arrays(work: _Work) -> dict[str, tuple[tuple[int, ...], str]]:
    out = {}
    for paths in zip(*(jax.tree.leaves_with_path(tree) for tree in work.shapes.values()), strict=True):
        path, leaf = paths[0]
        if len({other.shape for _, other in paths}) > 1:
            raise StoreError(
                "the examples have outputs of different shapes, and so do their kernels: there is no one array to "
                "store. Return one number for each example (an average over its tokens), or pad the examples to one "
                "shape and mask inside the network; without store= the result is a nested list."
            )
        name = ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)
        out[name] = ((len(work.xs), len(work.ys), *leaf.shape), np.dtype(leaf.dtype).name)
    return out


# --- what is asked for ------------------------------------------------------------------------------------


def _exact(kernel: Any, xs: Dataset, ys: Dataset, pairs: Sequence[tuple[int, int]]) -> Any:
    """The kernel without its errors, if it has some that are zero for every pair of shapes."""
    exact = getattr(kernel, "exact", None)
    if exact is None or not all(exact(xs.groups[g].spec, ys.groups[h].spec) for g, h in pairs):
        return None
    return kernel.values


def _output_ranks(shapes: dict[tuple[int, int], Any], groups: int) -> list[int]:
    """The number of axes of an output, of each group; refuses what is not of shape S + S'."""
    outputs = []
    for g in range(groups):
        found = {leaf.shape for leaf in jax.tree.leaves(shapes[g, g])}
        for shape in found:
            half = len(shape) // 2
            if shape[:half] != shape[half:]:
                raise ValueError(
                    f"the kernel of an example with itself must have shape S + S, and it has shape {shape}. If it "
                    "is not a symmetric kernel, pass Y explicitly: gram(kernel, X, X)."
                )
        outputs.append({shape[: len(shape) // 2] for shape in found})
    for (g, h), tree in shapes.items():
        for leaf in jax.tree.leaves(tree):
            if leaf.shape not in {s + t for s in outputs[g] for t in outputs[h]}:
                raise ValueError(f"the kernel of two examples must have shape S + S', and it has shape {leaf.shape}")
    ranks = [{len(s) for s in found} for found in outputs]
    if any(len(found) != 1 for found in ranks):
        raise ValueError("the arrays a kernel returns must all be over the same outputs when Y is None")
    return [found.pop() for found in ranks]
