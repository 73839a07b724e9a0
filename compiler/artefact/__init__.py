"""Artefacts: compiled programs in a folder, which another process calls without tracing."""
