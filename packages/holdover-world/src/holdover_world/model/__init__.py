"""The world model: transformer, KV cache, sampler, and the history of a video."""
