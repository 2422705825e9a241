"""Inner products of the states of gated loops, from sample paths.

A loop is gated if a state of its own goes, not Gaussian, into a nonlinear function of its body: then the inner products
of the states before a step do not determine those after it. Here requests for inner products of such states are
recognised and answered for all steps t and s at once. Values come from what has to be sampled alone, the rest being
integrated given it (`split.py`, `conditional.py`), where that takes closed forms only; otherwise from the paths of both
loops (`paths.py`). The derivative in epsilon comes from the covariances of their tangents (`tangents.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anywidth import conditional, readings
from anywidth.cells import base, pure, read, size, timed
from anywidth.conditional import Conditional
from anywidth.expect import methods
from anywidth.expect.atoms import Generic
from anywidth.frames import Loop
from anywidth.inner import ZERO, Gram, add, scaled
from anywidth.kets import Carry, Const, Contract, Graph, Node, Pointwise, Product, Sum, View
from anywidth.paths import Path, Stage, fresh_factor, mean_outer, simulate
from anywidth.split import Blame, NoSplit, Split, drawable
from anywidth.tangents import slopes
from anywidth.views import Index, ViewMap

Array = Any


SHORT = 16  # steps up to which a loop without recurrent weights is unrolled, which may be exact


def is_gated(loop: Loop) -> bool:
    """Whether a carry that is not Gaussian goes into a nonlinear function."""
    recurrent = any(isinstance(x, Product) and id(loop) in x.operand.loops for x in loop.lifted)
    if not recurrent and loop.length <= SHORT:
        return False
    for x in loop.lifted:
        if isinstance(x, Pointwise):
            for a in x.args:
                carry = base(a)
                if isinstance(carry, Carry) and carry.loop is loop and not carry.gaussian:
                    return True
    return False


@dataclass(frozen=True)
class State:
    """A node of a gated loop, with the time as its first axis, read through the entries of a view."""

    loop: Loop
    node: Node
    entries: tuple[Any, ...]


def state(graph: Graph, x: Node) -> State | None:
    """X as a function of the carries and Gaussians of one gated loop at one step (for each of its entries)."""
    node = base(x)
    entries = x.view.entries if isinstance(x, View) else tuple(range(x.rank))
    for key in node.loops:
        loop = graph.gated.get(key)
        if loop is not None and timed(loop, node):
            return None if pure(node) else State(loop, node, entries)
    return _function_of_states(graph, x) if isinstance(x, Pointwise) else None


def _function_of_states(graph: Graph, x: Pointwise) -> State | None:
    """A coordinatewise function, written outside of the loop, of what the loop has at one step."""
    loops = {key for a in x.args for key in a.loops if key in graph.gated}
    own = [graph.gated[k] for k in loops if any(timed(graph.gated[k], base(a)) for a in x.args)]
    if len(own) != 1:
        return None
    (loop,) = own
    if not all(timed(loop, base(a)) for a in x.args):
        return None
    times = [a.view.entries[0] if isinstance(a, View) else 0 for a in x.args]
    if all(t == times[0] and isinstance(t, int) for t in times):  # every step, along an axis
        axis = times[0]
        order = [axis, *(i for i in range(x.rank) if i != axis)]
        place = [order.index(i) for i in range(x.rank)]
        node = graph.view(x, ViewMap(x.rank, tuple(place)))
        node = graph.push(node) if isinstance(node, View) else node
        return State(loop, node, tuple(order))
    arrays = [t.array for t in times if isinstance(t, Index) and isinstance(t.array, np.ndarray) and t.array.size == 1]
    if len(arrays) == len(times) and len({int(t.item()) for t in arrays}) == 1:
        # one step: the same function at every step, read at that one
        rank = x.rank + 1
        args = []
        for a in x.args:
            rest = a.view.entries[1:]  # type: ignore[attr-defined]
            shifted = tuple(
                e + 1 if isinstance(e, int) else graph.index(graph.viewed(e.array, _later(x.rank))) for e in rest
            )
            args.append(graph.view(base(a), ViewMap(rank, (0, *shifted))))
        node = graph.pointwise(
            x.expr, args, [c if np.ndim(c) == 0 else graph.viewed(c, _later(x.rank)) for c in x.coefs]
        )
        step = graph.index(np.full((1,) * x.rank, int(arrays[0].item())))
        return State(loop, node, (step, *range(x.rank)))
    return None


def _later(rank: int) -> ViewMap:
    return ViewMap(rank + 1, tuple(range(1, rank + 1)))


def answer(gram: Gram, a: Node, b: Node, eps: bool) -> Any:
    """<a, b> if either is a state of a gated loop and the other is one too or a constant; otherwise None."""
    g = gram.graph
    if isinstance(a, Const) or isinstance(b, Const):
        x, constant = (b, a) if isinstance(a, Const) else (a, b)
        one = state(g, x)
        if one is None:
            return None
        found = given(gram, one.loop, one.loop, one.node, one.node)
        if found is not None:
            mean = _once(
                gram, ("means", id(one.loop)), (one.node,), lambda: readings.expected(gram, found[0], one.node)
            )
        else:
            mean = jnp.mean(values(gram, path(gram, one.loop), one.node), -1)
        return read(mean, one.entries, a.rank) * constant.array  # type: ignore[attr-defined]
    one, two = state(g, a), state(g, b)
    if one is None or two is None:
        return None if one is two else _decomposed(gram, *((b, a) if two is None else (a, b)), eps)
    entries = (*one.entries, *two.entries)
    if eps:
        methods.between(g, {one.node, two.node, *one.loop.lifted, *two.loop.lifted}, methods.PATHS)
    if (id(two.loop), id(one.loop)) in {k[1:] for k in gram.solved if k[0] in ("paths", "pair")}:
        one, two = two, one
        entries = (*one.entries, *two.entries)
    split = given(gram, one.loop, two.loop, one.node, two.node)
    if split is not None:
        value = _once(gram, ("tables", id(one.loop), id(two.loop)), (one.node, two.node),
                      lambda: readings.table(gram, *split, one.node, two.node))  # fmt: skip
    elif one.loop is two.loop:
        only = path(gram, one.loop)
        value = moments(gram, only, only, one.node, two.node)
    else:
        value = moments(gram, *paths(gram, one.loop, two.loop), one.node, two.node)
    value = read(value, entries, a.rank)
    if one.loop is two.loop or not eps:
        return value
    left, right = paths(gram, one.loop, two.loop)
    slope = _once(gram, ("slopes", id(one.loop), id(two.loop)), (one.node, two.node),
                  lambda: slopes(gram, left, right, one.node, two.node))  # fmt: skip
    return value + gram.epsilon * read(slope, entries, a.rank)


def _decomposed(gram: Gram, x: Node, state: Node, eps: bool) -> Any:
    """<x, state> by the parts of x, so that the state stays as it is."""
    if isinstance(x, View) and not isinstance(x.operand, Carry):
        return gram(gram.graph.push(x), state, eps)
    if isinstance(x, Contract):
        return gram.contracted(x, state, eps)
    if not isinstance(x, Sum):
        return None
    total: Any = ZERO
    for coef, term in x.terms:
        total = add(total, scaled(coef, gram(term, state, eps)))
    return total


def stage(gram: Gram, loop: Loop) -> Stage:
    """The loop made ready to be sampled."""
    return _once(gram, ("stage", id(loop)), ("stage",), lambda: Stage(gram, loop, loop.roots))


def given(gram: Gram, one: Loop, two: Loop, a: Node, b: Node) -> tuple[Conditional, Conditional] | None:
    """Both loops given what has to be sampled, if anything can be integrated and a and b are what this serves."""
    mine, other = _split(gram, one), _split(gram, two)
    if mine is None or other is None:
        return None
    try:
        mine.outer(a, True)
        other.outer(b, True)
    except Blame:
        return None

    def drawn(own: Split, copy: int, left: Conditional | None = None) -> Conditional:
        name = _name(gram, "given", *((one, two) if copy else (one,)))
        normals = own.stage.normals(copy, name, sum(map(size, own.drawn)))
        gram.graph.sampler.ordered |= bool(copy)
        return _noted(gram, name, conditional.simulate(own, normals, left), own.stage, own.drawn)

    first = lambda: drawn(mine, 0)  # noqa: E731
    if one is two:
        left = _once(gram, ("alone", id(one)), ("alone",), first)
        return left, left
    if not _once(gram, ("drawable", id(one), id(two)), ("drawable",), lambda: drawable(mine, other)):
        return None
    left = _once(gram, ("alone", id(one)), ("alone",), first)
    second = lambda: drawn(other, 1, left)  # noqa: E731
    return left, _once(gram, ("pair", id(one), id(two)), ("pair",), second)


def _split(gram: Gram, loop: Loop) -> Split | None:
    def run() -> Split | None:
        try:
            found = Split(stage(gram, loop))
        except NoSplit:
            return None
        generic = any(isinstance(f, Generic) for atom in found.atoms for _, f in atom.factors)
        return None if generic else found  # a quadrature for each pair of steps takes longer than more paths

    return _once(gram, ("split", id(loop)), ("split",), run)


def _name(gram: Gram, how: str, *loops: Loop) -> str:
    """Of what is drawn for these loops: the same in every run of a network."""
    order = list(gram.graph.gated)
    return f"{how} {' '.join(str(order.index(id(x))) for x in loops)}"


def _noted(gram: Gram, name: str, drawn: Any, stage: Stage, nodes: list[Node]) -> Any:
    """What was drawn, its factor noted for a later run."""
    if not gram.sealed and drawn.factors:
        gram.graph.sampler.found[name] = fresh_factor(drawn.factors, nodes, stage.loop.length)
    return drawn


def path(gram: Gram, loop: Loop) -> Path:
    """The loop alone."""

    def run() -> Path:
        own = stage(gram, loop)
        name = _name(gram, "path", loop)
        return _noted(gram, name, simulate(own, own.normals(0, name)), own, own.gaussians)

    return _once(gram, ("path", id(loop)), ("path",), run)


def paths(gram: Gram, one: Loop, two: Loop) -> tuple[Path, Path]:
    """Both, the second given the first."""

    def run() -> Path:
        own = stage(gram, two)
        name = _name(gram, "path", one, two)
        gram.graph.sampler.ordered = True
        return _noted(gram, name, simulate(own, own.normals(1, name), path(gram, one)), own, own.gaussians)

    return path(gram, one), _once(gram, ("paths", id(one), id(two)), ("paths",), run)


def values(gram: Gram, p: Path, node: Node) -> Array:
    """The samples of a node at all steps: (T, F..., M)."""
    own, M = p.stage, p.gaussians.shape[-1]

    def at(x: Any) -> Array:
        t, h, u = x
        return own.sample(own.at(t, h, u), node, M)

    return jax.lax.map(at, (jnp.arange(own.loop.length), p.carries, p.gaussians))


def moments(gram: Gram, left: Path, right: Path, a: Node, b: Node) -> Array:
    """E[a_t b_s] for all t and s: (T, F..., S, F'...)."""

    def run() -> Array:
        x = values(gram, left, a)
        y = x if (left is right and a is b) else values(gram, right, b)
        return mean_outer(x, y)

    return _once(gram, ("moments", id(left), id(right)), (a, b), run)


def _once(gram: Gram, place: Any, key: tuple[Any, ...], run: Any) -> Any:
    """Computed once, unless another trace is running; nothing here depends on epsilon."""
    known = gram.solved.setdefault(place, {})
    full = (*key, False)
    if full not in known:
        value = run()
        if gram.sealed:
            return value
        known[full] = value
    return known[full]


__all__ = ["answer", "is_gated", "state"]
