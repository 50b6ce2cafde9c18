"""The network against a GPT-2 written out from its description, and what padding and the cache may not change."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minirlhf.model import GPT, KVCache, RewardModel, ScalarHead, Shape

RESIDUAL = ("attention_out.weight", "mlp_out.weight")


def plain_gpt2(model, ids):
    """ids (B, T) -> hidden states (B, T, C) with model's weights: softmax attention, one head at a time."""
    weights, shape = dict(model.named_parameters()), model.shape
    C, D, T = shape.n_embd, shape.n_embd // shape.n_head, ids.size(1)
    past = torch.ones(T, T, dtype=torch.bool).tril()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (C,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"][:T]
    for i in range(shape.n_layer):
        q, k, v = linear(norm(x, f"blocks.{i}.norm_1"), f"blocks.{i}.qkv").split(C, -1)
        heads = []
        for h in range(shape.n_head):
            part = slice(h * D, (h + 1) * D)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(D)
            heads.append(scores.masked_fill(~past, -math.inf).softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attention_out")
        u = linear(norm(x, f"blocks.{i}.norm_2"), f"blocks.{i}.mlp_in")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, f"blocks.{i}.mlp_out")
    return norm(x, "norm")


def random_ids(*size, vocab_size=13, seed=0):
    return torch.randint(vocab_size, size, generator=torch.Generator().manual_seed(seed))


def padded_rows(lengths, seed=0):
    """(rows, ids, start): 1-D rows of these lengths, and the same left-padded with 0 into one batch."""
    rows = [random_ids(n, seed=seed + i) for i, n in enumerate(lengths)]
    T = max(lengths)
    ids = torch.stack([F.pad(row, (T - len(row), 0)) for row in rows])
    return rows, ids, torch.tensor([T - n for n in lengths])


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)


# ---- the forward pass ------------------------------------------------------------------------


def test_gpt_equals_gpt2_written_out_values_and_gradients(tiny_gpt):
    model = tiny_gpt(n_layer=3, n_head=4, n_embd=12, dtype=torch.float64)
    ids = random_ids(3, 16)  # as long as block_size: the last position is used too
    ours, plain = model(ids), plain_gpt2(model, ids)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)
    pull = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(gradients((ours * pull).sum(), model), gradients((plain * pull).sum(), model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_gpt_equals_torch_transformer_layers_with_the_same_weights(tiny_gpt):
    model = tiny_gpt(n_layer=2, n_head=2, n_embd=8, dtype=torch.float64)
    names = {"norm1": "norm_1", "norm2": "norm_2", "self_attn.in_proj_": "qkv", "self_attn.out_proj": "attention_out",
             "linear1": "mlp_in", "linear2": "mlp_out"}
    ids = random_ids(2, 9)
    x = model.token_embedding(ids) + model.position_embedding(torch.arange(9))
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, activation=nn.GELU(approximate="tanh"),
                                           batch_first=True, norm_first=True, dtype=torch.float64)
        ours = dict(block.named_parameters())
        layer.load_state_dict({f"{theirs}{'' if theirs.endswith('_') else '.'}{kind}": ours[f"{mine}.{kind}"]
                               for theirs, mine in names.items() for kind in ("weight", "bias")})
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64), is_causal=True)
    torch.testing.assert_close(model(ids), model.norm(x), rtol=0, atol=1e-10)


def test_a_token_changes_nothing_before_it_and_something_from_it_on(tiny_gpt):
    model = tiny_gpt(dtype=torch.float64)
    ids = random_ids(1, 10)
    before = model(ids)
    for t in range(10):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 13
        difference = (model(changed) - before).abs().amax((0, 2))
        assert torch.all(difference[:t] == 0)
        assert torch.all(difference[t:] > 1e-6)


def test_output_layer_is_the_embedding_and_gpt2_has_no_other_weights():
    V, T, L, C = 50, 11, 3, 12
    model = GPT(Shape(V, T, L, 4, C))
    assert model.head_weight is model.token_embedding.weight
    # Per block: qkv 3C² + 3C, attention_out C² + C, two MLP layers 8C² + 5C, two norms 4C.
    assert sum(p.numel() for p in model.parameters()) == V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C


# ---- padding ---------------------------------------------------------------------------------


def test_left_padded_rows_equal_each_row_alone(tiny_gpt):
    model = tiny_gpt()
    rows, ids, start = padded_rows([7, 3, 1, 5])
    batch = model(ids, start)
    for i, row in enumerate(rows):
        torch.testing.assert_close(batch[i, start[i]:], model(row[None])[0], rtol=0, atol=1e-5)


