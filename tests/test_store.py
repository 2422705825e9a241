"""Gram matrices on disk: the same numbers as in memory, whatever happens on the way."""

import dataclasses
import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import anywidth as aw
from anywidth.grams import evaluate, filling, here, tiles
from anywidth.grams import store as store_module
from anywidth.grams.claims import Claims
from anywidth.zoo import mlp

zarr = pytest.importorskip("zarr")


def scalar(x, y):
    return jnp.tanh(jnp.sum(x) * jnp.sum(y)) + jnp.sum(x * jnp.cos(x)) * jnp.sum(y * jnp.cos(y))


def tokens(x, y):
    return {"a": jnp.tanh(x @ y.T), "b": x @ jnp.sin(y).T + jnp.sin(x) @ y.T}


def asymmetric(x, y):
    return jnp.sum(x) - 2 * jnp.sum(y)


rng = np.random.default_rng(7)
POINTS = rng.normal(size=(150, 3))
LISTED = [rng.normal(size=(3 + k % 3, 2)) for k in range(40)]
NET = mlp(3, 2)


@pytest.mark.parametrize(
    ("kernel", "X", "Y"),
    [
        (scalar, POINTS, None),
        (scalar, POINTS, POINTS[:70]),
        (scalar, POINTS.astype(np.float32), None),
        (asymmetric, POINTS, POINTS),
        (tokens, rng.normal(size=(70, 3, 2)), None),
        (tokens, rng.normal(size=(20, 3, 2)), rng.normal(size=(9, 4, 2))),
        (scalar, LISTED, None),
        (scalar, LISTED, LISTED[3:20]),
        (aw.ntk(NET), POINTS, None),
        (aw.kernels(NET), POINTS[:40], None),
        (lambda x, y: jnp.zeros(()), POINTS, None),
        (lambda x, y: jnp.int32(x.shape[0]), POINTS, None),
    ],
    ids=[
        "points",
        "rectangle",
        "float32",
        "full",
        "tokens",
        "lengths",
        "mixed",
        "mixed_rectangle",
        "ntk",
        "kernels",
        "zeros",
        "integers",
    ],
)
def test_as_in_memory(tmp_path, kernel, X, Y):
    path = tmp_path / "K.zarr"
    expected = aw.gram(kernel, X, Y)
    for found in (aw.gram(kernel, X, Y, store=path), aw.open_gram(path), aw.gram(kernel, X, Y, store=path)):
        assert jax.tree.structure(found, is_leaf=is_array) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found, is_leaf=is_array), jax.tree.leaves(expected), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(a[...], b, rtol=1e-6 if a.dtype == np.float32 else 1e-13)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["K.zarr"]


def is_array(x):
    return isinstance(x, zarr.Array)


def test_opens_as_a_zarr_array_of_version_3_with_checksums(tmp_path):
    aw.gram(scalar, POINTS, store=tmp_path / "K.zarr")
    K = zarr.open(tmp_path / "K.zarr", mode="r")
    assert K.metadata.zarr_format == 3
    assert K.nchunks_initialized == K.nchunks == 9
    assert [type(codec).__name__ for codec in K.metadata.codecs] == ["BytesCodec", "Crc32cCodec"]
    np.testing.assert_array_equal(K[...], K[...].T)


def chunks(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("c/*/*") if p.is_file()}


def test_nothing_is_computed_twice(tmp_path, monkeypatch):
    calls = count_tiles(monkeypatch)
    aw.gram(scalar, POINTS, store=tmp_path / "K.zarr")
    assert len(calls) == 6
    aw.gram(scalar, POINTS, store=tmp_path / "K.zarr")
    assert len(calls) == 6


def count_tiles(monkeypatch):
    calls = []
    launch = here.launch
    monkeypatch.setattr(
        here, "launch", lambda kernel, tile, *sides: (calls.append(tile), launch(kernel, tile, *sides))[1]
    )
    return calls


def truncated(chunk):
    chunk.write_bytes(chunk.read_bytes()[:100])


