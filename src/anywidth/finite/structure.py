"""The structure of layers: where a parameter enters a network in matrix products only.

If z = W h the gradient of an output with respect to W is the outer product of the activation h and the cotangent
delta of z, and a product of two gradients is a product of activations times one of cotangents,

    <df_a/dW, df'_b/dW> = sum over t, u of (h_t . h'_u) (delta_at . delta'_bu),

where t and u run over all positions, steps and uses that share W. Gradients are never formed unless that is cheaper
(Novak, Sohl-Dickstein and Schoenholz, *Fast finite width neural tangent kernel*, 2022, "structured derivatives").

Nothing here knows a layer: the jaxpr of the network is walked once, each product with a parameter is noted, and the
network is run again with a zero added to each of them, whose cotangent is delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from anywidth import _compat

__all__ = ["Structure", "Taps", "flops", "footprint", "product", "product_flops", "product_held", "working"]

# What leaves the inner product of two gradients alone, up to a number.
_VIEWS = {"transpose", "reshape", "squeeze", "expand_dims", "copy", "copy_p", "rev"}


@dataclass(frozen=True)
class Tag:
    """A view of a parameter: what was done to it, and the number that it was multiplied by."""

    leaf: int
    key: tuple[Hashable, ...] = ()
    scale: Any = None


@dataclass(frozen=True)
class Use:
    """A product with a parameter: the equation in the order of the walk, and which operand the parameter is."""

    number: int
    leaf: int
    key: tuple[Hashable, ...]
    side: int
    dimension_numbers: Any
    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True, eq=False)
class Taps:
    """One parameter's activations and cotangents: h (B, T, in) and delta (copies, S, B, T, out)."""

    h: Any
    delta: Any


@dataclass(eq=False)
class Structure:
    """The products of a function `f(params, x)` with its parameters, on examples of one shape."""

    closed: Any
    count: int  # of parameters
    uses: list[Use] = field(default_factory=list)
    plain: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, function: Callable[..., Any], params: Any, x: Any) -> Structure:
        """Traces the function on shapes only."""
        leaves = jax.tree.leaves(params)
        self = cls(jax.make_jaxpr(function)(params, x), len(leaves))
        tags = [Tag(i) for i in range(len(leaves))] + [None] * (len(self.closed.jaxpr.invars) - len(leaves))
        self._note(tags)
        return self

    def structured(self) -> dict[int, Hashable]:
        """The parameters that enter in products of one kind only, and which kind that is."""
        kinds: dict[int, set[Hashable]] = {}
        for use in self.uses:
            kinds.setdefault(use.leaf, set()).add((use.key, _roles(use)))
        return {i: next(iter(k)) for i, k in kinds.items() if len(k) == 1 and i not in self.plain}

    def _note(self, tags: Sequence[Tag | None]) -> None:
        numbers = iter(range(10**9))

        def product(eqn: Any, tags: Sequence[Tag | None], operands: Any) -> None:
            number = next(numbers)
            side = 0 if tags[0] is not None else 1
            tag = tags[side]
            assert tag is not None
            aval = eqn.outvars[0].aval
            dims = _hashable(eqn.params["dimension_numbers"])
            self.uses.append(Use(number, tag.leaf, tag.key, side, dims, aval.shape, aval.dtype))

        jaxpr, consts = _compat.open_jaxpr(self.closed)
        out, _ = _walk(jaxpr, list(consts), list(tags), None, product, self.plain.add)
        self.plain |= {t.leaf for t in out if t is not None}

    def run(
        self, leaves: Sequence[Any], x: Any, chosen: set[int], zeros: Sequence[Any]
    ) -> tuple[list[Any], dict[int, Any]]:
        """The outputs with a zero added to every product with a chosen parameter, and the other operands there."""
        found: dict[int, Any] = {}
        numbers = iter(range(10**9))
        taps = {use.number: zero for use, zero in zip(self.chosen(chosen), zeros, strict=True)}

        def product(eqn: Any, tags: Sequence[Tag | None], operands: Sequence[Any]) -> Any:
            number = next(numbers)
            (out,) = _evaluate(eqn, operands)
            if number not in taps:
                return out
            side = 0 if tags[0] is not None else 1
            scale = tags[side].scale  # type: ignore[union-attr]
            h = operands[1 - side]
            found[number] = h if scale is None else h * scale.astype(h.dtype)
            return out + taps[number]

        jaxpr, consts = _compat.open_jaxpr(self.closed)
        args = [*leaves, *jax.tree.leaves(x)]
        tags = [Tag(i) for i in range(self.count)] + [None] * (len(args) - self.count)
        _, values = _walk(jaxpr, list(consts), tags, args, product, lambda leaf: None)
        return values, found

    def chosen(self, leaves: set[int]) -> list[Use]:
        """The uses of some parameters."""
        return [use for use in self.uses if use.leaf in leaves]

    def gathered(self, leaf: int, found: dict[int, Any], deltas: dict[int, Any]) -> Taps:
        """Activations and cotangents of all uses of a parameter, one after the other."""
        hs, ds = [], []
        for use in self.uses:
            if use.leaf == leaf:
                h, d = _normal(use, found[use.number], deltas[use.number])
                hs.append(h)
                ds.append(d)
        return Taps(jnp.concatenate(hs, 1), jnp.concatenate(ds, 3)) if len(hs) > 1 else Taps(hs[0], ds[0])

    def sizes(self, leaf: int) -> tuple[int, int, int, int]:
        """(B, T, in, out) of a parameter."""
        total, dims = 0, (1, 1, 1)
        for use in self.uses:
            if use.leaf == leaf:
                b, t, i, o = _sizes(use)
                total, dims = total + t, (b, i, o)
        return dims[0], total, dims[1], dims[2]


