"""HY-WorldPlay, tiny: the signatures of its blocks and of its models, and what they return."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tests.holdover.models.causal_wan import BLOCKS, CHANNELS, DIM, PER_FRAME, Base, attend

#: HY-WorldPlay: the passes over the text and over frames, and both at once.
TEXT_PASS = {
    "bi_inference": False,
    "ar_txt_inference": True,
    "text_states": torch.linspace(-1, 1, 3).reshape(1, 3, 1),
    "timestep_txt": 0.0,
    "cache_txt": True,
}
FRAMES = {"bi_inference": False, "ar_txt_inference": False, "ar_vision_inference": True}


class WorldPlayBlock(Base):
    """HY-WorldPlay: one pass for the text, others for frames; with ``cache_vision`` it returns what to keep of them.

    Noisy passes read what was kept of the text and of a context. ``vec`` has a row per token.
    """

    def forward(self, bi_inference=True, ar_txt_inference=False, ar_vision_inference=False, **kwargs):
        if bi_inference:
            return self.forward_bi(**kwargs)
        return self.forward_txt(**kwargs) if ar_txt_inference else self.forward_vision(**kwargs)

    def forward_txt(
        self, txt, vec_txt, text_mask=None, attn_param=None, is_flash=False, block_idx=None, kv_cache=None,
        cache_txt=False,
    ):  # fmt: skip
        k, v = self.k(txt + vec_txt), self.v(txt)
        txt = txt + self.o(attend(self.q(txt), k, v))
        return txt, {"k_txt": k, "v_txt": v} if cache_txt else {}

    def forward_vision(
        self, img, vec, freqs_cis=None, attn_param=None, block_idx=None, viewmats=None, Ks=None, kv_cache=None,
        cache_vision=False,
    ):  # fmt: skip
        h = self.norm1(img) + vec
        k, v = self.k(h), self.v(h)
        held = kv_cache[block_idx]
        before = ["txt"] if cache_vision or held["k_vision"] is None else ["txt", "vision"]
        keys, values = (torch.cat([*(held[f"{n}_{of}"] for of in before), new], 1) for n, new in (("k", k), ("v", v)))
        img = self.rest(img, attend(self.q(h), keys, values), viewmats, None)
        return img, {"k_vision": k, "v_vision": v} if cache_vision else {}

    def forward_bi(
        self, img, txt, vec_txt, vec, freqs_cis=None, text_mask=None, attn_param=None, is_flash=False,
        block_idx=None, viewmats=None, Ks=None,
    ):  # fmt: skip
        h = torch.cat([self.norm1(img) + vec, txt + vec_txt], 1)
        y = attend(self.q(h), self.k(h), self.v(h))
        return self.rest(img, y[:, : img.shape[1]], viewmats, None), txt + self.o(y[:, img.shape[1] :])


class HunyuanVideo_1_5_DiffusionTransformer(nn.Module):  # noqa: N801
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.text = nn.Linear(CHANNELS, DIM), nn.Linear(1, DIM)
        self.time, self.act = nn.Linear(1, DIM), nn.Linear(1, DIM)
        self.double_blocks = nn.ModuleList(WorldPlayBlock(number) for number in range(BLOCKS))
        self.head = nn.Linear(DIM, CHANNELS)

    def forward(self, bi_inference=True, ar_txt_inference=False, ar_vision_inference=False, **kwargs):
        modes = {
            "bi_inference": bi_inference,
            "ar_txt_inference": ar_txt_inference,
            "ar_vision_inference": ar_vision_inference,
        }
        return (self.forward_txt if ar_txt_inference else self.forward_vision)(modes, **kwargs)

    def forward_txt(self, modes, text_states, timestep_txt, kv_cache=None, cache_txt=False):
        txt, kept = self.text(text_states), []
        for number, block in enumerate(self.double_blocks):
            txt, t_kv = block(
                **modes, txt=txt, vec_txt=timestep_txt, block_idx=number, kv_cache=kv_cache, cache_txt=cache_txt
            )
            kept.append({"k_vision": None, "v_vision": None, **t_kv})
        return kept

    def forward_vision(
        self, modes, hidden_states, timestep, action, viewmats, Ks=None, kv_cache=None, cache_vision=False,
        text_states=None,
    ):  # fmt: skip
        img = self.patch(hidden_states.flatten(2).transpose(1, 2))
        vec = (self.time(timestep[..., None]) + self.act(action[..., None])).repeat_interleave(PER_FRAME, 1)
        kept = []
        if modes["bi_inference"]:
            txt = self.text(text_states)
        for number, block in enumerate(self.double_blocks):
            if modes["bi_inference"]:
                img, txt = block(
                    **modes, img=img, txt=txt, vec_txt=0, vec=vec, block_idx=number, viewmats=viewmats, Ks=Ks
                )
                continue
            img, vision_kv = block(
                **modes, img=img, vec=vec, freqs_cis=None, attn_param=None, block_idx=number, viewmats=viewmats,
                Ks=Ks, kv_cache=kv_cache, cache_vision=cache_vision,
            )  # fmt: skip
            kept.append({**kv_cache[number], **vision_kv})
        if cache_vision:
            return kept
        return torch.tanh(self.head(img)).transpose(1, 2).unflatten(2, hidden_states.shape[2:]), None


class WanBlock(Base):
    """HY-WorldPlay's Wan: noisy passes read what a pass over the context returned, and return an empty mapping."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, DIM) / DIM**0.5)

    def forward(
        self, hidden_states, encoder_hidden_states, temb, rotary_emb, kv_cache, is_cache, idx, viewmats, Ks,
        context_frames_list=None,
    ):  # fmt: skip
        shift, scale = (self.scale_shift_table + temb).unbind(1)[:2]
        h = (self.norm1(hidden_states).unflatten(1, (len(temb), -1)) * (1 + scale[:, None]) + shift[:, None]).flatten(
            1, 2
        )
        k, v = self.k(h), self.v(h)
        keys, values = k, v
        if kv_cache["v"] is not None and not is_cache:
            keys, values = (torch.cat([kv_cache[name], new], 1) for name, new in (("k", k), ("v", v)))
        x = self.rest(hidden_states, attend(self.q(h), keys, values), encoder_hidden_states + viewmats, None)
        return x, {"k": k, "v": v} if is_cache else {}


