"""A family of GGUF files from one model: recipe, folds, plan, quantization, verification and record."""
