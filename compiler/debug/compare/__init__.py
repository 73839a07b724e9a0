"""Every value of every stage against the single device."""
