"""Models as people bring them: name -> what makes one, and the points that it takes.

`ODD` can be trained, unlearned and attributed, `NOISY` among them draw noise; `REFUSED` cannot, and its refusal holds
the words beside them.
"""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

K, D = 3, 6


def mlp(*between, d=D, hidden=8):
    return nn.Sequential(nn.Linear(d, hidden), *(between or (nn.ReLU(),)), nn.Linear(hidden, K))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, K)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


class TiedByUse(nn.Module):
    """A layer's weight is used a second time by a function, as in an autoencoder."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, 5), nn.Linear(D, K)

    def forward(self, x):
        return self.last(F.linear(self.first(x).tanh(), self.first.weight.T).tanh())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(D, D), nn.Linear(D, K)

    def forward(self, x):
        return self.last(self.inner(self.inner(x).tanh()).tanh())


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(D, 8), nn.Linear(8, 8), nn.Linear(8, K)
        self.first.requires_grad_(False)
        self.second.weight.requires_grad_(False)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True))

    def forward(self, x):
        x *= 0.5
        x += 1
        return self.body(x)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.cell, self.last = kind(2, 5, batch_first=True), nn.Linear(5, K)

    def forward(self, x):
        return self.last(self.cell(x.view(len(x), 3, 2))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(2, K)

    def forward(self, x):
        x = x.view(len(x), 3, 2)
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
        self.lift, self.last = nn.Linear(2, 4), nn.Linear(4, K)

    def forward(self, x):
        return self.last(self.encoder(self.lift(x.view(len(x), 3, 2))).mean(1))


class Buffers(nn.Module):
    """Statistics of its own: one changed in place, two assigned, one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.body = mlp(d=D)
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("scale", torch.ones(D))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
            self.seen += len(x)
        return self.body((x - self.mean) / self.scale)


class Skip(nn.Module):
    """One input goes into two layers, and both meet again."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(D, 8), nn.Linear(D, 8), nn.Bilinear(8, 8, K)

    def forward(self, x):
        return self.last(self.left(x).tanh(), self.right(x).tanh())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.last = nn.Embedding(7, 4), nn.Linear(4 * D, K)

    def forward(self, x):
        return self.last(self.words(x).flatten(1).tanh())


class Branching(nn.Module):
    """What it computes depends on the values that it is given."""

    def __init__(self):
        super().__init__()
        self.body, self.more = mlp(), nn.Linear(K, K)

    def forward(self, x):
        z = self.body(x)
        return torch.stack([self.more(row.tanh()) if row.sum() > 0 else row for row in z])


class Remembers(nn.Module):
    """Keeps what it computed, as for a plot."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, 8), nn.Linear(8, K)

    def forward(self, x):
        self.features = self.first(x).relu()
        return self.last(self.features)


class Constant(nn.Module):
    """A tensor that is no buffer, a parameter that nothing uses, and a bare parameter of no dimension."""

    def __init__(self):
        super().__init__()
        self.body, self.unused, self.scale = mlp(), nn.Linear(3, 3), nn.Parameter(torch.tensor(0.7))
        self.shift = torch.linspace(-1, 1, D)

    def forward(self, x):
        return self.scale * self.body(x + self.shift)


class Draws(nn.Module):
    """Noise of its own in training, drawn by torch's functions."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x + 0.1 * torch.randn_like(x) if self.training else x)


class ByPython(nn.Module):
    """Draws its first weights by NumPy, and what it skips in training by Python."""

    def __init__(self):
        super().__init__()
        self.body, self.shift = mlp(), nn.Parameter(torch.from_numpy(np.random.rand(K)).float())  # noqa: NPY002

    def forward(self, x):
        kept = not self.training or random.random() < 0.7
        return self.body(x) * kept + self.shift


class Padded(nn.Module):
    """torch.vmap gives the padding a gradient."""

    def __init__(self, **options):
        super().__init__()
        self.words, self.last = nn.Embedding(7, 4, padding_idx=0, **options), nn.Linear(4 * D, K)

    def forward(self, x):
        return self.last(self.words(x).flatten(1))


def shared_layer():
    layer = nn.Linear(D, D)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.RReLU(), nn.Linear(D, K))


def table(d=D):
    return torch.randn(36, d, generator=torch.Generator().manual_seed(0))


def words():
    return torch.arange(36 * D).view(36, D) * 5 % 7


def images():
    return torch.randn(36, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(*norm):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), *norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, K)
    )


class Detached(nn.Module):
    """Its first layer stays as it was drawn."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, 8), nn.Linear(8, K)

    def forward(self, x):
        return self.last(self.first(x).relu().detach())


