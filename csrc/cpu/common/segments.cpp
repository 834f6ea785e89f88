// Offsets as the losses read them: the check that makes their loops safe.
#include "qempo/losses.h"

namespace qempo::cpu {

bool Segments::cover(int64_t total, int64_t at_least) const {
  if (!data) return true;  // checked with the sizes in Python
  int64_t before = first(0);
  if (before != 0) return false;
  for (int64_t i = 1; i <= count; ++i) {
    const int64_t next = first(i);
    // Not next - before < at_least: the difference of wild offsets may overflow.
    if (next < before || next > total || next - before < at_least) return false;
    before = next;
  }
  return before == total;
}

}  // namespace qempo::cpu
