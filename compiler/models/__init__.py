"""Models to compile: cases, and tiny random models of the types that transformers knows."""
