"""The reference executor: runs GE graphs on CPU tensors, where there is no NPU."""
