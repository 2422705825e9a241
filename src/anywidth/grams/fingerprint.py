"""What a kernel and a data set are, as short strings that are the same in every process.

A kernel is a function, and two processes never share a function. What they share is what it computes: the program
that JAX reads off it (operations, shapes, numbers, captured arrays), in which the network, the variances of its
parameters and every option of the kernel are written out. Names of variables and functions, addresses and source lines
are left out.

>>> import jax, jax.numpy as jnp
>>> x = jax.ShapeDtypeStruct((3,), jnp.float32)
>>> one = kernel_fingerprint(lambda x, y: 2.0 * x @ y, [(x, x)])
>>> one == kernel_fingerprint(lambda a, b: 2.0 * a @ b, [(x, x)])
True
>>> one == kernel_fingerprint(lambda x, y: 3.0 * x @ y, [(x, x)])
False
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from anywidth import _compat
from anywidth.examples import Dataset

__all__ = ["data_fingerprint", "kernel_fingerprint"]

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_NAMES = {"name", "debug_info", "jaxpr_debug_info"}  # parameters of operations that do not touch the result


def kernel_fingerprint(kernel: Callable[[Any, Any], Any], specs: Iterable[tuple[Any, Any]]) -> str:
    """The program of a kernel on examples of these shapes (pairs of pytrees of `jax.ShapeDtypeStruct`)."""
    digests: dict[int, tuple[Any, bytes]] = {}
    whole = _new()
    for x, y in specs:
        jaxpr, out = jax.make_jaxpr(kernel, return_shape=True)(x, y)
        whole.update(_jaxpr(jaxpr, digests))
        whole.update(str(jax.tree.structure(out)).encode())
    return whole.hexdigest()


def data_fingerprint(data: Dataset) -> str:
    """The numbers, shapes, dtypes and order of a data set."""
    whole = _new()
    for group in data.groups:
        whole.update(np.asarray(group.positions, "<i8").tobytes())
        whole.update(str(jax.tree.structure(group.stack)).encode())
        for leaf in jax.tree.leaves(group.stack):
            whole.update(_array(leaf))
    return whole.hexdigest()


def _new() -> Any:
    return hashlib.blake2b(digest_size=20)


def _array(value: Any) -> bytes:
    array = np.asarray(value)
    digest = _new()
    digest.update(f"{array.dtype.name}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.digest()


def _jaxpr(closed: Any, digests: dict[int, tuple[Any, bytes]]) -> bytes:
    """Digest of a program; variables are numbered in order of appearance."""
    if id(closed) in digests:
        return digests[id(closed)][1]
    jaxpr, consts = _compat.open_jaxpr(closed)
    numbers: dict[Any, int] = {}
    whole = _new()

    def operand(v: Any) -> bytes:
        if isinstance(v, _compat.Literal):
            return b"literal" + str(v.aval).encode() + _value(v.val, digests)
        return f"{numbers.setdefault(v, len(numbers))}:{v.aval}".encode()

    for v in (*jaxpr.constvars, *jaxpr.invars):
        whole.update(operand(v))
    for const in consts:
        whole.update(_value(const, digests))
    for eqn in jaxpr.eqns:
        whole.update(b"\n" + eqn.primitive.name.encode())
        for v in (*eqn.invars, None, *eqn.outvars):
            whole.update(b"->" if v is None else b" " + operand(v))
        for key in sorted(eqn.params):
            if key not in _NAMES:
                whole.update(key.encode() + b"=" + _value(eqn.params[key], digests))
    for v in jaxpr.outvars:
        whole.update(operand(v))
    digests[id(closed)] = closed, whole.digest()  # the object is kept, so that its id stays its own
    return whole.digest()


def _value(value: Any, digests: dict[int, tuple[Any, bytes]]) -> bytes:
    if isinstance(value, _compat.ClosedJaxpr | _compat.Jaxpr):
        return _jaxpr(value, digests)
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return _array(jax.random.key_data(value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _array(value)
    if isinstance(value, tuple | list):
        return b"(" + b",".join(_value(v, digests) for v in value) + b")"
    if isinstance(value, dict):
        return b"{" + b",".join(str(k).encode() + b":" + _value(v, digests) for k, v in value.items()) + b"}"
    if callable(value) and not isinstance(value, type):
        return getattr(value, "__qualname__", type(value).__qualname__).encode()
    return _ADDRESS.sub("", repr(value)).encode()