def test_left_padded_rows_give_the_gradients_of_each_row_alone(tiny_gpt):
    model = tiny_gpt(dtype=torch.float64)
    rows, ids, start = padded_rows([7, 3, 1, 5])
    batch = model(ids, start)
    together = sum((batch[i, start[i]:] ** 3).sum() for i in range(4))
    alone = sum((model(row[None]) ** 3).sum() for row in rows)
    for a, b in zip(gradients(together, model), gradients(alone, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_position_ids_count_real_tokens(tiny_gpt):
    """The gradient shows which positions a row read: four real tokens read positions 0 to 3, wherever they stand."""
    model = tiny_gpt()
    hidden = model(random_ids(1, 9), torch.tensor([5]))[0, 5:]
    hidden.pow(2).mul(torch.arange(8)).sum().backward()
    read = model.position_embedding.weight.grad.abs().sum(1) > 0
    assert read.tolist() == [True] * 4 + [False] * 12


@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_in_padded_slots_change_no_output_and_no_gradient(tiny_gpt, side):
    model = tiny_gpt()
    lengths = torch.tensor([8, 3, 1, 6])
    places = torch.arange(8)
    real = places >= 8 - lengths[:, None] if side == "left" else places < lengths[:, None]
    start = 8 - lengths if side == "left" else None
    results = []
    for seed in (1, 2):
        ids = random_ids(4, 8)
        ids[~real] = random_ids(int((~real).sum()), seed=seed)
        hidden = model(ids, start)[real]
        results.append((ids, hidden, gradients((hidden**3).sum(), model)))
    assert not torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


def test_a_row_of_only_padding_gives_no_nan_and_spoils_no_other_row(tiny_gpt):
    model = tiny_gpt()
    ids = random_ids(2, 5)
    hidden = model(ids, torch.tensor([5, 0]))
    assert torch.isfinite(hidden).all()
    assert all(torch.isfinite(g).all() for g in gradients(hidden.pow(2).sum(), model))
    torch.testing.assert_close(hidden[1], model(ids[1:])[0], rtol=0, atol=1e-5)
    # Some attention kernels forgive a slot that sees nothing, others answer NaN; so each padded slot sees just itself.
    torch.testing.assert_close(hidden[0], model(ids[0, :, None])[:, 0], rtol=0, atol=1e-5)


# ---- the cache -------------------------------------------------------------------------------


def cached_forward(model, ids, chunks, start=None):
    """Hidden states of all ids, fed to the model in chunks; slots not yet written hold NaN, so reading one shows."""
    cache = KVCache(model.shape, len(ids), ids.size(1) + 3, "cpu", torch.float32)
    cache.held.fill_(math.nan)
    return torch.cat([model(part, start, cache) for part in ids.split(chunks, 1)], 1), cache


@pytest.mark.parametrize("chunks", [[6, 1, 1, 1, 1, 1], [1] * 11, [11], [4, 4, 3], [1, 9, 1]], ids=str)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(tiny_gpt, chunks):
    model, ids = tiny_gpt(), random_ids(3, 11)
    hidden, cache = cached_forward(model, ids, chunks)
    assert cache.length == 11
    torch.testing.assert_close(hidden, model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [[7, 1, 1, 1], [7, 3], [5, 3, 2]], ids=str)
@torch.no_grad()
def test_cached_decoding_of_left_padded_rows_equals_each_row_alone(tiny_gpt, chunks):
    model = tiny_gpt()
    rows, ids, start = padded_rows([10, 6, 4, 9])
    hidden, _ = cached_forward(model, ids, chunks, start)
    for i, row in enumerate(rows):
        torch.testing.assert_close(hidden[i, start[i]:], model(row[None])[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_that_keeps_some_rows_goes_on_with_those(tiny_gpt):
    model = tiny_gpt()
    rows, ids, start = padded_rows([9, 5, 7, 4])
    _, cache = cached_forward(model, ids[:, :6], [6], start)
    kept = torch.tensor([False, True, False, True])
    cache.keep(kept)
    hidden = [model(ids[kept, t: t + 1], start[kept], cache) for t in (6, 7, 8)]
    for i, row in enumerate(torch.cat(hidden, 1)):
        torch.testing.assert_close(row, model(rows[(1, 3)[i]][None])[0, -3:], rtol=0, atol=1e-5)


# ---- initialisation --------------------------------------------------------------------------


def test_initial_weights_are_those_of_gpt2():
    torch.manual_seed(0)
    model = GPT(Shape(500, 64, 3, 2, 64))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith(RESIDUAL) else 0.02  # two in each of 3 blocks
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
        else:  # norms start as the identity, biases at 0
            assert torch.all(p == (0.0 if name.endswith("bias") else 1.0)), name


def test_reward_head_starts_with_variance_one_over_channels_plus_one_and_no_bias():
    """With 3 channels the std is 1/2; 1/sqrt(C) would be 0.58 and 1/(C + 1) would be 0.25."""
    torch.manual_seed(0)
    heads = [RewardModel(GPT(Shape(2, 2, 0, 1, 3))).head.linear for _ in range(800)]
    weights = torch.cat([head.weight.flatten() for head in heads])
    assert weights.std().item() == pytest.approx(0.5, rel=0.06)
    assert abs(weights.mean().item()) < 0.05
    assert all(head.bias.item() == 0 for head in heads)


def test_a_head_of_std_0_has_no_opinion():
    assert torch.all(ScalarHead(6, std=0.0)(torch.randn(2, 3, 6)) == 0)


# ---- reward model and scalar head ------------------------------------------------------------


@pytest.fixture
def reward_model(tiny_gpt):
    model = RewardModel(tiny_gpt())
    nn.init.constant_(model.head.linear.bias, 0.3)
    return model


def test_reward_is_read_off_the_last_real_token(reward_model):
    """Rows padded on both sides, as in a rollout, against the row alone through GPT-2 written out."""
    lengths, start = [5, 2, 4, 1], torch.tensor([0, 2, 1, 3])
    rows = [random_ids(n, seed=i) for i, n in enumerate(lengths)]
    ids = torch.zeros(4, 7, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, start[i]: start[i] + len(row)] = row
    last = start + torch.tensor(lengths) - 1
    head = reward_model.head.linear
    hidden = torch.stack([plain_gpt2(reward_model.trunk, row[None])[0, -1] for row in rows])
    expected = hidden @ head.weight[0] + head.bias[0]
    torch.testing.assert_close(reward_model(ids, last, start), expected, rtol=0, atol=1e-5)


def test_nothing_behind_the_last_real_token_touches_the_reward(reward_model):
    last = torch.tensor([5, 2, 0])
    ids, garbage = random_ids(3, 6), random_ids(3, 6, seed=1)
    behind = torch.arange(6) > last[:, None]
    changed = torch.where(behind, garbage, ids)
    assert not torch.equal(ids, changed)
    assert torch.equal(reward_model(ids, last), reward_model(changed, last))
    changed[torch.arange(3), last] = (changed[torch.arange(3), last] + 1) % 13  # while the last real token does count
    assert torch.all((reward_model(ids, last) - reward_model(changed, last)).abs() > 1e-4)


def test_score_is_gain_times_raw_plus_bias(reward_model):
    ids, last, start = random_ids(3, 6), torch.tensor([5, 2, 3]), torch.tensor([0, 1, 3])
    assert torch.equal(reward_model.score(ids, last), reward_model(ids, last))  # until it is calibrated
    reward_model.gain.fill_(2.5)
    reward_model.bias.fill_(-0.75)
    for padding in (None, start):
        expected = [2.5 * raw - 0.75 for raw in reward_model(ids, last, padding).tolist()]
        assert reward_model.score(ids, last, padding).tolist() == pytest.approx(expected, abs=1e-6)


def test_gain_and_bias_are_saved_but_not_trained(reward_model):
    assert {"gain", "bias"} <= set(reward_model.state_dict())
    assert not {"gain", "bias"} & {name for name, _ in reward_model.named_parameters()}


def test_training_a_reward_model_leaves_its_language_model_alone(tiny_gpt):
    lm = tiny_gpt()
    before = {name: p.clone() for name, p in lm.state_dict().items()}
    model = RewardModel.from_lm(lm)
    ids, last = random_ids(4, 6), torch.tensor([5, 4, 3, 5])
    assert torch.equal(model.trunk(ids), lm(ids))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, last).sum().backward()
    optimizer.step()
    assert not torch.equal(model.trunk(ids), lm(ids))
    assert all(torch.equal(p, before[name]) for name, p in lm.state_dict().items())
    assert all(p.grad is None for p in lm.parameters())


def test_scalar_head_computes_in_fp32_under_bf16_autocast():
    torch.manual_seed(0)
    head = ScalarHead(64, std=1.0)
    hidden = torch.randn(2, 3, 64).bfloat16()
    exact = hidden.double() @ head.linear.weight[0].double() + head.linear.bias.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(hidden)
    assert out.dtype == torch.float32 and out.shape == (2, 3)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)  # bf16 would be off by about 1e-2


def test_reward_model_scores_in_fp32_under_bf16_autocast(reward_model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reward_model.score(random_ids(2, 5), torch.tensor([4, 2])).dtype == torch.float32
