"""The first pass that broke a program, and the smallest part that shows it."""
