"""What each GE op computes: one small function per op, one file per family."""
