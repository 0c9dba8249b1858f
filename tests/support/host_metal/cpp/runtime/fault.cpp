#include "fault.h"

#include <cstdarg>
#include <cstdio>
#include <unistd.h>

namespace hm {

Position position;

// Fields are separated by tabs, so that the message may hold anything else.
void fault_at(Origin origin, const char* kind, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  const unsigned* group = position.threadgroup;
  dprintf(STDOUT_FILENO, "fault\t%s\t%s\t%d\t%lx\t%d\t%u,%u,%u\t%s\n", kind, origin.site.file,
          origin.site.line, (unsigned long)origin.pc, position.thread, group[0], group[1],
          group[2], message);
  _exit(1);
}

}  // namespace hm
