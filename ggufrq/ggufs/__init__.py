"""GGUF files: headers, tensors, importance matrices, saved states, and what they say of a cache."""
