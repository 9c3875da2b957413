// Runs a kernel that was compiled through the shim: NAME, threadgroups (3), threads (3), files of its buffers in their
// order. What the kernel leaves in the buffers is written back.

#include "shim/kernels.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char ** argv) {
    const kernels::entry * entry = argc > 8 ? kernels::find(argv[1]) : nullptr;
    if (!entry) {
        fprintf(stderr, "there is no kernel %s\n", argc > 1 ? argv[1] : "");
        return 1;
    }
    lanes::grid grid;
    for (int i = 0; i < 3; i++) {
        grid.groups[i]  = atoi(argv[2 + i]);
        grid.threads[i] = atoi(argv[5 + i]);
    }

    std::vector<std::vector<char>> buffers;
    kernels::arguments arguments = {};
    for (int i = 8; i < argc; i++) {
        FILE * file = fopen(argv[i], "rb");
        fseek(file, 0, SEEK_END);
        buffers.emplace_back(ftell(file));
        rewind(file);
        if (fread(buffers.back().data(), 1, buffers.back().size(), file) != buffers.back().size()) {
            return 1;
        }
        fclose(file);
    }
    for (size_t i = 0; i < buffers.size(); i++) {
        arguments.buffers[i] = buffers[i].data();
    }

    kernels::launch(entry, nullptr, 0, grid, 0, arguments);

    for (int i = 8; i < argc; i++) {
        FILE * file = fopen(argv[i], "wb");
        fwrite(buffers[i - 8].data(), 1, buffers[i - 8].size(), file);
        fclose(file);
    }
    return 0;
}
