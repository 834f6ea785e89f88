// Groups whose quality is far above the ridge: the square-root factorisation of docs/dpp.md, in scalar double, one
// group at a time.
#include "qempo/dpp.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace qempo::cpu {
namespace {

using Matrix = std::vector<double>;  // (k, k) by rows unless said otherwise
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A = D^-1 (L + ridge I) D^-1 with A^-1 = V V^T and V^T T X = Z X; rows of V and columns of Z in the order of the
// samples.
struct Factor {
  std::vector<double> log_d, t;
  Matrix v, z;
  double logdet;
};

// Length of x without squares that leave the range: entries go down to e^-500.
double length(const double* x, int64_t n) {
  double top = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) top = x[i] != x[i] ? x[i] : std::max(top, std::abs(x[i]));
  if (!(top > 0)) return top;
  for (int64_t i = 0; i < n; ++i) sum += (x[i] / top) * (x[i] / top);
  return top * std::sqrt(sum);
}

// Pivoted Cholesky of the cosines, largest s^2 v first; rows within rounding of the others last, with zero columns.
void pivoted(int64_t k, const double* cosines, const double* log_s, std::vector<int64_t>& order, Matrix& factor) {
  Matrix rest(cosines, cosines + k * k), unordered(k * k, 0.0);
  std::vector<bool> left(k, true);
  const double floor = dpp_noise(k);
  for (int64_t step = 0; step < k; ++step) {
    int64_t pivot = -1, dependent = -1;
    double best = -kInfinity;
    for (int64_t i = 0; i < k; ++i) {
      if (!left[i]) continue;
      if (dependent < 0) dependent = i;
      const double v = rest[i * k + i];
      if (v <= floor) continue;
      const double score = 2 * log_s[i] + std::log(v);
      if (pivot < 0 || score > best) pivot = i, best = score;
    }
    const int64_t p = pivot < 0 ? dependent : pivot;
    order[step] = p;
    if (pivot >= 0) {
      const double root = std::sqrt(rest[p * k + p]);
      for (int64_t i = 0; i < k; ++i) unordered[i * k + step] = left[i] ? rest[i * k + p] / root : 0.0;
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) rest[i * k + j] -= unordered[i * k + step] * unordered[j * k + step];
    }
    left[p] = false;
  }
  for (int64_t i = 0; i < k; ++i) std::copy_n(&unordered[order[i] * k], k, &factor[i * k]);
}

// x (rows, k) becomes x F^-1 for lower triangular F whose rows and columns outside `use` count as those of I.
void solve_right(int64_t k, const Matrix& f, const std::vector<bool>& use, double* x, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = k - 1; j >= 0; --j) {
      if (!use[j]) continue;
      double sum = x[r * k + j];
      for (int64_t i = j + 1; i < k; ++i)
        if (use[i]) sum -= x[r * k + i] * f[i * k + j];
      x[r * k + j] = sum / f[j * k + j];
    }
}

// Householder QR of columns (k columns of length m, one after the other). R is left in the upper part, and q (k, m)
// gets the columns of Q.
void householder(int64_t m, int64_t k, Matrix& columns, Matrix& q) {
  std::vector<double> tau(k, 0.0);
  Matrix reflectors(k * m, 0.0);
  auto reflect = [&](int64_t j, double* x) {
    const double* h = &reflectors[j * m];
    double dot = 0;
    for (int64_t i = j; i < m; ++i) dot += h[i] * x[i];
    dot *= tau[j];
    for (int64_t i = j; i < m; ++i) x[i] -= dot * h[i];
  };
  for (int64_t j = 0; j < k; ++j) {
    double* x = &columns[j * m];
    const double tail = length(x + j + 1, m - j - 1);
    if (tail == 0) continue;
    const double norm = std::hypot(x[j], tail), beta = x[j] > 0 ? -norm : norm, pivot = x[j] - beta;
    reflectors[j * m + j] = 1;
    for (int64_t i = j + 1; i < m; ++i) reflectors[j * m + i] = x[i] / pivot;
    tau[j] = -pivot / beta;
    x[j] = beta;
    std::fill(x + j + 1, x + m, 0.0);
    for (int64_t c = j + 1; c < k; ++c) reflect(j, &columns[c * m]);
  }
  std::fill(q.begin(), q.end(), 0.0);
  for (int64_t c = 0; c < k; ++c) {
    q[c * m + c] = 1;
    for (int64_t j = k - 1; j >= 0; --j) reflect(j, &q[c * m]);
  }
}

