"""Builds to be given away: an archive of programs, and the same as a wheel."""
