"""A family of GGUF files from one model: source, plan, quantization, verification and record."""
