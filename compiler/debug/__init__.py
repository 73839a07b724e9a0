"""Debugging tools: what the compiler did, seen, explained, and compared with the single device."""
