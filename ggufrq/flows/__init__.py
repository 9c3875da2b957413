"""Jobs from start to end, which take everything before: the demo, and the check of another upstream."""
