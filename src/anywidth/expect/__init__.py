"""Expectations of products of coordinatewise functions of Gaussians (fact 3 of the theory), by the most exact method.

`choose` picks among `closed` (exact to rounding; its mathematics is in `powers`, `stein`, `waves`), `quadrature` (any
function of one Gaussian), `normalised` (batch norm; the same batch twice is `coinciding`) and what is left to sampling.
"""
