"""The kernels of one finite network: its NTK and NNGP kernel, their products with vectors, its Taylor expansion.

The NTK of a pair of examples is contracted in the cheapest of three ways: from activations and cotangents where a
parameter enters in matrix products (`structure.py`), from gradients where it does not, or, where neither fits in
memory or there are more outputs than work, by one vector-Jacobian and one Jacobian-vector product for each output.

>>> import jax, jax.numpy as jnp
>>> import anywidth as aw
>>> from anywidth import zoo
>>> net = zoo.mlp(3, classes=2)
>>> params, x = net.sample(jax.random.key(0), n=64), jnp.ones(3)
>>> aw.empirical_ntk(net)(params, x, x).shape, aw.empirical_ntk(net, trace_axes=-1)(params, x, x).shape
((2, 2), ())
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from anywidth import _compat
from anywidth.errors import InputError, UnsupportedError
from anywidth.finite.structure import Structure, Taps, flops, footprint, product, product_flops, product_held, working
from anywidth.memory import free_memory, parse_bytes, readable
from anywidth.network import Network
from anywidth.rates import Rates, is_frozen, rates_at, scaled_by

__all__ = ["empirical_nngp", "empirical_ntk", "linearize", "ntk_vp"]

# A multiplication of a pass for one output against one of a matrix product: measured 9 (MLP) and more (convolutions).
_ALONE = 8.0

Method = Literal["auto", "structure", "jacobian", "vector-products"]


def empirical_ntk(
    net: Network,
    *,
    lr: Rates = None,
    trace_axes: int | Sequence[int] = (),
    method: Method = "auto",
    memory: int | str | None = None,
) -> Callable[[PyTree[Array], Any, Any], PyTree[Array]]:
    """The neural tangent kernel of a finite network: sum over all parameters of lr <df/dp(x), df/dp(y)>.

    Args:
        net: the network.
        lr: learning-rate multipliers, as for `ntk`; if it is a function of n, the width is read off the parameters.
        trace_axes: output axes over which the kernel is averaged along the diagonal instead of being given in full:
            `-1` for the classes of a readout, which all have the same limit.
        method: "structure" (activations times cotangents where a parameter is multiplied by something, gradients
            elsewhere), "jacobian" (gradients), "vector-products" (one output at a time: memory of one gradient), or
            "auto" for the cheapest of them that fits in the memory.
        memory: bytes that one pair may use beyond its result, as a number or like "1 GiB"; a quarter of what is free
            if None. Outputs are worked on a few at a time to stay within it.

    Returns:
        A pure function (params, x, y) of a pytree of arrays and two examples, whose shapes may differ. For outputs
        of shapes S and S' (without the traced axes) its result has shape S + S'; for a pytree of outputs, the kernel of
        each. `jit` and `vmap` it as you like; `gram(partial(empirical_ntk(net), params), X, Y)` is the kernel of data
        sets, in tiles within a memory budget, compiled once for all draws of the parameters.

    Raises:
        ValueError: if the method is not one of those, or the output does not have these axes.
        InputError: if `lr` does not fit the parameters, or the output is not one of floating-point numbers.
        UnsupportedError: if a loop cannot be differentiated in reverse mode, with its line.

    Reference: Novak, Sohl-Dickstein and Schoenholz, Fast finite width neural tangent kernel (2022).
    """
    if method not in ("auto", "structure", "jacobian", "vector-products"):
        raise ValueError(f'method is "auto", "structure", "jacobian" or "vector-products", and it is {method!r}')
    axes = (trace_axes,) if isinstance(trace_axes, int) else tuple(trace_axes)

    budget = None if memory is None else parse_bytes(memory)

    def kernel(params: PyTree[Array], x: Any, y: Any) -> PyTree[Array]:
        x, y = jax.tree.map(jnp.asarray, (x, y))
        rates = rates_at(net, lr, None, params)
        tree: Any = jax.tree.structure(jax.eval_shape(net.apply, params, x))
        with reverse_mode(net.apply, params, x):
            parts = [_Pair(_output(net, i), params, x, y, rates, axes) for i in range(tree.num_leaves)]
            return jax.tree.unflatten(tree, [part.kernel(method, budget) for part in parts])

    return jax.jit(kernel)  # traced once for a shape, whatever it is called under


def _output(net: Network, i: int) -> Callable[[Any, Any], Array]:
    return lambda params, x: jax.tree.leaves(net.apply(params, x))[i]


def empirical_nngp(
    net: Network, *, trace_axes: int | Sequence[int] = ()
) -> Callable[[PyTree[Array], Any, Any], PyTree[Array]]:
    """The product f(x) f(y) of the outputs of one finite network.

    Its mean over parameters is the network's NNGP kernel at that width. A single draw does not approach it as the
    width grows: average over many, or over many outputs that are i.i.d. copies (`trace_axes`).

    Args:
        net: the network.
        trace_axes: output axes over which the product is averaged along the diagonal, as for `empirical_ntk`.

    Returns:
        A pure function (params, x, y) whose result has shape S + S' for outputs of shapes S and S' (without the
        traced axes); for a pytree of outputs, the kernel of each.
    """
    axes = (trace_axes,) if isinstance(trace_axes, int) else tuple(trace_axes)

    def one(a: Array, b: Array) -> Array:
        shape = _shape_of_pair(a.shape, b.shape, axes)
        u, v = _copies_first(a, axes), _copies_first(b, axes)
        return (jnp.einsum("cp,cq->pq", u, v, precision="highest") / len(u)).reshape(shape)

    return lambda params, x, y: jax.tree.map(one, net.apply(params, x), net.apply(params, y))


def ntk_vp(
    net: Network, *, lr: Rates = None, memory: int | str | None = None
) -> Callable[[PyTree[Array], Any, Any, PyTree[Array]], PyTree[Array]]:
    """Products of the empirical NTK with vectors, without the kernel: sum over j of K(x_i, y_j) v_j.

    Costs one reverse pass over Y and one forward pass over X, a few examples at a time.

    Args:
        net: the network.
        lr: learning-rate multipliers, as for `empirical_ntk`.
        memory: bytes that the examples worked on together may use beyond the parameters' gradients and the result, as
            a number or like "1 GiB"; a quarter of what is free if None.

    Returns:
        A pure function (params, X, Y, v): X and Y are N and M examples, pytrees of arrays with a leading example axis
        (Y None for X), and v is an output for each example of Y, of shape (M,) + S'. The result has shape (N,) + S.

    Raises:
        ValueError: if v does not have the shape of the outputs.
    """
    budget = None if memory is None else parse_bytes(memory)

    def vp(params: PyTree[Array], X: Any, Y: Any, v: PyTree[Array]) -> PyTree[Array]:
        X = jax.tree.map(jnp.asarray, X)
        Y = X if Y is None else jax.tree.map(jnp.asarray, Y)
        rates = rates_at(net, lr, None, params)
        out = jax.eval_shape(jax.vmap(net.apply, (None, 0)), params, Y)
        if jax.tree.map(jnp.shape, v) != jax.tree.map(lambda a: a.shape, out):
            raise ValueError(
                f"v is an output for each example of Y, of shape {jax.tree.map(lambda a: a.shape, out)}, and it has "
                f"shape {jax.tree.map(jnp.shape, v)}"
            )
        v = jax.tree.map(lambda a, o: jnp.asarray(a, o.dtype), v, out)

        def pulled(index: Array, live: Array) -> Any:
            examples, vectors = _taken((Y, v), index)
            _, pull = jax.vjp(lambda p: jax.vmap(net.apply, (None, 0))(p, examples), params)
            masked = jax.tree.map(lambda a: a * live.reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype), vectors)
            return pull(masked)[0]

        def add(total: Any, chunk: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, pulled(*chunk)), None

        zero = jax.tree.map(jnp.zeros_like, params)
        with reverse_mode(jax.vmap(net.apply, (None, 0)), params, Y):
            total, _ = jax.lax.scan(add, zero, _chunks(Y, _together(net, params, Y, budget)))
        direction = scaled_by(rates, total)

        def pushed(index: Array) -> Any:
            examples = _taken(X, index)
            return jax.jvp(lambda p: jax.vmap(net.apply, (None, 0))(p, examples), (params,), (direction,))[1]

        result = jax.lax.map(pushed, _chunks(X, _together(net, params, X, budget))[0])
        count = jax.tree.leaves(X)[0].shape[0]
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], result)

    return vp


def linearize(net: Network, params: PyTree[Array], *, degree: int = 1) -> Callable[[PyTree[Array], Any], PyTree[Array]]:
    """The Taylor expansion of a network in its parameters.

    Args:
        net: the network.
        params: where it is expanded.
        degree: of the polynomial; 1 is the linear model whose kernel is the empirical NTK at `params`.

    Returns:
        A pure function (new_params, x) with the signature of `net.apply`, exact at `new_params = params`.

    Raises:
        ValueError: if the degree is negative.
    """
    if degree < 0:
        raise ValueError(f"the degree of a Taylor expansion is not negative, and it is {degree}")

    def model(new_params: PyTree[Array], x: Any) -> PyTree[Array]:
        step = jax.tree.map(lambda a, b: jnp.asarray(a, jnp.asarray(b).dtype) - b, new_params, params)

        def expand(f: Callable[[Any], Any], order: int) -> Any:
            """The sum of the terms from f on, the derivative of this order along the step."""
            if order == degree:
                return f(params)
            value, slope = f(params), lambda p: jax.jvp(f, (p,), (step,))[1]
            rest = expand(slope, order + 1)
            return jax.tree.map(lambda a, b: a + b / (order + 1), value, rest)

        return expand(lambda p: net.apply(p, x), 0)

    return model


@contextmanager
def reverse_mode(function: Callable[[Any, Any], Any], params: Any, x: Any) -> Iterator[None]:
    """Says in the user's terms that a loop of theirs has no reverse mode."""
    try:
        yield
    except ValueError as error:
        line = _compat.irreversible_loop(error, jax.make_jaxpr(function)(params, x))
        if line is None:
            raise
        raise UnsupportedError(
            "the gradients of this network cannot be taken: JAX does not differentiate a loop whose number of steps it "
            "does not know (lax.while_loop, or lax.fori_loop with traced bounds) in reverse mode. Write lax.scan, or "
            "lax.fori_loop with fixed bounds, over the most steps there can be, and keep the state of those beyond the "
            f"last with jnp.where. The infinite-width kernels may not need it.\n  at {line}"
        ) from error


