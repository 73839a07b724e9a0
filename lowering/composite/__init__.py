"""Composite ops: what a model computes in many ops of ATen, as one op with a fast kernel."""
