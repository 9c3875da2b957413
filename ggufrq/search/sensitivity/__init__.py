"""The best recipe under a budget, by measuring what quantizing parts of a model costs: ``best_recipe``."""
