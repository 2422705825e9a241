"""Hyperparameters of an infinitely wide network, learned by gradient ascent on the log marginal likelihood.

The variances of the parameters, numbers in the code of the network (a scale for each feature, so that those that do not
matter fade out) and the noise are ordinary traced numbers: the kernel is a JAX function of them, and
`predict.log_marginal_likelihood` of the kernel.

Run it: python examples/learn_hyperparameters.py    (needs optax and scikit-learn; about a minute)
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import scale

import anywidth as aw


def network(theta, d):
    """A relu perceptron whose hyperparameters are numbers in theta."""

    def init(n):
        return {
            "W": [aw.Normal((n, d if layer == 0 else n), var=jnp.exp(theta["log_varw"])) for layer in range(2)],
            "b": [aw.Normal((n,), var=jnp.exp(theta["log_varb"])) for _ in range(2)],
            "v": aw.Normal((n,), var=jnp.exp(theta["log_varv"])),
        }

    def apply(params, x):
        h = jnp.exp(theta["log_scale"]) * x
        for w, b in zip(params["W"], params["b"], strict=True):
            h = jax.nn.relu(w @ h / jnp.sqrt(w.shape[1]) + b)
        return params["v"] @ h / jnp.sqrt(h.size)

    return aw.Network(init, apply)


def gram(theta, X, Y):
    """The NNGP kernel of all pairs. Unlike `aw.gram` it can be differentiated in theta."""
    kernel = aw.nngp(network(theta, X.shape[1]))
    return jax.vmap(jax.vmap(kernel, (None, 0)), (0, None))(X, Y)


def learn(X, y, steps=100, rate=0.1):
    """Adam on minus the log marginal likelihood. Returns theta, and the likelihood at every step."""
    theta = {
        "log_varw": jnp.log(2.0),
        "log_varb": jnp.log(0.1),
        "log_varv": jnp.log(1.0),
        "log_scale": jnp.zeros(X.shape[1]),
        "log_noise": jnp.log(1.0),
    }

    def loss(theta):
        return -aw.predict.log_marginal_likelihood(gram(theta, X, X), y, jnp.exp(theta["log_noise"]))

    optimiser = optax.adam(rate)

    @jax.jit
    def step(theta, state):
        value, gradient = jax.value_and_grad(loss)(theta)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(theta, updates), state, -value

    state, history = optimiser.init(theta), []
    for _ in range(steps):
        theta, state, value = step(theta, state)
        history.append(float(value))
    return theta, history


def main():
    """Learn on half of the diabetes data, and predict the other half with what was learned."""
    X, y = load_diabetes(return_X_y=True)
    X, y = jnp.asarray(scale(X)), jnp.asarray(scale(y))
    train, test = slice(0, 221), slice(221, None)
    theta, history = learn(X[train], y[train])
    print(f"log marginal likelihood: {history[0]:.1f} to begin with, {history[-1]:.1f} at the end")
    for name, value in theta.items():
        print(f"  {name.removeprefix('log_')}: {jnp.exp(value).round(3)}")
    gp = aw.predict.posterior(gram(theta, X[train], X[train]), y[train], jnp.exp(theta["log_noise"]))
    mean = gp.mean(gram(theta, X[test], X[train]))
    print(f"R2 on the other half: {float(1 - ((y[test] - mean) ** 2).mean() / y[test].var()):.3f}")


if __name__ == "__main__":
    main()
