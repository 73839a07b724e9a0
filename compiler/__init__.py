"""The front door: capture, roles, the pass pipeline, the backend and the command line."""
