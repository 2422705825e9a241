r"""What is known of coordinatewise functions: the closed form of E[f(u) f(v)] and where it was published.

`u`, `v` are jointly Gaussian with variances q, q' and covariance c; θ is the angle with cos θ = c / √(q q').
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """E[f(u) f(v)] and E[f'(u) f'(v)], as LaTeX and as text, and the reference."""

    latex: str
    slope_latex: str
    text: str
    slope_text: str
    reference: str

    @property
    def angle(self) -> bool:
        """Whether it is written with the angle θ."""
        return "θ" in self.text


_Q = r"\sqrt{q q'}"
KNOWN: dict[str, Known] = {
    "relu": Known(
        rf"\frac{{{_Q}}}{{2\pi}}\left(\sin\theta + (\pi - \theta)\cos\theta\right)",
        r"\frac{\pi - \theta}{2\pi}",
        "√(q q')/(2π) (sin θ + (π - θ) cos θ)",
        "(π - θ)/(2π)",
        "arc-cosine kernels of order 1 and 0, Cho & Saul 2009",
    ),
    "abs": Known(
        rf"\frac{{2{_Q}}}{{\pi}}\left(\sin\theta + (\tfrac\pi2 - \theta)\cos\theta\right)",
        r"1 - \frac{2\theta}{\pi}",
        "2√(q q')/π (sin θ + (π/2 - θ) cos θ)",
        "1 - 2θ/π",
        "arc-cosine kernels, Cho & Saul 2009",
    ),
    "sign": Known(r"1 - \frac{2\theta}{\pi}", "0", "1 - 2θ/π", "0", "Sheppard 1899; arc-cosine kernel of order 0"),
    "erf": Known(
        r"\frac{2}{\pi}\arcsin\frac{2c}{\sqrt{(1 + 2q)(1 + 2q')}}",
        r"\frac{4}{\pi}\frac{1}{\sqrt{(1 + 2q)(1 + 2q') - 4c^2}}",
        "2/π arcsin(2c / √((1 + 2q)(1 + 2q')))",
        "4/π / √((1 + 2q)(1 + 2q') - 4c²)",
        "arcsine kernel, Williams 1997",
    ),
    "sin": Known(
        r"e^{-(q + q')/2}\sinh c", r"e^{-(q + q')/2}\cosh c", "exp(-(q + q')/2) sinh c", "exp(-(q + q')/2) cosh c",
        "characteristic function of a Gaussian",
    ),
    "cos": Known(
        r"e^{-(q + q')/2}\cosh c", r"e^{-(q + q')/2}\sinh c", "exp(-(q + q')/2) cosh c", "exp(-(q + q')/2) sinh c",
        "characteristic function of a Gaussian",
    ),
    "exp": Known(
        r"e^{(q + q')/2 + c}", r"e^{(q + q')/2 + c}", "exp((q + q')/2 + c)", "exp((q + q')/2 + c)",
        "moment generating function of a Gaussian",
    ),
}  # fmt: skip
