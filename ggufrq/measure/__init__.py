"""What caches and types of weights cost: divergence, speed, validation, published claims, calibration."""
