"""Numbers of `gram`: python benchmarks/gram.py {overhead,store,kill,cluster} [--n N].

overhead   gram next to one jitted vmap(vmap(kernel)) of the same pairs
store      N points in R^64, depth-3 relu, float32, in memory and in a store with a budget of 1 GiB: rates, peak memory
kill       the same into a store, killed with SIGKILL twenty times at random moments; compared bit by bit
cluster    a dask LocalCluster of two workers, one of which is killed; compared bit by bit
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import anywidth as aw
from anywidth import zoo

DEPTH, FEATURES = 3, 64


def data(n):
    return np.random.default_rng(0).normal(size=(n, FEATURES)).astype(np.float32)


def network(kind):
    return getattr(aw, kind)(zoo.mlp(FEATURES, DEPTH))


def seconds(call, clock):
    start = clock()
    call()
    return clock() - start


def overhead(args):
    """Turn by turn in one process, so that what else the machine does falls on both.

    The tile that gram chooses for this network in float32 is 1024 x 1024, so that is where the two compute the same;
    a smaller matrix shows what a call of gram costs, a larger one what tiles gain.
    """
    for kind in ("ntk", "kernels"):
        kernel = network(kind)
        plain = jax.jit(jax.vmap(jax.vmap(getattr(kernel, "values", kernel), (None, 0)), (0, None)))
        for n in (256, 512, 1024, 2048):
            X, Y = data(2 * n)[:n], data(2 * n)[n:]

            def whole(plain=plain, X=X, Y=Y):
                jax.block_until_ready(plain(X, Y))

            def gram(kernel=kernel, X=X, Y=Y):
                jax.block_until_ready(jax.tree.leaves(aw.gram(kernel, X, Y, progress=False)))

            whole(), gram()
            for clock in (time.process_time, time.perf_counter):
                ratios, least = [], [float("inf")] * 2
                for _ in range(max(9, 60 * 256 // n)):
                    taken = seconds(gram, clock), seconds(whole, clock)
                    ratios.append(taken[0] / taken[1])
                    least = [min(pair) for pair in zip(least, taken, strict=True)]
                print(
                    f"{kind:8s} {n:5d} x {n:<5d} gram / jit(vmap(vmap)), {clock.__name__}: median "
                    f"{statistics.median(ratios):.3f}, least against least {least[0] / least[1]:.3f}, "
                    f"a call {1e3 * (least[0] - least[1]):+.2f} ms",
                    flush=True,
                )


def child(args):
    """One gram in a process of its own, which prints its rate and its peak memory."""
    X = data(args.n)
    aw.gram(network(args.kind), X[:2048], progress=False)  # compile something; the tiles compile below
    before = peak()
    start, cpu = time.perf_counter(), time.process_time()
    if args.path:
        aw.gram(network(args.kind), X, store=args.path, memory="1 GiB")
    else:
        aw.gram(network(args.kind), X, progress=False)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak(), "before": before, "rate": args.n**2 / wall}))


def peak():
    """Bytes that this process had in memory at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def spawn(n, kind, path):
    command = [sys.executable, __file__, "child", "--n", str(n), "--kind", kind]
    return subprocess.Popen([*command, "--path", str(path)] if path else command, stdout=subprocess.PIPE, text=True)


def finished(n, kind, path=None):
    process = spawn(n, kind, path)
    out = process.communicate()[0]
    assert process.returncode == 0, process.returncode
    return json.loads(out.splitlines()[-1])


def store(args):
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for turn in range(args.turns):
            path = Path(scratch) / f"{turn}.zarr"
            results = {"memory": finished(args.n, args.kind), "store": finished(args.n, args.kind, path)}
            for name, r in results.items():
                rate, most = r["rate"] / 1e6, r["peak"] / 2**30
                print(f"{name:7s} {r['wall']:6.1f} s, {r['cpu']:6.1f} s of CPU, {rate:6.1f} M/s, peak {most:.2f} GiB")
            walls = results["memory"]["wall"] / results["store"]["wall"]
            cpus = results["memory"]["cpu"] / results["store"]["cpu"]
            print(f"rate of the store / rate in memory: {walls:.2f} by the clock, {cpus:.2f} by CPU time", flush=True)
            shutil.rmtree(path)


def kill(args):
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        whole, killed = Path(scratch) / "whole.zarr", Path(scratch) / "killed.zarr"
        finished(args.n, args.kind, whole)
        total = chunks(whole)
        draw = random.Random(args.seed)
        # Moments that are random in the work done: the time a process takes to start is not counted.
        for k, moment in enumerate(sorted(draw.uniform(0, 0.95) for _ in range(args.kills))):
            process = spawn(args.n, args.kind, killed)
            while process.poll() is None and chunks(killed) < moment * total:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            parts = len(list(killed.rglob("*.part")))
            print(f"killed {k + 1} times: {chunks(killed)} of {total} chunks, {parts} half written", flush=True)
        finished(args.n, args.kind, killed)
        same(whole, killed)


def chunks(path):
    return sum(name.isdigit() for _, _, names in os.walk(path) for name in names)


def same(one, other):
    chunks = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file() and p.name != ".claims")
    others = sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file() and p.name != ".claims")
    assert chunks == others, set(chunks) ^ set(others)
    different = [str(p) for p in chunks if (one / p).read_bytes() != (other / p).read_bytes()]
    assert not different, different
    print(f"all {len(chunks)} files are the same bit for bit")


def cluster(args):
    from distributed import Client, LocalCluster

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        whole, other = Path(scratch) / "whole.zarr", Path(scratch) / "cluster.zarr"
        X, kernel = data(args.n), network(args.kind)
        took = seconds(lambda: aw.gram(kernel, X, store=whole), time.perf_counter)
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as local, Client(local) as client:
            import threading

            victim = next(iter(client.run(os.getpid).values()))
            threading.Timer(took / 2, os.kill, (victim, signal.SIGKILL)).start()
            took = seconds(lambda: aw.gram(kernel, X, store=other, client=client), time.perf_counter), took
            assert victim not in client.run(os.getpid).values()
        print(f"here {took[1]:.1f} s, on the cluster {took[0]:.1f} s with a worker killed")
        same(whole, other)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "store", "kill", "cluster", "child"])
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--kind", default="ntk", choices=["nngp", "ntk", "kernels"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path")
    parser.add_argument("--scratch", help="a directory on the disk to measure; by default the temporary directory")
    arguments = parser.parse_args()
    globals()[arguments.what](arguments)
