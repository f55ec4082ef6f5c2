"""What the model is told: where the ego goes, and what is expected to be seen there."""
