// A tensor as a kernel sees it, host and device.
#pragma once

#include "base/common.h"

namespace hos {

// The first entry, and strides in elements; `row` runs over the D entries of a sample, `column`
// over the columns of a factor.
struct View {
  const void* data;
  int64_t point, batch, row, column;
};

inline namespace HOS_ISA {

template <class T>
HOS_HD const T* place(const View& view, int64_t point, int64_t sample, int64_t row,
                      int64_t column = 0) {
  return static_cast<const T*>(view.data) +
         (point * view.point + sample * view.batch + row * view.row + column * view.column);
}

template <class T>
HOS_HD T at(const View& view, int64_t point, int64_t sample, int64_t row, int64_t column = 0) {
  return *place<T>(view, point, sample, row, column);
}

// w_k: the sign of a column of the factor, 1 where none is given and for the score.
template <class T>
HOS_HD T weight_of(const void* sign, int64_t rank, int64_t k) {
  return sign != nullptr && k < rank ? static_cast<const T*>(sign)[k] : T(1);
}

}  // namespace HOS_ISA
}  // namespace hos
