// Asynchronous copies as late as the rules allow: the target holds NaN from the call on, and the
// bytes arrive when the thread waits for their batch.
#pragma once

#include "cuda_runtime.h"

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0);
void __pipeline_commit();
void __pipeline_wait_prior(int batches);
