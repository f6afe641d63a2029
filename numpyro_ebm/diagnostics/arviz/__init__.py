"""ArviZ, versions 0.23 and 1.x: no other package imports it. It is slow to import, so the import waits for its first use."""
