// runner DATA < job: runs the kernel that is linked in over the buffers in the file DATA.
//
// The job is lines of words (see runner.py, which writes it and reads what is printed here); the
// buffers' bytes lie in DATA, into which outputs are written back.
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <initializer_list>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include "fault.h"
#include "memory.h"
#include "order.h"
#include "scheduler.h"

using namespace hm;

struct Buffer {
  char kind[16], name[128];
  unsigned item;
  unsigned long bytes, offset;
};

struct Job {
  Launch launch;
  MemoryLimits limits;
  double seconds;
  unsigned count;
  Buffer buffers[MAX_BUFFERS];
};

static void expect(bool good, const char* what) {
  if (good) return;
  fprintf(stderr, "host_metal: bad job: %s\n", what);
  _exit(2);
}

static Job read_job() {
  static Job job;
  unsigned misalign;
  Launch& l = job.launch;
  expect(scanf(" grid %u %u %u", &l.grid[0], &l.grid[1], &l.grid[2]) == 3, "grid");
  expect(scanf(" threadgroup %u %u %u", &l.threadgroup[0], &l.threadgroup[1],
               &l.threadgroup[2]) == 3, "threadgroup");
  expect(scanf(" seed %lu misalign %u limit %lu seconds %lf", &l.seed, &misalign,
               &job.limits.threadgroup_bytes, &job.seconds) == 4, "options");
  job.limits.misalign = misalign != 0;
  expect(scanf(" buffers %u", &job.count) == 1 && job.count <= MAX_BUFFERS, "buffers");
  for (unsigned i = 0; i < job.count; i++) {
    Buffer& b = job.buffers[i];
    expect(scanf(" %15s %127s %u %lu %lu", b.kind, b.name, &b.item, &b.bytes, &b.offset) == 5,
           "buffer");
  }
  return job;
}

static char* map_data(const char* path) {
  int file = open(path, O_RDWR);
  struct stat status;
  expect(file >= 0 && fstat(file, &status) == 0, path);
  void* data = mmap(nullptr, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  expect(data != MAP_FAILED, "mmap");
  return (char*)data;
}

static bool is_output(const Buffer& b) { return strcmp(b.kind, "input") != 0; }

static void load_buffers(Job& job, const char* data) {
  for (unsigned i = 0; i < job.count; i++) {
    const Buffer& b = job.buffers[i];
    Space space = is_output(b) ? Space::output : Space::input;
    void* memory = job.launch.buffers[i] = add_buffer(i, b.name, space, b.bytes, b.item);
    bool blank = !strcmp(b.kind, "output");  // else an input, or an output with an init_value
    if (!blank) memcpy(memory, data + b.offset, b.bytes);
    if (is_output(b) && !blank) mark_written(buffers[i]);
  }
}

static void save_outputs(const Job& job, char* data) {
  for (unsigned i = 0; i < job.count; i++) {
    const Buffer& b = job.buffers[i];
    if (!is_output(b)) continue;
    uint64_t first = 0, missing = count_unwritten(buffers[i], first);
    if (missing)
      fault_at(Site{b.name, 0}, "unwritten-output", "%lu of %lu elements of '%s' are never written,"
               " the first is %lu", missing, b.bytes / b.item, b.name, first);
    memcpy(data + b.offset, job.launch.buffers[i], b.bytes);
  }
}

static void print_counts(const Job& job) {
  for (unsigned i = 0; i < job.count; i++)
    printf("buffer\t%s\t%lu\t%lu\t%lu\n", job.buffers[i].name, buffers[i].loaded,
           buffers[i].stored, buffers[i].distinct);
  uint64_t loaded = 0, stored = 0;
  for (const Region& variable : variables) {
    loaded += variable.loaded;
    stored += variable.stored;
  }
  printf("threadgroup_loaded\t%lu\nthreadgroup_stored\t%lu\n", loaded, stored);
  printf("threadgroup_bytes\t%lu\n", threadgroup_bytes_used());
  printf("threadgroups\t%lu\nthreads\t%lu\n", counts.threadgroups, counts.threads);
  printf("threadgroup_barriers\t%lu\n", counts.threadgroup_barriers);
  printf("simdgroup_barriers\t%lu\n", counts.simdgroup_barriers);
  for (const Counts::Operation& o : counts.operations)
    if (o.name) printf("simd\t%s\t%lu\n", o.name, o.count);
  printf("done\n");
}

// ---------------------------------------------------------------- signals

static double seconds_allowed;

static void on_signal(int signal, siginfo_t* info, void* context) {
  uintptr_t pc = 0;
#if defined(__x86_64__)
  pc = (uintptr_t)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#elif defined(__aarch64__)
  pc = (uintptr_t)((ucontext_t*)context)->uc_mcontext.pc;
#endif
  if (signal == SIGVTALRM)
    fault_at(pc + 1, "timeout", "the kernel still runs after %.1f s of CPU time (this thread last "
             "waited at line %d)", seconds_allowed, last_line());
  if (signal == SIGFPE) fault_at(pc + 1, "undefined", "division by zero");
  fault_page((uintptr_t)info->si_addr, pc + 1);
}

// CPU time, not wall time: a busy machine must not look like an endless loop.
static void catch_signals(double seconds) {
  static char stack[64 * 1024];  // a kernel may have overflowed its own
  stack_t alternative = {};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM})
    sigaction(signal, &action, nullptr);
  seconds_allowed = seconds;
  itimerval timer = {};
  timer.it_value.tv_sec = (time_t)seconds;
  timer.it_value.tv_usec = (suseconds_t)((seconds - (double)(time_t)seconds) * 1e6);
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

int main(int argc, char** argv) {
  expect(argc == 2, "usage: runner DATA < job");
  Job job = read_job();
  char* data = map_data(argv[1]);
  const unsigned* t = job.launch.threadgroup;
  expect(t[0] * t[1] * t[2] <= MAX_THREADS, "more than 1024 threads in a threadgroup");
  reserve_memory(job.limits, t[0] * t[1] * t[2]);
  load_buffers(job, data);
  catch_signals(job.seconds);
  run_launch(job.launch);
  save_outputs(job, data);
  print_counts(job);
  return 0;
}