def _roles(use: Use) -> Hashable:
    """The axes of the parameter that are contracted and those of its batches."""
    (lc, rc), (lb, rb) = use.dimension_numbers
    return (lc, lb) if use.side == 0 else (rc, rb)


def _normal(use: Use, h: Any, delta: Any) -> tuple[Any, Any]:
    """Brings h to (B, T, in) and delta to (copies, S, B, T, out)."""
    contracted, batch = (pair[1 - use.side] for pair in use.dimension_numbers)
    of_parameter = use.dimension_numbers[0][use.side]
    order = sorted(range(len(contracted)), key=lambda i: of_parameter[i])  # as the parameter's own axes
    contracted = [contracted[i] for i in order]
    free = [i for i in range(h.ndim) if i not in contracted and i not in batch]
    b, t = (math.prod(h.shape[i] for i in axes) for axes in (batch, free))
    h = jnp.transpose(h, (*batch, *free, *contracted)).reshape(b, t, -1)
    if use.side == 0:  # the parameter's axes come before those of h
        first, own = 2 + len(batch), delta.ndim - 2 - len(batch) - len(free)
        delta = jnp.moveaxis(delta, range(first, first + own), range(delta.ndim - own, delta.ndim))
    return h, delta.reshape(*delta.shape[:2], b, t, -1)


def _sizes(use: Use) -> tuple[int, int, int, int]:
    batches = len(use.dimension_numbers[1][0])
    rest = use.shape[batches:]
    contracted, own = cast(tuple[int, int], use.key[-1])
    out = math.prod(rest[:own]) if use.side == 0 else math.prod(rest[len(rest) - own :])
    return math.prod(use.shape[:batches]), math.prod(rest) // max(out, 1), contracted, out


# --- products of two gradients ------------------------------------------------------------------------------


def product_flops(sizes: Sequence[int], t: int, u: int, copies: int, s: int, r: int) -> tuple[float, float, float]:
    """Multiplications for a pair of examples of the three ways to contract, in the order of `product`."""
    b, _, i, o = sizes
    return (
        b * t * u * (i + copies * s * r * (o + 1)),
        b * (t * u * i + copies * r * t * u * o + copies * s * r * t * o),
        b * copies * s * r * i * o,
    )


