// simdgroup_matrix<T, 8, 8>: two of its 64 elements in each lane. The runtime sees to it that all
// lanes take part, and does for them what they do together.
#pragma once

namespace metal {

template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8 && is_floating_point_v<T>,
                "simdgroup_matrix: 8x8 of half, bfloat or float");
  vec<T, 2>& thread_elements() { return elements; }

  vec<T, 2> elements;
};

template <class T, int Columns, int Rows = Columns>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> out;
  out.elements = vec<T, 2>(value);
  return out;
}

namespace detail {

template <class T>
HM_UNCHECKED vec<T, 2> access_fragment(const char* operation, hm::Site site, const T* memory,
                                       ulong row, vec<ulong, 2> origin, bool transpose, bool store,
                                       vec<T, 2> elements) {
  hm::FragmentAccess own = {};
  own.operation = operation;
  own.site = site;
  own.memory = memory + origin.v[1] * row + origin.v[0];
  own.row = row;
  own.item = sizeof(T);
  own.store = store;
  own.transpose = transpose;
  for (int e = 0; e < 2; e++) __builtin_memcpy(own.elements[e], &elements.v[e], sizeof(T));
  hm::Exchange& exchange = meet(operation, site, own, hm_access_fragment);
  own = get<hm::FragmentAccess>(exchange, hm_lane());
  for (int e = 0; e < 2; e++)
    __builtin_memcpy((void*)&elements.v[e], own.elements[e], sizeof(T));
  return elements;
}

template <class A, class B>
HM_UNCHECKED vec<float, 2> multiply_fragments(const char* operation, hm::Site site, vec<A, 2> a,
                                              vec<B, 2> b, vec<float, 2> c) {
  hm::FragmentProduct own = {};
  own.operation = operation;
  own.site = site;
  for (int e = 0; e < 2; e++) {
    own.a[e] = float(a.v[e]);
    own.b[e] = float(b.v[e]);
    own.c[e] = c.v[e];
  }
  hm::Exchange& exchange = meet(operation, site, own, hm_multiply_fragments);
  own = get<hm::FragmentProduct>(exchange, hm_lane());
  return vec<float, 2>(own.c[0], own.c[1]);
}

}  // namespace detail

// `row` counts elements from one row of memory to the next; `origin` is column, then row.
template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& to, const T* from, ulong row = 8,
                           vec<ulong, 2> origin = vec<ulong, 2>(0ul), bool transpose = false,
                           HM_SITE) {
  to.elements = detail::access_fragment("simdgroup_load", HM_HERE, from, row, origin, transpose,
                                        false, to.elements);
}
template <class T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> from, T* to, ulong row = 8,
                            vec<ulong, 2> origin = vec<ulong, 2>(0ul), bool transpose = false,
                            HM_SITE) {
  detail::access_fragment("simdgroup_store", HM_HERE, (const T*)to, row, origin, transpose, true,
                          from.elements);
}

template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                          simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b,
                                          simdgroup_matrix<C, 8, 8> c, HM_SITE) {
  d.elements = vec<D, 2>(detail::multiply_fragments("simdgroup_multiply_accumulate", HM_HERE,
                                                    a.elements, b.elements,
                                                    vec<float, 2>(c.elements)));
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b, HM_SITE) {
  d.elements = vec<D, 2>(detail::multiply_fragments("simdgroup_multiply", HM_HERE, a.elements,
                                                    b.elements, vec<float, 2>(0.0f)));
}

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

}  // namespace metal
