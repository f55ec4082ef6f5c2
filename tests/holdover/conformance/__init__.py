"""What every registered policy must pass."""
