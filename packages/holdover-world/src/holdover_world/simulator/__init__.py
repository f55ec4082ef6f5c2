"""The driving simulator that makes the data: scenes, traffic, a scripted driver, and pictures."""
