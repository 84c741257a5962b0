/* Which CPU this is and which kernels it runs. Beside the kernels themselves the only file that knows of CPUs. */

#include <string.h>

#include "kernels.h"
#include "model.h"

#define DECLARE(code, isa, name)               \
    int bnnf_##name##_fits(const bnnf__op *op); \
    size_t bnnf_##name##_pack(bnnf__op *op, void *memory); \
    void bnnf_##name##_run(const bnnf__op *op, const bnnf__io *io);
BNNF__KERNELS(DECLARE)

#define LINE(code, isa, name) \
    {BNNF_OP_##code, isa, "bnnf_" #name, bnnf_##name##_fits, bnnf_##name##_pack, bnnf_##name##_run},
static const bnnf__kernel kernels[] = {BNNF__KERNELS(LINE)};

#define KERNELS (sizeof kernels / sizeof kernels[0])

/* avx512base: as if the CPU had neither VPOPCNTDQ nor VNNI; what avx512 is on a CPU that has neither. */
static const char *const isas[] = {"avx512", "avx512base", "avx2", "scalar"};

#define ISAS ((int)(sizeof isas / sizeof isas[0]))

/* The builtins ask the operating system too: whether it saves the wide registers. What a kernel needs beyond these
   (VPOPCNTDQ, VNNI) its own `fits` asks for. */
int bnnf__cpu_runs(const char *isa) {
#ifdef BNNF__X86
    __builtin_cpu_init();
#ifdef BNNF__HAVE_AVX512
    if (!strcmp(isa, "avx512") || !strcmp(isa, "avx512base"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#ifdef BNNF__HAVE_AVX2
    if (!strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
#endif
#endif
    return !strcmp(isa, "scalar");
}

const char *bnnf_isa_name(int i) {
    for (int k = 0; k < ISAS; k++)
        if (bnnf__cpu_runs(isas[k]) && i-- == 0) return isas[k];
    return NULL;
}

/* Lines of kernels.h stand in the order of the instruction sets: what none of `isa` fits, one of a lesser set does. */
const bnnf__kernel *bnnf__pick(const bnnf__op *op, const char *isa) {
    int seen = 0;
    for (size_t i = 0; i < KERNELS; i++) {
        const bnnf__kernel *kernel = &kernels[i];
        seen |= !strcmp(kernel->isa, isa);
        if (seen && kernel->code == op->record.code && bnnf__cpu_runs(kernel->isa) && kernel->fits(op)) return kernel;
    }
    return NULL; /* never: the scalar ones fit all */
}

void bnnf__relax(void) {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
    __builtin_ia32_pause();
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
