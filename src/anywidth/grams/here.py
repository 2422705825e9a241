"""Tiles of a Gram matrix in this process: one is fetched and put away while JAX computes the next."""

import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jax

from anywidth.grams.evaluate import Job, assemble, launch
from anywidth.grams.plan import Piece, Tile

__all__ = ["run"]

_Key = tuple[int, int, int, int]


def run(job: Job) -> None:
    """Compute the tiles of a job here."""
    held: dict[_Key, Any] = {}

    def hold(pieces: dict[_Key, Piece]) -> None:
        """Move examples to where JAX computes, all in one call: a call takes as long as a small tile."""
        if missing := {key: job.examples(key[0], piece) for key, piece in pieces.items() if key not in held}:
            held.update(jax.device_put(missing))

    listed = isinstance(job.tiles, Sequence)
    if listed:  # what one tile alone needs goes with the call that computes it
        known = [tile for tile in job.tiles if tile is not None]
        uses = Counter(key for tile in known for key in _pieces(tile))
        hold({key: piece for tile in known for key, piece in _pieces(tile).items() if uses[key] > 1})

    def side(tile: Tile, number: int) -> list[Any]:
        pieces = (tile.rows, tile.cols)[number].pieces
        keys = [_key(tile, number, piece) for piece in pieces]
        return [held[k] if k in held else job.examples(k[0], piece) for k, piece in zip(keys, pieces, strict=True)]

    def finish(tile: Tile, results: list[Any]) -> None:
        _wait(results)
        job.put(tile, assemble(tile, job.ranks, results))

    pending: tuple[Tile, list[Any]] | None = None
    for tile in job.tiles:
        results = None
        if tile is not None:
            if not listed:
                hold(_pieces(tile))
            results = launch(job.kernel, tile, side(tile, 0), side(tile, 1))
        if pending is not None:
            finish(*pending)
        elif tile is None:
            job.idle()
        pending = None if tile is None or results is None else (tile, results)
    if pending is not None:
        finish(*pending)


def _wait(results: list[Any]) -> None:
    """Wait where Ctrl-C is heard: within JAX, Python would hear it when the tile is done."""

    def ready() -> None:
        with suppress(Exception):  # raised below
            jax.block_until_ready(results)

    waiter = threading.Thread(target=ready, daemon=True)
    waiter.start()
    waiter.join()
    jax.block_until_ready(results)


def _pieces(tile: Tile) -> dict[_Key, Piece]:
    return {
        _key(tile, number, piece): piece
        for number, panel in enumerate((tile.rows, tile.cols))
        for piece in panel.pieces
    }


def _key(tile: Tile, side: int, piece: Piece) -> _Key:
    return 0 if tile.symmetric else side, piece.group, piece.start, piece.padded
