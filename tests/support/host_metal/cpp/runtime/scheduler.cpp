// A thread runs until it has to wait for others; then the next one that can run is resumed. A
// barrier or simd operation is a rendezvous at one line of kernel text that *every* thread of the
// threadgroup, or lane of the simdgroup, must reach: anything else is undefined in Metal (barriers)
// or gives values that depend on the compiler's idea of convergence (simd operations).
#include "scheduler.h"

#include <cstring>

#include "abi.h"
#include "attributes.h"
#include "fault.h"
#include "fiber.h"
#include "memory.h"
#include "order.h"

namespace hm {

Counts counts;

enum class State : uint8_t { ready, in_simd, at_barrier, returned };

struct Thread {
  Fiber fiber;
  Attributes attributes;
  unsigned id, simdgroup, lane;
  State state;
  Site site;  // where it last waited
};

// Bit l of each mask is lane l.
struct Simdgroup {
  unsigned size;
  uint32_t all, ready, waiting;
  const char* operation;
  Site site;
  // A quick lane may leave its next operand while a slow one still reads the last results.
  Exchange exchange[2];
  unsigned turn;
};

static Thread threads[MAX_THREADS];
static Simdgroup simdgroups[MAX_THREADS / SIMD_WIDTH];
static unsigned order_of_simdgroups[MAX_THREADS / SIMD_WIDTH];
static unsigned thread_count, simdgroup_count, returned_count;
static const Launch* launch;
static Thread* running;
static Fiber host;  // the stack that starts threadgroups

static struct Barrier {
  unsigned waiting;
  Site site;
} barrier;

int last_line() { return running ? running->site.line : 0; }

// ---------------------------------------------------------------- switching

static uint64_t random_state;

static uint64_t next_random() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

static void become(Thread& next) {
  running = &next;
  current_thread = next.id;
  position.thread = (int)next.id;
}

static void resume(Thread& next) {
  Thread& previous = *running;
  if (&previous == &next) return;
  become(next);
  switch_fiber(previous.fiber, next.fiber);
}

static Thread& first_ready(unsigned simdgroup) {
  return threads[simdgroup * SIMD_WIDTH + __builtin_ctz(simdgroups[simdgroup].ready)];
}

// A lane of `g` that is not in the simd operation where others wait, for the message.
static void fault_simd_divergence(Simdgroup& g, unsigned simdgroup) {
  unsigned lane = __builtin_ctz(g.all & ~g.waiting);
  const Thread& other = threads[simdgroup * SIMD_WIDTH + lane];
  const char* elsewhere = other.state == State::returned ? "has returned" : "waits at a barrier";
  fault_at(g.site, "simd-divergence", "%s is reached by lanes %08x of simdgroup %u while lane %u %s"
           " (line %d)", g.operation, g.waiting, simdgroup, lane, elsewhere, other.site.line);
}

// The running thread cannot go on: resume one that can. Lanes of the same simdgroup come first, so
// that its rendezvous completes early.
static void wait_for_others() {
  unsigned mine = running->simdgroup;
  Simdgroup& g = simdgroups[mine];
  if (g.ready) {
    uint32_t later = g.ready & ~((2u << running->lane) - 1);
    if (launch->seed && (next_random() & 1)) later = 0;
    return resume(threads[mine * SIMD_WIDTH + __builtin_ctz(later ? later : g.ready)]);
  }
  if (g.waiting) fault_simd_divergence(g, mine);
  for (unsigned k = 1; k <= simdgroup_count; k++) {
    unsigned next = order_of_simdgroups[(mine + k) % simdgroup_count];
    if (simdgroups[next].ready) return resume(first_ready(next));
  }
  // Nobody is ready: all that have not returned wait at a barrier.
  fault_at(barrier.site, "barrier-divergence", "%u of %u threads wait at this barrier, the others "
           "have returned", barrier.waiting, thread_count);
}

// ---------------------------------------------------------------- simd operations

static void count_operation(const char* name) {
  for (Counts::Operation& entry : counts.operations) {
    if (!entry.name) entry.name = name;
    if (entry.name == name || !strcmp(entry.name, name)) {
      entry.count++;
      return;
    }
  }
}

// The running lane arrives at a simd operation; true if it is the last one to do so.
static bool arrive(const char* operation, Site site) {
  Thread& t = *running;
  Simdgroup& g = simdgroups[t.simdgroup];
  t.site = site;
  if (g.waiting && (g.site.line != site.line || strcmp(g.operation, operation)))
    fault_at(site, "simd-divergence", "lane %u of simdgroup %u is at %s while lanes %08x wait in "
             "%s (line %d)", t.lane, t.simdgroup, operation, g.waiting, g.operation, g.site.line);
  if (!g.waiting) {
    g.operation = operation;
    g.site = site;
  }
  g.waiting |= 1u << t.lane;
  g.ready &= ~(1u << t.lane);
  t.state = State::in_simd;
  return g.waiting == g.all;
}

static void release(Simdgroup& g, unsigned simdgroup) {
  g.turn ^= 1;
  g.waiting = 0;
  g.ready = g.all;
  for (unsigned lane = 0; lane < g.size; lane++)
    threads[simdgroup * SIMD_WIDTH + lane].state = State::ready;
}

// ---------------------------------------------------------------- life of a thread

static void thread_main() {
  hm_kernel(launch->buffers, running->attributes);
  Thread& t = *running;
  t.state = State::returned;
  simdgroups[t.simdgroup].ready &= ~(1u << t.lane);
  returned_count++;
  if (returned_count == thread_count) switch_fiber(t.fiber, host);
  wait_for_others();
}

static void make_simdgroup(unsigned index) {
  Simdgroup& g = simdgroups[index];
  unsigned left = thread_count - index * SIMD_WIDTH;
  g.size = left < SIMD_WIDTH ? left : SIMD_WIDTH;
  g.all = g.ready = g.size == SIMD_WIDTH ? ~0u : (1u << g.size) - 1;
  g.waiting = g.turn = 0;
  order_of_simdgroups[index] = index;
}

static void shuffle_simdgroups() {
  for (unsigned i = simdgroup_count; i > 1; i--) {
    unsigned j = (unsigned)(next_random() % i), kept = order_of_simdgroups[i - 1];
    order_of_simdgroups[i - 1] = order_of_simdgroups[j];
    order_of_simdgroups[j] = kept;
  }
}

// ---------------------------------------------------------------- threadgroups

static void run_threadgroup(uint64_t index, const Triple& group) {
  unsigned size[3];
  for (int i = 0; i < 3; i++) {
    unsigned left = launch->grid[i] - group.v[i] * launch->threadgroup[i];
    size[i] = left < launch->threadgroup[i] ? left : launch->threadgroup[i];
    position.threadgroup[i] = group.v[i];
  }
  thread_count = size[0] * size[1] * size[2];
  simdgroup_count = groups_of(thread_count, SIMD_WIDTH);
  returned_count = 0;
  barrier = {};
  begin_threadgroup((unsigned)index);
  forget_variables();
  for (unsigned s = 0; s < simdgroup_count; s++) make_simdgroup(s);
  if (launch->seed) shuffle_simdgroups();
  for (unsigned id = 0; id < thread_count; id++) {
    Thread& t = threads[id];
    t.id = id;
    t.simdgroup = id / SIMD_WIDTH;
    t.lane = id % SIMD_WIDTH;
    t.state = State::ready;
    t.site = Site{"", 0};
    t.attributes = attributes_of(*launch, group, size, id);
    char* low = stack_of(id);
    start_fiber(t.fiber, low, low + STACK_BYTES - 4096, thread_main);
  }
  become(first_ready(order_of_simdgroups[0]));
  switch_fiber(host, running->fiber);
  running = nullptr;
  counts.threadgroups++;
  counts.threads += thread_count;
}

void run_launch(const Launch& given) {
  launch = &given;
  random_state = given.seed * 0x9e3779b97f4a7c15ull + 1;
  unsigned groups[3];
  for (int i = 0; i < 3; i++) groups[i] = groups_of(given.grid[i], given.threadgroup[i]);
  uint64_t total = (uint64_t)groups[0] * groups[1] * groups[2];
  for (uint64_t k = 0; k < total; k++) {
    uint64_t index = given.seed ? total - 1 - k : k;
    run_threadgroup(index, unravel(index, groups));
  }
}

}  // namespace hm