def product_held(sizes: Sequence[int], t: int, u: int, copies: int, s: int, r: int) -> int:
    """Numbers that the cheapest of those ways holds beside its operands."""
    b, _, i, o = sizes
    costs = product_flops(sizes, t, u, copies, s, r)
    held = (
        b * t * u * (1 + s * r if b * t * u > 1 else 1),
        b * (t * u + copies * r * t * o),
        copies * (s + r) * b * i * o,
    )
    return held[0 if t * u == 1 else costs.index(min(costs))]


def product(x: Taps, y: Taps) -> Any:
    """The sum over copies of the products of two parameters' gradients, of shape (S, S'), by the cheapest way."""
    b, t, i = x.h.shape
    u, o = y.h.shape[1], x.delta.shape[-1]
    costs = product_flops((b, t, i, o), t, u, x.delta.shape[0], x.delta.shape[1], y.delta.shape[1])
    with jax.default_matmul_precision("highest"):
        if t * u == 1 or costs[0] == min(costs):
            hh = jnp.einsum("bti,bui->btu", x.h, y.h)
            if b * t * u == 1:
                return jnp.einsum("cpo,cqo->pq", x.delta[:, :, 0, 0], y.delta[:, :, 0, 0]) * hh[0, 0, 0]
            return jnp.einsum("pqbtu,btu->pq", jnp.einsum("cpbto,cqbuo->pqbtu", x.delta, y.delta), hh)
        if costs[1] < costs[2]:
            hh = jnp.einsum("bti,bui->btu", x.h, y.h)
            return jnp.einsum("cpbto,cqbto->pq", x.delta, jnp.einsum("btu,cqbuo->cqbto", hh, y.delta))
        g = jnp.einsum("bti,cpbto->cpbio", x.h, x.delta)
        g_y = jnp.einsum("bti,cpbto->cpbio", y.h, y.delta)
        return jnp.einsum("cpbio,cqbio->pq", g, g_y)


# --- the walk -----------------------------------------------------------------------------------------------


def _walk(
    jaxpr: Any,
    consts: list[Any],
    tags: list[Tag | None],
    values: list[Any] | None,
    product: Callable[[Any, Sequence[Tag | None], Any], Any],
    spoil: Callable[[int], None],
) -> tuple[list[Tag | None], list[Any]]:
    """One pass over the equations, through calls: with values, or with tags only if `values` is None."""
    live = values is not None
    known: dict[Any, Tag] = {v: t for v, t in zip(jaxpr.invars, tags, strict=True) if t is not None}
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    if live:
        env |= dict(zip(jaxpr.invars, values, strict=True))  # type: ignore[arg-type]

    def read(v: Any) -> Any:
        return v.val if isinstance(v, _compat.Literal) else env[v] if live else None

    def tag(v: Any) -> Tag | None:
        return None if isinstance(v, _compat.Literal) else known.get(v)

    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        given = [tag(v) for v in eqn.invars]
        operands = [read(v) for v in eqn.invars] if live else []
        tagged = [t for t in given if t is not None]
        out: list[Any]
        new: list[Tag | None] = [None] * len(eqn.outvars)
        if not tagged:
            out = _evaluate(eqn, operands) if live else []
        elif name in _compat.CALLS and not name.startswith("custom"):
            inner, inner_consts = _compat.open_jaxpr(eqn.params[_compat.CALLS[name]])
            new, out = _walk(inner, list(inner_consts), given, operands if live else None, product, spoil)
        elif name == "dot_general" and len(tagged) == 1:
            result = product(eqn, _described(eqn, given), operands)
            out = [result]
        else:
            viewed = _view(eqn, given, operands if live else None)
            if viewed is None:
                for t in tagged:
                    spoil(t.leaf)
            new = [viewed]
            new += [None] * (len(eqn.outvars) - 1)
            out = _evaluate(eqn, operands) if live else []
        known |= {v: t for v, t in zip(eqn.outvars, new, strict=True) if t is not None}
        if live:
            env |= dict(zip(eqn.outvars, out, strict=True))
    return [tag(v) for v in jaxpr.outvars], [read(v) for v in jaxpr.outvars] if live else []


