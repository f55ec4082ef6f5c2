"""Sessions: one video of a world model for each client, advanced in batches. No network code."""
