"""Simulation: the kernels of `networks.py` measured at finite widths, with their standard errors.

    python tests/oracle.py [names]      simulate what is not in tests/oracle_cache (--force: simulate again)

`limit(case)` reads the cache: for the pairs "xy" and "xx" the NTK and NNGP at the two widths, and their linear
extrapolation in 1/n to infinite width. Every kernel is a (P, P') array over the flattened outputs, in the order of
`jax.tree.leaves`, of which i.i.d. axes keep their first entry (`flat`).

The NTK of a draw is the sum over all parameters of the products of Jacobians. The NNGP is the mean over draws of
the products of outputs ("raw"); where the case names its readout parameters, linear and independent of all else,
their mean over each draw is known: it is their share of the NTK, weighted by their variances, and that is used.
"""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import networks

WIDTHS = (128, 512)
SEEDS = (1200, 400)
# Networks that cost more than their share.
SETTINGS = {
    "convolution_primitive_2d": ((64, 256), (600, 150)),
    "multi_head_reshaped": (WIDTHS, (1200, 240)),
    "rnn_bidirectional": (WIDTHS, (1200, 240)),
    "batch_norm_relu": (WIDTHS, (1200, 240)),
}
QUICK = ((64, 256), (800, 200))  # for those of `strangers.py`
SETTINGS |= {c.name: ((64, 256), (800, 240)) for c in networks.with_kind("several")}
SETTINGS |= {c.name: ((16, 48), (1200, 400)) for c in networks.with_kind("heads")}  # of as many heads
SETTINGS |= {"heads_with_positions": ((12, 24), (1200, 200)), "rotary_embeddings_of_few_frequencies": QUICK}
SETTINGS |= {
    c.name: ((48, 144), (800, 400))
    for c in networks.CASES
    if c.net.apply.__module__ in ("made", "architectures") and "heads" not in c.kinds
}
CHUNK = 2**23  # parameters in flight
CACHE = pathlib.Path(__file__).parent / "oracle_cache"


def is_normal(leaf) -> bool:
    return isinstance(leaf, networks.Normal)


def finite(case):
    """The network of one width."""
    return case.net.along(lambda n: n) if case.net.second_width else case.net


def draw(net, width: int, count: int, rng) -> object:
    """`count` draws of the parameters, stacked, in float64 (drawn in float32: three times faster)."""

    def one(normal):
        shape = (count, *normal.shape)
        if normal.var == 0:
            return np.full(shape, float(normal.mean))
        z = rng.standard_normal(shape, dtype=np.float32).astype(np.float64)
        return z * float(normal.var) ** 0.5 + float(normal.mean)

    return jax.tree.map(one, net.init(width), is_leaf=is_normal)


def flat(case, output):
    """The outputs as one vector, with the first of every i.i.d. axis."""
    if case.output.endswith("classes"):
        output = jax.tree.map(lambda leaf: leaf[..., 0], output)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(output)])


def measurement(case, width):
    """A function of the stacked draws: for each, the kernels of the two pairs."""
    variances = [float(leaf.var) for leaf in jax.tree.leaves(finite(case).init(width), is_leaf=is_normal)]
    tree = jax.tree.structure(finite(case).init(width), is_leaf=is_normal)
    marks = jax.tree.unflatten(tree, list(range(len(variances))))
    readout = set() if case.readout is None else set(jax.tree.leaves(case.readout(marks)))

    def jacobian(params, example):
        f = lambda p: (flat(case, case.net.apply(p, example)),) * 2  # noqa: E731
        jac, value = jax.jacrev(f, has_aux=True)(params)
        return value, [j.reshape(value.size, -1) for j in jax.tree.leaves(jac)]

    def pair(one, two):
        (f, jf), (g, jg) = one, two
        shares = [a @ b.T for a, b in zip(jf, jg, strict=True)]
        nngp = sum((variances[i] * shares[i] for i in sorted(readout)), start=0 * shares[0])
        return {"ntk": sum(shares), "nngp": nngp, "raw": jnp.outer(f, g)}

    def measure(params):
        at_x, at_y = jacobian(params, case.x), jacobian(params, case.y)
        return {"xy": pair(at_x, at_y), "xx": pair(at_x, at_x)}

    return jax.jit(jax.vmap(measure)), readout