// ---------------------------------------------------------------- what kernels call

using namespace hm;

unsigned hm_lane() { return running->lane; }

Exchange& hm_simd(const char* operation, Site site, const void* operand, unsigned bytes,
                  Combine combine) {
  Simdgroup& g = simdgroups[running->simdgroup];
  Exchange& exchange = g.exchange[g.turn];
  memcpy(exchange.lane[running->lane], operand, bytes);
  if (!arrive(operation, site)) {
    wait_for_others();
    return exchange;
  }
  exchange.size = g.size;
  if (combine) combine(exchange);
  count_operation(operation);
  release(g, running->simdgroup);
  return exchange;
}

void hm_simdgroup_barrier(unsigned flags, Site site) {
  if (!arrive("simdgroup_barrier", site)) return wait_for_others();
  order_simdgroup(running->simdgroup, flags);
  counts.simdgroup_barriers++;
  release(simdgroups[running->simdgroup], running->simdgroup);
}

void hm_threadgroup_barrier(unsigned flags, Site site) {
  Thread& t = *running;
  t.site = site;
  if (barrier.waiting && barrier.site.line != site.line)
    fault_at(site, "barrier-divergence", "thread %u is at this barrier while %u threads wait at "
             "the one of line %d", t.id, barrier.waiting, barrier.site.line);
  barrier.site = site;
  t.state = State::at_barrier;
  simdgroups[t.simdgroup].ready &= ~(1u << t.lane);
  if (++barrier.waiting < thread_count) return wait_for_others();
  order_threadgroup(flags);
  counts.threadgroup_barriers++;
  barrier.waiting = 0;
  for (unsigned id = 0; id < thread_count; id++) threads[id].state = State::ready;
  for (unsigned s = 0; s < simdgroup_count; s++) simdgroups[s].ready = simdgroups[s].all;
}

void hm_absent_lane(const char* operation, Site site, unsigned lane) {
  fault_at(site, "simd-absent-lane", "%s: lane %u reads lane %u, which the simdgroup does not have",
           operation, running->lane, lane);
}
