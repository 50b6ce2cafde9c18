"""Log-probabilities of tokens, and the cross-entropy made of them: three paths, one result.

    log softmax(z)_i = z_i - log sum_j exp(z_j)            (computed after subtracting max z)
    cross-entropy(z, target) = -log softmax(z)_target      (torch.nn.CrossEntropyLoss = LogSoftmax + NLLLoss)

The logits z = hidden @ weight.T, N rows of V tokens, are by far the largest tensor of a language model. The paths differ
in how often such a tensor is written to memory:

    plain      the definition, operation by operation: many times
    compiled   once forward, once backward: what follows the matrix product is one region, fused by torch.compile
    chunked    never: a chunk of rows at a time, whose logits are formed again for the gradient

One temperature for every log-prob of a run: rollout, old, reference and new alike. Next: generate.py.
"""

import functools

import torch
from torch.nn import functional as F

from minirlhf.run import can_compile

PATHS = ("auto", "plain", "compiled", "chunked")
CHUNK = 2**24  # logits held at a time: 64 MB in fp32
PIECE = 2**18  # of those, how many the operations between the matrix products take at a time on a CPU: 1 MB, for its cache


def log_softmax(logits):
    """(..., V) -> (..., V), in nats; exact for any finite logits, large ones too."""
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


# ---- public: hidden states in, log-probs out -------------------------------------------------


def token_logprobs(hidden, weight, targets, mask, temperature=1.0, path="auto"):
    """Log-probability of each token the policy chose, with gradients to hidden and weight.

    hidden (B, T, C), weight (V, C), targets int64 (B, T), mask bool (B, T). Position t of hidden is the one that predicts
    target t. Returns (B, T), fp32, in nats, 0 where the mask is False; nothing behind the mask is looked at.
    """
    return token_stats(hidden, weight, targets, mask, temperature, path, moments=False)[0]


def token_stats(hidden, weight, targets, mask, temperature=1.0, path="auto", moments=True):
    """(logprobs, entropy, variance), (B, T) each, as above: entropy in nats is the mean of -log π over all V tokens,
    variance in nats² that of -log π. Both are for the log: they carry no gradient. Without `moments` they are None."""
    hidden, targets = hidden[mask] / temperature, targets[mask]  # (N, C), (N,), N = mask.sum()
    path = choose_path(path, len(hidden), weight)
    if path == "plain":
        columns = select(hidden @ weight.T, targets, moments)
    elif path == "compiled":
        columns = Compiled.apply(hidden @ weight.T, targets, moments)
    else:
        columns = Chunked.apply(hidden, weight, targets, moments, product_dtype(hidden))
    zeros = torch.zeros(mask.shape, device=hidden.device, dtype=columns[0].dtype)
    return [None if column is None else zeros.masked_scatter(mask, column) for column in columns]


def cross_entropy(hidden, weight, targets, reduction="mean", path="auto"):
    """Negative log-likelihood of targets, in nats, with gradients to hidden and weight.

    hidden (B, T, C), weight (V, C), targets int64 (B, T). Positions whose target is -100 count nothing.
    reduction: "none" (B, T), "sum", or "mean" over the positions that count.
    """
    counted = targets != -100
    if torch.is_grad_enabled() and reduction != "none" and choose_path(path, counted.sum().item(), weight) == "chunked":
        total = ChunkedSum.apply(hidden[counted], weight, targets[counted], product_dtype(hidden))
    else:
        nll = -token_logprobs(hidden, weight, targets, counted, path=path)
        if reduction == "none":
            return nll
        total = nll.sum()
    return total / counted.sum() if reduction == "mean" else total


def choose_path(path, N, weight):
    """auto: chunked where the logits alone, in fp32, would fill a sixteenth of the GPU's memory, or 1 GB elsewhere; else
    compiled on CUDA, where passes over memory are what costs; else plain, as a small vocabulary gains nothing there."""
    if path != "auto":
        return path
    cuda = weight.device.type == "cuda"
    limit = torch.cuda.get_device_properties(weight.device).total_memory / 16 if cuda else 2**30
    if 4 * N * len(weight) > limit:
        return "chunked"
    return "compiled" if cuda and can_compile("cuda") else "plain"


# ---- the region and its gradient, as torch.compile fuses them --------------------------------


