"""Networks of finite width: their own kernels (`empirical`), and how far they are from the limit (`simulation`)."""

from anywidth.finite.empirical import empirical_nngp, empirical_ntk, linearize, ntk_vp
from anywidth.finite.simulation import Check, check

__all__ = ["Check", "check", "empirical_nngp", "empirical_ntk", "linearize", "ntk_vp"]
