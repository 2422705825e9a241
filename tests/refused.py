"""Networks that must be refused, the words their errors must contain, and the line they must name.

The guilty line carries the comment `# <- guilty`; where several lines are equally at fault each carries it, and the
error names one of them (`guilty_lines`). `kernel` says which kernel must be refused: "nngp" (the NTK is then nobody's
business), "ntk" (the NNGP exists and must be given) or "either" (the NTK; the NNGP has a limit of another kind, such
as the sign of a tanh, and may be given or refused). `reason` says which family of error is meant:

    limit        the kernel vanishes, diverges, is random or is not random at all as n grows
    structure    the program itself changes with the width
    unsupported  a limit may exist, and it is not computed here
    input        the examples are not what the network takes
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from anywidth.network import Network, Normal

MARK = "# <- guilty"


@dataclass(frozen=True)
class Refusal:
    name: str
    net: Network
    x: Any
    y: Any
    kernel: str  # "nngp", "ntk" or "either"
    reason: str
    # Every word must be in the message, in any case; a word "a|b" is satisfied by either.
    words: tuple[str, ...]
    build: Callable

    def missing(self, message: str) -> list[str]:
        """The expected words that a message lacks."""
        lower = message.lower()
        return [w for w in self.words if not any(option.lower() in lower for option in w.split("|"))]


REFUSED: list[Refusal] = []


def guilty_lines(entry: Refusal) -> list[int]:
    """The line numbers in this file of the marked lines of an entry; none if no line is at fault."""
    lines, first = inspect.getsourcelines(entry.build)
    return [first + i for i, line in enumerate(lines) if MARK in line]


def names_guilty_line(entry: Refusal, message: str) -> bool:
    """Whether a message names one of the guilty lines as `refused.py:123` (or needs to name none)."""
    lines = guilty_lines(entry)
    return not lines or any(f"refused.py:{line}" in message for line in lines)


def refused(reason: str, *words: str, kernel: str = "nngp", x=None, y=None):
    def register(build):
        a = vx if x is None else x
        b = vy if y is None else y
        REFUSED.append(Refusal(build.__name__, Network(*build()), a, b, kernel, reason, words, build))
        return build

    return register


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


vx, vy = np.array([0.9, -0.4, 1.1]), np.array([0.5, 0.8, 0.7])
sx, sy = gaussian(3, 4, 3), gaussian(4, 3, 3)
s4 = gaussian(5, 4, 3)


def _mlp(n):
    return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,))}


# ---- Powers of n ------------------------------------------------------------------------------------------


@refused("limit", "diverge", "n^1|n**1|power 1|power of n")
def readout_without_scaling():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        return p["v"] @ h  # <- guilty

    return _mlp, apply


@refused("limit", "vanish", "n^-1|n**-1|n^(-1)|n**(-1)|power -1|power of n")
def readout_divided_by_n():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        return p["v"] @ h / n  # <- guilty

    return _mlp, apply


@refused("limit", "diverge", "n^1|n**1|power 1|power of n", "NTK", kernel="ntk")
def standard_parametrisation():
    def init(n):
        return {"U": Normal((n, 3), 1 / 3), "W": Normal((n, n), 2 / n), "v": Normal((n,), 1 / n)}

    def apply(p, x):
        h = jax.nn.relu(p["U"] @ x)
        h = jax.nn.relu(p["W"] @ h)  # <- guilty
        return p["v"] @ h  # <- guilty

    return init, apply


@refused("limit", "diverge", "NTK", kernel="ntk")
def readout_in_standard_parametrisation():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n)), "v": Normal((n,), var=1 / n)}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        return p["v"] @ h  # <- guilty

    return init, apply


@refused("limit", "vanish", "NTK", kernel="ntk")
def ntk_vanishes():
    def init(n):
        return {"U": Normal((n, 3), n), "W": Normal((n, n), n), "v": Normal((n,), n)}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x / jnp.sqrt(n))  # <- guilty
        h = jax.nn.relu(p["W"] @ h / n)  # <- guilty
        return p["v"] @ h / n  # <- guilty

    return init, apply


@refused("limit", "diverge", "NTK", kernel="ntk")
def output_bias_scaled_up():
    def init(n):
        return _mlp(n) | {"c": Normal((), var=1 / n)}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        return p["v"] @ h / jnp.sqrt(n) + jnp.sqrt(n) * p["c"]  # <- guilty

    return init, apply


@refused("limit", "vanish")
def scaled_twice():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n), var=2 / n), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)  # <- guilty

    return init, apply


@refused("limit|unsupported", "diverge|power of n|grows", kernel="either")
def saturated_tanh():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jnp.tanh(p["U"] @ x)
        h = jnp.tanh(p["W"] @ h)  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


@refused("limit", "diverge|grows|mean")
def weights_with_a_mean():
    def init(n):
        return {"U": Normal((n, 3)), "W": Normal((n, n), mean=1.0), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


# ---- Attention scores -------------------------------------------------------------------------------------


def _attention(n):
    return {
        "E": Normal((n, 3)),
        "Q": Normal((n, n)),
        "K": Normal((n, n)),
        "V": Normal((n, n)),
        "v": Normal((n,)),
    }


@refused("limit", "independent|random", "n", x=sx, y=sy)
def independent_scores_over_root_n():
    def apply(p, x):
        n = p["v"].shape[0]
        h = x @ p["E"].T
        q = h @ p["Q"].T / jnp.sqrt(n)
        k = h @ p["K"].T / jnp.sqrt(n)
        u = h @ p["V"].T / jnp.sqrt(n)
        scores = q @ k.T / jnp.sqrt(n)  # <- guilty
        return (jax.nn.softmax(scores) @ u).mean(0) @ p["v"] / jnp.sqrt(n)

    return _attention, apply


@refused("limit|unsupported", "diverge|grow", "n", x=sx, y=sy)
def shared_scores_over_root_n():
    def apply(p, x):
        n = p["v"].shape[0]
        h = x @ p["E"].T
        q = h @ p["Q"].T / jnp.sqrt(n)
        u = h @ p["V"].T / jnp.sqrt(n)
        scores = q @ q.T / jnp.sqrt(n)  # <- guilty
        weights = jax.nn.softmax(scores)  # <- guilty
        return (weights @ u).mean(0) @ p["v"] / jnp.sqrt(n)

    return _attention, apply


@refused("limit|unsupported", "heads|random|width|gaussians", x=sx, y=sy)
def heads_of_fixed_size():
    def apply(p, x):
        n = p["v"].shape[0]
        h = x @ p["E"].T
        q, k, u = ((h @ p[w].T / jnp.sqrt(n)).reshape(-1, n // 32, 32) for w in "QKV")
        scores = jnp.einsum("thd,shd->hts", q, k) / jnp.sqrt(32)  # <- guilty
        mixed = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), u)  # <- guilty
        return mixed.reshape(-1, n).mean(0) @ p["v"] / jnp.sqrt(n)

    return _attention, apply


# ---- Random numbers that stay random ----------------------------------------------------------------------


@refused("limit|unsupported", "readout|random|output")
def nonlinear_function_of_the_readout():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        f = p["v"] @ h / jnp.sqrt(n)
        return jnp.tanh(f)  # <- guilty

    return _mlp, apply


@refused("limit|unsupported", "readout|random|output")
def softmax_of_the_classes():
    def init(n):
        return {"U": Normal((n, 3)), "V": Normal((10, n))}

    def apply(p, x):
        logits = p["V"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(p["V"].shape[1])
        return jax.nn.log_softmax(logits)  # <- guilty

    return init, apply


@refused("limit|unsupported", "readout|random|output")
def finite_bottleneck():
    def init(n):
        return {"U": Normal((n, 3)), "down": Normal((4, n)), "up": Normal((n, 4)), "v": Normal((n,))}

    def apply(p, x):
        n = p["v"].shape[0]
        code = p["down"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n)
        code = jax.nn.relu(code)  # <- guilty
        h = jax.nn.relu(p["up"] @ code)  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return init, apply


@refused("limit|unsupported", "readout|random|output")
def random_scalar_gates_a_layer():
    def init(n):
        return _mlp(n) | {"g": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        attention = p["g"] @ h / jnp.sqrt(n)
        h = jax.nn.sigmoid(attention) * h  # <- guilty
        return p["v"] @ jax.nn.relu(p["W"] @ h / jnp.sqrt(n)) / jnp.sqrt(n)

    return init, apply


@refused("limit|unsupported", "random", "width|shared|channels")
def trained_scalar_gain():
    def init(n):
        return _mlp(n) | {"gain": Normal((), mean=1.0, var=0.1)}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        h = p["gain"] * h  # <- guilty
        return p["v"] @ jax.nn.relu(p["W"] @ h / jnp.sqrt(n)) / jnp.sqrt(n)

    return init, apply


@refused("limit|unsupported", "random", x=sx, y=s4)
def trained_mixing_matrix():
    def init(n):
        return _mlp(n) | {"M": Normal((4, 4), var=0.25)}

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(x @ p["U"].T)
        h = p["M"] @ h  # <- guilty
        return jax.nn.relu(h @ p["W"].T / jnp.sqrt(n)).mean(0) @ p["v"] / jnp.sqrt(n)

    return init, apply


@refused("limit", "deterministic|not random|vanish")
def deterministic_output():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        return jnp.mean(h)  # <- guilty

    return _mlp, apply


@refused("limit", "deterministic|not random|vanish|parameter")
def output_without_parameters():
    def apply(p, x):
        return jnp.sum(x**2)  # <- guilty

    return _mlp, apply


@refused("limit|unsupported", "width")
def output_of_the_width():
    def apply(p, x):
        n = p["W"].shape[0]
        return jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))  # <- guilty

    return _mlp, apply


# ---- Structure that changes with the width ----------------------------------------------------------------


@refused("structure", "width")
def branch_on_the_width():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        if n > 20_000:
            h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)  # <- guilty

    return _mlp, apply


@refused("structure", "width")
def logarithmic_depth():
    def init(n):
        return _mlp(n)

    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        for _ in range(int(math.log2(n))):
            h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)  # <- guilty

    return init, apply


@refused("structure", "width|init")
def more_layers_when_wider():
    def init(n):
        return {"U": Normal((n, 3)), "W": [Normal((n, n)) for _ in range(n.bit_length())], "v": Normal((n,))}

    def apply(p, x):
        h = jax.nn.relu(p["U"] @ x)
        for W in p["W"]:
            h = jax.nn.relu(W @ h / jnp.sqrt(h.shape[0]))
        return p["v"] @ h / jnp.sqrt(h.shape[0])

    return init, apply


@refused("structure", "width")
def constant_not_a_power_of_the_width():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        return p["v"] @ h / (math.sqrt(n) * math.log(n))  # <- guilty

    return _mlp, apply


# ---- Matrices used otherwise than on kets -----------------------------------------------------------------


@refused("unsupported", "transpose")
def matrix_and_its_transpose():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        h = jax.nn.relu(p["W"] @ h / jnp.sqrt(n))
        h = jax.nn.relu(p["W"].T @ h / jnp.sqrt(n))  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "transpose", x=sx, y=sy)
def transpose_hidden_in_an_einsum():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jnp.einsum("nd,td->tn", p["U"], x)
        h = jax.nn.relu(jnp.einsum("ij,tj->ti", p["W"], h) / jnp.sqrt(n))
        h = jax.nn.relu(jnp.einsum("tj,ji->ti", h, p["W"]) / jnp.sqrt(n))  # <- guilty
        return jnp.einsum("ti,i->", h, p["v"]) / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "transpose")
def gradient_inside_the_network():
    def apply(p, x):
        n = p["W"].shape[0]
        h = p["U"] @ x
        energy = lambda h: jnp.sum(jnp.cos(p["W"] @ h / jnp.sqrt(n)))  # noqa: E731  # <- guilty
        h = h - 0.1 * jax.grad(energy)(h)  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "matri|parameter|W")
def function_of_the_weights():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        W = jnp.tanh(p["W"])  # <- guilty
        h = jax.nn.relu(W @ h / jnp.sqrt(n))  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "n x n", "vector", "tanh", x=sx, y=sy)
def function_of_a_memory():
    def apply(p, x):
        n = p["v"].shape[0]
        h = jax.nn.relu(x @ p["E"].T)
        memory = jnp.tanh(h.T @ h / n)  # <- guilty
        return (h @ memory).mean(0) @ p["v"] / jnp.sqrt(n)

    return _attention, apply


@refused("limit", "random", "n^0")
def trace_of_a_product():
    def init(n):
        return _mlp(n) | {"W2": Normal((n, n))}

    def apply(p, x):
        n = p["W"].shape[0]
        size = jnp.einsum("ij,ji->", p["W"], p["W2"]) / n  # <- guilty
        return size * (p["v"] @ jax.nn.relu(p["U"] @ x)) / jnp.sqrt(n)

    return init, apply


@refused("unsupported", "W", "transpose")
def norm_of_a_matrix_squared():
    def apply(p, x):
        n = p["W"].shape[0]
        W = p["W"] @ p["W"] / n
        return p["v"] @ jax.nn.relu(W.T @ jax.nn.relu(W @ p["U"] @ x)) / jnp.sqrt(n)  # <- guilty

    return _mlp, apply


@refused("unsupported", "qr|orthogonal|primitive")
def orthogonalised_weights():
    def apply(p, x):
        n = p["W"].shape[0]
        Q = jnp.linalg.qr(p["W"])[0]  # <- guilty
        return p["v"] @ jax.nn.relu(Q @ jax.nn.relu(p["U"] @ x)) / jnp.sqrt(n)

    return _mlp, apply


# ---- Batch normalisation ----------------------------------------------------------------------------------


@refused("limit", "batch|epsilon|infinite|diverge", kernel="ntk", x=gaussian(6, 2, 4), y=gaussian(7, 2, 4))
def batch_norm_of_two_without_epsilon():
    def init(n):
        return {"U": Normal((4, n)), "W": Normal((n, n)), "v": Normal((n,))}

    def apply(p, x):
        n = p["W"].shape[0]
        h = x @ p["U"]
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0))  # <- guilty
        h = jax.nn.relu(h) @ p["W"] / jnp.sqrt(n)
        h = jax.nn.relu((h - h.mean(0)) / jnp.sqrt(h.var(0)))  # <- guilty
        return h @ p["v"] / jnp.sqrt(n)

    return init, apply


# ---- Primitives without a meaning on a ket ----------------------------------------------------------------


@refused("unsupported", "reduce_max|max", "width")
def softmax_over_the_width():
    def apply(p, x):
        n = p["W"].shape[0]
        h = p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n)
        h = n * jax.nn.softmax(h)  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "reduce_max|max", "width")
def max_over_the_width():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["U"] @ x)
        h = h / jnp.max(jnp.abs(h))  # <- guilty
        return p["v"] @ jax.nn.relu(p["W"] @ h / jnp.sqrt(n)) / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "sort")
def sort_over_the_width():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jnp.sort(p["U"] @ x)  # <- guilty
        return p["v"] @ jax.nn.relu(p["W"] @ h / jnp.sqrt(n)) / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "cumsum")
def cumulative_sum_over_the_width():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jnp.cumsum(jax.nn.relu(p["U"] @ x)) / n  # <- guilty
        return p["v"] @ jax.nn.relu(p["W"] @ h / jnp.sqrt(n)) / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "roll|concatenate|slice|width|neighbour")
def neighbours_along_the_width():
    def apply(p, x):
        n = p["W"].shape[0]
        h = p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n)
        h = jax.nn.relu(h) * jnp.roll(h, 1)  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "random")
def dropout_inside_apply():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        keep = jax.random.bernoulli(jax.random.key(0), 0.5, h.shape)  # <- guilty
        return p["v"] @ jnp.where(keep, 2 * h, 0) / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "while")
def loop_until_small():
    def apply(p, x):
        n = p["W"].shape[0]
        h = lax.while_loop(  # <- guilty
            lambda h: jnp.mean(h**2) > 0.1,
            lambda h: 0.5 * jax.nn.relu(p["W"] @ h / jnp.sqrt(n)),
            p["U"] @ x,
        )
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


@refused("unsupported", "callback")
def callback_to_numpy():
    def apply(p, x):
        n = p["W"].shape[0]
        h = p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n)
        h = jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h)  # <- guilty
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


# ---- Inputs that do not fit -------------------------------------------------------------------------------


def _plain():
    def apply(p, x):
        n = p["W"].shape[0]
        h = jax.nn.relu(p["W"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(n))
        return p["v"] @ h / jnp.sqrt(n)

    return _mlp, apply


@refused("input", "nan", x=np.array([0.1, np.nan, 0.3]))
def nan_in_the_input():
    return _plain()


@refused("input", "inf", y=np.array([0.1, np.inf, 0.3]))
def infinity_in_the_input():
    return _plain()


@refused("input", "shape", x=gaussian(8, 4), y=gaussian(9, 4))
def input_of_the_wrong_shape():
    return _plain()


@refused("input", "shape", y=gaussian(9, 4))
def second_input_of_the_wrong_shape():
    return _plain()


@refused("input", "structure|tree", y={"x": vy})
def inputs_of_different_structures():
    return _plain()


@refused("input", "array of shape (4, 4)", "Normal", "W")
def init_with_an_array():
    def init(n):
        return {"U": Normal((n, 3)), "W": np.zeros((4, 4)), "v": Normal((n,))}

    return init, _plain()[1]


@refused("input", "cat", "numbers", x={"x": vx, "name": "cat"}, y={"x": vy, "name": "dog"})
def a_string_in_the_input():
    return _mlp, lambda p, x: _plain()[1](p, x["x"])


# ---- Slips of the pen ---------------------------------------------------------------------------------------


@refused("input", "one example", "aw.gram", x=gaussian(8, 10, 3), y=gaussian(9, 10, 3))
def data_set_for_an_example():
    def apply(p, x):
        h = jax.nn.relu(p["U"] @ x)  # <- guilty
        return p["v"] @ h / jnp.sqrt(h.size)

    return _mlp, apply


@refused("input", "lax.cond")
def branch_on_a_value():
    def apply(p, x):
        h = jax.nn.relu(p["U"] @ x)
        if h.mean() > 0:  # <- guilty
            h = 2 * h
        return p["v"] @ h / jnp.sqrt(h.size)

    return _mlp, apply


@refused("input", "jnp for numpy")
def numpy_on_a_parameter():
    def apply(p, x):
        h = np.maximum(np.asarray(p["U"]) @ x, 0)  # <- guilty
        return p["v"] @ h / jnp.sqrt(h.size)

    return _mlp, apply


@refused("input", "None", "return")
def return_forgotten():
    def apply(p, x):
        p["v"] @ jax.nn.relu(p["U"] @ x)

    return _mlp, apply


@refused("limit", "axis that grows with n")
def width_written_as_a_number():
    def init(n):
        return {"U": Normal((128, 3)), "v": Normal((128,))}

    return init, lambda p, x: p["v"] @ jax.nn.relu(p["U"] @ x) / math.sqrt(128)


@refused("limit", "multiplied by another random number")
def readout_times_a_trained_number():
    def init(n):
        return {"U": Normal((n, 3)), "v": Normal((n,)), "g": Normal(())}

    def apply(p, x):
        return p["g"] * (p["v"] @ jax.nn.relu(p["U"] @ x) / jnp.sqrt(p["v"].size))  # <- guilty

    return init, apply