ODD = {
    "tied": (Tied, table),
    "tied by use": (TiedByUse, table),
    "twice": (Twice, table),
    "frozen": (Frozen, table),
    "detached": (Detached, table),
    "in place": (InPlace, table),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(8), nn.ReLU()), table),
    "cumulative batch norm": (lambda: mlp(nn.BatchNorm1d(8, momentum=None), nn.ReLU()), table),
    "batch norm of images": (lambda: conv(nn.BatchNorm2d(4)), images),
    "group norm": (lambda: conv(nn.GroupNorm(2, 4)), images),
    "channels last": (
        lambda: conv().to(memory_format=torch.channels_last),
        lambda: images().to(memory_format=torch.channels_last),
    ),
    "dropout": (lambda: mlp(nn.ReLU(), nn.Dropout(0.3)), table),
    "noise": (Draws, table),
    "lstm": (Recurrent, table),
    "gru": (lambda: Recurrent(nn.GRU), table),
    "attention": (Attention, table),
    "encoder": (Encoder, table),
    "encoder with dropout": (lambda: Encoder(0.2), table),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 8)), nn.Tanh(), nn.Linear(8, K)),
        table,
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, 8)), nn.Tanh(), nn.Linear(8, K)),
        table,
    ),
    "old weight norm": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(D, 8)), nn.Tanh(), nn.Linear(8, K)),
        table,
    ),
    "old spectral norm": (
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(D, 8)), nn.Tanh(), nn.Linear(8, K)),
        table,
    ),
    "weight norm alone": (lambda: parametrizations.weight_norm(nn.Linear(D, K)), table),
    "spectral norm alone": (lambda: parametrizations.spectral_norm(nn.Linear(D, K)), table),
    "orthogonal alone": (lambda: parametrizations.orthogonal(nn.Linear(D, K), orthogonal_map="cayley"), table),
    "buffers": (Buffers, table),
    "skip": (Skip, table),
    "double": (lambda: mlp().double(), lambda: table().double()),
    "embedding": (Words, words),
    "padding": (Padded, words),
    "shared layer": (shared_layer, table),
    "python's chance": (ByPython, table),
    "branching": (Branching, table),
    "remembers": (Remembers, table),
    "constant": (Constant, table),
    "one layer": (lambda: nn.Linear(D, K), table),
    "no bias": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, K, bias=False)), images),
}
NOISY = ("dropout", "noise", "encoder with dropout", "shared layer", "python's chance")


# --- what cannot be trained ----------------------------------------------------------------------------


class Around(nn.Module):
    """A network whose answers are changed by a function of (module, x, z)."""

    def __init__(self, change, body=None):
        super().__init__()
        self.body, self.change, self.calls, self.level = body or mlp(), change, 0, torch.tensor(0.0)
        self.register_buffer("queue", torch.zeros(2))

    def forward(self, x):
        return self.change(self, x, self.body(x))


def counts(module, x, z):
    module.calls += 1
    return z


def drifts(module, x, z):
    module.level = 0.9 * module.level + 0.1 * x.mean()
    return z + module.level


def grows(module, x, z):
    module.queue = torch.cat([module.queue, module.queue])
    return z


class OwnTensor(nn.Module):
    """A projection drawn by the seed that is neither a parameter nor a buffer: a stack would give all models one."""

    def __init__(self):
        super().__init__()
        self.last, self.projection = nn.Linear(8, K), torch.randn(D, 8)

    def forward(self, x):
        return self.last((x @ self.projection).relu())


class Clipped(torch.autograd.Function):
    """In the old form, which torch.func does not take."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        return g


def renorms(module, x, z):
    with torch.no_grad():
        module.body[0].weight *= 0.9
    return z


def hooked():
    model = mlp()
    model[0].weight.register_hook(lambda g: 0 * g)
    return model


def frozen():
    return mlp().requires_grad_(False)


def of(change, body=None):
    return lambda: Around(change, body() if body else None)


ONE = mlp()
REFUSED = {
    "two answers more": (lambda: nn.Linear(D, K + 2), r"answers \(4, 5\) for 4 points; give logits \(4, 3\)"),
    "probabilities": (of(lambda m, x, z: z.softmax(1)), "answers probabilities; return logits, before the softmax"),
    "a sequence": (of(lambda m, x, z: z[:, None]), r"answers \(4, 1, 3\)"),
    "tuple": (of(lambda m, x, z: (z, x)), "answers a tuple; return logits"),
    "dictionary": (of(lambda m, x, z: {"logits": z}), "answers a dict; return logits"),
    "labels": (of(lambda m, x, z: z.argmax(1)), "answers a torch.int64; return logits"),
    "NaN": (of(lambda m, x, z: z / 0), "NaN or infinity before any training"),
    "noise in evaluation": (
        of(lambda m, x, z: z + torch.randn_like(z)),
        "when asked twice; draw nothing in evaluation",
    ),
    "count": (of(counts), "plain attributes"),
    "drift": (of(drifts), "when asked twice"),
    "growth": (of(grows), r"fails on points .*must match the size"),
    "own tensor": (OwnTensor, "make every tensor a parameter or buffer"),
    "neighbours": (of(lambda m, x, z: z - z.mean(0)), "which others are in its batch"),
    "no running statistics": (
        lambda: mlp(nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU()),
        "which others are in its batch",
    ),
    "no gradient": (of(lambda m, x, z: z.detach()), "no finite gradient"),
    "hook on a weight": (hooked, "hooks on gradients of its weights"),
    "no width": (lambda: mlp(nn.Dropout(0.1), hidden=0), "no number in its weight 0.weight"),
    "frozen whole": (frozen, "no parameter that requires gradients"),
    "shared": (lambda: ONE, "same object at every call"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, K)), "uninitialized parameter"),
    "function": (lambda: torch.relu, "has no attribute 'to'"),
    "another shape": (lambda: nn.Linear(D + 1, K), r"fails on points of shape \(6,\), float32 \(RuntimeError: mat1"),
    "another precision": (lambda: mlp().double(), r"fails on points of shape \(6,\), float32"),
    "renorm": (of(renorms), "changes its parameters"),
    "half weights": (lambda: mlp().bfloat16(), "has weights of torch.bfloat16"),
    "half answers": (of(lambda m, x, z: z.half()), "answers a torch.float16; return logits"),
    "old function": (of(lambda m, x, z: Clipped.apply(z)), "fails on points .* autograd.Function with functorch"),
    "no batch of one's own": (of(lambda m, x, z: z.sum(0)), r"answers \(3,\) for 4 points"),
}
