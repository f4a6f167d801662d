"""Tasks, suites and their images (floor 5)."""