def flipped(chunk):
    raw = bytearray(chunk.read_bytes())
    raw[11] ^= 4
    chunk.write_bytes(raw)


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink, lambda chunk: chunk.write_bytes(b"")])
def test_a_damaged_tile_is_found_and_computed_again(tmp_path, monkeypatch, damage):
    path = tmp_path / "K.zarr"
    aw.gram(aw.ntk(NET), POINTS, store=path)
    whole = chunks(path)
    damage(path / "c" / "1" / "0")
    calls = count_tiles(monkeypatch)
    aw.gram(aw.ntk(NET), POINTS, store=path)
    assert [tile.index for tile in calls] == [(0, 1)]
    assert chunks(path) == whole


def test_a_pair_of_shapes_is_compiled_once(tmp_path):
    evaluate._compiled.cache_clear()
    aw.gram(scalar, LISTED, store=tmp_path / "K.zarr", memory="2 MB")
    assert zarr.open(tmp_path / "K.zarr").nchunks == 1
    assert evaluate._compiled.cache_info().misses == 6


OTHERS = {
    "other data": (lambda: (scalar, POINTS + 1e-9), r"the numbers in X"),
    "other order": (lambda: (scalar, POINTS[::-1]), r"the numbers in X, or their order"),
    "more data": (lambda: (scalar, np.concatenate([POINTS, POINTS])), r"examples of X: 150 in the store, 300 now"),
    "other dtype": (lambda: (scalar, POINTS.astype(np.float32)), r"the dtypes of X: float64 in the store, float32 now"),
    "other shape": (lambda: (scalar, POINTS[:, :2]), r"the shapes of X: \(3,\) in the store, \(2,\) now"),
    "two sets": (lambda: (scalar, POINTS, POINTS), r"Y: none in the store, given now"),
    "other function": (lambda: (asymmetric, POINTS), r"the kernel: scalar in the store, asymmetric now"),
    "other number": (lambda: (named(lambda x, y: 1.5 * scalar(x, y)), POINTS), r"another program was traced"),
}


def named(kernel):
    kernel.__name__ = "scalar"
    return kernel


@pytest.mark.parametrize("case", OTHERS)
def test_another_matrix_is_refused_and_says_what_differs(tmp_path, case):
    path = tmp_path / "K.zarr"
    aw.gram(scalar, POINTS, store=path)
    whole = chunks(path)
    make, words = OTHERS[case]
    with pytest.raises(aw.StoreError, match=rf"holds another Gram matrix(?s:.*){words}"):
        aw.gram(*make(), store=path)
    assert chunks(path) == whole


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (
            aw.ntk(mlp(3, 2, varw=1.5)),
            r"the parameter \['W'\]\[0\]: Normal\(\(n, 3\), var=2\) in the store, .*var=1.5\) now",
        ),
        (aw.ntk(mlp(3, 3)), r"the parameter \['W'\]\[2\]: absent in the store, Normal\(\(n, n\), var=2\) now"),
        (aw.ntk(mlp(3, 2, jnp.abs)), "the network's code"),
        (aw.nngp(NET), "the kernel: ntk in the store, nngp now"),
    ],
)
def test_another_network_is_refused(tmp_path, kernel, words):
    aw.gram(aw.ntk(mlp(3, 2)), POINTS, store=tmp_path / "K.zarr")
    aw.gram(aw.ntk(mlp(3, 2)), POINTS, store=tmp_path / "K.zarr")  # the same network, other objects
    with pytest.raises(aw.StoreError, match=words):
        aw.gram(kernel, POINTS, store=tmp_path / "K.zarr")


def test_another_version_or_setting_is_refused(tmp_path, monkeypatch):
    X = POINTS.astype(np.float32)
    aw.gram(scalar, X, store=tmp_path / "K.zarr")
    with jax.enable_x64(False), pytest.raises(aw.StoreError, match="jax_enable_x64: True in the store, False now"):
        aw.gram(scalar, X, store=tmp_path / "K.zarr")
    monkeypatch.setattr(aw, "__version__", "9.9")
    with pytest.raises(aw.StoreError, match=r"the version of anywidth: .* in the store, 9\.9 now"):
        aw.gram(scalar, X, store=tmp_path / "K.zarr")


