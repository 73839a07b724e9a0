"""The warm start: what was captured, sharded and compiled, kept in files for the next process."""
