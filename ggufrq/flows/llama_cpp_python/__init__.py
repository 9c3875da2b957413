"""llama-cpp-python over a build of ours: its Python files, slightly edited, and our libraries, as a wheel."""
