"""The Gymnasium environment. Importing `holdover_world.env.drive_env` registers it."""
