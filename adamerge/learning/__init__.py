"""Learning coefficients with Lightning (floor 5)."""
