"""`anywidth gram`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from anywidth.cli.errors import Interrupted
from anywidth.cli.options import Drop, Dtype, InputShape, NetworkName, NetworkOptions

__all__ = ["gram"]


def gram(
    network: NetworkName,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Examples: .npy, .npz, .csv or .parquet.")],
    store: Annotated[Path, typer.Option(metavar="DIR", help="Where to keep the matrix, such as K.zarr.")],
    other: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples of the columns, if they are not those of the rows.")
    ] = None,
    option: NetworkOptions = None,
    kernel: Annotated[str, typer.Option(metavar="[ntk|nngp|both]", help="Which kernel.")] = "both",
    drop: Drop = None,
    input_shape: InputShape = None,
    dtype: Dtype = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory to use, such as '1 GiB'. [default: a quarter of what is free]"),
    ] = None,
) -> None:
    """Compute a kernel matrix and keep it in a zarr store.

    The store is written tile by tile and may be larger than memory. Interrupt the command and run it again to go on;
    run it on a finished store to check it. It belongs to this network, these data and this precision, and is refused
    to others.

    For example:

    \b
      anywidth gram --network zoo:mlp --option depth=3 --data X.npy --store K.zarr
      anywidth gram --network mypkg.nets:rnn --data X.npy --kernel ntk --store K.zarr

    In Python: K = anywidth.open_gram("K.zarr"), and anywidth.predict.posterior(K.ntk, y, noise).
    """
    if kernel not in ("ntk", "nngp", "both"):
        raise typer.BadParameter(f"{kernel!r} is none of ntk, nngp, both", param_hint="--kernel")
    import anywidth as aw
    from anywidth.cli.files import read_array
    from anywidth.cli.networks import find_network, parse_shape
    from anywidth.memory import readable
    from anywidth.sklearn.networks import as_examples, computing, network_of

    found, shape = find_network(network, option or ()), parse_shape(input_shape)
    tables = [read_array(path, drop=tuple(drop or ())) for path in (data, *((other,) if other else ()))]
    precision = dtype or ("float32" if tables[0].dtype == "float32" else "float64")
    examples = [as_examples(table, shape).astype(precision) for table in tables]
    net = network_of(found, examples[0].shape[-1])
    make = {"ntk": aw.ntk, "nngp": aw.nngp, "both": aw.kernels}[kernel]
    start = time.monotonic()
    try:
        with computing(precision):
            K = aw.gram(make(net), *examples, store=store, memory=memory)
    except KeyboardInterrupt:
        raise Interrupted(f"what was computed is kept in {store}: run the same command again to go on") from None
    arrays = {"nngp": K.nngp, "ntk": K.ntk} if kernel == "both" else {kernel: K}
    for name, array in arrays.items():
        size = readable(array.dtype.itemsize * array.size)
        print(f"{name}: {' x '.join(map(str, array.shape))} {array.dtype}, {size}")
    print(f"store: {store} ({time.monotonic() - start:.1f} s)")
