// The table of the kernels that are compiled beside it: once for each instruction set and once for
// CUDA, each in a namespace of that name.

#include "python/kernels.h"

#define HOS_TEXT(name) HOS_QUOTED(name)
#define HOS_QUOTED(name) #name

namespace hos {
inline namespace HOS_ISA {

extern const Kernels table;
const Kernels table = {HOS_TEXT(HOS_ISA), &noise,    &step,   &step_backward, &loss, &loss_backward,
                       &loss_scratch,     &assemble, &matvec, &matvec_scratch};

}  // namespace HOS_ISA
}  // namespace hos
