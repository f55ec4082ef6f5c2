"""The tiny world and its clips are those of the world's tests."""

from tests.holdover_world.conftest import clips, model

__all__ = ["clips", "model"]
