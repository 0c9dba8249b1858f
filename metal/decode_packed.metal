// Decode attention, first part of the body: sinks in the dtype of the model, the ring quantised.
//
// k [B, HKV, S or more, D] and v [B, HKV, S or more, DV] hold rows 0 to S - 1; S is scalars[2].
// k_words [B, HKV, N, D * KBITS / 32] uint32, k_scales and k_biases [B, HKV, N, D / GS] hold the
// rows from S on, as MLX quantises them; likewise v_words and the others, of DV and VBITS. All may
// be strided, but the elements of a row are neighbours. No range has rows on both sides of S.
const int hk = int(threadgroup_position_in_grid.y);
const int b = int(threadgroup_position_in_grid.z);
SinkRows<T, KBITS, GS> keys;
keys.split = int(scalars[2]);
keys.sinks = k + b * size_t(k_strides[0]) + hk * size_t(k_strides[1]);
keys.sinks_row = int(k_strides[2]);
keys.words = k_words + b * size_t(k_words_strides[0]) + hk * size_t(k_words_strides[1]);
keys.words_row = int(k_words_strides[2]);
keys.scales =
    k_scales + b * size_t(k_scales_strides[0]) + hk * size_t(k_scales_strides[1]);
keys.scales_row = int(k_scales_strides[2]);
keys.biases =
    k_biases + b * size_t(k_biases_strides[0]) + hk * size_t(k_biases_strides[1]);
keys.biases_row = int(k_biases_strides[2]);
SinkRows<T, VBITS, GS> values;
values.split = int(scalars[2]);
values.sinks = v + b * size_t(v_strides[0]) + hk * size_t(v_strides[1]);
values.sinks_row = int(v_strides[2]);
values.words = v_words + b * size_t(v_words_strides[0]) + hk * size_t(v_words_strides[1]);
values.words_row = int(v_words_strides[2]);
values.scales =
    v_scales + b * size_t(v_scales_strides[0]) + hk * size_t(v_scales_strides[1]);
values.scales_row = int(v_scales_strides[2]);
values.biases =
    v_biases + b * size_t(v_biases_strides[0]) + hk * size_t(v_biases_strides[1]);
values.biases_row = int(v_biases_strides[2]);
