"""The only door to ArviZ, for its versions 0.23 and 1.x; it is slow to import and waits for its first use."""
