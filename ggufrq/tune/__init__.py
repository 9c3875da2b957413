"""Types for K and V of every layer, chosen by measurement. ``core`` says how, ``report`` what it came to."""
