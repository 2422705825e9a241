"""gram, fit, predict and info, as a user runs them."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import anywidth as aw
from anywidth import cli, zoo

pytest.importorskip("typer")
pytest.importorskip("pandas")
import pandas
from typer.testing import CliRunner


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line in a directory of its own, that holds some data and a module of networks."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(2)
    frame = pandas.DataFrame(rng.normal(size=(40, 3)), columns=["a", "b", "c"])
    frame["y"] = np.tanh(frame.a) + 0.2 * frame.b
    frame["kind"] = np.where(frame.a + frame.c > 0, "high", "low")
    frame.iloc[:30].to_csv("train.csv", index=False)
    frame.iloc[30:].to_csv("test.csv", index=False)
    frame.iloc[:30].to_parquet("train.parquet")
    frame.iloc[30:, :3].to_parquet("new.parquet")
    frame.assign(a=frame.a.where(frame.index != 4)).to_csv("holes.csv", index=False)
    X, y = frame[["a", "b", "c"]].to_numpy(), frame.y.to_numpy()
    np.save("X.npy", X.astype(np.float32))
    np.save("y.npy", y)
    np.savez("both.npz", X=X, y=y, labels=(y > 0).astype(int))
    frame.iloc[:0].to_csv("header.csv", index=False)
    frame.assign(y=frame.y.where(frame.index > 2)).to_csv("unknown.csv", index=False)
    frame.assign(y="x").to_csv("alike.csv", index=False)
    np.save("nan.npy", np.where(X > 2, np.nan, X))
    (tmp_path / "broken.csv").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("a,b\n1,2\n")
    (tmp_path / "aw_test_nets.py").write_text(
        "from anywidth import zoo\n\ndef make(d, depth=1):\n    return zoo.mlp(d, depth)\n\nfixed = make(3)\n"
        "number = 3\n\ndef fails(d):\n    return 1 / 0\n"
    )

    def invoke(*arguments):
        return CliRunner().invoke(cli.application(), [str(a) for a in arguments])

    return invoke


def test_regression_from_files_to_files(run):
    done = run("fit", "--network", "zoo:mlp", "--option", "varb=0.1", "--data", "train.csv", "--target", "y",
               "--drop", "kind", "--model", "m.npz")  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in ("regression of 'y': 30 examples of 3 features", "zoo:mlp varb=0.1", "the likeliest", "m.npz"):
        assert words in done.output
    done = run("predict", "--model", "m.npz", "--data", "test.csv", "--out", "p.csv")
    assert done.exit_code == 0, done.output
    found, truth = pandas.read_csv("p.csv"), pandas.read_csv("test.csv").y
    assert list(found.columns) == ["y", "std"]
    r2 = 1 - ((found.y - truth) ** 2).mean() / truth.var(ddof=0)
    assert r2 > 0.7
    assert f"R2: {r2:.4f}" in done.output
    done = run("predict", "--model", "m.npz", "--data", "new.parquet", "--out", "p.npz", "--no-spread")
    assert done.exit_code == 0, done.output
    assert "R2" not in done.output
    np.testing.assert_allclose(np.load("p.npz")["y"], found.y, rtol=1e-12)
    done = run("info", "m.npz")
    for words in ("regression of 'y'", "zoo:mlp varb=0.1", "30 of 3 features", "a, b, c"):
        assert words in done.output


def test_classification_of_a_column_of_text(run):
    arguments = ("--network", "aw_test_nets:make", "--data", "train.parquet", "--target", "kind", "--drop", "y")
    done = run("fit", *arguments, "--kernel", "nngp", "--noise", 0.1, "--model", "k.npz")
    assert done.exit_code == 0, done.output
    assert "classification of 'kind'" in done.output
    done = run("predict", "--model", "k.npz", "--data", "test.csv", "--out", "k.csv")
    assert done.exit_code == 0, done.output
    found, truth = pandas.read_csv("k.csv"), pandas.read_csv("test.csv").kind
    assert list(found.columns) == ["kind", "p(high)", "p(low)"]
    np.testing.assert_allclose(found["p(high)"] + found["p(low)"], 1)
    assert f"accuracy: {(found.kind == truth).mean():.4f}" in done.output


@pytest.mark.parametrize(("data", "target", "task"), [
    ("both.npz", "labels", "classification"), ("both.npz", "y", "regression"), ("X.npy", "y.npy", "regression"),
])  # fmt: skip
def test_arrays(run, data, target, task):
    done = run("fit", "--network", "aw_test_nets:fixed", "--data", data, "--target", target, "--model", "m.npz")
    assert done.exit_code == 0, done.output
    assert f"{task} of '{target}': 40 examples" in done.output
    done = run("predict", "--model", "m.npz", "--data", data, "--out", "p.npy", "--no-spread")
    assert done.exit_code == 0, done.output
    assert np.load("p.npy").shape == (40,)
    scored = "accuracy" in done.output or "R2" in done.output
    assert scored == (data == "both.npz")  # that y.npy is still there says nothing of the examples of another .npy
    done = run("predict", "--model", "m.npz", "--data", data, "--target", target, "--out", "p.npy")
    assert done.exit_code == 0, done.output
    assert ("accuracy: " if task == "classification" else "R2: ") in done.output
    done = run("predict", "--model", "m.npz", "--data", data, "--target", "nothing", "--out", "p.npy")
    assert done.exit_code == 1
    assert done.output.count("\n") == 1


@pytest.mark.parametrize("kernel", ["both", "nngp"])
def test_gram(run, kernel):
    pytest.importorskip("zarr")
    arguments = (
        "gram",
        "--network",
        "zoo:mlp",
        "--option",
        "depth=2",
        "--option",
        "nonlinearity=erf",
        "--data",
        "X.npy",
    )
    done = run(*arguments, "--kernel", kernel, "--store", "K.zarr")
    assert done.exit_code == 0, done.output
    assert "nngp: 40 x 40 float32" in done.output
    import jax

    K = aw.open_gram("K.zarr")
    K = K.nngp if kernel == "both" else K
    net = zoo.mlp(3, 2, jax.lax.erf)
    np.testing.assert_allclose(K[...], aw.gram(aw.nngp(net), np.load("X.npy")), rtol=1e-6)
    done = run("info", "K.zarr")
    for words in ("40 x 40 float32", "finished", "yes", "40 examples of shape (3,)", "var=2"):
        assert words in done.output
    refused = run(*arguments, "--kernel", kernel, "--option", "varw=3", "--store", "K.zarr")
    assert refused.exit_code == 1
    assert "another Gram matrix" in refused.output


def test_a_damaged_store_is_counted_and_mended(run):
    pytest.importorskip("zarr")
    arguments = ("gram", "--network", "zoo:mlp", "--data", "X.npy", "--kernel", "nngp", "--store", "K.zarr")
    assert run(*arguments).exit_code == 0
    assert re.search(r"damaged +nothing", run("info", "--check", "K.zarr").output)
    chunk = next(file for file in Path("K.zarr/c").rglob("*") if file.is_file())
    raw = bytearray(chunk.read_bytes())
    raw[5] ^= 1
    chunk.write_bytes(raw)
    assert "damaged" not in run("info", "K.zarr").output
    done = run("info", "--check", "K.zarr")
    assert done.exit_code == 0
    assert re.search(r"damaged +1 of \d+ chunks?: the same call of gram", done.output)
    assert run(*arguments).exit_code == 0
    assert re.search(r"damaged +nothing", run("info", "--check", "K.zarr").output)


def test_a_full_disk_takes_a_line(run, monkeypatch):
    pytest.importorskip("zarr")
    fsync = os.fsync

    def full(file):
        if stat.S_ISREG(os.fstat(file).st_mode) and os.fstat(file).st_size > 5000:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    arguments = ("gram", "--network", "zoo:mlp", "--data", "X.npy", "--kernel", "nngp", "--store", "K.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = run(*arguments)
    assert done.exit_code == 1
    assert re.match(r"anywidth: .*the disk is full.*K\.zarr", done.output)
    assert done.output.count("\n") == 1
    assert run(*arguments).exit_code == 0


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.slow
def test_ctrl_c_is_heard_within_a_tile(run):
    """Each tile takes minutes."""
    pytest.importorskip("zarr")
    np.save("many.npy", np.random.default_rng(0).normal(size=(4096, 3)))
    # a shell has what it starts in the background ignore SIGINT, and children inherit that
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heard}; from anywidth.cli import main; main()", "gram", "--network", "zoo:mlp"]
    options = ["--option", "nonlinearity=tanh", "--kernel", "nngp", "--data", "many.npy", "--store", "K.zarr"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            while not Path("K.zarr").exists():  # it is created when the tile is compiled
                assert process.poll() is None
                time.sleep(0.05)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "interrupted; what was computed is kept in K.zarr: run the same command again" in said


FIT = {"--network": "zoo:mlp", "--data": "train.csv", "--target": "y", "--drop": "kind", "--model": "m.npz"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--network": "mlp"}, "MODULE:NAME or zoo:NAME"),
        ({"--network": "zoo:mpl"}, "the zoo has no 'mpl'; it has .*mlp"),
        ({"--network": "nowhere.nets:a"}, "there is no module 'nowhere.nets'"),
        ({"--network": "aw_test_nets:mak"}, "has no 'mak'; is it 'make'"),
        ({"--network": "aw_test_nets:number"}, "neither a Network nor a function"),
        ({"--network": "aw_test_nets:fixed", "--option": "depth=2"}, "takes no options"),
        ({"--option": "width=2"}, "mlp has no option 'width'; it has depth"),
        ({"--option": "depth"}, "NAME=VALUE"),
        ({"--option": "nonlinearity=bump"}, "no function 'bump'"),
        ({"--data": "none.csv"}, "there is no file none.csv"),
        ({"--data": "broken.csv"}, "broken.csv cannot be read"),
        ({"--data": "notes.txt"}, "known kind"),
        ({"--data": "header.csv"}, "header.csv has no rows"),
        ({"--data": "unknown.csv"}, "'y' of unknown.csv lacks 3 values, the first in row 1"),
        ({"--data": "alike.csv"}, "'y' is 'x' for every example"),
        ({"--data": "holes.csv"}, r"'a' of holes.csv lacks a value, in row 5"),
        ({"--target": "price"}, "no column 'price'; it has a, b, c, y, kind"),
        ({"--drop": "d"}, "no column 'd'"),
        ({"--drop": "b"}, "'kind' of train.csv holds '.*', which is not a number: leave it out with --drop kind"),
        ({"--target": "kind", "--drop": "y", "--task": "regression"}, "use --task classification"),
        ({"--data": "both.npz"}, "no named columns"),
        ({"--input-shape": "2by2"}, "written like 8x8"),
        ({"--input-shape": "2x2"}, "3 features"),
        ({"--model": "m.pkl"}, ".npz"),
    ],
)
def test_what_is_wrong_takes_a_line(run, change, words):
    done = run("fit", *[x for pair in {**FIT, **change}.items() for x in pair])
    assert done.exit_code == 1
    assert re.search(words, done.output)
    assert done.output.startswith("anywidth: ")
    assert done.output.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "target", "words"),
    [
        ("nan.npy", "y.npy", r"nan.npy have \d+ entries that are NaN or infinite, the first at"),
        ("X.npy", "nan.npy", "the target 'nan.npy' is NaN or infinite"),
        ("X.npy", "none.npy", "no file none.npy"),
        ("X.npy", "notes.txt", "notes.txt is damaged, or not a .npy file"),
    ],
)
def test_what_is_wrong_with_arrays_takes_a_line(run, data, target, words):
    done = run("fit", "--network", "zoo:mlp", "--data", data, "--target", target, "--model", "m.npz")
    assert done.exit_code == 1
    assert re.search(words, done.output)
    assert done.output.count("\n") == 1


def test_a_network_that_fails_is_told_with_its_line(run):
    done = run("fit", *[x for pair in {**FIT, "--network": "aw_test_nets:fails"}.items() for x in pair])
    assert done.exit_code == 1
    assert re.match(
        r"anywidth: the network fails: ZeroDivisionError: division by zero\n  at .*nets.py:10 \(fails\)\n$", done.output
    )
    done = run("fit", *[x for pair in {**FIT, "--option": "depth=three"}.items() for x in pair])
    assert done.exit_code == 1
    assert re.match(r"anywidth: the network fails: TypeError: .*\n  at .*zoo.mlp.py:\d+ \(mlp\)\n$", done.output)


def test_an_error_of_this_package_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr("anywidth.cli.files.KINDS", None)
    done = run("fit", *[x for pair in FIT.items() for x in pair])
    assert isinstance(done.exception, TypeError)


def test_gram_of_some_columns_of_a_table(run):
    arguments = ("gram", "--network", "zoo:mlp", "--data", "train.csv", "--kernel", "nngp", "--store", "K.zarr")
    done = run(*arguments)
    assert done.exit_code == 1
    assert "leave it out with --drop kind" in done.output
    done = run(*arguments, "--drop", "kind", "--drop", "y")
    assert done.exit_code == 0, done.output
    X = pandas.read_csv("train.csv")[["a", "b", "c"]].to_numpy()
    np.testing.assert_allclose(aw.open_gram("K.zarr")[...], aw.gram(aw.nngp(zoo.mlp(3)), X), rtol=1e-5)


def test_help_and_version(run):
    assert run("--version").output == f"anywidth {aw.__version__}\n"
    text = run("--help").output
    assert "anywidth gram --network mypkg.nets:rnn --data X.npy --store K.zarr" in text
    assert "..." not in text.split("Commands:")[1]


def test_what_is_not_a_model_or_store(run):
    for arguments, words in (
        (("predict", "--model", "both.npz", "--data", "test.csv", "--out", "p.csv"), "not a model"),
        (("predict", "--model", "gone.npz", "--data", "test.csv", "--out", "p.csv"), "no model gone.npz"),
        (("predict", "--model", "gone.npz", "--data", "test.csv", "--out", "p.xls"), "known kind"),
        (("info", "gone.zarr"), "nothing at gone.zarr"),
        (("info", "both.npz"), "not a model"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1
        assert done.output.startswith("anywidth: ")
        assert words in done.output
    for option, value in (("--kernel", "rbf"), ("--task", "ranking"), ("--noise", "-1")):
        assert run("fit", *[x for pair in {**FIT, option: value}.items() for x in pair]).exit_code == 2


def test_help_reads_like_a_manual(run):
    for command in ("gram", "fit", "predict", "info"):
        text = run(command, "--help").output
        assert "For example:" in text
        assert f"anywidth {command} " in text
