"""Lowering: one rank's Program to a callable, one file or folder per target."""
