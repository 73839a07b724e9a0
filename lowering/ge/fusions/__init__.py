"""Passes that rewrite ATen patterns of one rank's flat graph into Ascend's fused ops."""
