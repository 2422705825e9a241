"""Gram matrices of many examples: the plan of tiles, their computation, and a store that a stopped run goes on from."""

from anywidth.grams.store import open_gram
from anywidth.grams.tiles import gram

__all__ = ["gram", "open_gram"]
