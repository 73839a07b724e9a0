"""When ops and collectives run, simulated and measured."""
