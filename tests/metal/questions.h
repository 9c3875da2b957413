#pragma once

void print_names();    // a JSON list
void print_supports(); // a JSON object: "yes", "no", or "upstream" where the answer is upstream's
void print_launches();
