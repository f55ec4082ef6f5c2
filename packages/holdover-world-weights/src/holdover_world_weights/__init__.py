"""The trained models and clips of holdover-world."""
