"""The closed loop, the scenarios that it starts from, and the models that it drives."""
