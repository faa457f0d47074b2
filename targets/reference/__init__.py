"""Plain loops that run anywhere."""