def test_what_is_not_a_store_is_refused_and_kept(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("precious")
    zarr.create_array(tmp_path / "other.zarr", shape=(150, 150), dtype="float64")
    for name in ("file", "folder", "other.zarr"):
        with pytest.raises(aw.StoreError, match="not a store of Gram matrices"):
            aw.gram(scalar, POINTS, store=tmp_path / name)
        with pytest.raises(aw.StoreError):
            aw.open_gram(tmp_path / name)
    assert (tmp_path / "folder" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "precious"
    with pytest.raises(aw.StoreError, match="no store at"):
        aw.open_gram(tmp_path / "nothing.zarr")
    with pytest.raises(aw.StoreError, match="local or mounted file system"):
        aw.gram(scalar, POINTS, store="s3://bucket/K.zarr")
    (tmp_path / "empty").mkdir()
    assert aw.gram(scalar, POINTS, store=tmp_path / "empty").shape == (150, 150)


def test_outputs_of_different_shapes_are_refused(tmp_path):
    with pytest.raises(aw.StoreError, match="no one array to store"):
        aw.gram(tokens, LISTED, store=tmp_path / "K.zarr")
    assert not any(tmp_path.iterdir())


def test_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "K.zarr"
    fsync, left = os.fsync, [4]

    def full(file):
        left[0] -= stat.S_ISREG(os.fstat(file).st_mode) and os.fstat(file).st_size > 10_000
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"the disk is full.* the same call goes on") as caught:
        aw.gram(scalar, POINTS, store=path)
    assert caught.value.errno == errno.ENOSPC
    assert not list(path.rglob("*.part"))
    with pytest.raises(aw.StoreError, match=r"not finished: 4 of its 9 chunks"):
        aw.open_gram(path)
    monkeypatch.setattr(os, "fsync", fsync)
    np.testing.assert_array_equal(aw.gram(scalar, POINTS, store=path)[...], aw.gram(scalar, POINTS))


def test_no_room_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"the store takes 176 KiB, and the disk has 1e\+03 bytes free"):
        aw.gram(scalar, POINTS, store=tmp_path / "a" / "K.zarr")
    assert not any(tmp_path.iterdir())


def test_read_only(tmp_path, monkeypatch):
    """A finished store can be read where nothing can be written; an unfinished one says that it cannot go on."""
    path = tmp_path / "K.zarr"
    expected = aw.gram(scalar, POINTS, store=path)[...]

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(filling, "Claims", denied)
    np.testing.assert_array_equal(aw.gram(scalar, POINTS, store=path)[...], expected)
    (path / "c" / "0" / "1").unlink()
    with pytest.raises(PermissionError, match="not finished, and it cannot be written to"):
        aw.gram(scalar, POINTS, store=path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"the store cannot be created: .*K\.zarr"):
        aw.gram(scalar, POINTS, store=tmp_path / "K.zarr")
    tmp_path.chmod(0o700)


def test_nowhere_to_create_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the store cannot be created: .*K\.zarr"):
        aw.gram(scalar, POINTS, store=tmp_path / "file" / "K.zarr")


def test_examples_of_a_deep_network_with_duplicates_factorise_in_float32(tmp_path):
    X = np.random.default_rng(2).normal(size=(300, 8)).astype(np.float32)
    K = aw.gram(aw.nngp(mlp(8, 10)), np.concatenate([X, X[:100]]), store=tmp_path / "K.zarr")[...]
    assert K.dtype == np.float32
    np.testing.assert_allclose(K[:100], K[300:], rtol=2e-6)
    values = np.linalg.eigvalsh(K.astype(np.float64))
    assert values[0] > -8 * np.finfo(np.float32).eps * values[-1]
    assert np.isfinite(np.linalg.cholesky(K + 1e-4 * np.eye(400, dtype=np.float32))).all()


