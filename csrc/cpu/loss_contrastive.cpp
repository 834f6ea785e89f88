// EPA's and PoFT's losses: a positive against its negatives, row by row. Compiled once per instruction set.
#include "loss_math.h"

namespace qempo::cpu::QEMPO_ISA {

template <class A>
Status poft_loss(const Poft<A>& in, int threads) {
  int short_ = 0;
#pragma omp simd reduction(| : short_)
  for (int64_t i = 0; i < in.rows; ++i) short_ |= !(in.lengths[i] > A(0));
  if (short_ || !finite(in.rows * in.models, in.aligned)) return Status::bad_values;
  const double weight = row_weight(in.reduction, in.rows), models = static_cast<double>(in.models);
  over_rows(threads, in, kBlock, in.rows, [&](int64_t begin, int64_t n, double* h) {
    double slope[kBlock];
    std::fill_n(h, n, 0.0);
    for (int64_t m = 0; m < in.models; ++m) {
      const A* aligned = in.aligned + begin * in.models + m;
      for (int64_t i = 0; i < n; ++i) h[i] += static_cast<double>(aligned[i * in.models]);
    }
    const A *logps = in.logps + begin, *lengths = in.lengths + begin;
    for (int64_t i = 0; i < n; ++i)
      h[i] = in.beta * (static_cast<double>(logps[i]) / static_cast<double>(lengths[i]) - h[i] / models) + in.gamma;
    log_sigmoids<A>(n, 0.0, h, slope);
    A* coef = in.coef + begin;
    for (int64_t i = 0; i < n; ++i)
      coef[i] = static_cast<A>(in.beta * weight * slope[i] / static_cast<double>(lengths[i]));
  });
  return Status::done;
}

// The row of an infinite top, whose columns are NaN where they are infinite too. One infinity, a response that the
// reference excludes, has the whole chance; several have no shares, and the row stays NaN.
inline bool settle(int64_t negatives, int64_t rows, bool positive, double& loss, double& rest, double* v) {
  int64_t infinite = positive;
  for (int64_t j = 0; j < negatives; ++j) infinite += v[j * rows] != v[j * rows];
  if (infinite != 1) return false;
  loss = positive ? 0.0 : std::numeric_limits<double>::infinity();
  rest = positive ? 0.0 : 1.0;
  for (int64_t j = 0; j < negatives; ++j) v[j * rows] = v[j * rows] != v[j * rows] ? 1.0 : 0.0;
  return true;
}

// A block of rows lies in v by columns, one for each negative: a_j = l_j - f_j, then e^(beta (a_j - top)) with top the
// largest of all, the positive's too. A positive or negatives of a mask fill keep no share and cost the others no
// digit.
template <class A>
Status epa_loss(const Epa<A>& in, int threads) {
  const double weight = row_weight(in.reduction, in.rows);
  const int64_t negatives = in.strong_count + in.weak_count;
  constexpr int64_t kRows = 128;
  auto read = [&](int64_t begin, int64_t n, int64_t count, const A* l, const A* f, double* v) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = (begin + i) * count + j;
        v[j * kRows + i] = static_cast<double>(l[at]) - static_cast<double>(f[at]);
      }
  };
  auto write = [&](int64_t begin, int64_t n, const double* scale, int64_t count, const double* v, A* coef) {
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < n; ++i) coef[(begin + i) * count + j] = static_cast<A>(scale[i] * v[j * kRows + i]);
  };
  over_rows(threads, in, kRows, in.rows * negatives, [&](int64_t begin, int64_t n, double* loss) {
    double own[kRows], top[kRows], rest[kRows], scale[kRows], endless = 0;
    std::vector<double> v(negatives * kRows);
    for (int64_t i = 0; i < n; ++i)
      own[i] = static_cast<double>(in.positive[begin + i]) - static_cast<double>(in.ref_positive[begin + i]);
    double* weak = v.data() + in.strong_count * kRows;
    read(begin, n, in.strong_count, in.strong, in.ref_strong, v.data());
    read(begin, n, in.weak_count, in.weak, in.ref_weak, weak);
    std::copy_n(own, n, top);
    for (int64_t j = 0; j < negatives; ++j)
      for (int64_t i = 0; i < n; ++i) top[i] = v[j * kRows + i] > top[i] ? v[j * kRows + i] : top[i];
    std::fill_n(rest, n, 0.0);
    for (int64_t j = 0; j < negatives; ++j) {
      double* column = v.data() + j * kRows;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        column[i] = static_cast<double>(exp_as(in.beta * (column[i] - top[i]), A(0)));
        rest[i] += column[i];
      }
    }
#pragma omp simd reduction(+ : endless)
    for (int64_t i = 0; i < n; ++i) {
      // The sum of all exponentials is 1 + t, t without the 1 of the largest: small losses keep their digits.
      const double behind = in.beta * (top[i] - own[i]);
      const double positive = static_cast<double>(exp_as(-behind, A(0)));
      const double t = top[i] > own[i] ? positive + rest[i] - 1.0 : rest[i];
      loss[i] = behind + static_cast<double>(log1p_as(static_cast<A>(t)));
      scale[i] = in.beta * weight / (1.0 + t);
      endless += top[i] - top[i];
    }
    for (int64_t i = 0; endless != 0.0 && i < n; ++i)
      if (top[i] == std::numeric_limits<double>::infinity() &&
          settle(negatives, kRows, own[i] == top[i], loss[i], rest[i], v.data() + i))
        scale[i] = in.beta * weight;
    for (int64_t i = 0; i < n; ++i) in.coef_positive[begin + i] = static_cast<A>(-scale[i] * rest[i]);
    write(begin, n, scale, in.strong_count, v.data(), in.coef_strong);
    write(begin, n, scale, in.weak_count, weak, in.coef_weak);
  });
  return Status::done;
}

template Status poft_loss(const Poft<float>&, int);
template Status poft_loss(const Poft<double>&, int);
template Status epa_loss(const Epa<float>&, int);
template Status epa_loss(const Epa<double>&, int);

}  // namespace qempo::cpu::QEMPO_ISA
