"""A GPT-2 (Radford et al. 2019) and the scalar head that turns its trunk into a reward or value.

Pre-norm, learned positions, tanh GELU, output layer tied to the embedding, no dropout anywhere.
Shapes: B batch, T time, C channels, V vocabulary, H heads, D = C / H head size. Next: run.py.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """What a checkpoint needs to rebuild the network."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int


class KVCache:
    """Keys and values of the tokens so far, in one buffer allocated once: (L, 2, B, H, T_max, D), L layers."""

    def __init__(self, shape, batch, max_length, device, dtype):
        size = (shape.n_layer, 2, batch, shape.n_head, max_length, shape.n_embd // shape.n_head)
        self.held = torch.empty(size, device=device, dtype=dtype)
        self.length = 0  # tokens held; the model moves it on once all layers have written theirs

    def extend(self, layer, kv):
        """Write a layer's new keys and values (2, B, H, T, D); return all of it so far, longer in T."""
        end = self.length + kv.size(3)
        self.held[layer, :, :, :, self.length:end] = kv
        return self.held[layer, :, :, :, :end]

    def keep(self, rows):
        """Keep only these rows of the batch; rows: bool (B,)."""
        self.held = self.held[:, :, rows]


def attention(q, k, v, mask):
    """softmax(q kᵀ / sqrt(D)) v (Vaswani et al. 2017, eq. 1): (B, H, T, D) for q (B, H, T, D), k and v (B, H, S, D).

    mask: bool, True where q may look, broadcast to (B, H, T, S); None: causal for S = T, everything for T = 1.
    """
    if q.size(2) > 1 or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1)
    # One new token, on a CPU: SDPA's tiles are made for many queries, and take half as long again.
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-1, -2)  # (B, H, 1, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        C = shape.n_embd
        self.n_head = shape.n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attention_out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp_in, self.mlp_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x, mask, cache, layer):
        B, T, C = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = qkv
        if cache is not None:
            k, v = cache.extend(layer, qkv[1:])  # (B, H, T so far, D) each
        y = attention(q, k, v, mask)  # (B, H, T, D)
        x = x + self.attention_out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Token ids to hidden states; `logits` are hidden @ self.head_weight.T, formed where needed."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.token_embedding = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.position_embedding = nn.Embedding(shape.block_size, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = nn.LayerNorm(shape.n_embd)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # GPT-2: N(0, 0.02), residual projections / sqrt(2 L)
                residual = "_out." in name
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def head_weight(self):
        """(V, C): the output layer is the embedding."""
        return self.token_embedding.weight

    def forward(self, ids, start=None, cache=None):
        """ids int64 (B, T) -> hidden states (B, T, C) after the last norm.

        start: int64 (B,), the number of padded slots on the left of each row; None if there are
        none. Padding on the right needs no mask: a causal model never looks there. With a cache,
        ids are the T tokens after those it holds, and start counts from the first one it held.
        """
        T, past = ids.size(1), 0 if cache is None else cache.length
        positions = torch.arange(past, past + T, device=ids.device)  # (T,)
        mask = None  # causal, nothing else to hide
        if start is None and past and T > 1:
            start = ids.new_zeros(len(ids))  # SDPA's is_causal would line new tokens up with the oldest keys
        if start is not None:
            keys = torch.arange(past + T, device=ids.device)
            mask = (keys >= start[:, None])[:, None, None]  # (B, 1, 1, past + T): real tokens
            if T > 1:
                causal = keys <= positions[:, None]  # (T, past + T)
                itself = keys == positions[:, None]  # lets a padded slot see itself: no row of only -inf, no NaN
                mask = causal & mask | itself  # (B, 1, T, past + T)
            positions = (positions - start[:, None]).clamp(min=0)  # (B, T): position ids count real tokens
        x = self.token_embedding(ids) + self.position_embedding(positions)  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.length += T
        return self.norm(x)


class ScalarHead(nn.Module):
    """Hidden states (..., C) -> one number each (...): a reward or a value. fp32 whatever the trunk's dtype."""

    def __init__(self, channels, std):
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        nn.init.normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)


class RewardModel(nn.Module):
    """A GPT trunk with a scalar head at the last real token: the score of a whole answer.

    Head: N(0, 1/(C + 1)), bias 0 (Stiennon et al. 2020). gain and bias bring the scores of
    reference samples to mean 0 and standard deviation 1 (Ziegler et al. 2019, section 2.1).
    """

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.head = ScalarHead(trunk.shape.n_embd, std=1 / math.sqrt(trunk.shape.n_embd + 1))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    @classmethod
    def from_lm(cls, lm):
        return cls(copy.deepcopy(lm))

    def forward(self, ids, last, start=None):
        """ids (B, T), last (B,) index of each row's last real token -> raw scores (B,)."""
        hidden = self.trunk(ids, start)  # (B, T, C)
        return self.head(hidden[torch.arange(len(ids), device=ids.device), last])

    def normalised_head(self):
        """A copy of the head that gain and bias are folded into."""
        head = copy.deepcopy(self.head)
        with torch.no_grad():
            head.linear.weight.mul_(self.gain)
            head.linear.bias.mul_(self.gain).add_(self.bias)
        return head

    def score(self, ids, last, start=None):
        """Normalised scores (B,)."""
        return self.gain * self(ids, last, start) + self.bias
