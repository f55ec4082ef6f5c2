"""The tiny world and its clips are those of the benchmarks."""

from tests.lab.conftest import clips, model

__all__ = ["clips", "model"]
