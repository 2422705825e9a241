"""Architectures of the papers, each a page of plain JAX that uses only the public names of `anywidth`.

They are examples as much as tools: a network of your own is written the same way, and the engine treats it the
same way. Every constructor returns a `Network` and takes the number `d` of input features first.

Conventions, shared by all of them: a layer is `h = W x / sqrt(fan_in)` with entries of `W ~ N(0, varw)`, a bias is
added as `h + b` with `b ~ N(0, varb)`. `varb=None` means that there are no biases; `varb=0.0` means biases that
start at zero and are trained, which adds to the NTK and not to the NNGP.
"""

from anywidth.zoo.attention import attention
from anywidth.zoo.batchnorm import batchnorm_mlp
from anywidth.zoo.cnn import cnn, resnet
from anywidth.zoo.gates import glu_mlp, highway
from anywidth.zoo.gcn import gcn
from anywidth.zoo.gru import gru
from anywidth.zoo.lstm import lstm
from anywidth.zoo.maxpool import maxpool_cnn
from anywidth.zoo.mlp import mlp
from anywidth.zoo.rnn import rnn
from anywidth.zoo.transformer import transformer
from anywidth.zoo.unet import unet
from anywidth.zoo.vit import vit

__all__ = [
    "attention",
    "batchnorm_mlp",
    "cnn",
    "gcn",
    "glu_mlp",
    "gru",
    "highway",
    "lstm",
    "maxpool_cnn",
    "mlp",
    "resnet",
    "rnn",
    "transformer",
    "unet",
    "vit",
]
