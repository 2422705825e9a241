"""From kernels to predictions: Gaussian processes and training by gradient flow.

Everything here takes Gram matrices, as `anywidth.gram` returns them or keeps them in a store: of shape (N, M) for a
network with one output (or i.i.d. ones), and (N, M) + S + S' for an output of shape S. Targets are (N,) + S + R, where
R is any shape of right-hand sides, such as the columns of a one-hot code; all of them share the work.

>>> import jax, jax.numpy as jnp
>>> import anywidth as aw
>>> X = jnp.linspace(-2, 2, 8)[:, None]
>>> new = jnp.array([[0.3]])
>>> kernel = aw.nngp(aw.zoo.mlp(1, depth=2, nonlinearity=jax.lax.erf, varb=0.1))
>>> gp = aw.predict.posterior(aw.gram(kernel, X), jnp.sin(X[:, 0]), noise=1e-4)
>>> cross = aw.gram(kernel, new, X)
>>> print(gp.mean(cross).round(1), gp.variance(cross, aw.predict.diagonal(kernel, new)) < 1e-3)
[0.3] [ True]
"""

from anywidth.predict.cg import NotConvergedError, Solution, conjugate_gradients
from anywidth.predict.flow import GradientFlow, gradient_flow, max_learning_rate
from anywidth.predict.gp import LeaveOneOut, Posterior, leave_one_out, posterior
from anywidth.predict.likelihood import NoiseFit, fit_noise, log_marginal_likelihood
from anywidth.predict.matrices import diagonal

__all__ = [
    "GradientFlow",
    "LeaveOneOut",
    "NoiseFit",
    "NotConvergedError",
    "Posterior",
    "Solution",
    "conjugate_gradients",
    "diagonal",
    "fit_noise",
    "gradient_flow",
    "leave_one_out",
    "log_marginal_likelihood",
    "max_learning_rate",
    "posterior",
]
