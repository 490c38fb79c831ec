// Memory that a thread keeps from call to call.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace TREADLE_NS {

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  // At least so many bytes, at a multiple of 64; what was there is lost. Null where there is no memory.
  void* room(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
      data = std::aligned_alloc(4096, size);
      if (!data) std::abort();  // the kernel has no way to say so
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

}  // namespace TREADLE_NS
