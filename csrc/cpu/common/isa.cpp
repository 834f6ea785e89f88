#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "qempo/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace qempo::cpu {
namespace {

// QEMPO_CPU_ISA bounds it from above, so that one value serves machines of several kinds.
Isa best() {
  const Isa level = runs_here(Isa::avx512) ? Isa::avx512 : runs_here(Isa::avx2) ? Isa::avx2 : Isa::baseline;
  const char* asked = std::getenv("QEMPO_CPU_ISA");
  if (!asked || !*asked) return level;
  for (Isa candidate : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (!std::strcmp(asked, isa_name(candidate))) return candidate < level ? candidate : level;
  throw std::invalid_argument(std::string("QEMPO_CPU_ISA: wanted baseline, avx2 or avx512, got ") + asked);
}

std::atomic<Isa>& current() {
  // If best() throws, nothing is set and the next call reads again.
  static std::atomic<Isa> level{best()};
  return level;
}

}  // namespace

bool runs_here(Isa level) {
  if (level == Isa::baseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

Isa isa() { return current().load(std::memory_order_relaxed); }

bool use_isa(Isa level) {
  if (!runs_here(level)) return false;
  current().store(level, std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

const char* vendor() {
  static char name[13] = "";
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  if (!name[0] && __get_cpuid(0, &eax, &ebx, &ecx, &edx)) {
    std::memcpy(name, &ebx, 4);
    std::memcpy(name + 4, &edx, 4);
    std::memcpy(name + 8, &ecx, 4);
  }
#endif
  return name;
}

}  // namespace qempo::cpu
