"""Profiles of a KV cache: a mean and a matrix per head of K that put it into the metric of its queries."""

from ggufrq.profile.file import LayerProfile, Profile, read_profile
from ggufrq.profile.weights import profile_from_weights

__all__ = ["LayerProfile", "Profile", "profile_from_weights", "read_profile"]
