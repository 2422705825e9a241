"""Theory against simulation, over networks written by strangers (networks.py, oracle.py)."""

import networks
import numpy as np
import oracle
import pytest

import anywidth as aw

# Those whose kernels compile within seconds; `python tests/oracle.py` has the others.
NAMES = (
    "mlp_relu mlp_einsum_maximum mlp_tensordot_where mlp_row_vectors_abs mlp_nested_jit_gelu mlp_bottleneck_expand "
    "activation_square activation_cube activation_exp activation_sine_plus_linear resnet_identity_relu same_branch_twice "
    "siamese_sum scan_over_stacked_layers dense_net_concatenation layer_norm_after_relu norm_by_other_means "
    "random_gain_with_mean product_of_linear_kets rnn_erf_mean_pool rnn_last_state_relu rnn_stacked_in_one_scan "
    "rnn_running_mean_with_counter"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_theory_against_simulation(name):
    case = networks.get(name)
    limit = oracle.limit(case)
    for pair, (x, y) in {"xy": (case.x, case.y), "xx": (case.x, case.x)}.items():
        found = aw.kernels(case.net)(x, y)
        for kind in ("nngp", "ntk"):
            value, error, *_ = limit[pair][kind]
            value, error = np.asarray(value), np.asarray(error)
            K = np.asarray(getattr(found, kind)).reshape(value.shape)
            assert (np.abs(K - value) <= 5 * error + 0.01 * np.abs(value).max()).all(), (pair, kind, K, value, error)