def _described(eqn: Any, tags: Sequence[Tag | None]) -> list[Tag | None]:
    """The tags with the sizes of the parameter's roles at the end of their keys."""
    side = 0 if tags[0] is not None else 1
    (c, b) = (eqn.params["dimension_numbers"][0][side], eqn.params["dimension_numbers"][1][side])
    aval = eqn.invars[side].aval
    contracted = math.prod(aval.shape[i] for i in c)
    tag = tags[side]
    assert tag is not None
    done = Tag(tag.leaf, (*tag.key, (contracted, len(aval.shape) - len(c) - len(b))), tag.scale)
    return [done, None] if side == 0 else [None, done]


def _view(eqn: Any, tags: Sequence[Tag | None], operands: Sequence[Any] | None) -> Tag | None:
    """The tag of a parameter that was only looked at in another way, or multiplied by a number."""
    name, params = eqn.primitive.name, eqn.params
    first = tags[0]
    if name in _VIEWS and first is not None:
        return Tag(first.leaf, (*first.key, (name, _hashable(params))), first.scale)
    if name == "convert_element_type" and first is not None and jnp.issubdtype(params["new_dtype"], jnp.floating):
        return first
    if name in ("mul", "div") and sum(t is not None for t in tags) == 1:
        at = 0 if first is not None else 1
        number = eqn.invars[1 - at].aval
        if math.prod(number.shape) != 1 or (name == "div" and at == 1):
            return None
        tag = tags[at]
        assert tag is not None
        scale = tag.scale
        if operands is not None:
            value = jnp.reshape(jnp.asarray(operands[1 - at]), ())
            value = 1 / value if name == "div" else value
            scale = value if scale is None else scale * value
        return Tag(tag.leaf, tag.key, scale)
    return None


def _evaluate(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The equation itself, with whatever derivative rules it has."""
    free = [v for v in eqn.invars if not isinstance(v, _compat.Literal)]
    given = [x for v, x in zip(eqn.invars, operands, strict=True) if not isinstance(v, _compat.Literal)]
    return list(_compat.equation_as_fun(eqn, tuple(dict.fromkeys(free)))(*dict(zip(free, given, strict=True)).values()))


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    if isinstance(value, tuple | list):
        return tuple(_hashable(v) for v in value)
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


# --- what a program costs -----------------------------------------------------------------------------------


def flops(jaxpr: Any) -> float:
    """Multiplications of the matrix products and convolutions of a program, loops included."""
    total = 0.0
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        name = eqn.primitive.name
        size = float(np.prod(eqn.outvars[0].aval.shape)) if eqn.outvars else 0.0
        if name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            total += size * math.prod(kernel) / kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        else:
            total += size + sum(flops(j) for j in _inner(eqn)) * eqn.params.get("length", 1)
    return total


def footprint(jaxpr: Any) -> int:
    """Bytes of everything a program computes, loops included: what a reverse pass keeps, at most."""
    total = 0
    for eqn in _compat.open_jaxpr(jaxpr)[0].eqns:
        inner = _inner(eqn)
        if inner:
            total += sum(footprint(j) for j in inner) * eqn.params.get("length", 1)
        total += sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars)
    return total


def working(jaxpr: Any) -> int:
    """Bytes of the largest set of results that are alive at once: what their cotangents take in a reverse pass."""
    eqns = _compat.open_jaxpr(jaxpr)[0].eqns
    last = {v: i for i, eqn in enumerate(eqns) for v in eqn.invars if not isinstance(v, _compat.Literal)}
    last |= {v: len(eqns) for v in _compat.open_jaxpr(jaxpr)[0].outvars if not isinstance(v, _compat.Literal)}
    ending: dict[int, int] = {}
    alive = peak = 0
    for i, eqn in enumerate(eqns):
        for v in eqn.outvars:
            size = math.prod(v.aval.shape) * v.aval.dtype.itemsize
            alive += size
            end = max(last.get(v, i), i)
            ending[end] = ending.get(end, 0) + size
        peak = max(peak, alive + max((working(j) for j in _inner(eqn)), default=0))
        alive -= ending.pop(i, 0)
    return peak


def _inner(eqn: Any) -> list[Any]:
    kinds = (_compat.ClosedJaxpr, _compat.Jaxpr)
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else [p])]
    return [v for v in values if isinstance(v, kinds)]
