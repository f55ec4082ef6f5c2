"""A transformer of diffusers that is compiled, before or after its cache is enabled: its graphs hold what they held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import holdover
import holdover.diffusers
from tests.holdover.engine.test_compiled import Graphs
from tests.holdover.models.models import TINY

pytest.importorskip("transformers")

#: Wan, with as many blocks as leave its own few operations around them the share that they have in a real one or more.
WAN = next(tiny for tiny in TINY if tiny.name == "WanTransformer3DModel")
DEEP = replace(WAN, config={**WAN.config, "num_layers": 4})

compile_blocks = pytest.param(
    lambda model, backend: model.compile_repeated_blocks(backend=backend, fullgraph=True), id="blocks"
)
compile_whole = pytest.param(lambda model, backend: model.compile(backend=backend), id="whole")


@pytest.mark.parametrize("compile_", [compile_blocks, compile_whole])
def test_graphs_hold_what_they_hold_without_a_cache(compile_: Callable[..., Any]) -> None:
    found: dict[str, Graphs] = {}
    for order in ("no cache", "compile, enable", "enable, compile"):
        torch.compiler.reset()
        model: Any = DEEP.make()
        backend = found[order] = Graphs()
        fbcache = holdover.policy("fbcache", threshold=0.0)
        if order == "enable, compile":
            holdover.diffusers.enable(model, fbcache)
        compile_(model, backend)
        if order == "compile, enable":
            holdover.diffusers.enable(model, fbcache)
        for index in range(2):
            with torch.no_grad(), model.cache_context("cond", step_index=index, num_inference_steps=2):
                DEEP.run(model, index)
    torch.compiler.reset()
    alone = found.pop("no cache")
    for each in found.values():
        assert 0.95 * alone.held <= each.held <= alone.held
        assert 0.95 * alone.ran <= each.ran <= alone.ran
