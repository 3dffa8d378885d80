// What UBSan's runtime in atheris lacks: checks of C++ types, which find nothing here.
unsigned long __ubsan_vptr_type_cache[128];
void __ubsan_handle_dynamic_type_cache_miss(void) {}
void __ubsan_handle_dynamic_type_cache_miss_abort(void) {}
void __ubsan_handle_function_type_mismatch_v1(void) {}
void __ubsan_handle_function_type_mismatch_v1_abort(void) {}
