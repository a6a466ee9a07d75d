// Which instruction set runs, and how a family of kernels finds its code for it.
//
// Every source named *_kernels.cc is compiled once per instruction set, with the flags of that set and with
// OPSIN_ISA naming a namespace (portable, avx2, ...). Each ends with one constant table of function pointers:
//
//     namespace opsin::OPSIN_ISA { extern const GemmTable gemm_table = {...}; }
//
// The family's header declares the tables with OPSIN_TABLES(GemmTable, gemm_table); its front (compiled once,
// without special flags) asks for the right one with OPSIN_PICK(gemm_table).
//
// A *_kernels.cc must not instantiate inline functions of the standard library: the linker keeps one copy of
// such a function, and it might be the one compiled for instructions that this processor lacks.
#pragma once

namespace opsin {

// In rising order on each architecture; a processor that has one has those before it.
enum class Isa { portable, avx2, avx512, avx512vnni, amx, dotprod };

// The best that this processor has and this library holds, or the one that OPSIN_CPU_ISA names if that is lower.
// Settled at the first call.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace opsin

#if defined(__x86_64__) || defined(_M_X64)
#define OPSIN_X86 1
#else
#define OPSIN_X86 0
#endif
#if defined(__aarch64__)
#define OPSIN_ARM 1
#else
#define OPSIN_ARM 0
#endif

// CMake defines OPSIN_HAS_AMX where the compiler knows its instructions.
#ifndef OPSIN_HAS_AMX
#define OPSIN_HAS_AMX 0
#endif

#define OPSIN_TABLE_(Type, table, isa) \
  namespace isa {                      \
  extern const Type table;             \
  }

#if OPSIN_X86 && OPSIN_HAS_AMX
#define OPSIN_TABLES(Type, table)      \
  OPSIN_TABLE_(Type, table, portable)  \
  OPSIN_TABLE_(Type, table, avx2)      \
  OPSIN_TABLE_(Type, table, avx512)    \
  OPSIN_TABLE_(Type, table, avx512vnni)\
  OPSIN_TABLE_(Type, table, amx)
#define OPSIN_PICK(table)                                         \
  (opsin::isa() == opsin::Isa::amx          ? &opsin::amx::table  \
   : opsin::isa() == opsin::Isa::avx512vnni ? &opsin::avx512vnni::table \
   : opsin::isa() == opsin::Isa::avx512     ? &opsin::avx512::table     \
   : opsin::isa() == opsin::Isa::avx2       ? &opsin::avx2::table       \
                                            : &opsin::portable::table)
#elif OPSIN_X86
#define OPSIN_TABLES(Type, table)      \
  OPSIN_TABLE_(Type, table, portable)  \
  OPSIN_TABLE_(Type, table, avx2)      \
  OPSIN_TABLE_(Type, table, avx512)    \
  OPSIN_TABLE_(Type, table, avx512vnni)
#define OPSIN_PICK(table)                                               \
  (opsin::isa() == opsin::Isa::avx512vnni ? &opsin::avx512vnni::table   \
   : opsin::isa() == opsin::Isa::avx512   ? &opsin::avx512::table       \
   : opsin::isa() == opsin::Isa::avx2     ? &opsin::avx2::table         \
                                          : &opsin::portable::table)
#elif OPSIN_ARM
#define OPSIN_TABLES(Type, table)     \
  OPSIN_TABLE_(Type, table, portable) \
  OPSIN_TABLE_(Type, table, dotprod)
#define OPSIN_PICK(table) \
  (opsin::isa() == opsin::Isa::dotprod ? &opsin::dotprod::table : &opsin::portable::table)
#else
#define OPSIN_TABLES(Type, table) OPSIN_TABLE_(Type, table, portable)
#define OPSIN_PICK(table) (&opsin::portable::table)
#endif

#define OPSIN_EXPORT extern "C" __attribute__((visibility("default")))
