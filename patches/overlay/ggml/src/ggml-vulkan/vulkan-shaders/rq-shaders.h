#pragma once

// Shaders of the rotated cache types, for vulkan-shaders-gen.cpp, which includes this where string_to_spv is known. Bits and
// values of a block are constants of the pipelines (../rq.h), so that each is compiled once for all codes.

static void rq_shaders() {
    const std::map<std::string, std::string> set_rows = { { "SET_ROWS", "1" }, { "A_TYPE", "uint" }, { "D_TYPE", "uint16_t" } };

    string_to_spv("rq_set_rows_i32", "rq_to.comp", merge_maps(set_rows, { { "B_TYPE", "uint" }, { "DATA_B_SWIZZLE", "" } }));
    string_to_spv("rq_set_rows_i64", "rq_to.comp", merge_maps(set_rows, { { "B_TYPE", "uvec2" }, { "DATA_B_SWIZZLE", ".x" } }));
    string_to_spv("rq_cpy_to", "rq_to.comp", { { "A_TYPE", "uint" }, { "D_TYPE", "uint16_t" } });
    string_to_spv("rq_cpy_from", "rq_from.comp", { { "A_TYPE", "uint16_t" }, { "D_TYPE", "float" } });
    string_to_spv("rq_cpy_from_f16", "rq_from.comp", { { "A_TYPE", "uint16_t" }, { "D_TYPE", "float16_t" } });
    string_to_spv("rq_get_rows", "rq_get_rows.comp", { { "A_TYPE", "uint16_t" }, { "B_TYPE", "int" }, { "D_TYPE", "float" } });
    string_to_spv("rq_dequant_transpose", "rq_dequant_transpose.comp", { { "D_TYPE", "float16_t" } });
    string_to_spv("rq_rotate", "rq_rotate.comp", {});
    string_to_spv("rq_recent", "rq_recent.comp", {});

    // upstream's types to f16, for recent rows beside them
    for (const char * type : { "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl" }) {
        string_to_spv(std::string("rq_cpy_") + type + "_f16", "rq_from_quant.comp",
            { { "DATA_A_" + to_uppercase(type), "1" }, { "D_TYPE", "float16_t" }, { "FLOAT_TYPE", "float" } });
    }
}
