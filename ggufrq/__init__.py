"""Three-bit KV caches for upstream llama.cpp: patch, build, quantize, run and measure."""

__version__ = "0.1.0"
