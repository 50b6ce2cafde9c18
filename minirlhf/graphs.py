"""The decode step at fixed shapes: recorded once as a CUDA graph, replayed for every token of every rollout.

One token is little work in many small kernels, and launching them takes the CPU longer than running them takes the GPU.
A graph launches all of them at once, but always on the same memory: so the cache is as long as the longest text from the
start, every token looks at all of it through a mask, and no row leaves the batch. `generate` uses it where it gets one;
train_ppo.py makes one for --compile on CUDA. Without this file only that is lost. Next: labelers.py.
"""

import torch
from torch import nn

from minirlhf.model import KVCache


class Decoder(nn.Module):
    """model's decode step for `batch` rows of at most max_length tokens. compile=False: the same step, uncompiled."""

    def __init__(self, model, batch, max_length, dtype, compile=True):
        super().__init__()
        self.model, device = model, model.head_weight.device
        self.cache = KVCache(model.shape, batch, max_length, device, dtype)
        self.cache.held.zero_()  # what no token has written yet is masked, but 0 times NaN would be NaN
        # Buffers: torch.compile knows that they stay where they are, and lets the graph write into them.
        self.register_buffer("held", self.cache.held, persistent=False)
        self.register_buffer("slot", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)  # to write next
        self.register_buffer("start", torch.zeros(batch, 1, dtype=torch.int64, device=device), persistent=False)
        self.step = torch.compile(self.decode, mode="reduce-overhead", fullgraph=True) if compile else self.decode

    def extend(self, layer, kv):
        """As KVCache.extend for one token, (2, B, H, 1, D); returns all slots, those not yet written too."""
        return self.held[layer].index_copy_(3, self.slot, kv.to(self.held.dtype))

    def prefill(self, ids, start):
        """Read the prompts, as GPT.forward does: ids (B, P), start (B,) or None -> last hidden states (B, C)."""
        self.cache.length = 0
        hidden = self.model(ids, start, self.cache)[:, -1]
        self.slot.fill_(ids.size(1))
        self.start.copy_(torch.zeros_like(self.start) if start is None else start[:, None])
        return hidden

    def decode(self, token):
        """token int64 (B,) -> hidden states (B, C) that the next one is drawn from."""
        keys = torch.arange(self.held.size(-2), device=token.device)
        mask = (keys >= self.start) & (keys <= self.slot)  # (B, T_max)
        x = self.model.token_embedding(token) + self.model.position_embedding((self.slot - self.start)[:, 0])
        x = x[:, None]  # (B, 1, C)
        for layer, block in enumerate(self.model.blocks):
            x = block(x, mask[:, None, None], self, layer)
        return self.model.norm(x)[:, 0]

    def forward(self, token):
        if token.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # nobody reads the last step's output any more
        hidden = self.step(token)
        self.slot += 1
        return hidden