class WanTransformer3DModel(nn.Module):
    """It has the name of diffusers' class. ``timestep`` and ``action`` have an entry per latent frame."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=(1, 1, 1))
        self.patch, self.time, self.act = nn.Linear(CHANNELS, DIM), nn.Linear(1, 6 * DIM), nn.Linear(1, 6 * DIM)
        self.blocks = nn.ModuleList(WanBlock(number) for number in range(BLOCKS))
        self.head = nn.Linear(DIM, CHANNELS)

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=None, return_dict=True,
        attention_kwargs=None, current_start=None, current_end=None, kv_cache=None, is_cache=False, viewmats=None,
        Ks=None, action=None, window_frames=None, context_frames_list=None,
    ):  # fmt: skip
        x = self.patch(hidden_states.flatten(2).transpose(1, 2))
        e = (self.time(timestep[:, None] / 1000) + self.act(action[:, None])).unflatten(1, (6, DIM))
        kept = []
        for idx, block in enumerate(self.blocks):
            x, t_kv = block(
                x, encoder_hidden_states, e, None, kv_cache[idx] if kv_cache is not None else None, is_cache, idx,
                viewmats, Ks, context_frames_list=context_frames_list,
            )  # fmt: skip
            kept.append(t_kv)
        if is_cache:
            return kept
        return (torch.tanh(self.head(x)).transpose(1, 2).unflatten(2, hidden_states.shape[2:]),)
