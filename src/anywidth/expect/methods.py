"""Which method computed each expectation, for those who ask: a derivation says what the engine does.

The engine reports where it happens, with `used`; what was asked for is known by the equations that made the two nodes.
Without a `recording` nothing is kept.

>>> with recording() as ways:
...     pass  # a kernel is computed, or traced
>>> ways
{}
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# From the most exact to the least.
COVARIANCE = "covariances alone"
CLOSED = "closed form"
ISSERLIS = "moments of Gaussians by Isserlis' theorem"
NORMALISED = "an integral over one auxiliary variable w for each copy, by the trapezoid rule"
QUADRATURE = "adaptive quadrature"
SAMPLED = "randomised quasi-Monte Carlo over the Gaussians"
PATHS = "randomised quasi-Monte Carlo over sample paths of the loop"
ORDER = (COVARIANCE, CLOSED, ISSERLIS, NORMALISED, QUADRATURE, SAMPLED, PATHS)

Places = tuple[int | None, int | None]  # of the equations that made the two sides; None of a product with a parameter


class Ways(dict[Places, set[str]]):
    """The methods by the places; and where, in a network with two widths, products are not what they are with one."""

    def __init__(self) -> None:
        super().__init__()
        self.fluctuating: set[int] = set()  # sums over one width that are Gaussian along the other
        self.mixed: set[int] = set()  # products with a parameter that are Gaussian only given what a head attends to


class _Recording:
    def __init__(self) -> None:
        self.ways = Ways()
        self.open: list[set[str]] = []
        self.kept: dict[tuple[int, Hashable], set[str]] = {}  # of what is remembered, by the memo and its key


_RECORDING: ContextVar[_Recording | None] = ContextVar("anywidth_methods", default=None)


@contextmanager
def recording() -> Iterator[Ways]:
    """The methods by which expectations across the two copies are computed inside of the block."""
    recording = _Recording()
    token = _RECORDING.set(recording)
    try:
        yield recording.ways
    finally:
        _RECORDING.reset(token)


@contextmanager
def asked(graph: Any, a: Any, b: Any, cross: bool) -> Iterator[None]:
    """What is used inside of the block is used for E[a b]; kept if the two are of different copies."""
    recording = _RECORDING.get()
    if recording is None:
        yield
        return
    places = tuple(None if o is None else o.place for o in (graph.origin.get(x) for x in (a, b)))
    recording.open.append(recording.ways.setdefault(places, set()) if cross else set())  # type: ignore[arg-type]
    try:
        yield
    finally:
        recording.open.pop()


def fluctuates(place: int) -> None:
    """Said of an equation whose sum over one of two widths is Gaussian along the other."""
    if (recording := _RECORDING.get()) is not None:
        recording.ways.fluctuating.add(place)


def mixes(place: int) -> None:
    """Said of an equation whose product with a parameter is a mixture of Gaussians."""
    if (recording := _RECORDING.get()) is not None:
        recording.ways.mixed.add(place)


def used(method: str) -> None:
    """Said where the method is applied."""
    recording = _RECORDING.get()
    if recording is not None and recording.open:
        recording.open[-1].add(method)


@contextmanager
def remembered(memo: Any, key: Hashable, known: bool) -> Iterator[None]:
    """What was used for a value, once more where the value is taken from a memo."""
    recording = _RECORDING.get()
    if recording is None or not recording.open:
        yield
        return
    place = (id(memo), key)
    if known:
        recording.open[-1] |= recording.kept.get(place, set())
        yield
        return
    recording.open.append(set())
    try:
        yield
    finally:
        found = recording.open.pop()
        recording.kept[place] = found
        recording.open[-1] |= found


def between(graph: Any, nodes: Iterable[Any], method: str) -> None:
    """The method of every expectation among some nodes."""
    recording = _RECORDING.get()
    if recording is not None:
        places = {o.place for o in (graph.origin.get(x) for x in nodes) if o is not None}
        for p in places:
            for q in places:
                recording.ways.setdefault((p, q), set()).add(method)
