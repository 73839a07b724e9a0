"""What moves: every collective, its bytes and formula, and the order that ranks agree on."""
