// Rows of f32 from a file through the operations of a device, compared with the C code bit by bit: SET_ROWS and CPY into each
// of our types, GET_ROWS and CPY out of them. Arguments: part of the device's name, the file, values of a row, and types if not all.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-rq-types.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

static ggml_backend_t backend;
static int failures = 0;

// computes what build makes of a context; fill sets its inputs; the bytes of the result
static std::vector<uint8_t> computed(const std::function<ggml_tensor *(ggml_context *)> & build, const std::function<void(ggml_context *)> & fill) {
    const ggml_init_params params = { 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    ggml_context_ptr ctx(ggml_init(params));
    ggml_tensor * out = build(ctx.get());
    if (!ggml_backend_supports_op(backend, out)) {
        return {};
    }
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, out);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    ggml_backend_buffer_clear(buffer.get(), 0xa5);
    fill(ctx.get());
    GGML_ASSERT(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
    std::vector<uint8_t> res(ggml_nbytes(out));
    ggml_backend_tensor_get(out, res.data(), 0, res.size());
    return res;
}

static void set(ggml_context * ctx, const char * name, const void * data, size_t size) {
    ggml_tensor * t = ggml_get_tensor(ctx, name);
    GGML_ASSERT(ggml_nbytes(t) == size);
    ggml_backend_tensor_set(t, data, 0, size);
}

static ggml_tensor * input(ggml_context * ctx, const char * name, ggml_type type, int64_t n, int64_t rows) {
    return ggml_set_name(ggml_new_tensor_2d(ctx, type, n, rows), name);
}

static void check(const std::string & what, const std::vector<uint8_t> & got, const void * want, size_t size) {
    const uint8_t * w = (const uint8_t *) want;
    size_t i = 0;
    while (got.size() == size && i < size && got[i] == w[i]) {
        i++;
    }
    const bool good = got.size() == size && i == size;
    failures += !good;
    printf("%s: %s\n", what.c_str(), good ? "ok" : got.empty() ? "not supported" : ("byte " + std::to_string(i) + " differs").c_str());
}

int main(int argc, char ** argv) {
    GGML_ASSERT(argc >= 4);
    ggml_backend_load_all();
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (strstr(ggml_backend_dev_name(dev), argv[1])) {
            backend = ggml_backend_dev_init(dev, nullptr);
        }
    }
    GGML_ASSERT(backend && "no such device");

    const int64_t n = atoll(argv[3]);
    FILE * file = fopen(argv[2], "rb");
    GGML_ASSERT(file);
    std::vector<float> x;
    std::vector<float> row(n);
    while (fread(row.data(), sizeof(float), n, file) == (size_t) n) {
        x.insert(x.end(), row.begin(), row.end());
    }
    fclose(file);
    const int64_t rows = (int64_t) x.size()/n;

    // rows go to the places of others
    std::vector<int64_t> to(rows);
    std::vector<int32_t> to32(rows);
    for (int64_t i = 0; i < rows; i++) {
        to[i] = to32[i] = (int32_t) (rows - 1 - i);
    }

    for (ggml_type type : { GGML_RQ_TYPE_LIST, GGML_RQ_SIBLING_LIST }) {
        const std::string name = ggml_type_name(type);
        const bool asked = argc == 4 || std::find(argv + 4, argv + argc, name) != argv + argc;
        if (!asked) {
            continue;
        }
        const size_t size = ggml_row_size(type, n);
        std::vector<uint8_t> want(rows*size);
        ggml_get_type_traits(type)->from_float_ref(x.data(), want.data(), rows*n);
        std::vector<uint8_t> turned(want.size());
        std::vector<float> values(rows*n);
        std::vector<float> values_turned(rows*n);
        ggml_get_type_traits(type)->to_float(want.data(), values.data(), rows*n);
        for (int64_t i = 0; i < rows; i++) {
            memcpy(turned.data() + to[i]*size, want.data() + i*size, size);
            memcpy(values_turned.data() + to[i]*n, values.data() + i*n, n*sizeof(float));
        }

        for (const bool wide : { true, false }) {
            check("set_rows " + name + (wide ? " i64" : " i32"), computed([&](ggml_context * ctx) {
                ggml_tensor * places = ggml_set_name(ggml_new_tensor_1d(ctx, wide ? GGML_TYPE_I64 : GGML_TYPE_I32, rows), "to");
                return ggml_set_rows(ctx, input(ctx, "cells", type, n, rows), input(ctx, "x", GGML_TYPE_F32, n, rows), places);
            }, [&](ggml_context * ctx) {
                set(ctx, "x", x.data(), x.size()*sizeof(float));
                wide ? set(ctx, "to", to.data(), to.size()*sizeof(int64_t)) : set(ctx, "to", to32.data(), to32.size()*sizeof(int32_t));
            }), turned.data(), turned.size());
        }
        // in another shape, as where a cache is shifted
        check("cpy into " + name, computed([&](ggml_context * ctx) {
            return ggml_cpy(ctx, ggml_view_3d(ctx, input(ctx, "x", GGML_TYPE_F32, n, rows), n/2, 2, rows, n*2, n*4, 0), input(ctx, "cells", type, n, rows));
        }, [&](ggml_context * ctx) {
            set(ctx, "x", x.data(), x.size()*sizeof(float));
        }), want.data(), want.size());
        check("cpy out of " + name, computed([&](ggml_context * ctx) {
            return ggml_cpy(ctx, input(ctx, "cells", type, n, rows), input(ctx, "y", GGML_TYPE_F32, n, rows));
        }, [&](ggml_context * ctx) {
            set(ctx, "cells", want.data(), want.size());
        }), values.data(), values.size()*sizeof(float));
        check("get_rows " + name, computed([&](ggml_context * ctx) {
            return ggml_get_rows(ctx, input(ctx, "cells", type, n, rows), ggml_set_name(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, rows), "from"));
        }, [&](ggml_context * ctx) {
            set(ctx, "cells", want.data(), want.size());
            set(ctx, "from", to32.data(), to32.size()*sizeof(int32_t));
        }), values_turned.data(), values_turned.size()*sizeof(float));
    }
    ggml_backend_free(backend);
    return failures != 0;
}
