#include "kernels.h"

#include <cstring>

namespace kernels {

static library * libraries;

void add(library * library) {
    for (size_t i = 0; i < library->n_entries; i++) {
        library->entries[i].from = library;
    }
    library->next = libraries;
    libraries     = library;
}

const entry * find(const char * name) {
    for (const library * l = libraries; l; l = l->next) {
        for (size_t i = 0; i < l->n_entries; i++) {
            if (strcmp(l->entries[i].name, name) == 0) {
                return &l->entries[i];
            }
        }
    }
    return nullptr;
}

void launch(const entry * entry, const value * values, size_t n_values, const lanes::grid & grid, size_t memory, arguments & arguments) {
    const library * from = entry->from;
    for (size_t i = 0; i < from->n_setters; i++) {
        int64_t value = 0;
        for (size_t j = 0; j < n_values; j++) {
            if (values[j].index == from->setters[i].index) {
                value = values[j].value;
            }
        }
        from->setters[i].set(value);
    }
    lanes::run(grid, memory, entry->run, &arguments);
}

} // namespace kernels
