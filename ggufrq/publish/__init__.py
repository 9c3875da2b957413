"""Uploads of families to the Hub: only what the manifest vouches for, verified when it has arrived."""

from ggufrq.publish.core import Plan, Published, plan, publish

__all__ = ["Plan", "Published", "plan", "publish"]
