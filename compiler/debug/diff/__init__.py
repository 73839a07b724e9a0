"""What differs between two stages, programs, runs or ranks."""
