"""Networks of many forms, small, with random weights: for tests of channels and cutting."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from tiny_decoders import random_windows, roomy_decoder


def cacheless(kind):
    model = roomy_decoder(kind)
    model.config.use_cache = False  # which torch.export cannot give back
    return model


class Net(nn.Module):
    """A forward of its own, of modules that are given."""

    def __init__(self, run, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, *inputs):
        return self.run(self, *inputs)


def settled(model):
    """With norms that have seen something, so that they are no identity."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def images(channels=3, size=16):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def residual(self, x):
    x = torch.relu(self.b0(self.c0(x)))
    x = torch.relu(self.b2(self.c2(torch.relu(self.b1(self.c1(x))))) + x)
    return self.head(x.mean((2, 3)))


def concat(self, x):
    x = torch.cat([self.a(x), F.gelu(self.b(x))], 1)
    first, second = self.c(x).chunk(2, 1)
    return self.head((first * second.sigmoid()).flatten(1))


def recurrent(self, x):
    state = None
    for step in x.unbind(1):
        state = self.cell(step, state)
    return self.head(state[0] if isinstance(state, tuple) else state)


def packed(self, x):
    """Attention of one matrix for queries, keys and values."""
    q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def spread(self, x):
    return self.head(self.up(torch.relu(self.grouped(self.first(x)))).amax((2, 3)))


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.narrow, self.wide = (
            nn.Linear(channels, channels // 2),
            nn.Linear(channels // 2, channels),
        )

    def forward(self, x):
        gate = self.wide(torch.relu(self.narrow(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


def u_shaped(self, x):
    a = F.silu(self.n1(self.d1(x)))
    b = F.silu(self.n2(self.d2(F.max_pool2d(a, 2))))
    return self.last(torch.cat([a, F.interpolate(self.up(b), scale_factor=2)], 1))


def densely(self, x):
    a = self.c0(x)
    b = torch.cat([a, self.c1(torch.relu(self.b1(a)))], 1)
    c = torch.cat([b, self.c2(torch.relu(self.b2(b)))], 1)
    return self.head(F.adaptive_avg_pool2d(torch.relu(self.b3(c)), 1).flatten(1))


def sequence(self, x):
    return self.head(self.cell(x)[0][:, -1])


def by_letters(self, x):
    q, k, v = (layer(x).unflatten(-1, (-1, 4)) for layer in (self.q, self.k, self.v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))


def steps(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


NETS = {
    "residual": lambda: (
        Net(
            residual,
            c0=nn.Conv2d(3, 8, 3, padding=1),
            b0=nn.BatchNorm2d(8),
            c1=nn.Conv2d(8, 12, 3, padding=1, bias=False),
            b1=nn.BatchNorm2d(12),
            c2=nn.Conv2d(12, 8, 3, padding=1),
            b2=nn.BatchNorm2d(8),
            head=nn.Linear(8, 5),
        ),
        images(),
        {"c0": 8, "c1": 12},
    ),
    "concat, gate and flatten": lambda: (
        Net(
            concat,
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 6, 1),
            c=nn.Conv2d(10, 10, 3),
            head=nn.Linear(5 * 4, 3),
        ),
        images(3, 4),
        {"a": 4, "b": 6, "c": 5},
    ),
    "grouped and transposed": lambda: (
        Net(
            spread,
            first=nn.Conv2d(3, 8, 1),
            grouped=nn.Conv2d(8, 12, 3, groups=4),
            up=nn.ConvTranspose2d(12, 6, 2, stride=2),
            head=nn.Linear(6, 3),
        ),
        images(),
        {"first": 4, "up": 6},
    ),
    "packed attention": lambda: (
        Net(packed, qkv=nn.Linear(10, 3 * 5 * 4), out=nn.Linear(20, 7)),
        torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(2)),
        {"qkv": 5},
    ),
    "gru": lambda: (
        Net(recurrent, cell=nn.GRUCell(5, 8), head=nn.Linear(8, 3)),
        torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2)),
        {"cell.weight_ih": 8},
    ),
    "lstm": lambda: (
        Net(recurrent, cell=nn.LSTMCell(5, 8), head=nn.Linear(8, 3)),
        torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2)),
        {"cell.weight_ih": 8},
    ),
    "lstm module": lambda: (
        Net(sequence, cell=nn.LSTM(5, 8, batch_first=True), head=nn.Linear(8, 3)),
        steps(2, 4, 5),
        {"cell.weight_ih_l0": 8},
    ),
    "gru module, two layers, both ways": lambda: (
        Net(
            sequence,
            cell=nn.GRU(5, 8, 2, batch_first=True, bidirectional=True),
            head=nn.Linear(16, 3),
        ),
        steps(2, 4, 5),
        {"cell.weight_ih_l0": 8},
    ),
    "squeeze and excitation": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), Excited(8), nn.Conv2d(8, 4, 1)),
        images(),
        {"0": 8, "2.narrow": 4},
    ),
    "u-net with norms of groups": lambda: (
        Net(
            u_shaped,
            d1=nn.Conv2d(3, 8, 3, padding=1),
            n1=nn.GroupNorm(4, 8),
            d2=nn.Conv2d(8, 16, 3, padding=1),
            n2=nn.GroupNorm(4, 16),
            up=nn.Conv2d(16, 8, 1),
            last=nn.Conv2d(16, 3, 1),
        ),
        images(),
        {"d1": 4, "d2": 4, "up": 8},
    ),
    "dense blocks": lambda: (
        Net(
            densely,
            c0=nn.Conv2d(3, 8, 3),
            b1=nn.BatchNorm2d(8),
            c1=nn.Conv2d(8, 4, 3, padding=1),
            b2=nn.BatchNorm2d(12),
            c2=nn.Conv2d(12, 4, 3, padding=1),
            b3=nn.BatchNorm2d(16),
            head=nn.Linear(16, 5),
        ),
        images(),
        {"c0": 8, "c1": 4, "c2": 4},
    ),
    "attention by letters": lambda: (
        Net(
            by_letters,
            q=nn.Linear(10, 16),
            k=nn.Linear(10, 16),
            v=nn.Linear(10, 16),
            out=nn.Linear(16, 5),
        ),
        steps(2, 6, 10),
        {"q": 4},
    ),
    "pixels and gates": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.PixelShuffle(2),
            nn.Hardswish(),
            nn.Conv2d(4, 12, 1),
            nn.GLU(1),
            nn.Conv2d(6, 3, 1),
        ),
        images(),
        {"0": 4, "3": 6},
    ),
    "resnet": lambda: (
        ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1])
        ),
        images(size=32),
        None,
    ),
    "mobilenet": lambda: (
        MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25)),
        images(size=32),
        None,
    ),
    "vit": lambda: (
        ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=4,
            )
        ),
        images(),
        None,
    ),
    "bert": lambda: (
        BertForSequenceClassification(
            BertConfig(
                vocab_size=96,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=16,
            )
        ),
        random_windows(2, 12),
        None,
    ),
    "decoder": lambda: (cacheless("llama"), random_windows(2, 12), None),
}


def half(network, seed=0):
    """About half of the channels of every family, at random."""
    draw = torch.Generator().manual_seed(seed)
    return {
        family.name: torch.randperm(family.channels, generator=draw)[: max(1, family.channels // 2)]
        .sort()
        .values
        for family in network.families
    }


@torch.no_grad()
def out(model, *inputs):
    found = model(*inputs)
    return found if isinstance(found, torch.Tensor) else found.logits
