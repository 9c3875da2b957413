"""The pinned llama.cpp: where its tree can be had, and the verified pristine tree."""
