"""Runtime: what exists while a program runs, such as process groups, ranks and weights."""
