"""The command line: one module per subcommand, and what all of them share."""