def select(logits, targets, moments):
    """logits (N, V), targets (N,) -> log-probs, and with `moments` mean and variance of -log π, (N,) each."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = z - z.amax(-1, keepdim=True).detach()  # as in log_softmax, of which only one column is needed
    weights = shifted.exp()  # (N, V): softmax times its total
    total = weights.sum(-1)
    logprobs = shifted.gather(-1, targets[:, None]).squeeze(-1) - total.log()
    if not moments:
        return logprobs, None, None
    with torch.no_grad():  # three sums over V in the pass that finds the total: log π = shifted - log total
        mean = (weights * shifted).sum(-1) / total
        variance = (weights * shifted**2).sum(-1) / total - mean**2
        return logprobs, total.log() - mean, variance.clamp(min=0)


def select_gradient(logits, targets, logprobs, grad):
    """The logits (N, V) become the gradient grad (1[v = target] - softmax), where grad (N,) is that of the log-probs.

    softmax = exp(z - z[target] + log-prob of the target), so nothing of size (N, V) has to be kept from forward.
    """
    z = logits.to(logprobs.dtype)  # fp32 logits themselves, or a copy
    is_target = torch.arange(z.size(-1), device=z.device) == targets[:, None]
    z.sub_(z.gather(-1, targets[:, None])).add_(logprobs[:, None]).exp_()
    return logits.copy_(z.add_(is_target, alpha=-1).mul_(-grad[:, None]))


@functools.cache
def fused(function):
    """function, compiled once for any number of rows."""
    compiled = torch.compile(function)

    def call(*inputs):
        for x in inputs:
            if torch.is_tensor(x):
                torch._dynamo.mark_dynamic(x, 0)
        return compiled(*inputs)

    return call


def first_of(ctx, columns, N):
    """What a forward returns: N rows of its columns, of which only the log-probs carry a gradient."""
    columns = [None if column is None else column[:N] for column in columns]
    ctx.mark_non_differentiable(*(column for column in columns[1:] if column is not None))
    return tuple(columns)


class Compiled(torch.autograd.Function):
    """select of logits that exist, with a gradient that reads them once and writes once.

    (Derived by autograd it would spread grad into zeros (N, V) first, and read those.)
    """

    @staticmethod
    def forward(ctx, logits, targets, moments):
        N = len(logits)
        if N < 2:  # torch.compile treats sizes 0 and 1 as constants
            logits, targets = F.pad(logits, (0, 0, 0, 2 - N)), F.pad(targets, (0, 2 - N))
        columns = fused(select)(logits, targets, moments)
        ctx.save_for_backward(logits, targets, columns[0])
        ctx.N = N
        return first_of(ctx, columns, N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        logits, targets, logprobs = ctx.saved_tensors
        grad = F.pad(grad, (0, len(logits) - ctx.N))
        return fused(select_gradient)(logits, targets, logprobs, grad)[:ctx.N], None, None


def product_dtype(hidden):
    """The dtype of matrix products here and now."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class Chunks:
    """hidden @ weight.T a chunk of rows at a time, in one buffer. The last chunk is padded with rows that weigh nothing, so
    that all have one shape. Products in `dtype`; sums over V, and over chunks for the weight's gradient, in fp32."""

    def __init__(self, hidden, weight, dtype):
        self.N, self.head = len(hidden), weight.to(dtype)
        self.rows = min(max(2, CHUNK // len(weight)), max(2, self.N))
        self.piece = self.rows if hidden.is_cuda else max(1, PIECE // len(weight))
        self.region = fused if hidden.is_cuda and can_compile("cuda") else lambda function: function
        self.logits = self.head.new_empty(self.rows, len(weight))

    def split(self, *columns):
        """Chunks of columns (N, ...), together."""
        pad = -self.N % self.rows if self.N else self.rows
        return zip(*(F.pad(x, (0, 0) * (x.dim() - 1) + (0, pad)).split(self.rows) for x in columns))

    def select(self, hidden, targets, moments):
        """self.logits become those of this chunk; returns select of them, as three columns."""
        torch.mm(hidden.to(self.head.dtype), self.head.T, out=self.logits)
        pieces = zip(self.logits.split(self.piece), targets.split(self.piece))
        parts = [self.region(select)(*part, moments) for part in pieces]
        return [None if column[0] is None else torch.cat(column) for column in zip(*parts)]

    def pull(self, hidden, targets, logprobs, grad, grad_weight):
        """Gradient of this chunk's hidden states, where grad (rows,) is that of its log-probs; that of the weight is added
        to grad_weight (V, C). self.logits are spent."""
        for part in zip(*(x.split(self.piece) for x in (self.logits, targets, logprobs, grad))):
            self.region(select_gradient)(*part)
        if self.logits.dtype == grad_weight.dtype:
            grad_weight.addmm_(self.logits.T, hidden)  # no second (V, C)
        else:
            grad_weight += self.logits.T @ hidden.to(self.logits.dtype)
        return self.logits @ self.head


class Chunked(torch.autograd.Function):
    """select of hidden @ weight.T without (N, V): the logits are formed again for the gradient, four products for three."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, moments, dtype):
        chunks = Chunks(hidden, weight, dtype)
        columns = zip(*(chunks.select(*part, moments) for part in chunks.split(hidden, targets)))
        columns = [None if column[0] is None else torch.cat(column)[:chunks.N] for column in columns]
        ctx.save_for_backward(hidden, weight, targets, columns[0])
        ctx.dtype = dtype
        ctx.mark_non_differentiable(*(column for column in columns[1:] if column is not None))
        return tuple(columns)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        hidden, weight, targets, logprobs = ctx.saved_tensors
        chunks = Chunks(hidden, weight, ctx.dtype)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        grad_hidden = []
        for h, y, p, g in chunks.split(hidden, targets, logprobs, grad):
            torch.mm(h.to(ctx.dtype), chunks.head.T, out=chunks.logits)
            grad_hidden.append(chunks.pull(h, y, p, g, grad_weight))
        return torch.cat(grad_hidden)[:chunks.N].to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None


class ChunkedSum(torch.autograd.Function):
    """-Σ log-probs, of which nothing else is made: both gradients are formed at once, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        chunks, total, grad_hidden = Chunks(hidden, weight, dtype), 0.0, []
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for h, y, counts in chunks.split(hidden, targets, torch.ones_like(hidden[:, 0], dtype=grad_weight.dtype)):
            logprobs = chunks.select(h, y, False)[0]
            total = total - (logprobs * counts).sum()
            grad_hidden.append(chunks.pull(h, y, logprobs, -counts, grad_weight))
        ctx.gradients = torch.cat(grad_hidden)[:chunks.N].to(hidden.dtype), grad_weight.to(weight.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.gradients
        del ctx.gradients  # they are scaled in place: a second backward would scale them again
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None
