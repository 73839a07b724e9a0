"""Moving stored tensors from one layout manifest to another."""
