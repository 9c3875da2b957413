"""What every other package stands on: errors, paths, logs, running programs, tables, sizes, kept results."""
