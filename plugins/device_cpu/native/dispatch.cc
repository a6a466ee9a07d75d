#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

#if OPSIN_X86
#include <cpuid.h>
#endif
#if OPSIN_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if OPSIN_ARM && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace opsin {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512vnni, Isa::amx, Isa::dotprod};

#if OPSIN_X86 && OPSIN_HAS_AMX
// Linux keeps the tiles' state only for processes that ask (Documentation/arch/x86/xstate.rst).
bool amx_permitted() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, int8 = d >> 25 & 1;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return tile && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool has(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
#if OPSIN_X86
    case Isa::avx2: {
      unsigned a, b, c, d;
      const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
      return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    case Isa::avx512:
      return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512vnni:
      return has(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
#if OPSIN_HAS_AMX
    case Isa::amx:
      return has(Isa::avx512vnni) && amx_permitted();
#endif
#endif
#if OPSIN_ARM && defined(__linux__)
    case Isa::dotprod: {
      constexpr unsigned long kAsimdDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
      return getauxval(AT_HWCAP) & kAsimdDotProduct;
    }
#endif
    default:
      return false;
  }
}

Isa choose() {
  const char* wanted = getenv("OPSIN_CPU_ISA");
  Isa best = Isa::portable;
  for (Isa isa : kAll) {
    if (!has(isa)) continue;
    best = isa;
    if (wanted != nullptr && strcmp(wanted, isa_name(isa)) == 0) return isa;
  }
  return best;  // the caller (native.py) refuses a name that did not come true
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512vnni", "amx", "dotprod"};
  return names[static_cast<int>(isa)];
}

}  // namespace opsin

// Raised with every change of an exported function's meaning; native.py loads no other.
OPSIN_EXPORT int opsin_abi_version() { return OPSIN_ABI_VERSION; }

// The instruction set in use.
OPSIN_EXPORT const char* opsin_isa() { return opsin::isa_name(opsin::isa()); }

// Whether this library holds kernels for the instruction set and this processor can run them.
OPSIN_EXPORT int opsin_has_isa(const char* name) {
  for (opsin::Isa isa : opsin::kAll) {
    if (strcmp(name, opsin::isa_name(isa)) == 0) return opsin::has(isa);
  }
  return 0;
}
