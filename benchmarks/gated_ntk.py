"""The NTK of GRU and LSTM against simulation: `python benchmarks/gated_ntk.py [gru|lstm ...]`, some minutes.

For sequences of length 2, 4 and 8, and each width, the mean over seeds of the empirical NTK of a pair (x, y) of lengths
T and T - 1 and of (x, x), with its standard error. The finite-width mean is off by a multiple of 1/n: by weighted least
squares the means are fitted by a + b / n, and a is compared with the theory. Printed as a table in Markdown; the last
columns are a, its deviation from the theory in standard errors (those of the theory included), and chi^2 of the fit.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import anywidth as aw
from anywidth import zoo

SEEDS = {256: 128, 512: 64, 1024: 32, 2048: 12}


def theory(net, x, y):
    """NTK(x, y) and NTK(x, x), and their standard errors."""
    both = [aw.kernels(net, tol=1e-3)(a, b) for a, b in ((x, y), (x, x))]
    return np.array([float(k.ntk) for k in both]), np.array([float(k.error.ntk) for k in both])


def simulated(net, x, y, n, seeds):
    """The mean over seeds of the same two, and its standard error."""

    @jax.jit
    def draw(key):
        params = net.sample(key, n, jnp.float32)
        gx, gy = (jax.tree.leaves(jax.grad(net.apply)(params, a)) for a in (x, y))
        return jnp.stack([sum(jnp.vdot(g, h) for g, h in zip(gx, other, strict=True)) for other in (gy, gx)])

    found = np.stack([draw(jax.random.fold_in(jax.random.key(n), seed)) for seed in range(seeds)]).astype(float)
    return found.mean(0), found.std(0, ddof=1) / np.sqrt(seeds)


def extrapolated(means, errors):
    """a of a + b / n with its standard error, and chi^2 of the fit, (2,) each."""
    A = np.stack([np.ones(len(SEEDS)), 1 / np.array(list(SEEDS))], 1)
    out = []
    for m, e in zip(means.T, errors.T, strict=True):
        covariance = np.linalg.inv((A / e[:, None] ** 2).T @ A)
        fit = covariance @ (A.T @ (m / e**2))
        out.append((fit[0], np.sqrt(covariance[0, 0]), (((m - A @ fit) / e) ** 2).sum()))
    return np.array(out).T


def main(names):
    """Print the table."""
    print("| | pair | theory |" + "".join(f" {n} |" for n in SEEDS) + " n → ∞ | off by | χ² (2) |")
    print("|" + "---|" * (6 + len(SEEDS)))
    for name in names:
        for length in (2, 4, 8):
            net = getattr(zoo, name)(3, varb=0.5)
            x, y = np.random.default_rng(length).standard_normal((2, length, 3)).astype(np.float32)
            y = y[: length - 1]
            start = time.process_time()
            value, stated = theory(net, x, y)
            middle = time.process_time()
            means, errors = map(np.stack, zip(*(simulated(net, x, y, *item) for item in SEEDS.items()), strict=True))
            limit, error, chi2 = extrapolated(means, errors)
            for i, pair in enumerate(("x, y", "x, x")):
                columns = [f"{m:.4f} ± {e:.4f}" for m, e in zip(means[:, i], errors[:, i], strict=True)]
                off = (value[i] - limit[i]) / np.hypot(error[i], stated[i])
                columns += [f"{limit[i]:.4f} ± {error[i]:.4f}", f"{off:+.1f}", f"{chi2[i]:.1f}"]
                print(
                    f"| {name}, T = {length} | {pair} | {value[i]:.4f} ± {stated[i]:.4f} | "
                    + " | ".join(columns)
                    + " |"
                )
            spent = (
                f"{name}, T = {length}: theory {middle - start:.0f} s, simulation {time.process_time() - middle:.0f} s"
            )
            print(spent, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ("gru", "lstm"))
