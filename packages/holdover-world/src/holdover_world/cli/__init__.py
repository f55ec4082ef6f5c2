"""The commands that this package adds to `holdover`, one module each. They import what they need when they run."""
