#include "fault.h"

#include <cstdarg>
#include <cstdio>
#include <unistd.h>

namespace hm {

Position position;

// Fields are separated by tabs, so that the message may hold anything else.
[[noreturn]] static void report(Site site, uintptr_t pc, const char* kind, const char* format,
                                va_list arguments) {
  char message[512];
  vsnprintf(message, sizeof message, format, arguments);
  const unsigned* group = position.threadgroup;
  dprintf(STDOUT_FILENO, "fault\t%s\t%s\t%d\t%lx\t%d\t%u,%u,%u\t%s\n", kind, site.file, site.line,
          (unsigned long)pc, position.thread, group[0], group[1], group[2], message);
  _exit(1);
}

void fault_at(Site site, const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(site, 0, kind, format, arguments);
}

void fault_pc(uintptr_t pc, const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  report(Site{"", 0}, pc, kind, format, arguments);
}

}  // namespace hm
