"""Tables and arrays from files, and predictions back into them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np

from anywidth.errors import InputError

__all__ = ["KINDS", "Table", "read_array", "read_table", "write_columns"]

KINDS = (".npy", ".npz", ".csv", ".parquet")


@dataclass(frozen=True)
class Table:
    """Features with their names (none in an array file), and the target if there is one."""

    X: np.ndarray
    names: tuple[str, ...] | None
    y: np.ndarray | None


def read_array(path: Path, name: str | None = None, drop: tuple[str, ...] = ()) -> np.ndarray:
    """Examples: the array of a .npy file, the array `name` of a .npz file, or the columns of a table but those dropped.

    Raises:
        InputError, OSError: in one line, what is wrong with the file.
    """
    return read_table(path, name=name, drop=drop).X


def read_table(
    path: Path,
    target: str | None = None,
    drop: tuple[str, ...] = (),
    name: str | None = None,
    names: tuple[str, ...] | None = None,
    optional: bool = False,
) -> Table:
    """Features and target.

    Args:
        path: a file of one of `KINDS`.
        target: a column of a table, an array of a .npz file, or, for examples in a .npy file, the path of another one.
        drop: columns to leave out.
        name: which array of a .npz file holds the features; by default "X", or the only one.
        names: the columns that are wanted, in order; all of them by default.
        optional: whether the target may be missing.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"{path} is not a file of a known kind ({', '.join(KINDS)})")
    read = _frame if kind in (".csv", ".parquet") else _arrays
    table = read(path, target, drop, name, names, optional)
    if not table.X.size:
        raise InputError(f"{path} holds no examples")
    if not (finite := np.isfinite(table.X)).all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"the examples in {path} have {int((~finite).sum())} entries that are NaN or infinite, the first at index "
            f"{where}"
        )
    return table


def _arrays(
    path: Path,
    target: str | None,
    drop: tuple[str, ...],
    name: str | None,
    names: tuple[str, ...] | None,
    optional: bool,
) -> Table:
    if drop or names:
        wanted = ", ".join(map(repr, (*drop, *(names or ()))[:6]))
        raise InputError(f"{path} has no named columns, such as {wanted}; .csv and .parquet files have")
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, BadZipFile):
        raise InputError(f"{path} is damaged, or not a {path.suffix} file of plain arrays of numbers") from None
    y = None
    if isinstance(found, np.ndarray):
        X = found
        if target is not None and not optional:
            y = _targets(Path(target))
    else:
        with found:
            arrays = dict(found)
        others = [key for key in arrays if key != target]
        name = name or ("X" if "X" in arrays else others[0] if len(others) == 1 else "X")
        for key in (name, target):
            if key is not None and key not in arrays and not (key == target and optional):
                raise InputError(f"{path} has no array {key!r}; it has {', '.join(arrays)}")
        X, y = arrays[name], arrays.get(target) if target is not None else None
    if X.dtype.kind not in "fiub":
        raise InputError(f"the examples in {path} are not numbers, their dtype is {X.dtype}")
    return Table(X if X.dtype.kind == "f" else X.astype(np.float64), None, y)


def _frame(
    path: Path,
    target: str | None,
    drop: tuple[str, ...],
    name: str | None,
    names: tuple[str, ...] | None,
    optional: bool,
) -> Table:
    try:
        import pandas
    except ImportError:
        raise ImportError(f'{path} needs pandas: pip install "anywidth[cli]"') from None
    try:
        frame = pandas.read_csv(path) if path.suffix.lower() == ".csv" else pandas.read_parquet(path)
    except Exception as error:  # each reader has its own
        raise InputError(f"{path} cannot be read: {str(error).strip().splitlines()[0]}") from None
    frame.columns = [str(column) for column in frame.columns]
    asked = (*((target,) if target and not optional else ()), *drop, *(names or ()))
    for column in asked:
        if column not in frame.columns:
            raise InputError(f"{path} has no column {column!r}; it has {_listed(list(frame.columns))}")
    y = frame[target].to_numpy() if target in frame.columns else None
    features = frame[list(names)] if names else frame.drop(columns=[*drop, *([target] if y is not None else [])])
    if y is not None and (missing := frame[target].isna()).any():
        if not optional:
            raise InputError(f"column {target!r} of {path} {_lacks(missing)}")
        y = None
    if not len(frame):
        raise InputError(f"{path} has no rows")
    for column in features.columns:
        values = features[column]
        if not pandas.api.types.is_numeric_dtype(values):
            raise InputError(
                f"column {column!r} of {path} holds {values.iloc[0]!r}, which is not a number: leave it out with "
                f"--drop {column}, or encode it first"
            )
        if (missing := values.isna()).any():
            raise InputError(f"column {column!r} of {path} {_lacks(missing)}")
    if not len(features.columns):
        raise InputError(f"{path} has no columns left for the examples")
    return Table(features.to_numpy(np.float64), tuple(features.columns), y)


def _targets(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"there is no file {path} (the target of a .npy file is another one)")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, BadZipFile):
        raise InputError(f"{path} is damaged, or not a .npy file of plain numbers or labels") from None


def _lacks(missing: Any) -> str:
    count, row = int(missing.sum()), int(missing.to_numpy().argmax())
    return f"lacks {f'{count} values, the first' if count > 1 else 'a value,'} in row {row + 1}"


def write_columns(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write predictions: named columns, or for a .npy file one array of them."""
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"{path} is not a file of a known kind ({', '.join(KINDS)})")
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".npz":
        np.savez(path, **cast(Any, columns))
    elif kind == ".npy":
        values = list(columns.values())
        np.save(path, values[0] if len(values) == 1 else np.stack(values, 1))
    else:
        import pandas

        frame = pandas.DataFrame(columns)
        if kind == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path)


def _listed(names: list[Any], most: int = 12) -> str:
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
