"""The run directory: what the compiler did, stage by stage, written and read."""
