"""Helpers shared by several estimators: the negative phase, its starts, pools and health; noise; projections; critics."""
