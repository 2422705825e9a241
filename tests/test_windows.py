"""Everything that moves, sums or reads positions, against the same linear map written as a dense matrix.

`A = d op(h) / d h` is read off by JAX itself; a network that applies `op` to its hidden layer and one that multiplies
it by A have the same kernels. Convolutions are held against sums of shifted products.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import anywidth as aw

rng = np.random.default_rng(0)
LINE = rng.normal(size=(2, 6, 3))
IMAGE = rng.normal(size=(2, 4, 5, 3))


def network(op):
    """One output for each position that `op` leaves of a hidden layer (.., n)."""

    def init(n):
        return {"u": aw.Normal((3, n)), "w": aw.Normal((n, n)), "v": aw.Normal((n,))}

    def apply(p, example):
        x, *more = example if isinstance(example, tuple) else (example,)
        h = jax.nn.relu(x @ p["u"] / np.sqrt(3))
        z = op(h, *more)
        return jax.nn.relu(z @ p["w"] / np.sqrt(z.shape[-1])) @ p["v"] / np.sqrt(z.shape[-1])

    return aw.Network(init, apply)


ROWS = 80
"""The most numbers that any map here gives: matrices are filled up with zero rows, so one program serves them all."""


def by_matrix(p, example):
    """The same network for the map as a matrix: an example is (x, A)."""
    x, A = example
    return network(lambda h: jnp.tensordot(A, h, A.ndim - 1)).apply(p, x)


BY_MATRIX = aw.kernels(aw.Network(network(None).init, by_matrix))


def window(h, size, strides, padding, scale=1.0):
    return lax.reduce_window(h, 0.0, lax.add, (*size, 1), (*strides, 1), padding) * scale


def edges(h, senders, receivers):
    return jax.ops.segment_sum(h[senders], receivers, len(h))


def cases(table, *more):
    """The names of a table; those that a shorter one of the same rule stands for are `long`."""
    return [pytest.param(name, marks=pytest.mark.long) if name in more else name for name in table]


N1, N2 = np.array([0, 3, 3, 5, 1]), np.array([1, 1, 2, 0, 5])
LINES = {
    "pad": lambda h: jnp.pad(h, ((2, 1), (0, 0))),
    "pad_negative_and_between": lambda h: lax.pad(h, 0.0, ((-1, 2, 1), (0, 0, 0))),
    "pad_wrap": lambda h: jnp.pad(h, ((2, 1), (0, 0)), mode="wrap"),
    "pad_reflect": lambda h: jnp.pad(h, ((2, 1), (0, 0)), mode="reflect"),
    "roll": lambda h: jnp.roll(h, 2, 0),
    "flip": lambda h: jnp.flip(h, 0),
    "strided": lambda h: h[1::2],
    "picked": lambda h: h[jnp.array([4, 0, 0, 2])],
    "picked_pairs": lambda h: h[np.array([[0, 1], [5, 5]])].sum(1),
    "repeat": lambda h: jnp.repeat(h, 2, 0),
    "tile": lambda h: jnp.tile(h, (2, 1)),
    "cumsum": lambda h: jnp.cumsum(h, 0),
    "differences": lambda h: h[1:] - h[:-1],
    "sum_pool": lambda h: window(h, (3,), (1,), "SAME"),
    "average_pool_strided": lambda h: window(h, (2,), (2,), "VALID", 0.5),
    "sum_pool_dilated": lambda h: lax.reduce_window(h, 0.0, lax.add, (2, 1), (1, 1), ((1, 0), (0, 0)), None, (3, 1)),
    "resize_linear": lambda h: jax.image.resize(h, (9, h.shape[1]), "linear"),
    "resize_nearest": lambda h: jax.image.resize(h, (4, h.shape[1]), "nearest"),
    "written": lambda h: h.at[np.array([1, 4])].set(2 * h[:2]),
    "written_slice": lambda h: h.at[1:3].set(h[3:5]),
    "added": lambda h: h.at[np.array([1, 1, 4])].add(h[:3]),
    "added_apart": lambda h: jnp.zeros_like(h).at[np.array([5, 1, 4])].add(h[:3]),
    "updated": lambda h: lax.dynamic_update_slice(h, 3 * h[:2], (3, 0)),
    "stacked_shifts": lambda h: jnp.stack([h[:4], h[1:5], h[2:]], 1).sum(1),
}
IMAGES = {
    "pad": lambda h: jnp.pad(h, ((1, 0), (1, 2), (0, 0))),
    "pad_wrap": lambda h: jnp.pad(h, ((1, 1), (1, 2), (0, 0)), mode="wrap"),
    "roll": lambda h: jnp.roll(h, (1, 2), (0, 1)),
    "transposed": lambda h: jnp.transpose(h, (1, 0, 2)),
    "block": lambda h: h[1:3, ::2],
    "diagonal": lambda h: h[np.arange(4), np.arange(4)],
    "average_pool": lambda h: window(h, (2, 3), (2, 1), "SAME", 1 / 6),
    "window_of_a_window": lambda h: window(window(h, (2, 2), (1, 1), "VALID"), (2, 2), (2, 2), "SAME"),
    "resize_linear": lambda h: jax.image.resize(h, (8, 7, h.shape[2]), "linear"),
    "resize_nearest": lambda h: jax.image.resize(h, (8, 10, h.shape[2]), "nearest"),
    "updated": lambda h: lax.dynamic_update_slice(h, 3 * h[:2, :3], (1, 2, 0)),
    "space_to_depth_sum": lambda h: h[:, :4].reshape(2, 2, 2, 2, -1).sum((1, 3)),
}
TRACED = {
    "taken": (lambda h, i, j: h[i], N1, N2),
    "taken_with_zeros": (lambda h, i, j: jnp.take(h, i + j, 0, mode="fill", fill_value=0.0), N1, N2),
    "taken_along": (lambda h, i, j: jnp.take_along_axis(h, i[:, None], 0), N1, N2),
    "sliced": (lambda h, i, j: lax.dynamic_slice_in_dim(h, i[0] + 2, 3), N1, N2),
    "updated": (lambda h, i, j: lax.dynamic_update_slice_in_dim(h, 2 * h[:2], i[1], 0), N1, N2),
    "written": (lambda h, i, j: h.at[i[3]].set(h[0] + h[1]), N1, N2),
    "edges": (edges, N1, N2),
    "weighted_edges": (lambda h, i, j: jnp.zeros_like(h).at[j].add(h[i] * (1.0 + i[:, None])), N1, N2),
}


def matrix(op, shape, more):
    """A = d op(h) / d h, its rows filled up with zeros to ROWS, and the shape of what `op` gives."""
    A = jax.jit(jax.jacobian(lambda z: op(z[..., None], *more)[..., 0]))(jnp.zeros(shape))
    rows = A.reshape(-1, *shape)
    return np.pad(rows, ((0, ROWS - len(rows)), *((0, 0) for _ in shape))), A.shape[: A.ndim - len(shape)]


def compare(op, X, more=()):
    examples = [(X[0], *more), (X[1], *(m[::-1] for m in more))]
    found = aw.kernels(network(op))(*(e if more else e[0] for e in examples))
    (A, out), (B, _) = (matrix(op, x.shape[:-1], m) for x, *m in examples)
    wanted = BY_MATRIX((X[0], A), (X[1], B))
    rows = int(np.prod(out))
    for kind in ("nngp", "ntk"):
        block = np.asarray(getattr(wanted, kind))[:rows, :rows].reshape(*out, *out)
        np.testing.assert_allclose(getattr(found, kind), block, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    cases(
        LINES,
        "flip",
        "repeat",
        "differences",
        "sum_pool_dilated",
        "written_slice",
        "added_apart",
        "pad_wrap",
        "pad_reflect",
        "picked_pairs",
        "tile",
        "stacked_shifts",
        "resize_nearest",
    ),
)
def test_on_a_line(name):
    compare(LINES[name], LINE)


@pytest.mark.parametrize(
    "name",
    cases(
        IMAGES,
        "roll",
        "resize_nearest",
        "space_to_depth_sum",
        "pad_wrap",
        "resize_linear",
        "window_of_a_window",
        "updated",
        "pad",
    ),
)
def test_on_an_image(name):
    compare(IMAGES[name], IMAGE)


@pytest.mark.parametrize("name", cases(TRACED, "taken_with_zeros", "sliced", "weighted_edges"))
def test_with_indices_of_the_example(name):
    op, *more = TRACED[name]
    compare(op, LINE, tuple(more))


# --- convolutions ------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "valid": {"padding": "VALID"},
    "explicit": {"padding": [(2, 0)]},
    "strided": {"padding": "SAME", "window_strides": (2,)},
    "dilated": {"padding": "SAME", "rhs_dilation": (2,)},
    "transposed": {"padding": [(1, 2)], "lhs_dilation": (2,)},
    "transposed_dilated": {"padding": [(3, 2)], "lhs_dilation": (3,), "rhs_dilation": (2,), "window_strides": (2,)},
    "negative_padding": {"padding": [(-1, 1)]},
    "grouped": {"padding": "SAME", "feature_group_count": 2},
    "channels_first": {"padding": "SAME", "dimension_numbers": ("NCH", "OIH", "NCH")},
    "odd_order": {"padding": "SAME", "dimension_numbers": ("HNC", "IHO", "CHN")},
}  # fmt: skip


def by_hand(h, w, padding, window_strides=(1,), lhs_dilation=(1,), rhs_dilation=(1,), feature_group_count=1, **_):
    """The same convolution as a matrix over positions for every offset."""
    size = len(h)

    def plain(z, o):
        kernel = jnp.zeros((3, 1, 1)).at[o].set(1.0)
        return lax.conv_general_dilated(
            z[None, :, None], kernel, window_strides, padding, lhs_dilation, rhs_dilation, ("NHC", "HIO", "NHC")
        )[0, :, 0]

    total = 0
    for o in range(3):
        A = jax.jacobian(lambda z, o=o: plain(z, o))(np.zeros(size))
        moved = jnp.tensordot(A, h, 1)
        k = feature_group_count
        if k == 1:
            total = total + moved @ w[o]
        else:
            blocks = moved.reshape(len(A), k, -1), w[o].reshape(w.shape[1], k, -1)
            total = total + jnp.einsum("pgc,cgn->pgn", *blocks).reshape(len(A), -1)
    return total


def convolved(h, w, padding, window_strides=(1,), dimension_numbers=("NHC", "HIO", "NHC"), **more):
    places = [dict(zip(spec, range(3), strict=True)) for spec in dimension_numbers]
    x = jnp.transpose(h[None], [{"N": 0, "H": 1, "C": 2}[c] for c in dimension_numbers[0]])
    k = jnp.transpose(w, [{"H": 0, "I": 1, "O": 2}[c] for c in dimension_numbers[1]])
    y = lax.conv_general_dilated(x, k, window_strides, padding, dimension_numbers=dimension_numbers, **more)
    return jnp.transpose(y, [places[2][c] for c in "NHC"])[0]


def conv_network(f, settings):
    groups = settings.get("feature_group_count", 1)

    def init(n):
        block = (3, n // groups, n)
        return {"u": aw.Normal((3, n)), "a": aw.Normal(block), "b": aw.Normal(block), "v": aw.Normal((n,))}

    def apply(p, x):
        h = jax.nn.relu(x @ p["u"])
        for w in (p["a"], p["b"]):
            h = jax.nn.relu(f(h, w, **settings) / np.sqrt(w.shape[1]))
        return h @ p["v"] / np.sqrt(p["v"].size)

    return aw.Network(init, apply)


@pytest.mark.parametrize(
    "name", cases(CONVOLUTIONS, "channels_first", "explicit", "negative_padding", "transposed", "dilated", "odd_order")
)
def test_convolution(name):
    found, wanted = (aw.kernels(conv_network(f, CONVOLUTIONS[name])) for f in (convolved, by_hand))
    a, b = found(*LINE), wanted(*LINE)
    for kind in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(a, kind), getattr(b, kind), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", ["matrix", "inputs"])
def test_groups_of_the_batch_are_convolutions_of_their_own(kernel):
    """Each group of two of four parts of a sequence has half of the output channels."""
    numbers = ("NHC", "HIO", "NHC")

    def apply(convolve):
        def run(p, x):
            n = p["v"].size
            h = jnp.stack([x, x[::-1], 2 * x, x**2])
            h = h if kernel == "inputs" else jax.nn.relu(h @ p["u"]) / np.sqrt(n)
            z = jax.nn.relu(convolve(h, p["w"] if kernel == "matrix" else p["first"]))
            return z.mean((0, 1)) @ p["v"] / np.sqrt(n)

        return run

    def grouped(h, w):
        return lax.conv_general_dilated(h, w, (1,), "SAME", dimension_numbers=numbers, batch_group_count=2)

    def apart(h, w):
        parts = zip(jnp.split(h, 2), jnp.split(w, 2, -1), strict=True)
        return jnp.concatenate(
            [lax.conv_general_dilated(*p, (1,), "SAME", dimension_numbers=numbers) for p in parts], -1
        )

    def init(n):
        return {"u": aw.Normal((3, n)), "w": aw.Normal((3, n, n)), "first": aw.Normal((3, 3, n)), "v": aw.Normal((n,))}

    a, b = (aw.kernels(aw.Network(init, apply(f)))(*LINE) for f in (grouped, apart))
    for kind in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(a, kind), getattr(b, kind), rtol=1e-12)


def test_depthwise_convolution_has_the_moments_of_its_products():
    def init(n):
        return {"u": aw.Normal((3, n)), "d": aw.Normal((3, 1, n)), "w": aw.Normal((n, n)), "v": aw.Normal((n,))}

    def apply(mixed):
        def run(p, x):
            n = p["v"].size
            h = jax.nn.relu(x @ p["u"])
            z = mixed(h, p["d"])
            return jax.nn.relu(z @ p["w"] / np.sqrt(n)) @ p["v"] / np.sqrt(n)

        return run

    def depthwise(h, d):
        return lax.conv_general_dilated(
            h[None], d, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=h.shape[1]
        )[0]

    def products(h, d):
        return h[:-2] * d[0, 0] + h[1:-1] * d[1, 0] + h[2:] * d[2, 0]

    a, b = (aw.kernels(aw.Network(init, apply(f)))(*LINE) for f in (depthwise, products))
    for kind in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(a, kind), getattr(b, kind), rtol=1e-10)
    # E[d^2] = 1: the covariance is the sum of those of what is read
    plain_init = lambda n: {"u": aw.Normal((3, n)), "v": aw.Normal((n,))}  # noqa: E731
    h = aw.nngp(aw.Network(plain_init, lambda p, x: jax.nn.relu(x @ p["u"]) @ p["v"] / np.sqrt(p["v"].size)))
    plain = np.asarray(h(*LINE))
    summed = sum(plain[o : o + 4, o : o + 4] for o in range(3))
    z = aw.nngp(
        aw.Network(init, lambda p, x: depthwise(jax.nn.relu(x @ p["u"]), p["d"]) @ p["v"] / np.sqrt(p["v"].size))
    )
    np.testing.assert_allclose(z(*LINE), summed, rtol=1e-10)


def test_a_convolution_over_the_width_is_refused():
    net = aw.Network(
        lambda n: {"u": aw.Normal((3, n)), "v": aw.Normal((n,))},
        lambda p, x: jnp.convolve(jax.nn.relu(x @ p["u"]), np.ones(3), "same") @ p["v"] / np.sqrt(p["v"].size),
    )
    with pytest.raises((aw.UnsupportedError, aw.NoLimitError), match="test_windows"):
        aw.nngp(net)(LINE[0, 0], LINE[1, 0])


# --- groups: each way to convolve, and the same with shifts ---------------------------------------------------

CHANNELS_LAST = ("NHC", "HIO", "NHC")


def shifts(h):
    """(batch, positions, 3, channels): what a window of three reads."""
    padded = jnp.pad(h, ((0, 0), (1, 1), (0, 0)))
    return jnp.stack([padded[:, o : o + h.shape[1]] for o in range(3)], 2)


def convolve(h, w, **groups):
    return lax.conv_general_dilated(h, w, (1,), "SAME", dimension_numbers=CHANNELS_LAST, **groups)


def depthwise_by_shifts(h, w):
    n = h.shape[-1]
    out = jnp.einsum("btoc,ocm->btcm", shifts(h), w.reshape(3, n, -1))
    return out.reshape(*h.shape[:2], -1)


def by_batch_with_shifts(h, w):
    halves = zip(jnp.split(h, 2), jnp.split(w, 2, -1), strict=True)
    return jnp.concatenate([jnp.einsum("btoc,ocd->btd", shifts(a), b) for a, b in halves], -1) / np.sqrt(h.shape[-1])


GROUPS = {
    "depthwise_with_two_outputs": (
        lambda n: (3, 1, 2 * n),
        lambda h, w: convolve(h, w, feature_group_count=h.shape[-1]),
        depthwise_by_shifts,
    ),
    "groups_of_the_batch": (
        lambda n: (3, n, 2 * n),
        lambda h, w: convolve(h, w, batch_group_count=2) / np.sqrt(h.shape[-1]),
        by_batch_with_shifts,
    ),
    "patches": (
        lambda n: (3 * n, 2 * n),
        lambda h, w: lax.conv_general_dilated_patches(h, (3,), (1,), "SAME", dimension_numbers=CHANNELS_LAST) @ w,
        lambda h, w: jnp.einsum("btoc,cod->btd", shifts(h), w.reshape(-1, 3, w.shape[-1])),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name):
    shape, *ways = GROUPS[name]

    def network(convolution):
        def init(n):
            return {"u": aw.Normal((3, n)), "w": aw.Normal(shape(n)), "c": aw.Normal((2 * n, n)), "v": aw.Normal((n,))}

        def apply(p, x):
            n = len(p["v"])
            h = convolution(jax.nn.relu(x @ p["u"]), p["w"])
            h = jax.nn.relu(h / np.sqrt(h.shape[-1] if name == "patches" else 1) @ p["c"] / np.sqrt(n))
            return h.mean((0, 1)) @ p["v"] / np.sqrt(n)

        return aw.Network(init, apply)

    x, y = rng.normal(size=(4, 3, 3)), rng.normal(size=(4, 4, 3))
    found, wanted = (aw.kernels(network(way))(x, y) for way in ways)
    for kind in ("nngp", "ntk"):
        np.testing.assert_allclose(getattr(found, kind), getattr(wanted, kind), rtol=1e-10)
