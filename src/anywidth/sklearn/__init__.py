"""Infinitely wide networks as scikit-learn estimators and kernels. Needs the extra `anywidth[sklearn]`.

>>> import numpy as np
>>> from anywidth import zoo
>>> from anywidth.sklearn import Factory, InfiniteWidthRegressor
>>> X = np.linspace(-2, 2, 20)[:, None]
>>> model = InfiniteWidthRegressor(Factory(zoo.mlp, depth=2, varb=0.1)).fit(X, np.sin(X[:, 0]))
>>> print(model.predict([[0.5]]).round(2))
[0.48]

A network is given as a `Network`; as a `Factory`, which makes one for the number of features of the data and whose
options are parameters to `GridSearchCV` (`network__depth`); or as a constructor such as `zoo.mlp`, which is a factory
with its defaults. Everything is computed in float64, whatever JAX's settings, unless `dtype="float32"`.
"""

from anywidth.sklearn.estimators import InfiniteWidthClassifier, InfiniteWidthRegressor
from anywidth.sklearn.kernel import InfiniteWidthKernel
from anywidth.sklearn.networks import Factory

__all__ = ["Factory", "InfiniteWidthClassifier", "InfiniteWidthKernel", "InfiniteWidthRegressor"]
