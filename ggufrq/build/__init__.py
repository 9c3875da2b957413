"""Builds of the patched llama.cpp: what they need, how they are made, kept and checked."""
