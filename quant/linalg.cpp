#include "quant/linalg.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <mutex>
#include <string>

#include "schemas/error.h"

namespace kvplan::quant {
namespace {

// Rows x 64 bytes of outputs stay in registers while k runs: 8 AVX registers with 4 rows.
template <class T, int Rows>
[[gnu::always_inline]] inline void multiply_block(const T* a, const T* b, int k, int m, T* out) {
  using Vector [[gnu::vector_size(32)]] = T;
  using Unaligned [[gnu::vector_size(32), gnu::aligned(alignof(T)), gnu::may_alias]] = T;
  constexpr int kLanes = 32 / static_cast<int>(sizeof(T));
  Vector sum[Rows][2] = {};
  for (int p = 0; p < k; ++p) {
    const auto* const row = reinterpret_cast<const Unaligned*>(b + p * m);
    const Vector low = row[0], high = row[1];
    for (int i = 0; i < Rows; ++i) {
      sum[i][0] += a[i * k + p] * low;
      sum[i][1] += a[i * k + p] * high;
    }
  }
  for (int i = 0; i < Rows; ++i) {
    *reinterpret_cast<Unaligned*>(out + i * m) = sum[i][0];
    *reinterpret_cast<Unaligned*>(out + i * m + kLanes) = sum[i][1];
  }
}

template <class T, int Rows>
[[gnu::always_inline]] inline void multiply_rows(const T* a, const T* b, int k, int m, T* out) {
  constexpr int kCols = 64 / static_cast<int>(sizeof(T));
  int j = 0;
  for (; j + kCols <= m; j += kCols) multiply_block<T, Rows>(a, b + j, k, m, out + j);
  for (; j < m; ++j)
    for (int i = 0; i < Rows; ++i) {
      T sum = 0;
      for (int p = 0; p < k; ++p) sum += a[i * k + p] * b[p * m + j];
      out[i * m + j] = sum;
    }
}

template <class T>
[[gnu::always_inline]] inline void multiply_all(const T* a, const T* b, int n, int k, int m,
                                                T* out) {
  constexpr int kRows = 4;
  int i = 0;
  for (; i + kRows <= n; i += kRows) multiply_rows<T, kRows>(a + i * k, b, k, m, out + i * m);
  for (; i < n; ++i) multiply_rows<T, 1>(a + i * k, b, k, m, out + i * m);
}

KVPLAN_VECTOR_CLONES void multiply_double(const double* a, const double* b, int n, int k, int m,
                                          double* out) {
  multiply_all(a, b, n, k, m, out);
}

KVPLAN_VECTOR_CLONES void multiply_float(const float* a, const float* b, int n, int k, int m,
                                         float* out) {
  multiply_all(a, b, n, k, m, out);
}

void require_sizes(std::size_t a, std::size_t b, std::size_t out, int n, int k, int m) {
  const auto size = [](int rows, int cols) {
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols);
  };
  if (n < 0 || k < 0 || m < 0 || a != size(n, k) || b != size(k, m) || out != size(n, m))
    throw InternalError("matrix product of " + std::to_string(n) + " x " + std::to_string(k) +
                        " x " + std::to_string(m) + " got operands of " + std::to_string(a) + ", " +
                        std::to_string(b) + " and " + std::to_string(out) + " elements");
}

// Eigen splits its products by the sizes of the caches it finds, which would change the order of
// sums between machines.
void fix_eigen_blocking() {
  static std::once_flag once;
  std::call_once(once, [] { Eigen::setCpuCacheSizes(32 << 10, 256 << 10, 2 << 20); });
}

}  // namespace

void multiply(std::span<const double> a, std::span<const double> b, int n, int k, int m,
              std::span<double> out) {
  require_sizes(a.size(), b.size(), out.size(), n, k, m);
  multiply_double(a.data(), b.data(), n, k, m, out.data());
}

void multiply(std::span<const float> a, std::span<const float> b, int n, int k, int m,
              std::span<float> out) {
  require_sizes(a.size(), b.size(), out.size(), n, k, m);
  multiply_float(a.data(), b.data(), n, k, m, out.data());
}

void multiply_transposed(std::span<const double> a, std::span<const double> b, int n, int k, int m,
                         std::span<double> out) {
  multiply(a, transposed(b, m, k), n, k, m, out);
}

std::vector<double> transposed(std::span<const double> a, int rows, int cols) {
  std::vector<double> out(a.size());
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) out[j * rows + i] = a[i * cols + j];
  return out;
}

void symmetric_eigen(std::span<const double> a, int d, std::vector<double>& values_descending,
                     std::vector<double>& vectors_as_columns) {
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  require_sizes(a.size(), a.size(), a.size(), d, d, d);
  fix_eigen_blocking();
  const Eigen::MatrixXd matrix = Eigen::Map<const Matrix>(a.data(), d, d);
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(matrix);
  if (solver.info() != Eigen::Success)
    throw InternalError("the eigenvalues of a " + std::to_string(d) + " x " + std::to_string(d) +
                        " matrix did not converge");
  values_descending.resize(d);
  vectors_as_columns.resize(a.size());
  for (int i = 0; i < d; ++i) {
    const auto column = solver.eigenvectors().col(d - 1 - i);
    values_descending[i] = solver.eigenvalues()[d - 1 - i];
    int largest = 0;
    for (int j = 1; j < d; ++j)
      if (std::abs(column[j]) > std::abs(column[largest])) largest = j;
    const double sign = column[largest] < 0 ? -1.0 : 1.0;
    for (int j = 0; j < d; ++j) vectors_as_columns[j * d + i] = sign * column[j];
  }
}

}  // namespace kvplan::quant
