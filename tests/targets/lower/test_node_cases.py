"""The ONNX standard's own cases of single operators against the reference target."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.node_cases import cases, try_case

# At least one case of every operator family; the slow test runs all cases.
CHOSEN = """
abs add_bcast add_int8 and_bcast3v2d argmax_keepdims_random_select_last_index argmin_negative_axis_keepdims_random
averagepool_2d_ceil averagepool_2d_pads_count_include_pad averagepool_2d_same_upper batchnorm_example
bitshift_left_uint16  cast_FLOAT_to_FLOAT16 celu clip_min_greater_than_max concat_3d_axis_negative_2
basic_conv_with_padding conv_with_autopad_same convinteger_with_padding convtranspose convtranspose_dilations
convtranspose_output_shape cumsum_2d_negative_axis depthtospace_crd_mode_example dequantizelinear_blocked
dequantizelinear_axis div_uint8 dropout_default_mask dynamicquantizelinear einsum_batch_matmul einsum_inner_prod elu
equal_bcast erf expand_dim_changed eyelike_populate_off_main_diagonal flatten_negative_axis2 floor
gather_2d_indices gather_elements_negative_indices gathernd_example_int32_batch_dim1 gelu_tanh_1
gemm_all_attributes globalaveragepool globalmaxpool_precomputed greater_equal_bcast group_normalization_epsilon
hardmax_axis_1 hardsigmoid hardswish instancenorm_epsilon isinf_negative isnan layer_normalization_3d_axis1_epsilon
leakyrelu less_bcast log logsoftmax_axis_1 lppool_2d_dilations lrn matmul_4d matmulinteger max_float32
maxpool_2d_ceil maxpool_2d_dilations maxpool_3d_default mean_two_inputs min_int64 mish mod_mixed_sign_float32
mod_mixed_sign_int16 mul_bcast neg not_3d onehot_negative_indices constant_pad_negative_axes edge_pad
reflect_pad pow_bcast_array pow_types_int64_float32 prelu_broadcast quantizelinear_axis
reciprocal reduce_l2_keep_dims_random reduce_log_sum_exp_keepdims_random reduce_max_bool_inputs
reduce_mean_default_axes_keepdims_random reduce_prod_negative_axes_keepdims_random reshape_zero_and_negative_dim
resize_downsample_scales_cubic resize_upsample_scales_linear_align_corners resize_upsample_scales_nearest
resize_upsample_sizes_nearest_ceil_half_pixel resize_upsample_scales_linear_half_pixel_symmetric
 round scatter_elements_with_reduction_max scatternd_add selu shape_start_1_end_negative_1
shrink_soft sigmoid sign sin size slice_neg_steps softmax_large_number softplus
softsign spacetodepth split_variable_parts_2d_opset18 sqrt squeeze_negative_axes sub_bcast sum_example tan tanh
thresholdedrelu tile top_k_smallest transpose_all_permutations_3 tril_neg triu_one_row unsqueeze_negative_axes
where_long_example xor_bcast4v4d dft_axis gridsample_reflection_padding gridsample_nearest reversesequence_time
if lstm_with_peepholes lstm_bidirectional lstm_batchwise gru_seq_length gru_with_initial_bias gru_reverse rnn_seq_length
simple_rnn_bidirectional
""".split()


@pytest.mark.parametrize("name", CHOSEN)
def test_case_of_the_standard(name: str) -> None:
    outcome = try_case(f"test_{name}")
    assert outcome.status == "right", outcome.detail


@pytest.mark.slow
def test_no_case_of_the_standard_is_wrong() -> None:
    """Every case is either right or refused with an error of kbitc; a crash fails by itself."""
    outcomes = {name: try_case(name) for name in cases()}
    wrong = {name: outcome.detail for name, outcome in outcomes.items() if outcome.status == "wrong"}
    assert not wrong
    assert Counter(outcome.status for outcome in outcomes.values())["right"] > 940