def test_memory_budget(tmp_path):
    with pytest.raises(MemoryError, match="budget is 100 bytes"):
        aw.gram(scalar, POINTS, store=tmp_path / "K.zarr", memory=100)
    assert not any(tmp_path.iterdir())
    K = aw.gram(scalar, POINTS, store=tmp_path / "K.zarr", memory="40 KB")
    assert K.chunks[0] < 20
    np.testing.assert_allclose(K[...], aw.gram(scalar, POINTS), rtol=1e-13)
    with pytest.raises(MemoryError, match="the tiles of this store"):
        aw.gram(scalar, POINTS, store=tmp_path / "K.zarr", memory=1000)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    path = tmp_path / "K.zarr"
    launch, left = here.launch, [3]

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return launch(*args)

    monkeypatch.setattr(here, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"2 of 6 tiles are in .*K\.zarr, and the same call goes on"):
        aw.gram(scalar, POINTS, store=path)
    monkeypatch.setattr(here, "launch", launch)
    np.testing.assert_array_equal(aw.gram(scalar, POINTS, store=path)[...], aw.gram(scalar, POINTS))


# --- several processes ------------------------------------------------------------------------------------

JOB = textwrap.dedent(
    """
    import sys, time
    import jax, jax.numpy as jnp, numpy as np
    import anywidth as aw
    from anywidth.grams import here

    jax.config.update("jax_enable_x64", True)
    launch, computed = here.launch, []

    def slow(kernel, tile, *sides):
        time.sleep(float(sys.argv[2]))
        computed.append(tile.index)
        return launch(kernel, tile, *sides)

    here.launch = slow

    def kernel(x, y):
        return jnp.tanh(x @ y) + jnp.sum(jnp.cos(x)) * jnp.sum(jnp.cos(y))

    X = np.random.default_rng(5).normal(size=(500, 3))
    print("ready", flush=True)
    aw.gram(kernel, X, store=sys.argv[1], progress=False)
    print(len(computed), flush=True)
    """
)


def start(path, pause=0.0):
    command = [sys.executable, "-W", "error", "-c", JOB, str(path), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)


def finish(process):
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return int(out.split()[-1])


def wait_for_chunks(path, count, process):
    deadline = time.monotonic() + 600
    while len(chunks(path)) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


def test_killed_at_any_instant(tmp_path):
    """kill -9 twice, at growing progress; then resumed: equal bit for bit, and only tiles in flight are repeated."""
    whole, killed = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    reference = start(whole)
    total = 0
    for target in (3, 20):
        process = start(killed, 0.02)
        wait_for_chunks(killed, target, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    present = len(chunks(killed))
    total = finish(start(killed))
    assert finish(reference) == 36
    assert total <= 36 - (present - 8) / 2 + 2  # a tile off the diagonal is two chunks, and may be half there
    assert chunks(killed) == chunks(whole)
    assert not list(killed.rglob("*.part"))


def test_two_processes_share_one_store(tmp_path):
    both, whole = tmp_path / "both.zarr", tmp_path / "whole.zarr"
    processes = [start(both, 0.05) for _ in range(2)]
    counts = [finish(p) for p in processes]
    assert sum(counts) == 36  # no tile twice
    assert finish(start(whole)) == 36
    assert chunks(both) == chunks(whole)


def test_another_process_creates_it_first_with_other_tiles(tmp_path, monkeypatch):
    create = tiles.create

    def slower(path, header):
        create(path, dataclasses.replace(header, tile=(40, 40)))
        create(path, header)

    monkeypatch.setattr(tiles, "create", slower)
    K = aw.gram(scalar, POINTS, store=tmp_path / "K.zarr")
    assert K.chunks == (40, 40)
    np.testing.assert_allclose(K[...], aw.gram(scalar, POINTS), rtol=1e-13)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["K.zarr"]


def test_claims_exclude_other_processes_and_die_with_them(tmp_path):
    path = tmp_path / "claims"
    path.touch()
    code = (
        f"import sys; sys.path[:0] = {sys.path}; from pathlib import Path; from anywidth.grams.claims import Claims\n"
    )
    code += f"c = Claims(Path({str(path)!r})); c.take(3); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    claims = Claims(path)
    with pytest.raises(BlockingIOError, match="already"):
        Claims(path)
    assert not claims.take(3)
    assert claims.take(4)
    other.kill()
    other.communicate()
    assert claims.take(3)
    claims.close()
    Claims(path).close()
