// What a kernel prints and how its assertions fail: vprintf and __assertfail (see math.h).
#pragma once
#include "math.h"

extern "C" long write(int file, const void* data, size_t bytes);

namespace ptx {

// One conversion of a format (%-8.3f) with its argument, formatted.  Arguments lie one behind
// another, each aligned to its size; short ones are passed as int, f32 as f64.
inline u32 format_one(char* out, u32 space, const char* specification,
                      const unsigned char*& arguments) {
  u32 length = u32(__builtin_strlen(specification));
  char kind = specification[length - 1];
  bool is_long = false;
  for (u32 i = 1; i + 1 < length; i++)
    is_long |= __builtin_strchr("lzjt", specification[i]) != nullptr;
  bool is_float = __builtin_strchr("fFeEgGaA", kind) != nullptr;
  u32 size = is_float || is_long || kind == 's' || kind == 'p' ? 8 : 4;
  u64 at = (reinterpret_cast<u64>(arguments) + size - 1) / size * size;
  arguments = reinterpret_cast<const unsigned char*>(at) + size;
  const void* from = pointer(at);
  int written;
  if (is_float)
    written = __builtin_snprintf(out, space, specification, load<f64>(from));
  else if (size == 8)
    written = __builtin_snprintf(out, space, specification, load<u64>(from));
  else
    written = __builtin_snprintf(out, space, specification, load<u32>(from));
  return written < 0 ? 0 : u32(written) < space ? u32(written) : space - 1;
}

// vprintf(format, arguments): writes to the standard error output, returns the arguments' number.
inline u32 print_formatted(u64 format_address, u64 arguments_address) {
  const char* format = static_cast<const char*>(pointer(format_address));
  auto* arguments = static_cast<const unsigned char*>(pointer(arguments_address));
  char line[1024];
  u32 used = 0, count = 0;
  while (*format && used + 1 < sizeof line) {
    if (*format != '%' || format[1] == '%') {
      format += *format == '%';
      line[used++] = *format++;
      continue;
    }
    char specification[32] = {};
    u32 length = 0;
    do {
      specification[length++] = *format++;
    } while (*format && length < 30 && !__builtin_strchr("diouxXcspfFeEgGaA", *format));
    if (*format) specification[length++] = *format++;
    used += format_one(line + used, u32(sizeof line) - used, specification, arguments);
    count++;
  }
  (void)!::write(2, line, used);
  return count;
}

// __assertfail(message, file, line, function, size of a character)
[[noreturn]] inline void assertion_failed(u64 message, u64 file, u32 line, u64 function, u32 site) {
  char text[512];
  __builtin_snprintf(text, sizeof text, "%s:%u: %s: assertion `%s' failed",
                     static_cast<const char*>(pointer(file)), line,
                     static_cast<const char*>(pointer(function)),
                     static_cast<const char*>(pointer(message)));
  fatal("device-assert", text, site);
}

}  // namespace ptx
