"""The graph-capture target: one rank's graph recorded once and replayed on the NPU."""
