"""The programs of llama.cpp: a module for each, which builds its arguments and reads its output strictly.

Exit statuses are not trusted: several of these programs end with 0 after a failure.
"""
