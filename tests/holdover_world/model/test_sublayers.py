"""Methods that cache parts of a block, on the world model."""

from __future__ import annotations

import torch
from torch import Tensor

import holdover
from tests.holdover_world.driving import world_model


@torch.no_grad()
def test_toca_recomputes_a_share_of_the_world_models_tokens() -> None:
    """With all tokens fresh only the attention is cached; with none, the MLPs as well."""
    model = world_model()
    x = torch.randn(1, 4, model.sizes.tokens, model.sizes.patch_values, generator=torch.Generator().manual_seed(0))
    action = torch.zeros(1, 4, model.sizes.action_dims)

    def second(**options: float) -> Tensor:
        with holdover.attach(model, holdover.policy("toca", **options)) as cache:
            for index, sigma in enumerate((1.0, 0.5)):
                with cache.step(chunk=0, index=index, num_steps=2, sigma=sigma):
                    output: Tensor = model(x, sigma=sigma, action_BFA=action)
        return output

    given: dict[tuple[int, str], Tensor] = {}
    names = {block: "attend_temporal" if block.temporal else "attend_cross" for block in model.blocks}
    for n, (block, name) in enumerate(names.items()):
        attend = getattr(block, name)
        setattr(block, name, lambda *args, n=n, name=name, attend=attend: given.setdefault((n, name), attend(*args)))
    model(x, sigma=1.0, action_BFA=action)
    expected = model(x, sigma=0.5, action_BFA=action)  # by hand: attention as at the first step
    for block, name in names.items():
        delattr(block, name)
    torch.testing.assert_close(second(fresh=1.0), expected)
    assert not torch.allclose(second(fresh=0.0), expected, atol=1e-3)


@torch.no_grad()
def test_attention_that_is_a_method_is_cached_in_the_world_model() -> None:
    model = world_model()
    x = torch.randn(1, 4, model.sizes.tokens, model.sizes.patch_values, generator=torch.Generator().manual_seed(0))
    action = torch.zeros(1, 4, model.sizes.action_dims)
    expected = [model(x, sigma=sigma, action_BFA=action) for sigma in (1.0, 0.5)]
    outputs = []
    with holdover.attach(model, holdover.policy("pab", start=0.0, stop=1.0)) as cache:
        for index, sigma in enumerate((1.0, 0.5)):
            with cache.step(chunk=0, index=index, num_steps=2, sigma=sigma):
                outputs.append(model(x, sigma=sigma, action_BFA=action))
    assert torch.equal(outputs[0], expected[0])
    assert not torch.equal(outputs[1], expected[1])
    # By hand: at the second step attention gives what it gave at the first.
    given: dict[int, Tensor] = {}
    for n, block in enumerate(model.blocks):
        name = "attend_temporal" if block.temporal else "attend_cross"
        attend = getattr(block, name)
        setattr(block, name, lambda *args, n=n, attend=attend: given.setdefault(n, attend(*args)))
    model(x, sigma=1.0, action_BFA=action)
    assert torch.equal(outputs[1], model(x, sigma=0.5, action_BFA=action))
