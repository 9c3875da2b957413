"""Model cards of families: written from metadata, measurements and commands that were run, never from
claims."""
