"""Theory against simulation, over networks written by strangers (networks.py, oracle.py)."""

import jax
import numpy as np
import pytest

import anywidth as aw
import networks
import oracle

# What does not work yet, and why: an entry that starts to work fails here, so that it is taken off.
NOT_YET: dict[str, str] = {}
# Those that compile for more than a few seconds.
LONG = {
    "delta_rule_in_a_loop", "causal_memory_added_to_weights", "soft_mixture_of_experts_in_the_weights",
    "heads_with_layers_of_their_own", "heads_on_a_normalised_stream", "heads_across_with_a_mask",
    "heads_with_positions",
    "batch_norm_tanh", "diagonal_state_space", "highway_of_gates", "max_pooling_over_positions",
    "softmax_pooling_of_each_channel",
    "activation_elu", "activation_gelu_tanh", "activation_hard_tanh", "activation_softplus", "attention_vmapped_heads",
    "batch_norm_relu", "convolution_primitive_2d", "circular_convolution_flatten", "fixed_mixing_and_class_token",
    "fori_loop_tied_depth",
    "group_norm", "mlp_checkpoint_silu_sigmoid", "resnet_deep_branches", "rms_norm_residual", "rnn_bidirectional",
    "masks_instead_of_while", "scan_over_layers_with_layer_norm", "pre_norm_transformer", "nested_scans",
    "states_written_into_a_buffer", "embedding_by_traced_index_in_a_loop", "library_relu6",
    "rnn_last_and_mean", "rnn_masked_by_length", "rnn_preactivation", "rnn_running_mean_with_counter",
    "rnn_stacked_in_one_scan", "rnn_two_scans", "same_matrix_in_every_layer", "transformer_shared_qk_causal",
    "universal_transformer", "rnn_last_state_relu", "rows_replaced_with_at_set", "library_dot_product_attention",
    "cross_attention_shared_embedding", "nonlinearity_after_the_residual",
    "squeeze_and_excite", "wavenet", "graph_attention_of_many_heads", "deep_sets", "radiance_field", "unet_on_a_line",
    "set_transformer_pooling", "mixer_with_weights_per_channel",
    "kernel_regression_inside", "rnn_residual_every_state", "rnn_python_loop",
}  # fmt: skip


def marked(case):
    marks = [pytest.mark.long] if case.name in LONG else []
    if case.name in NOT_YET:
        reason = NOT_YET[case.name]
        marks.append(pytest.mark.xfail(reason=reason, strict=True, raises=aw.UnsupportedError))
    return pytest.param(case, marks=marks, id=case.name)


def flat(kernel, like, tree):
    """The kernel as the oracle has it, but for the cross terms of several outputs, which only the oracle has."""
    if not tree:
        return np.asarray(kernel).reshape(like[0].shape), *like
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(kernel)]), *(np.diag(a) for a in like)


@pytest.mark.parametrize("case", [marked(c) for c in networks.CASES])
def test_theory_against_simulation(case):
    limit = oracle.limit(case)
    kernels = aw.kernels(case.net, tol=1e-3)  # compiled once for the two pairs, where the examples have one shape
    for pair, (x, y) in {"xy": (case.x, case.y), "xx": (case.x, case.x)}.items():
        found = kernels(x, y)
        for kind in ("nngp", "ntk"):
            K, value, error = flat(getattr(found, kind), limit[pair][kind][:2], case.output == "tree")
            close = np.abs(K - value) <= 5 * error + 0.01 * np.abs(value).max()
            assert close.all(), (pair, kind, K, value, error)
        errors = np.concatenate([np.ravel(e) for e in jax.tree.leaves(found.error)])
        assert errors.any() if "sampled" in case.kinds else not errors.any()  # what is closed form stays closed form
