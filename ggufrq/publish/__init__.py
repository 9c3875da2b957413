"""Uploads of families to the Hub: only what the manifest vouches for, verified when it has arrived."""
