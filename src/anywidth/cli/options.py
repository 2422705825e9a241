"""Options that several commands have."""

from typing import Annotated

import typer

__all__ = ["Drop", "Dtype", "InputShape", "NetworkName", "NetworkOptions"]

NetworkName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="zoo:NAME for a network of the zoo (zoo:mlp, zoo:rnn, ...), or MODULE:NAME for a Network of yours, or for "
        "a function from the number of features to one.",
    ),
]
NetworkOptions = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="An option of that function, such as depth=3 or nonlinearity=gelu. Repeatable."
    ),
]
Drop = Annotated[
    list[str] | None, typer.Option(metavar="COLUMN", help="A column of the table to leave out. Repeatable.")
]
InputShape = Annotated[
    str | None,
    typer.Option(metavar="SHAPE", help="Fold each row into an example of this shape, such as 8x8 for sequences."),
]
Dtype = Annotated[str | None, typer.Option(metavar="[float32|float64]", help="Precision. [default: that of the data]")]