# --- one pair -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """How many copies and outputs are worked on together."""

    copies: int
    outputs: int


class _Pair:
    """The NTK of one array of outputs at one pair of examples."""

    def __init__(
        self, function: Callable[[Any, Any], Array], params: Any, x: Any, y: Any, rates: Any, axes: tuple[int, ...]
    ) -> None:
        self.leaves, self.tree = jax.tree.flatten(params)
        self.rates, self.examples = rates, (x, y)
        self.learning = [i for i, r in enumerate(rates) if not is_frozen(r)]
        of_x, of_y = (jax.eval_shape(function, params, e) for e in (x, y))
        if not jnp.issubdtype(of_x.dtype, jnp.floating):
            raise InputError(f"an output of floating-point numbers has an NTK, and this one is of type {of_x.dtype}")
        self.shape = _shape_of_pair(of_x.shape, of_y.shape, axes)
        self.function = lambda p, e: _copies_first(function(p, e), axes)
        self.sides = [Structure.of(self.function, params, e) for e in (x, y)]
        outs = [side.closed.out_avals[0] for side in self.sides]
        self.copies, self.outputs, self.dtype = outs[0].shape[0], [o.shape[1] for o in outs], outs[0].dtype

    def kernel(self, method: Method, memory: int | None) -> Array:
        budget = free_memory() // 4 if memory is None else memory
        if not self.learning:
            return jnp.zeros(self.shape, self.dtype)
        s, r = self.outputs
        structured = self._structured() if method in ("auto", "structure") else set()
        blocks = self._blocks(structured, budget)
        one_pass = flops(self.sides[1].closed)
        one_by_one = _ALONE * 3.0 * one_pass * self.copies * s
        again = 0 if blocks is None else math.ceil(s / min(s, blocks.outputs)) - 1  # gradients at y are taken anew
        cost = self._cost(structured) + 2.0 * again * one_pass * self.copies * r
        if method == "vector-products" or (method == "auto" and (blocks is None or one_by_one < cost)):
            result = self._by_vectors()
        elif blocks is None:
            raise MemoryError(
                f"one output of a pair of examples needs more than {readable(budget)}: pass a larger memory=, or "
                'method="vector-products"'
            )
        else:
            result = self._by_blocks(structured, blocks)
        return (result / self.copies).reshape(self.shape)

    def _structured(self) -> set[int]:
        """Parameters for which a product of activations and cotangents is cheaper than one of gradients."""
        left, right = (side.structured() for side in self.sides)
        s, r = self.outputs
        found = set()
        for i in self.learning:
            if i in left and left[i] == right.get(i):
                sizes, other = self.sides[0].sizes(i), self.sides[1].sizes(i)
                costs = product_flops(sizes, sizes[1], other[1], self.copies, s, r)
                if min(costs[:2]) < costs[2]:
                    found.add(i)
        return found

    def _cost(self, structured: set[int]) -> float:
        s, r = self.outputs
        total = 0.0
        for i in self.learning:
            if i in structured:
                sizes, other = self.sides[0].sizes(i), self.sides[1].sizes(i)
                total += min(product_flops(sizes, sizes[1], other[1], self.copies, s, r))
            else:
                total += float(self.leaves[i].size) * self.copies * s * r
        return total

    def _blocks(self, structured: set[int], budget: int) -> _Blocks | None:
        """As many copies and outputs together as fit in the budget."""
        plain = [self.leaves[i].size for i in self.learning if i not in structured]

        def need(copies: int, outputs: int) -> int:
            """What the forward passes keep, the cotangents, their basis and gradients, and what is in the products."""
            kept, each, counts = 0, [], [min(outputs, count) for count in self.outputs]
            for side, count, all_outputs in zip(self.sides, counts, self.outputs, strict=True):
                taps = sum(math.prod(use.shape) for use in side.chosen(structured))
                basis = self.copies * all_outputs
                one = (2 * taps + sum(plain) + basis) * self.dtype.itemsize + 2 * working(side.closed)
                kept += footprint(side.closed) + copies * count * one
                each.append(copies * count * sum(plain) if copies * count > 1 else 0)  # the products lay it out anew
            inside = max((self._inside(i, copies, *counts) for i in structured), default=0)
            return kept + max(*each, inside) * self.dtype.itemsize

        for outputs in _halvings(max(self.outputs)):
            for copies in _halvings(self.copies):
                if need(copies, outputs) <= budget:
                    return _Blocks(copies, outputs)
        return None

    def _inside(self, i: int, copies: int, s: int, r: int) -> int:
        """Numbers that are held within the product of a structured parameter."""
        sizes, other = self.sides[0].sizes(i), self.sides[1].sizes(i)
        return product_held(sizes, sizes[1], other[1], copies, s, r)

    def _by_blocks(self, structured: set[int], blocks: _Blocks) -> Array:
        s, r = self.outputs
        if blocks.copies >= self.copies and blocks.outputs >= max(s, r):
            every = [jnp.eye(self.copies * k, dtype=self.dtype).reshape(self.copies, k, self.copies, k) for k in (s, r)]
            # the cotangent of copy c, output p is one at (c, p)
            return self._block(structured, *every)
        c, k = blocks.copies, blocks.outputs

        def basis(start_c: Any, start_k: Any, size: int) -> Array:
            rows, columns = start_c + jnp.arange(c), start_k + jnp.arange(min(k, size))
            one = jnp.equal(rows[:, None], jnp.arange(self.copies)).astype(self.dtype)
            other = jnp.equal(columns[:, None], jnp.arange(size)).astype(self.dtype)
            return one[:, None, :, None] * other[None, :, None, :]

        def row(start: Any) -> Array:
            left = self._side(0, structured, basis(start[0], start[1], s))

            def column(at: Any) -> Array:
                return self._product(structured, left, self._side(1, structured, basis(start[0], at, r)))

            found = jax.lax.map(column, jnp.arange(0, r, min(k, r)))
            return jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1)[:, :r]

        cs, ks = np.arange(0, self.copies, c), np.arange(0, s, min(k, s))
        starts = jnp.asarray([(i, j) for i in cs for j in ks])
        found = jax.lax.map(row, starts).reshape(len(cs), -1, r)
        return found.sum(0)[:s]

    def _block(self, structured: set[int], left: Array, right: Array) -> Array:
        return self._product(structured, self._side(0, structured, left), self._side(1, structured, right))

    def _side(self, which: int, structured: set[int], basis: Array) -> tuple[dict[int, Taps], list[Array]]:
        """Activations and cotangents of the structured parameters, and the gradients of the others.

        `basis` (copies, outputs, all copies, all outputs) are the cotangents of the output.
        """
        side, example = self.sides[which], self.examples[which]
        plain = [i for i in self.learning if i not in structured]
        uses = side.chosen(structured)
        zeros = [jnp.zeros(use.shape, use.dtype) for use in uses]

        def run(own: list[Array], taps: list[Array]) -> tuple[Array, Any]:
            leaves = list(self.leaves)
            for i, leaf in zip(plain, own, strict=True):
                leaves[i] = leaf
            (out,), found = side.run(leaves, example, structured, taps)
            return out, found

        _, pull, found = jax.vjp(run, [self.leaves[i] for i in plain], zeros, has_aux=True)
        gradients, cotangents = jax.vmap(jax.vmap(pull))(basis)
        deltas = {use.number: d for use, d in zip(uses, cotangents, strict=True)}
        return {i: side.gathered(i, found, deltas) for i in structured}, gradients

    def _product(self, structured: set[int], left: Any, right: Any) -> Array:
        total: Any = 0.0
        for i in sorted(structured):
            total = total + self._rated(i, product(left[0][i], right[0][i]))
        plain = [i for i in self.learning if i not in structured]
        for i, a, b in zip(plain, left[1], right[1], strict=True):
            a, b = a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1)
            total = total + self._rated(i, jnp.einsum("cpi,cqi->pq", a, b, precision="highest"))
        return total

    def _rated(self, i: int, value: Array) -> Array:
        rate = self.rates[i]
        return value if isinstance(rate, float) and rate == 1.0 else value * jnp.asarray(rate, value.dtype)

    def _by_vectors(self) -> Array:
        """One output of x at a time."""
        params = jax.tree.unflatten(self.tree, self.leaves)
        x, y = self.examples
        _, pull = jax.vjp(lambda p: self.function(p, x), params)
        _, push = jax.linearize(lambda p: self.function(p, y), params)
        s = self.outputs[0]

        def row(index: Array) -> Array:
            e = jnp.zeros(self.copies * s, self.dtype).at[index].set(1).reshape(self.copies, s)
            return push(scaled_by(self.rates, *pull(e)))[index // s]

        rows = jax.lax.map(row, jnp.arange(self.copies * s))
        return rows.reshape(self.copies, s, -1).sum(0)


def _halvings(n: int) -> list[int]:
    """N, then ever smaller sizes of pieces down to one."""
    out = [n]
    while out[-1] > 1:
        out.append(-(-out[-1] // 2))
    return out


def _shape_of_pair(left: tuple[int, ...], right: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a kernel without the traced axes."""
    kept: list[int] = []
    traced = []
    for shape in (left, right):
        if any(not -len(shape) <= a < len(shape) for a in axes):
            raise ValueError(f"trace_axes={axes} are not all axes of an output of shape {shape}")
        away = sorted({a % len(shape) for a in axes})
        kept += [size for i, size in enumerate(shape) if i not in away]
        traced.append([shape[i] for i in away])
    if traced[0] != traced[1]:
        raise ValueError(f"trace_axes={axes} have other sizes in the two outputs, of shapes {left} and {right}")
    return tuple(kept)


def _copies_first(out: Array, axes: tuple[int, ...]) -> Array:
    """(copies, outputs): the traced axes first, merged."""
    traced = sorted({a % out.ndim for a in axes}) if out.ndim else []
    out = jnp.moveaxis(out, traced, range(len(traced)))
    return out.reshape(math.prod(out.shape[: len(traced)]), -1)


def _together(net: Network, params: Any, X: Any, memory: int | None) -> int:
    """How many examples fit in the memory."""
    budget = free_memory() // 4 if memory is None else memory
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), X)
    count = jax.tree.leaves(X)[0].shape[0]
    return max(1, min(count, int(budget / (2 * footprint(jax.make_jaxpr(net.apply)(params, one)) + 1))))


def _chunks(X: Any, size: int) -> tuple[Array, Array]:
    """(chunks, size): the numbers of the examples, the last of them repeated as padding, and which are not padding."""
    count = jax.tree.leaves(X)[0].shape[0]
    index = np.arange(-(-count // size) * size).reshape(-1, size)
    return jnp.asarray(np.minimum(index, count - 1)), jnp.asarray(index < count)


def _taken(trees: Any, index: Array) -> Any:
    """These examples alone: the data set is not copied."""
    return jax.tree.map(lambda a: a[index], trees)
