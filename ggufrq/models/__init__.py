"""Models that are not GGUF files yet or not here yet: what a name means, the Hub, the converter."""
