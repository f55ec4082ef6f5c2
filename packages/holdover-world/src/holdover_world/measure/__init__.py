"""Measurements of the world model: the demo, the evaluation, and what both are made of."""
