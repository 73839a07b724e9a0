"""Stages in the formats of other tools."""
