// Threads without linking an OpenMP runtime.
//
// torch ships its own OpenMP runtime under a name of its own. A second one linked here would keep its workers spinning
// on the cores that torch's GEMMs want (docs/cpu.md has the measurement). So the runtime that is already in the process
// is borrowed through its GOMP entry points, and std::thread serves where there is none.
#include <algorithm>
#include <thread>
#include <vector>

#include "qempo/cpu.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#define QEMPO_HAS_DLSYM 1
#endif

namespace qempo::cpu {
namespace {

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

OpenMP find_openmp() {
  OpenMP omp;
#ifdef QEMPO_HAS_DLSYM
  omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  omp.num_threads = reinterpret_cast<decltype(omp.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  if (!omp.thread_num || !omp.num_threads) omp.parallel = nullptr;
#endif
  return omp;
}

const OpenMP& openmp() {
  static const OpenMP omp = find_openmp();
  return omp;
}

struct Job {
  void* context;
  RangeFn run;
  int64_t items;
};

void run_part(const Job& job, int thread, int threads) {
  const int64_t begin = job.items * thread / threads, end = job.items * (thread + 1) / threads;
  if (begin < end) job.run(job.context, thread, begin, end);
}

}  // namespace

const char* thread_runtime() { return openmp().parallel ? "openmp" : "std::thread"; }

void parallel_for(int threads, int64_t items, void* context, RangeFn run) {
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), items));
  if (threads <= 1) {
    if (items > 0) run(context, 0, 0, items);
    return;
  }
  Job job{context, run, items};
  const OpenMP& omp = openmp();
  if (omp.parallel) {
    // The runtime may give fewer threads than asked (nested regions): split by what came.
    auto body = [](void* data) { run_part(*static_cast<Job*>(data), openmp().thread_num(), openmp().num_threads()); };
    omp.parallel(body, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(threads - 1);
  for (int t = 1; t < threads; ++t) workers.emplace_back([&job, t, threads] { run_part(job, t, threads); });
  run_part(job, 0, threads);
  for (auto& worker : workers) worker.join();
}

}  // namespace qempo::cpu
