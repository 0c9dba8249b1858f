// Decode attention, first part of the body: keys and values in the dtype of the model.
//
// k [B, HKV, N, D], v [B, HKV, N, DV]. They may be strided: a slice of a ring is not copied.
const int hk = int(threadgroup_position_in_grid.y);
const int b = int(threadgroup_position_in_grid.z);
PlainRows<T> keys;
keys.first = k + b * size_t(k_strides[0]) + hk * size_t(k_strides[1]);
keys.row = int(k_strides[2]);
keys.step = int(k_strides[3]);
PlainRows<T> values;
values.first = v + b * size_t(v_strides[0]) + hk * size_t(v_strides[1]);
values.row = int(v_strides[2]);
values.step = int(v_strides[3]);
