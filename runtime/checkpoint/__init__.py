"""Loading a safetensors checkpoint shard by shard into the store."""
