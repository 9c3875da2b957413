#pragma once

// Shaders of the rotated cache types, for vulkan-shaders-gen.cpp, which includes this where string_to_spv is known. Bits and
// values of a block are constants of the pipelines (../rq.h), so that each is compiled once for all codes.

static void rq_shaders() {
    const std::map<std::string, std::string> set_rows = { { "SET_ROWS", "1" }, { "A_TYPE", "uint" }, { "D_TYPE", "uint16_t" } };

    string_to_spv("rq_set_rows_i32", "rq_to.comp", merge_maps(set_rows, { { "B_TYPE", "uint" }, { "DATA_B_SWIZZLE", "" } }));
    string_to_spv("rq_set_rows_i64", "rq_to.comp", merge_maps(set_rows, { { "B_TYPE", "uvec2" }, { "DATA_B_SWIZZLE", ".x" } }));
    string_to_spv("rq_cpy_to", "rq_to.comp", { { "A_TYPE", "uint" }, { "D_TYPE", "uint16_t" } });
    string_to_spv("rq_cpy_from", "rq_from.comp", { { "A_TYPE", "uint16_t" }, { "D_TYPE", "float" } });
    string_to_spv("rq_get_rows", "rq_get_rows.comp", { { "A_TYPE", "uint16_t" }, { "B_TYPE", "int" }, { "D_TYPE", "float" } });
    string_to_spv("rq_dequant_transpose", "rq_dequant_transpose.comp", { { "D_TYPE", "float16_t" } });
}
