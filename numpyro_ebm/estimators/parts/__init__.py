"""What several estimators share: the negative phase, its starts, pools and health; noise; projections; critics."""
