"""Ascend's fused ops: their schemas, shapes, and what they compute on any device."""
