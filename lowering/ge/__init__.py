"""The GE target: one rank's graph to a GE graph, through torchair."""
