"""The command line and Figure 1, with a theory that is not the engine's: its own tests are elsewhere."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from anywidth import cli, figure1, figure3

pytest.importorskip("typer")
from typer.testing import CliRunner


@pytest.fixture
def run(monkeypatch):
    """Runs the command line, with a limit that costs nothing and means nothing."""

    def limit(net, X, kernel):
        return np.eye(2 if len(X[0]) == 5 else 12), ()

    monkeypatch.setattr(figure1, "limit", limit)
    return lambda *arguments: CliRunner().invoke(cli.application(), [str(a) for a in arguments])


@pytest.fixture
def one_network(monkeypatch):
    """Two of the three networks less to compile."""
    every = figure1.settings
    monkeypatch.setattr(figure1, "settings", lambda images: every(images)[:1])


def cells(out):
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


def test_figure1_draws_and_says_where(run, tmp_path):
    result = run("figure1", "--max-width", 64, "--seeds", 3, "--out", tmp_path / "a")
    assert result.exit_code == 0, result.output
    for name in ("figure1.png", "figure1.csv"):
        assert str(tmp_path / "a" / name) in result.output
        assert (tmp_path / "a" / name).stat().st_size > 100
    rows = list(csv.DictReader((tmp_path / "a" / "figure1.csv").read_text().splitlines()))
    assert [(row["network"], row["width"], row["seeds"]) for row in rows] == [
        (name, width, "3") for name in ("rnn", "transformer", "batchnorm") for width in ("64",)
    ]
    assert len(cells(tmp_path / "a")) == 3 * 3


@pytest.mark.usefixtures("one_network")
def test_figure1_goes_on_where_it_was_cut_short(run, tmp_path):
    out = tmp_path / "b"
    assert run("figure1", "--max-width", 64, "--seeds", 2, "--out", out).exit_code == 0
    whole = (out / "cells.jsonl").read_text()
    (out / "cells.jsonl").write_text(whole[:-30])  # killed while writing
    assert run("figure1", "--max-width", 64, "--seeds", 3, "--out", out).exit_code == 0
    kept = [line for line in (out / "cells.jsonl").read_text().splitlines() if line.endswith("}")]
    found = {(cell["network"], cell["seed"]): cell["deviation"] for cell in map(json.loads, kept)}
    assert len(kept) == len(found) == 3
    before = {(cell["network"], cell["seed"]): cell["deviation"] for cell in map(json.loads, whole.splitlines())}
    for cell, value in before.items():
        assert found[cell] == pytest.approx(value, rel=1e-4)


@pytest.mark.usefixtures("one_network")
def test_figure1_does_not_compute_a_finished_cell(run, tmp_path, monkeypatch):
    out = tmp_path / "c"
    assert run("figure1", "--max-width", 64, "--seeds", 2, "--out", out).exit_code == 0
    monkeypatch.setattr(figure1, "simulations", None)
    assert run("figure1", "--max-width", 64, "--seeds", 2, "--out", out).exit_code == 0
    assert run("figure1", "--max-width", 64, "--seeds", 2, "--out", out, "--dtype", "float64").exit_code != 0


def write_cifar10(path, images=12, label=3):
    records = np.random.default_rng(0).integers(0, 256, size=(images, 3073), dtype=np.uint8)
    records[:, 0] = label
    path.write_bytes(records.tobytes())
    return records


def test_cifar10_pixels_are_read_plane_by_plane(tmp_path):
    records = write_cifar10(tmp_path / "data_batch_1.bin")
    images = figure1.cifar10_images(tmp_path)
    assert images.shape == (12, 1024, 3)
    red, green, blue = records[5, 1 + 7], records[5, 1 + 1024 + 7], records[5, 1 + 2048 + 7]
    np.testing.assert_allclose(images[5, 7] * 255, [red, green, blue])


@pytest.mark.usefixtures("one_network")
def test_cifar10(run, tmp_path):
    write_cifar10(tmp_path / "data_batch_1.bin")
    result = run("figure1", "--max-width", 64, "--seeds", 2, "--out", tmp_path / "d", "--cifar10", tmp_path)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: None, "is not there"),
        (lambda path: write_cifar10(path, images=3), "too short"),
        (lambda path: write_cifar10(path, label=200), "not of the binary version"),
    ],
)
def test_cifar10_errors_are_messages(run, tmp_path, prepare, words):
    prepare(tmp_path / "data_batch_1.bin")
    result = run("figure1", "--cifar10", tmp_path, "--out", tmp_path / "e")
    assert result.exit_code == 1
    assert words in result.output


def test_options_are_checked(run, tmp_path):
    assert run("figure1", "--max-width", 10).exit_code == 2
    assert run("figure1", "--seeds", 0).exit_code == 2
    assert run("figure1", "--dtype", "float16").exit_code == 2


def test_help(run):
    assert "figure1" in run("--help").output
    assert "figure3" in run("--help").output
    assert "--cifar10" in run("figure1", "--help").output


def test_settings_are_the_papers():
    rnn, transformer, batchnorm = figure1.settings(figure1.default_images())
    assert [x.shape for x in rnn.examples] == [(5, 3), (5, 3)]
    assert [x.shape for x in transformer.examples] == [(5, 3), (5, 3)]
    assert [x.shape for x in batchnorm.examples] == [(7, 13), (5, 13)]


def test_widths():
    assert figure1.widths_up_to(64) == (64,)
    assert figure1.widths_up_to(1024) == (64, 128, 256, 512, 1024)
    assert figure1.widths_up_to(300) == (64, 128, 256, 300)
    with pytest.raises(ValueError, match="at least 64"):
        figure1.widths_up_to(63)


def test_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None; from anywidth.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "anywidth[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_figure3_settings():
    sentences = figure3.sentences()
    assert [len(s) for s in sentences] == [len(w) for w in figure3.WORDS] == [7, 9]
    assert (sentences[0][-1] == sentences[1][-1]).all()  # "dog"
    for setting in figure3.settings():
        trained = {name for name in setting.net.init(64) if setting.lr.get(name, 1.0)}
        assert trained == {"v"}
        assert setting.kernel == "nngp"
    np.testing.assert_allclose(figure3.correlations(np.array([[4.0, 1.0], [1.0, 1.0]])), [[1.0, 0.5], [0.5, 1.0]])
