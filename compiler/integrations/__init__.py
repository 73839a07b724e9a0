"""What `rolemesh.integrate` registers with libraries of models, a file for each interface."""
