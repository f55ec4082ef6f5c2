"""Pipelines of our own that call a chunk-causal model as the repositories' do: order, arguments, state, schedules."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.holdover.models.causal_wan import BLOCKS, CHUNK, DIM, TOKENS
from tests.holdover.models.contracts import Contract, kv

PROMPTS = {name: torch.linspace(-1, n, 2 * DIM).reshape(1, 2, DIM) for n, name in enumerate(("no", "rain", "sun"))}


class Scheduler:
    """A thousand noise levels, shifted to the noisy side."""

    def __init__(self, shift: float = 5.0) -> None:
        sigmas = torch.linspace(1, 0, 1001)[:-1]
        self.sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.timesteps = 1000 * self.sigmas

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.sigmas[(self.timesteps[None] - timestep.flatten()[:, None]).abs().argmin(1)]

    def add_noise(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        sigma = self.sigma(timestep).view(-1, 1, 1, 1)
        return (1 - sigma) * clean + sigma * noise


class Generator(nn.Module):
    """The wrapper: latents ``[B, F, C, H, W]``; what the model returns is a flow, handed on with its clean latents."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scheduler = model, Scheduler()

    def forward(
        self, noisy_image_or_video, conditional_dict, timestep, kv_cache, crossattn_cache, current_start, **more
    ):  # fmt: skip
        flow = self.model(
            noisy_image_or_video.permute(0, 2, 1, 3, 4), t=timestep, context=conditional_dict["prompt_embeds"],
            seq_len=32760, kv_cache=kv_cache, crossattn_cache=crossattn_cache, current_start=current_start, **more,
        ).permute(0, 2, 1, 3, 4)  # fmt: skip
        sigma = self.scheduler.sigma(timestep).view(1, -1, 1, 1, 1)
        return flow, noisy_image_or_video - sigma * flow


class Pipeline(nn.Module):
    """What all have: a generator, a KV cache that lives as long as the pipeline, a seed for noise between passes."""

    def __init__(self, contract: Contract, **args: Any) -> None:
        super().__init__()
        self.contract = contract
        self.generator = Generator(contract.model())
        self.args = SimpleNamespace(**{"context_noise": 0, **args})
        self.num_frame_per_block = CHUNK
        self.source = torch.Generator().manual_seed(0)

    def kv(self) -> list[dict[str, Any]]:
        return kv()

    def crossattn(self) -> list[dict[str, Any]]:
        return [{"is_init": False} for _ in range(BLOCKS)]

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.source)


def restart(kv_cache: list[dict[str, Any]], crossattn_cache: list[dict[str, Any]]) -> None:
    """Before a video: what was written stays, and is overwritten."""
    for held in crossattn_cache:
        held["is_init"] = False
    for held in kv_cache:
        held["global_end_index"], held["local_end_index"] = torch.tensor([0]), torch.tensor([0])


