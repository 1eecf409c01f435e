#pragma once
// Small dense products and the symmetric eigenproblem with one summation order everywhere: results
// are equal to the bit on every platform. Private to quant. Matrices are row-major.

#include <span>
#include <vector>

/// Compiles a function for AVX2 as well and picks at load time. Without FMA and reassociation both
/// give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define KVPLAN_VECTOR_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define KVPLAN_VECTOR_CLONES
#endif

namespace kvplan::quant {

/// out [n,m] = a [n,k] b [k,m]; every output sums its k products in ascending order, starting from
/// 0. `out` must not overlap.
void multiply(std::span<const double> a, std::span<const double> b, int n, int k, int m,
              std::span<double> out);
void multiply(std::span<const float> a, std::span<const float> b, int n, int k, int m,
              std::span<float> out);

/// out [n,m] = a [n,k] b^T with b [m,k]; same summation order.
void multiply_transposed(std::span<const double> a, std::span<const double> b, int n, int k, int m,
                         std::span<double> out);

/// [cols,rows] from [rows,cols].
std::vector<double> transposed(std::span<const double> a, int rows, int cols);

/// Eigenvalues in descending order and eigenvectors as the columns of a d x d matrix; only the
/// lower triangle of `a` is read. Sign rule: the component of largest magnitude is positive, ties
/// to the lower index. InternalError if it does not converge.
void symmetric_eigen(std::span<const double> a, int d, std::vector<double>& values_descending,
                     std::vector<double>& vectors_as_columns);

}  // namespace kvplan::quant
