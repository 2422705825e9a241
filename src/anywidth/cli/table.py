"""`anywidth table`."""

from pathlib import Path
from typing import Annotated

import typer

from anywidth.cli.errors import Interrupted

__all__ = ["table"]


def table(
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="diabetes, wine, 'breast cancer' or digits. Repeatable. [default: all]"),
    ] = None,
    splits: Annotated[int, typer.Option(min=1, help="Random splits into training and test data.")] = 3,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table to a Markdown file, the best in bold.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep every number in this .csv file as it is found, and go on from what is in it."
        ),
    ] = None,
) -> None:
    """Compare infinitely wide networks with an SVM and a Gaussian process, both with RBF kernels, on real data.

    The data sets come with scikit-learn. Quality is accuracy, or R2 for diabetes, and the log-likelihood that of a test
    target. The networks' hyperparameters are not tuned, those of the baselines are.

    A row is printed when it is found; all of them take some minutes.

    For example:

    \b
      anywidth table --data wine --data diabetes
      anywidth table --out table.md --scores table.csv
    """
    import itertools
    import warnings

    from rich.console import Console

    from anywidth import realdata

    names = list(dict.fromkeys(data or realdata.DATA))
    for name in names:
        if name not in realdata.DATA:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(realdata.DATA)}", param_hint="--data")
    for path in (out, scores):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no directory {path.parent}")
    known = [] if scores is None else realdata.read(scores)
    found: list[realdata.Score] = []
    try:
        with Console(stderr=True).status("starting") as status, warnings.catch_warnings():
            # the baselines' optimisers warn of bounds they reach
            warnings.filterwarnings("ignore", module="sklearn")
            started = lambda d, m: status.update(f"{d}: {m}")  # noqa: E731
            every = realdata.scores(names, splits, started, known)
            for (name, _), mine in itertools.groupby(every, key=lambda score: (score.data, score.model)):
                if not found or found[-1].data != name:
                    typer.echo(f"{chr(10) if found else ''}{realdata.heading(name)}", nl=False)
                own = []
                for score in mine:
                    own.append(score)
                    if scores is not None and score not in known:
                        realdata.append(scores, score)
                found += own
                typer.echo(realdata.row(own), nl=False)
    except KeyboardInterrupt:
        kept = f"the same command goes on from {scores}" if scores else "with --scores FILE the next one could go on"
        raise Interrupted(kept) from None
    if out is not None:
        out.write_text(realdata.markdown(found))
