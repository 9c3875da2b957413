"""Which cache for a model: a ladder of them is measured, one recommended, and a bad one warned of."""
