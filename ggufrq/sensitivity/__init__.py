"""The best recipe under a budget, by measuring what quantizing each part of a model costs; see ``core``."""
