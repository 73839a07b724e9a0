"""Stages and runs as text."""
