"""The serving engine: slots, caches, phases and sampling around the compiled programs of a role."""
