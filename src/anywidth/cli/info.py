"""`anywidth info`."""

from pathlib import Path
from typing import Annotated

import typer

from anywidth.errors import InputError

__all__ = ["info"]


def info(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A store of gram, or a model of fit.", show_default=False)
    ],
    check: Annotated[
        bool, typer.Option("--check", help="Read all of a store, and count the tiles that are damaged.")
    ] = False,
) -> None:
    """Say what a store or a model holds, without computing anything.

    For example:

    \b
      anywidth info K.zarr
      anywidth info --check K.zarr
      anywidth info model.npz
    """
    lines = _model(path) if path.is_file() else _store(path, check)
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _store(path: Path, check: bool) -> list[tuple[str, str]]:
    from anywidth.grams.store import chunks, count, read_header, whole
    from anywidth.memory import readable

    header = read_header(path)
    if header is None:
        raise InputError(f"there is nothing at {path}")
    done, total = count(path, header)
    identity = header.identity
    lines = []
    for name, (shape, dtype) in header.arrays.items():
        lines.append((name or str(identity["kernel"]), f"{' x '.join(map(str, shape))} {dtype}"))
    percent = f"{100 * done / total:.1f}% of it: the same call of gram goes on"
    lines.append(("size", readable(header.size)))
    lines.append(("tiles", f"{header.tile[0]} x {header.tile[1]}, {header.grid[0]} x {header.grid[1]} of them"))
    lines.append(("finished", "yes" if done == total else percent))
    if check:
        damaged = sum(not whole(file, header.chunk_bytes(name)) for name, file in chunks(path, header))
        some = f"{damaged} of {done} chunks: the same call of gram computes what is damaged again"
        lines.append(("damaged", some if damaged else "nothing"))
    for key, what in (("X", identity["X"]), ("Y", identity["Y"])):
        if what is None:
            lines.append((key, "the same examples: one triangle computed, and mirrored"))
        else:
            shapes, dtypes = ", ".join(what["shapes"]), ", ".join(what["dtypes"])
            lines.append((key, f"{what['examples']} examples of shape {shapes}, {dtypes}"))
    lines += [(name, text) for name, text in identity["parameters"].items()]
    lines.append(("written by", f"anywidth {identity['anywidth']}, jax {identity['jax']}"))
    return lines


def _model(path: Path) -> list[tuple[str, str]]:
    from anywidth.cli.models import read

    recipe, header, arrays = read(path)
    numbers = header["numbers"]
    lines = [
        ("model", f"{recipe.task} of {recipe.target!r}"),
        ("network", " ".join((recipe.network, *recipe.options))),
        ("kernel", recipe.kernel),
        ("examples", f"{len(arrays['X_fit_'])} of {int(numbers['n_features_in_'])} features"),
        ("noise", f"{numbers['noise_']:.3g}{' (the likeliest)' if recipe.noise is None else ''}"),
        ("log marginal likelihood", f"{numbers['log_marginal_likelihood_']:.1f}"),
        ("jitter", f"{numbers['jitter_']:.3g}"),
    ]
    if "classes_" in arrays:
        lines.append(("classes", ", ".join(map(str, arrays["classes_"]))))
    if recipe.names:
        lines.append(("columns", ", ".join(recipe.names)))
    return lines
