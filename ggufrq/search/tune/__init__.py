"""Types for K and V of every layer, chosen by measurement. ``layers`` says how, ``report`` the outcome."""