def simulate(case, width: int, seeds: int) -> dict:
    """Mean and standard error over `seeds` draws: {"xy": {"ntk": (mean, error), "nngp": …, "raw": …}, "xx": …}."""
    measure, readout = measurement(case, width)
    leaves = jax.tree.leaves(finite(case).init(width), is_leaf=is_normal)
    chunk = max(1, min(seeds, CHUNK // (sum(np.prod(leaf.shape, dtype=int) for leaf in leaves) or 1)))
    while seeds % chunk:
        chunk -= 1
    rng = np.random.default_rng([width, *case.name.encode()])
    parts = [jax.device_get(measure(draw(finite(case), width, chunk, rng))) for _ in range(seeds // chunk)]
    samples = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    if not readout:
        for kernels in samples.values():
            kernels["nngp"] = kernels["raw"]
    return jax.tree.map(lambda a: (a.mean(0), a.std(0, ddof=1) / np.sqrt(len(a))), samples)


def path(case) -> pathlib.Path:
    return CACHE / f"{case.name}.json"


def limit(case) -> dict:
    """The cached simulation of a case, extrapolated: {"xy": {"ntk": (value, error, widest, error), …}, "xx": …}.

    `value` extrapolates linearly in 1/n, `widest` is the mean at the greater width.
    """
    stored = json.loads(path(case).read_text())
    small, large = stored["widths"]
    ratio = large / small

    def extrapolate(kernel):
        (a, ea), (b, eb) = ((np.array(kernel[k]["mean"]), np.array(kernel[k]["error"])) for k in ("small", "large"))
        value = (ratio * b - a) / (ratio - 1)
        error = np.hypot(ratio * eb, ea) / (ratio - 1)
        return value, error, b, eb

    return {pair: {k: extrapolate(v) for k, v in kernels.items()} for pair, kernels in stored["kernels"].items()}


def digits(a) -> list:
    return [[float(f"{v:.6g}") for v in row] for row in a]


def remember(case) -> None:
    quick = case.net.apply.__module__ == "strangers"
    widths, seeds = SETTINGS.get(case.name, QUICK if quick else (WIDTHS, SEEDS))
    runs = [simulate(case, n, s) for n, s in zip(widths, seeds, strict=True)]
    kernels = {
        pair: {
            kernel: {
                size: {"mean": digits(run[pair][kernel][0]), "error": digits(run[pair][kernel][1])}
                for size, run in zip(("small", "large"), runs, strict=True)
            }
            for kernel in ("ntk", "nngp", "raw")
        }
        for pair in ("xy", "xx")
    }
    CACHE.mkdir(exist_ok=True)
    path(case).write_text(json.dumps({"widths": widths, "seeds": seeds, "kernels": kernels}) + "\n")


def suspicions(case) -> list[str]:
    """What a healthy limit does not show: growth or decay with the width, large errors, a wrong readout."""
    stored = json.loads(path(case).read_text())["kernels"]
    found = []
    for pair, kernels in stored.items():
        for kernel in ("ntk", "nngp"):
            a, ea, b, eb = (np.array(kernels[kernel][s][w]) for s in ("small", "large") for w in ("mean", "error"))
            scale = np.abs(np.array(stored["xx"][kernel]["large"]["mean"])).max()
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                found.append(f"{pair} {kernel} not finite")
            elif (np.abs(a - b) > 0.15 * scale + 4 * np.hypot(ea, eb)).any():
                found.append(f"{pair} {kernel} moves with the width: {a.ravel()[0]:.4g} -> {b.ravel()[0]:.4g}")
            if kernel == "ntk" and (eb > 0.02 * scale).any():
                found.append(f"{pair} {kernel} noisy: error {eb.max():.3g} of {scale:.3g}")
        n, en, r, er = (np.array(kernels[k]["large"][w]) for k in ("nngp", "raw") for w in ("mean", "error"))
        if (np.abs(n - r) > 4 * np.hypot(en, er)).any():
            found.append(f"{pair} readout share {n.ravel()[0]:.4g} is not the raw NNGP {r.ravel()[0]:.4g}")
    return found


def main(arguments: list[str]) -> None:
    names = [a for a in arguments if not a.startswith("-")] or [c.name for c in networks.CASES]
    start = time.time()
    for name in names:
        case = networks.get(name)
        if "--force" in arguments or not path(case).exists():
            began = time.time()
            remember(case)
            took = f"{time.time() - began:5.1f} s"
        else:
            took = "cached "
        parts = []
        for pair, kernels in limit(case).items():
            for kernel in ("ntk", "nngp"):
                value, error, widest, _ = kernels[kernel]
                parts.append(f"{kernel}({pair}) {value.flat[-1]:8.4f} ± {error.flat[-1]:.4f} [{widest.flat[-1]:8.4f}]")
        print(f"{took} {name:36s} " + "  ".join(parts), *suspicions(case), sep="\n    ! ", flush=True)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1:])