class FewSteps(Pipeline):
    """Self-Forcing's and Causal-Forcing's: a few passes with fresh noise, then a clean one. Videos share a KV cache."""

    def __init__(
        self, contract: Contract, levels: tuple[float, ...] = (1000, 750, 500, 250), first: Any = None, **args: Any
    ) -> None:
        super().__init__(contract, **args)
        self.scheduler = self.generator.scheduler
        self.denoising_step_list = torch.tensor(levels)
        self.denoising_step_list_first_chunk = None if first is None else torch.tensor(first)
        self.kv_cache1: Any = None

    def begin(self) -> None:
        if self.kv_cache1 is None:
            self.kv_cache1, self.crossattn_cache = self.kv(), self.crossattn()
        restart(self.kv_cache1, self.crossattn_cache)

    def call(self, latents: Tensor, timestep: Tensor, prompt: str, start: int, **more: Any) -> Tensor:
        output = self.generator(
            noisy_image_or_video=latents,
            conditional_dict={"prompt_embeds": PROMPTS[prompt]},
            timestep=timestep,
            kv_cache=self.kv_cache1,
            crossattn_cache=self.crossattn_cache,
            current_start=start * TOKENS // CHUNK,
            **more,
        )
        clean: Tensor = output[1]
        return clean

    def inference(self, noise: Tensor, prompts: list[str], initial_latent: Tensor | None = None) -> Tensor:
        """``noise [1, F, C, H, W]``; a prompt for each chunk."""
        self.begin()
        given = 0 if initial_latent is None else initial_latent.shape[1]
        output = torch.zeros(1, given + noise.shape[1], *noise.shape[2:])
        if initial_latent is not None:
            output[:, :given] = initial_latent
            for start in range(0, given, CHUNK):
                self.call(initial_latent[:, start : start + CHUNK], torch.zeros(1, CHUNK), prompts[0], start)
        for number, prompt in enumerate(prompts):
            start = given + number * CHUNK
            if number and prompt != prompts[number - 1]:
                self.switch(output, start, prompt)
            x, first = noise[:, start - given : start - given + CHUNK], self.denoising_step_list_first_chunk
            levels = first if start == 0 and first is not None else self.denoising_step_list
            for index, level in enumerate(levels):
                timestep = torch.ones(1, CHUNK, dtype=torch.int64) * level
                clean = self.call(x, timestep, prompt, start)
                if index + 1 < len(levels):
                    x = self.scheduler.add_noise(clean[0], self.noise(clean[0]), levels[index + 1])[None]
            output[:, start : start + CHUNK] = clean
            self.call(clean, torch.ones_like(timestep) * self.args.context_noise, prompt, start)
        return output

    def switch(self, output: Tensor, start: int, prompt: str) -> None:
        """The next prompt begins."""


class Interactive(FewSteps):
    """LongLive's, branch v1.0: a switch of prompts writes the context anew. The mask stays set on the model."""

    def switch(self, output: Tensor, start: int, prompt: str) -> None:
        for held in self.kv_cache1:
            held["k"].zero_()
            held["v"].zero_()
        for held in self.crossattn_cache:
            held["is_init"] = False
        self.generator.model.block_mask = object()
        context = output[:, :start]
        self.call(context, torch.zeros(1, start), prompt, 0, sink_recache_after_switch=True)
        for held in self.crossattn_cache:
            held["is_init"] = False


class ManySteps(Pipeline):
    """Self-Forcing's before it is distilled: two guidance branches, each with a KV cache; Euler's sampler."""

    def __init__(self, contract: Contract, steps: int = 6) -> None:
        super().__init__(contract, guidance_scale=2.0)
        self.sampling_steps = steps
        self.kv_cache_pos, self.kv_cache_neg = self.kv(), self.kv()

    def inference(self, noise: Tensor, prompts: list[str]) -> Tensor:
        output, sigmas = torch.zeros_like(noise), torch.linspace(1, 0, self.sampling_steps + 1)
        crossattn = {"pos": self.crossattn(), "neg": self.crossattn()}
        restart(self.kv_cache_pos, [])
        restart(self.kv_cache_neg, [])
        both = ("pos", self.kv_cache_pos, prompts[0]), ("neg", self.kv_cache_neg, "no")
        for number in range(len(prompts)):
            start = number * CHUNK
            x = noise[:, start : start + CHUNK]

            def call(x: Tensor, t: Tensor, name: str, kv_cache: Any, prompt: str, start: int = start) -> Tensor:
                given = {"prompt_embeds": PROMPTS[prompt]}
                flow: Tensor = self.generator(x, given, t, kv_cache, crossattn[name], start * TOKENS // CHUNK)[0]
                return flow

            for sigma, following in pairwise(sigmas):
                timestep = 1000 * sigma * torch.ones(1, CHUNK)
                cond, uncond = (call(x, timestep, *each) for each in both)
                x = x + (following - sigma) * (uncond + 2.0 * (cond - uncond))
            output[:, start : start + CHUNK] = x
            for each in both:
                call(x, timestep * 0, *each)
        return output