Factor factorise(int64_t k, const double* cosines, const double* log_s, double ridge) {
  std::vector<int64_t> order(k);
  Matrix f(k * k);
  pivoted(k, cosines, log_s, order, f);
  std::vector<double> ls(k), ld(k), t(k);
  std::vector<bool> independent(k), heavy(k);
  for (int64_t i = 0; i < k; ++i) {
    ls[i] = log_s[order[i]];
    ld[i] = ls[i] < 0 ? 0 : ls[i];
    t[i] = std::exp(ls[i] - ld[i]);
    independent[i] = f[i * k + i] != 0;
    heavy[i] = independent[i] && 2 * (ls[i] + std::log(f[i * k + i])) > std::log(ridge);
  }
  // Rows with s^2 v > ridge are taken out of the others by hand, F_other = W F_heavy: what is left of an equal row is
  // then exactly its ridge, e^-1000 of the row, and not rounding.
  Matrix weights(k * k, 0.0);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j)
      if (heavy[j] && !heavy[i]) weights[i * k + j] = f[i * k + j];
  solve_right(k, f, heavy, weights.data(), k);
  const int64_t m = 2 * k;
  Matrix columns(k * m, 0.0), q(k * m);
  for (int64_t i = 0; i < k; ++i) {
    const double scale = std::sqrt(ridge) * std::exp(-ld[i]);
    columns[i * m + k + i] = scale;
    for (int64_t j = 0; j < k; ++j) {
      double& w = weights[i * k + j];
      if (std::abs(w) <= dpp_noise(k)) w = 0;
      if (heavy[i] || !heavy[j]) columns[i * m + j] = t[i] * f[i * k + j];
      if (w != 0) columns[i * m + k + j] = -scale * w * std::exp(ls[i] - ls[j]);
    }
  }
  householder(m, k, columns, q);
  // V = (I - W')^T R^-1, back substitution column by column.
  Matrix v(k * k, 0.0);
  for (int64_t c = 0; c < k; ++c)
    for (int64_t i = c; i >= 0; --i) {
      double sum = i == c ? 1.0 : 0.0;
      for (int64_t j = i + 1; j <= c; ++j) sum -= columns[j * m + i] * v[j * k + c];
      v[i * k + c] = sum / columns[i * m + i];
    }
  for (int64_t p = 0; p < k; ++p)
    for (int64_t i = 0; i < k; ++i)
      if (const double w = weights[i * k + p]; w != 0)
        for (int64_t c = 0; c < k; ++c) v[p * k + c] -= w * (t[i] / t[p]) * v[i * k + c];
  // Z = Q_F^T F_P^-1 on the independent rows, 0 on the others.
  Matrix z(k * k, 0.0);
  for (int64_t c = 0; c < k; ++c)
    for (int64_t j = 0; j < k; ++j) z[c * k + j] = independent[j] ? q[c * m + j] : 0.0;
  solve_right(k, f, independent, z.data(), k);

  Factor out{std::vector<double>(k), std::vector<double>(k), Matrix(k * k), Matrix(k * k), 0.0};
  for (int64_t i = 0; i < k; ++i) {
    out.log_d[order[i]] = ld[i];
    out.t[order[i]] = t[i];
    std::copy_n(&v[i * k], k, &out.v[order[i] * k]);
    for (int64_t c = 0; c < k; ++c) out.z[c * k + order[i]] = z[c * k + i];
    out.logdet += 2 * (std::log(std::abs(columns[i * m + i])) + ld[i]);
  }
  return out;
}

// Rows of v scaled to length 1; their lengths, up to e^500, as logarithms.
std::vector<double> unit_rows(int64_t k, Matrix& v) {
  std::vector<double> logs(k);
  for (int64_t i = 0; i < k; ++i) {
    const double norm = length(&v[i * k], k);
    for (int64_t c = 0; c < k; ++c) v[i * k + c] /= norm;
    logs[i] = std::log(norm);
  }
  return logs;
}

// log(1 - P^2) with P = a . b of unit vectors: 1 - |P| = |a -+ b|^2 / 2 keeps its digits near 0.
double log_one_minus_square(int64_t k, const double* a, const double* b) {
  double p = 0;
  for (int64_t c = 0; c < k; ++c) p += a[c] * b[c];
  std::vector<double> difference(k);
  for (int64_t c = 0; c < k; ++c) difference[c] = p < 0 ? a[c] + b[c] : a[c] - b[c];
  return 2 * std::log(length(difference.data(), k)) - std::log(2.0) + std::log1p(std::abs(p));
}

}  // namespace

double dpp_noise(int64_t k) { return 8 * static_cast<double>(k) * std::numeric_limits<double>::epsilon(); }

bool dpp_is_careful(int64_t k, const double* log_s, double ridge) {
  const double top = *std::max_element(log_s, log_s + k);
  return 2 * top > std::log(1e4 * ridge);
}

void dpp_careful_forward(int64_t k, const double* cosines, const double* log_s, double ridge, double* logdet,
                         double* gains, double* baselines) {
  Factor factor = factorise(k, cosines, log_s, ridge);
  const std::vector<double> lengths = unit_rows(k, factor.v);
  *logdet = factor.logdet;
  for (int64_t i = 0; i < k; ++i) gains[i] = 2 * (factor.log_d[i] - lengths[i]);
  for (int64_t i = 0; i < k; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < k; ++j)
      if (j != i) sum += gains[j] - log_one_minus_square(k, &factor.v[i * k], &factor.v[j * k]);
    baselines[i] = k > 1 ? sum / static_cast<double>(k - 1) : std::numeric_limits<double>::quiet_NaN();
  }
}

void dpp_careful_backward(int64_t k, const double* cosines, const double* log_s, double ridge, double grad_logdet,
                          const double* grad_gains, double* w) {
  Factor factor = factorise(k, cosines, log_s, ridge);
  Matrix u = factor.v;
  unit_rows(k, u);
  // W = 2 T V (grad_logdet I + U^T diag(grad_gains) U) Z
  Matrix inner(k * k, 0.0), right(k * k, 0.0);
  for (int64_t a = 0; a < k; ++a) inner[a * k + a] = grad_logdet;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t a = 0; a < k; ++a)
      for (int64_t b = 0; b < k; ++b) inner[a * k + b] += grad_gains[i] * u[i * k + a] * u[i * k + b];
  auto multiply = [k](const Matrix& a, const Matrix& b, double* out) {
    std::fill_n(out, k * k, 0.0);
    for (int64_t i = 0; i < k; ++i)
      for (int64_t l = 0; l < k; ++l)
        for (int64_t j = 0; j < k; ++j) out[i * k + j] += a[i * k + l] * b[l * k + j];
  };
  multiply(inner, factor.z, right.data());
  multiply(factor.v, right, w);
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < k; ++j) w[i * k + j] *= 2 * factor.t[i];
}

}  // namespace qempo::cpu
