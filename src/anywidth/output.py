"""Whether an output has kernels in the limit, and what to change where it has none.

An output of order n^p has an NNGP kernel if p = 0. Its NTK is a sum over the parameters; the share of one of which the
epsilon is lr n^s (`Leaf.speed`) is of order n^(2p + s), so that it has a limit if the largest of them is zero, which
may be where the output itself vanishes (maximal-update parametrization).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from anywidth.errors import NoLimitError, UnsupportedError
from anywidth.kets import Contract, Leaf, Node, Product, Sum, View, is_zero
from anywidth.parameters import Parameters
from anywidth.rates import Rates, suggestion
from anywidth.trace import Program
from anywidth.values import Cat, Det, Mat, Operator, Value


def check_output(
    value: Value, program: Program, dropped: Sequence[Any], which: str, parameters: Parameters, lr: Rates
) -> Value:
    """The value itself, if its kernels have a limit.

    Raises: NoLimitError, with the line at fault and the scaling or the learning rates that would mend it.
    """
    line = program.eqns[-1].line if program.eqns else "the return value"
    if isinstance(value, Cat):
        for p in value.parts:
            check_output(p, program, dropped, which, parameters, lr)
        return value
    if isinstance(value, Mat | Operator):
        raise UnsupportedError(f"the network returns an n x n matrix, and no readout.\n  at {line}")
    if isinstance(value, Det) and value.zero and value.noise is not None and value.noise >= 0:
        where = f"\n  at {value.line.line}" if value.line is not None else f"\n  at {line}"
        raise UnsupportedError(
            "the output is an inner product of independent random vectors: its mean is zero, and it is random, of "
            f"order n^{value.noise}, in a way that anywidth does not follow. Multiply the last hidden layer, whole, "
            f"by a parameter that is used nowhere else, v @ h / sqrt(n).{where}"
        )
    if isinstance(value, Det):
        reason = "is zero" if value.zero else "is not random"
        raise NoLimitError(
            f"the output {reason} in the limit (an average over the width is a fixed number): there is no kernel. End "
            f"the network in a readout, v @ h / sqrt(n) with v a parameter.\n  at {line}"
        )
    if value.wides():
        raise NoLimitError(
            f"the output has an axis of size {value.wides()[0].size} that grows with the width. Return a readout, "
            f"v @ h / sqrt(n) with v a parameter.\n  at {line}"
        )
    where = _line_of(value.node) or line
    if is_zero(value.node):
        raise NoLimitError(f"the output is zero in the limit.\n  at {where}")
    learning = sorted((p for p in value.node.leaves if not p.frozen), key=lambda p: (-p.speed, p.name))
    share = learning[0].share(value.power) if learning else None
    if value.power != 0 and not (which == "ntk" and (share == 0 or lr is not None)):
        grows = value.power > 0
        raise NoLimitError(
            f"the output {'diverges' if grows else 'vanishes'} like n^{value.power} as the width grows. "
            f"{'Divide' if grows else 'Multiply'} it by n^{abs(value.power)}"
            + (" (its NTK has a limit: ask for ntk alone)" if share == 0 and which == "both" else "")
            + f".\n  at {where}"
        )
    if which == "nngp":
        return value
    if share is None:
        raise NoLimitError(f"the NTK is zero: lr freezes every parameter that the output depends on.\n  at {where}")
    if share != 0:
        raise NoLimitError(_wrong_rates(learning, value.power, share, parameters, lr) + f"\n  at {where}")
    for leaf, behind, eqn in dropped:
        if not leaf.frozen and leaf.share(value.power + behind) >= 0:
            raise UnsupportedError(
                f"the parameter {leaf.name} adds nothing to the output in the limit but its learning adds to the "
                f"NTK: such parametrizations are not supported.\n  at {eqn.line}"
            )
    return value


def _wrong_rates(learning: Sequence[Leaf], output: Fraction, share: Fraction, parameters: Parameters, lr: Rates) -> str:
    """What is wrong with the learning rates, and which would do."""
    wrong = [p for p in learning if p.share(output) > 0] if share > 0 else list(learning)
    powers = {p.leaf.path: Fraction(0) for p in parameters.items} | {p.path: -p.share(output) for p in wrong}
    names = ", ".join(p.name for p in wrong)
    does = f"{'diverges' if share > 0 else 'vanishes'} like n^{share}"
    one = len(wrong) == 1
    advice = (
        f"Multiply the learning {'rate' if one else 'rates'} of {names} by a power of n: {suggestion(powers)}"
        if lr is None
        else f"Multiply the learning rates that you gave by those of {suggestion(powers)}"
    )
    sizes = sorted({p.size for p in wrong})
    scale = f"entries of order n^{sizes[0]} and " if share > 0 and len(sizes) == 1 and sizes[0] != 0 else ""
    return (
        f"the NTK {does} as the width grows: {names} {'has' if one else 'have'} {scale}"
        f"a learning rate that is too {'high' if share > 0 else 'low'}. {advice}"
        + (", or write the scaling of the entries in apply (NTK parametrization)." if scale else ".")
    )


def _line_of(node: Node) -> str | None:
    while not isinstance(node, Product):
        if isinstance(node, Sum):
            node = node.terms[0][1]
        elif isinstance(node, Contract | View):
            node = node.operand
        else:
            return None
    return node.line
