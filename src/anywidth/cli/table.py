"""`anywidth table`."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["table"]


def table(
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="diabetes, wine, 'breast cancer' or digits. Repeatable. [default: all]"),
    ] = None,
    splits: Annotated[int, typer.Option(min=1, help="Random splits into training and test data.")] = 3,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the table in a Markdown file too.")] = None,
) -> None:
    """Compare infinitely wide networks with an SVM and a Gaussian process, both with RBF kernels, on real data.

    The data sets come with scikit-learn. Quality is accuracy, or R2 for diabetes, and the log-likelihood that of a test
    target. The networks' hyperparameters are not tuned, those of the baselines are.

    For example:

    \b
      anywidth table --data wine --data diabetes
    """
    import warnings

    from rich.console import Console

    from anywidth import realdata

    for name in data or ():
        if name not in realdata.DATA:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(realdata.DATA)}", param_hint="--data")
    console = Console(stderr=True)
    with console.status("starting") as status, warnings.catch_warnings():
        # the baselines' optimisers warn of bounds they reach
        warnings.filterwarnings("ignore", module="sklearn")
        found = list(realdata.scores(data or realdata.DATA, splits, lambda d, m: status.update(f"{d}: {m}")))
    text = realdata.markdown(found)
    print(text, end="")
    if out is not None:
        out.write_text(text)
