"""What the scripts share: the DARTS search space, the gradient primitives, the data, the run.

Sections: operations and supernet; gradients; images and streams; command line and run folder.
Sources: DARTS (Liu et al. 2019, arXiv 1806.09055) for the search space and the one-step gradient;
the methods' equations are in lpt.py, il.py and lease.py.
"""

import json
import math
import os
import pickle
import shlex
import sys
import time
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with torchvision
from torch import Tensor
from torchvision.transforms import v2

from genotypes import PRIMITIVES, BadInput, Genotype, to_json, to_svg

# ------------------------------------------------------------------------ operations and supernet


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that takes its weight at the call: alpha * BN(x) is BN(x) with weight alpha."""

    def forward(self, x, weight=None):
        weight = self.weight if weight is None else weight
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias,
                            self.training, self.momentum, self.eps)


class SeparableConv(nn.Module):
    """Depthwise k x k, pointwise, BN; `edges` of them side by side along the channels."""

    def __init__(self, C, kernel, stride=1, dilation=1, edges=1, affine=False):
        super().__init__()
        wide, self.dilation = edges * C, dilation
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide, bias=False)
        self.pointwise = nn.Conv2d(wide, wide, 1, groups=edges, bias=False)
        self.norm = BatchNorm(wide, affine=affine)

    def forward(self, x, weight=None, dilation=None):
        d, dilation = self.depthwise, dilation or self.dilation
        x = F.conv2d(x, d.weight, None, d.stride, dilation * d.padding[0], dilation, d.groups)
        return self.norm(self.pointwise(x), weight)


class FactorizedReduce(nn.Module):
    """Two 1 x 1 convolutions of stride 2, one shifted by a pixel, side by side; `edges` of them."""

    def __init__(self, C_in, C_out, edges=1, affine=False):
        super().__init__()
        self.edges = edges
        self.conv1 = nn.Conv2d(C_in, edges * (C_out // 2), 1, 2, bias=False)
        self.conv2 = nn.Conv2d(C_in, edges * (C_out - C_out // 2), 1, 2, bias=False)
        self.norm = BatchNorm(edges * C_out, affine=affine)

    def forward(self, x, weight=None):
        H, W = x.shape[2:]
        shifted = F.pad(x, (-1, W % 2, -1, H % 2))                # an odd map is padded to even
        halves = zip(self.conv1(x).chunk(self.edges, 1), self.conv2(shifted).chunk(self.edges, 1))
        return self.norm(torch.cat([half for pair in halves for half in pair], 1), weight)


def relu_conv_bn(C_in, C_out, affine=False):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(C_in, C_out, 1, bias=False),
                         BatchNorm(C_out, affine=affine))


def operation(name: str, C: int, stride: int, affine: bool) -> nn.Module:
    """One candidate operation on one edge, as the evaluated network uses it (DARTS §3.1.1)."""
    kernel = int(name[-1]) if name[-1].isdigit() else 0
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, 1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name == "skip_connect":
        return (nn.Identity() if stride == 1 else
                nn.Sequential(nn.ReLU(), FactorizedReduce(C, C, affine=affine)))
    if name.startswith("sep_conv"):
        return nn.Sequential(nn.ReLU(), SeparableConv(C, kernel, stride, affine=affine),
                             nn.ReLU(), SeparableConv(C, kernel, affine=affine))
    return nn.Sequential(nn.ReLU(), SeparableConv(C, kernel, stride, 2, affine=affine))


def phases(x):
    """The four stride-2 phases of x along the batch: (N, C, H, W) -> (4N, C, H/2, W/2).

    A convolution of dilation 2 is a plain one on each phase, whose gradients cost far less.
    """
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def merge_phases(x):                                              # the inverse of phases
    x = x.permute(0, 2, 3, 1).unflatten(0, (2, 2, -1))            # (2, 2, N, H/2, W/2, C)
    x = x.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)   # (N, H, W, C)
    return x.permute(0, 3, 1, 2)


class MixedEdges(nn.Module):
    """The mixed operations (DARTS Eq. 2) on all `edges` outgoing edges of one state at once.

    The convolutions of one type are merged over the edges into one grouped convolution; what has no
    weights (pooling with its BN, identity) is computed once; `none` adds zero and is left out.
    """

    def __init__(self, C, edges, stride):
        super().__init__()
        self.edges, self.stride = edges, stride
        for k in (3, 5):
            self.add_module(f"sep_conv_{k}x{k}_a", SeparableConv(C, k, stride, edges=edges))
            self.add_module(f"sep_conv_{k}x{k}_b", SeparableConv(C, k, edges=edges))
            self.add_module(f"dil_conv_{k}x{k}", SeparableConv(C, k, edges=edges))
        self.max_norm, self.avg_norm = (BatchNorm(C, affine=False) for _ in range(2))
        if stride == 2:
            self.skip_connect = FactorizedReduce(C, C, edges)

    def forward(self, x, p):
        """x (N, C, H, W), p (edges, 8) softmaxed -> one (N, C, H', W') per edge."""
        _, C, H, W = x.shape
        on_edges = dict(zip(PRIMITIVES, p.repeat_interleave(C, 0).t().contiguous()))  # (edges*C,)
        wide = F.relu_(torch.cat([x] * self.edges, 1))            # (N, edges*C, H, W)

        def separable(name):
            once = F.relu_(self.get_submodule(name + "_a")(wide))
            return self.get_submodule(name + "_b")(once, on_edges[name])

        def dilated(wide, dilation):
            return (self.dil_conv_3x3(wide, on_edges["dil_conv_3x3"], dilation)
                    + self.dil_conv_5x5(wide, on_edges["dil_conv_5x5"], dilation))

        out = separable("sep_conv_3x3") + separable("sep_conv_5x5")
        if self.stride == 2:     # then dilation 2 reads one phase only
            out = out + dilated(wide[:, :, ::2, ::2], 1)
            out = out + self.skip_connect(F.relu(x), on_edges["skip_connect"])
        elif H % 2 == W % 2 == 0:
            out = out + merge_phases(dilated(phases(wide), 1))
        else:
            out = out + dilated(wide, 2)

        shared = [self.max_norm(F.max_pool2d(x, 3, self.stride, 1)),
                  self.avg_norm(F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False))]
        if self.stride == 1:
            shared.append(x)
        N, _, H, W = out.shape
        stacked = torch.stack([s.permute(0, 2, 3, 1) for s in shared]).flatten(1)  # (2|3, N*H*W*C)
        mixed = p[:, 1:1 + len(shared)] @ stacked                 # max_pool, avg_pool, skip_connect
        mixed = mixed.view(-1, N, H, W, C).permute(0, 1, 4, 2, 3)
        return [a + b for a, b in zip(out.chunk(self.edges, 1), mixed)]


NODES = 4
EDGES = sum(2 + i for i in range(NODES))                          # 14
# the rows of alpha that belong to state j's outgoing edges, in the order of the nodes they lead to
OUTGOING = [[sum(2 + n for n in range(i)) + j for i in range(max(0, j - 1), NODES)]
            for j in range(NODES + 1)]


class SearchCell(nn.Module):
    def __init__(self, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        self.reduction = reduction
        self.preprocess0 = (nn.Sequential(nn.ReLU(), FactorizedReduce(C_prev_prev, C))
                            if reduction_prev else relu_conv_bn(C_prev_prev, C))
        self.preprocess1 = relu_conv_bn(C_prev, C)
        self.states = nn.ModuleList(MixedEdges(C, len(rows), 2 if reduction and j < 2 else 1)
                                    for j, rows in enumerate(OUTGOING))

    def forward(self, s0, s1, p):
        """p: per state, its outgoing edges' softmaxed alphas."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        sums = [0] * NODES
        for j, edges in enumerate(self.states):
            for node, term in zip(range(max(0, j - 1), NODES), edges(states[j], p[j])):
                sums[node] = sums[node] + term
            if j > 0:                                             # node j - 1 has all its inputs
                states.append(sums[j - 1])
        return torch.cat(states[2:], 1)                           # (N, 4C, H, W)


class Supernet(nn.Module):
    """The DARTS search network: cells of mixed operations; reduction cells at 1/3 and 2/3.

    Its parameters are the weights alone; the architecture comes with the call, so that one
    architecture can be shared by several networks.
    """

    def __init__(self, C=16, num_classes=10, layers=8):
        super().__init__()
        C_prev_prev = C_prev = 3 * C
        self.stem = nn.Sequential(nn.Conv2d(3, C_prev, 3, padding=1, bias=False), BatchNorm(C_prev))
        self.cells, reduction = nn.ModuleList(), False
        for i in range(layers):
            reduction_prev, reduction = reduction, i in (layers // 3, 2 * layers // 3)
            C *= 2 if reduction else 1
            self.cells.append(SearchCell(C_prev_prev, C_prev, C, reduction, reduction_prev))
            C_prev_prev, C_prev = C_prev, NODES * C
        self.classifier = nn.Linear(C_prev, num_classes)

    def forward(self, x, alphas):
        """x (N, 3, H, W), alphas: normal and reduce, each (14, 8) -> logits (N, num_classes)."""
        p = [[torch.stack([rows[e] for e in edges]) for edges in OUTGOING]
             for rows in (F.softmax(alpha, -1).unbind() for alpha in alphas)]
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, p[cell.reduction])
        return self.classifier(s1.mean((2, 3)))


def initial_alphas(device) -> list[Tensor]:
    """The architecture A: alpha of the normal and of the reduction cell, each (14, 8)."""
    return [nn.Parameter((1e-3 * torch.randn(EDGES, len(PRIMITIVES))).to(device)) for _ in range(2)]


def decode(alphas: list[Tensor]) -> Genotype:
    """The cell that alphas stand for (DARTS §2.4): per node the two incoming edges whose strongest
    operation other than `none` is strongest, with that operation; ties go to the lower index."""
    def cell(alpha):
        p, edges, first = F.softmax(alpha.detach().float().cpu(), -1)[:, 1:].tolist(), [], 0
        for n in range(2, 2 + NODES):
            rows = p[first:first + n]
            for state in sorted(range(n), key=lambda s: -max(rows[s]))[:2]:
                edges.append((PRIMITIVES[1 + rows[state].index(max(rows[state]))], state))
            first += n
        return edges
    concat = list(range(2, 2 + NODES))
    return Genotype(cell(alphas[0]), concat, cell(alphas[1]), concat)


def architecture_report(alphas: list[Tensor]) -> dict:
    """Mean entropy of softmax(alpha) in nats, and skip connections in the decoded normal cell."""
    p = F.softmax(torch.cat([a.detach() for a in alphas]), -1)
    skips = sum(op == "skip_connect" for op, _ in decode(alphas).normal)
    return {"alpha_entropy": -(p * p.log()).sum(-1).mean().item(), "skip_connections": skips}


def place(module: nn.Module, device) -> nn.Module:
    """The module on its device, in the memory format that is fast there."""
    return module.to(device, memory_format=memory_format(device))


def memory_format(device):
    return torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format


# -------------------------------------------------------------------------------------- gradients


def grad(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """d loss / d inputs; touches no .grad. Every gradient of the methods is taken here."""
    return list(torch.autograd.grad(loss, inputs))


def call(module: nn.Module, weights: list[Tensor], *inputs):
    """module(*inputs) at other weights (in the order of its parameters) and with throw-away
    BatchNorm statistics: changes nothing in the module."""
    state = dict(zip((name for name, _ in module.named_parameters()), weights, strict=True))
    state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return torch.func.functional_call(module, state, inputs)


@torch.no_grad()
def virtual_weights(optimizer: torch.optim.SGD, weights: list[Tensor], grads: list[Tensor]):
    """The weights after one SGD step, w' = w - xi (mu buffer + grad + wd w), as leaves (DARTS
    Eq. 7, with the momentum and weight decay of its reference code); nothing else changes."""
    group = optimizer.param_groups[0]
    step = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
    buffers = [optimizer.state[w].get("momentum_buffer") for w in weights if w in optimizer.state]
    if buffers and buffers[0] is not None:
        torch._foreach_add_(step, buffers, alpha=group["momentum"])
    return [w.requires_grad_() for w in torch._foreach_add(weights, step, alpha=-group["lr"])]


def central_difference(grad_at, w: list[Tensor], v: list[Tensor], radius: float = 1e-2):
    """(d2 L / da dw) v for every tensor a that grad_at differentiates by; zeros where v is zero.

    grad_at(w) returns dL/da at weights w. The step is eps = radius / |v|, with the norm over all
    of v (DARTS Eq. 8; LPT Eq. 17; LeaSE Eq. 11).
    """
    with torch.no_grad():
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(v)))
        eps = torch.where(norm > 0, radius / norm, radius)
        step = torch._foreach_mul(v, eps)
        plus, minus = torch._foreach_add(w, step), torch._foreach_sub(w, step)
    return [(p - n) / (2 * eps) for p, n in zip(grad_at(plus), grad_at(minus))]


def descend(optimizer, weights: list[Tensor], grads: list[Tensor], clip: float | None = None):
    """One optimizer step along given gradients, their total norm clipped at `clip`."""
    for w, g in zip(weights, grads):
        w.grad = g
    if clip:
        nn.utils.clip_grad_norm_(weights, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def cosine(start: float, end: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch, annealed from start towards end (SGDR, Eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


# ----------------------------------------------------------------------------- images and streams


@dataclass
class ImageSet:
    """Labelled images in memory, whole, on the device."""
    images: Tensor          # (n, 3, H, W) uint8
    labels: Tensor          # (n,) int64
    classes: list[str]
    mean: Tensor            # (3, 1, 1), of the training images, in units of 0 to 1
    std: Tensor             # (3, 1, 1)

    def batch(self, rows, rng=None, cutout: int = 0) -> Tensor:
        """The images `rows`, normalised, (N, 3, H, W) float32. With a generator each is cropped
        out of its zero-padded self (by 1/8: 4 pixels at 32), flipped by even odds and, if asked,
        loses a square of `cutout` pixels' side."""
        x, device = self.images[rows], self.images.device
        N, _, H, W = x.shape
        ys, xs = torch.arange(H, device=device), torch.arange(W, device=device)

        def draw(high):                                           # (N, 1) integers below high
            return torch.from_numpy(rng.integers(high, size=(N, 1))).to(device)

        if rng is not None:
            pad = H // 8
            x = F.pad(x, (pad,) * 4)
            down, across = ys + draw(2 * pad + 1), xs + draw(2 * pad + 1)
            across = torch.where(draw(2) == 1, across.flip(1), across)
            n, c = (torch.arange(k, device=device)[:, None, None] for k in (N, 3))
            x = x[n[..., None], c, down[:, None, :, None], across[:, None, None, :]]
        x = (x.float() / 255 - self.mean) / self.std
        if cutout:
            inside = [(at - centre + cutout // 2).div(cutout, rounding_mode="floor") == 0
                      for at, centre in ((ys, draw(H)), (xs, draw(W)))]
            x = x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
        return x.contiguous(memory_format=memory_format(device))

    def batches(self, rows, batch_size):
        """Each image of `rows` once, in order and as it is: x, y."""
        for part in torch.as_tensor(rows, device=self.labels.device).split(batch_size):
            yield self.batch(part), self.labels[part]


def image_set(images: Tensor, labels, classes, device) -> ImageSet:
    """An ImageSet on the device, with the channel statistics of its own images."""
    sums = [(x.double().sum((0, 2, 3)), x.double().square().sum((0, 2, 3)))
            for x in images.split(256)]
    pixels = images[:, 0].numel()
    mean = sum(s for s, _ in sums) / pixels
    std = (sum(q for _, q in sums) / pixels - mean ** 2).clamp_min(0).sqrt().clamp_min(1)
    mean, std = ((s / 255).float().view(3, 1, 1).to(device) for s in (mean, std))
    labels = torch.as_tensor(labels).long().to(device)
    return ImageSet(images.to(device), labels, classes, mean, std)


def load_images(dataset: str, data: Path, device, image_size: int | None = None,
                test: bool = False) -> ImageSet:
    """The training (or test) images of a data set.

    dataset: cifar10, cifar100, folder or folder:DIR (an ImageFolder tree: train/, and test/ or
    val/), synthetic or synthetic:CLASSES. Raises BadInput where they cannot be had.
    """
    name, _, option = dataset.partition(":")
    if name == "synthetic":
        return synthetic(int(option or 10), image_size or 32, device, test)
    if name == "folder":
        data = Path(option or data)
        parts = [data / part for part in (("test", "val") if test else ("train",))]
        path = next((p for p in parts if p.is_dir()), None)
        if path is None:
            raise BadInput(f"no folder {' or '.join(map(str, parts))}: --data must hold train/, "
                           "and test/ or val/, with one folder of images per class")
        return read_folder(path, image_size, device)
    if name == "imagenet":
        raise BadInput("--dataset imagenet: not built yet; evaluate.py has --count-params for it")
    if image_size not in (None, 32):
        raise BadInput(f"--image-size {image_size}: the images of {dataset} have 32 pixels")
    source = getattr(torchvision.datasets, name.upper())
    try:
        cifar = source(data, train=not test, download=True)       # checks its files' checksums
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{dataset} is not in {data} and cannot be downloaded ({error}): put "
                       f"{source.filename} there, or use --dataset folder --data DIR") from None
    return image_set(torch.from_numpy(cifar.data).permute(0, 3, 1, 2), cifar.targets,
                     cifar.classes, device)


def read_folder(path: Path, image_size: int | None, device) -> ImageSet:
    """All images of an ImageFolder, resized and centre-cropped to image_size if given."""
    try:
        folder = torchvision.datasets.ImageFolder(path)
    except (FileNotFoundError, PermissionError) as error:
        raise BadInput(f"no images in {path}: {error}") from None
    images = []
    for file, _ in folder.samples:
        try:
            image = folder.loader(file)                           # RGB
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadInput(f"cannot read the image {file}: {error}") from None
        if image_size:
            image = v2.functional.resize(image, [image_size])
            image = v2.functional.center_crop(image, [image_size])
        images.append(np.asarray(image))
        if images[-1].shape != images[0].shape:
            raise BadInput(f"{file} is {image.width} x {image.height} pixels and the images before "
                           "it are not: give --image-size")
    return image_set(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
                     folder.targets, folder.classes, device)


def synthetic(num_classes: int, image_size: int, device, test: bool = False) -> ImageSet:
    """Small procedural images that a network can learn: a class is a colour and a shape, on noise
    of another colour. 4% of the training labels are wrong on purpose, none of the test's."""
    rng = np.random.default_rng([num_classes, image_size, test])
    n = 400 if test else 2000
    labels = rng.integers(num_classes, size=n)

    def of(*shape, low=0.0, high=1.0):
        return rng.uniform(low, high, size=(n, *shape)).astype(np.float32)

    grid = np.linspace(-1, 1, image_size, dtype=np.float32)
    u = (grid[None, None, :] - of(1, 1, low=-0.3, high=0.3)) / of(1, 1, low=0.4, high=0.8)
    v = (grid[None, :, None] - of(1, 1, low=-0.3, high=0.3)) / of(1, 1, low=0.4, high=0.8)
    power = np.array([0.6, 1, 2, 8], np.float32)[labels % 4, None, None]    # star, ..., square
    radius = np.abs(u) ** power + np.abs(v) ** power
    ring = ((labels // 4 % 2 == 1)[:, None, None]) & (radius < 0.3)
    mask = ((radius < 1) & ~ring)[:, None]
    hue = (labels / num_classes + rng.normal(0, 0.03, n)).astype(np.float32)[:, None]
    colour = 0.5 + 0.4 * np.cos(2 * np.pi * (hue + np.array([[0, 1 / 3, 2 / 3]], np.float32)))
    image = np.where(mask, colour[:, :, None, None], of(3, 1, 1)) + rng.normal(
        0, 0.12, (n, 3, image_size, image_size)).astype(np.float32)
    if not test:
        wrong = rng.random(n) < 0.04
        labels = np.where(wrong, (labels + rng.integers(1, num_classes, n)) % num_classes, labels)
    pixels = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    names = [f"{s}{k}" for k, s in zip(range(num_classes), ["star", "diamond", "disc", "square"]
                                       * num_classes)]
    return image_set(torch.from_numpy(pixels), labels, names, device)


def split_rows(n: int, seed: int, hold_out: int = 0):
    """Rows of the training half, the validation half and the held-out images: a random partition.
    The held-out ones are the same for every seed, so that another script can test on them."""
    order = np.random.default_rng(0).permutation(n)
    held, rest = np.sort(order[:hold_out]), np.sort(order[hold_out:])
    rest = np.random.default_rng([seed, 0]).permutation(rest)
    return rest[:len(rest) // 2], rest[len(rest) // 2:], held


class Stream:
    """Endless mini-batches of some rows of an ImageSet, shuffled without replacement and augmented.

    stream(step) is a pure function of (seed, name, step): x (N, 3, H, W), y (N,), rows (N,).
    """

    def __init__(self, data: ImageSet, rows, batch_size: int, seed: int, name: str, cutout=0):
        if batch_size > len(rows):
            raise BadInput(f"--batch-size {batch_size}: the {name} stream has {len(rows)} images")
        self.data, self.rows, self.batch_size, self.cutout = data, rows, batch_size, cutout
        self.key, self.order = (seed, zlib.crc32(name.encode())), (-1, None)

    def epoch_steps(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def _row(self, position: int) -> int:
        lap, k = divmod(position, len(self.rows))
        if lap != self.order[0]:
            self.order = lap, np.random.default_rng([*self.key, 0, lap]).permutation(self.rows)
        return self.order[1][k]

    def __call__(self, step: int):
        first = step * self.batch_size
        rows = np.array([self._row(first + k) for k in range(self.batch_size)])
        rng = np.random.default_rng([*self.key, 1, step])
        rows = torch.from_numpy(rows).to(self.data.images.device)
        return self.data.batch(rows, rng, self.cutout), self.data.labels[rows], rows


@torch.no_grad()
def accuracy(predict, data: ImageSet, rows, batch_size: int) -> float:
    """The share of images `rows` whose largest logit, of predict(x), is their label's."""
    hits = sum((predict(x).argmax(1) == y).sum() for x, y in data.batches(rows, batch_size))
    return hits.item() / len(rows)


# ------------------------------------------------------------- command line, run folder, pictures


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} from {low}" + (f" to {high}" if high < math.inf else "")
    return parse


def dataset_name(text: str) -> str:
    """An argparse type: the data sets of load_images."""
    name, colon, option = text.partition(":")
    known = name in ("cifar10", "cifar100", "imagenet", "folder", "synthetic") and not colon
    classes = name == "synthetic" and option.isascii() and option.isdigit()
    if known or (name == "folder" and option) or (classes and 2 <= int(option) <= 1000):
        return text
    raise ValueError


dataset_name.__name__ = "data set (cifar10, cifar100, imagenet, folder[:DIR], synthetic[:CLASSES])"


def parse(parser, argv, method: str, quick: dict):
    """The parsed arguments and, with --resume, the checkpoint to go on from.

    --quick replaces defaults by those of `quick`; --resume takes the saved run's arguments, and an
    argument given with it must agree. Raises BadInput.
    """
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    arch = Path(getattr(args, "arch", None) or "")
    cell = arch.parent.name or arch.stem if arch.suffix == ".json" else arch.name
    tasks = getattr(args, "tasks", None) or [args.dataset]
    name = "-".join(word for word in (method, cell, *tasks, str(args.seed)) if word)
    out = args.out or Path("runs") / name.replace(":", "").replace("/", "_")
    checkpoint = None
    if args.resume:
        path = out / "checkpoint.pt"
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            saved = checkpoint["args"]
        except FileNotFoundError:
            raise BadInput(f"--resume: there is no {path}") from None
        except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError,
                pickle.UnpicklingError) as error:
            raise BadInput(f"--resume: {path} is damaged: {error}") from None
        if checkpoint.get("method") != method:
            raise BadInput(f"--resume: {path} is a run of {checkpoint.get('method')}, not {method}")
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        for name, value in plain(args).items():
            if saved.get(name) != value and name != "data":
                raise BadInput(f"--resume: the run in {out} has {name} = {saved.get(name)!r}, not "
                               f"{value!r}")
    elif (not getattr(args, "count_params", False)                # which writes nothing
          and out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise BadInput(f"{out} is not an empty folder: give another --out, or --resume to go on "
                       "from its checkpoint")
    args.out = out
    return args, checkpoint


def plain(args) -> dict:
    """The arguments that make a run what it is, and where its data is, as plain values."""
    where = ("out", "device", "resume", "quick", "log_every")
    return {k: str(v) if k == "data" else v for k, v in vars(args).items() if k not in where}


def pick_device(name: str) -> torch.device:
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if has["cuda"] else "mps" if has["mps"] else "cpu"
    if not has[name]:
        raise BadInput(f"--device {name}: torch sees no such device here")
    torch.backends.cudnn.allow_tf32 = False     # TF32 rounds as coarsely as the differences step
    return torch.device(name)


def pace(begin: float, done: int, left: int, batch_size: int) -> str:
    """The speed since time.time() was `begin`, and the time that `left` more steps will take."""
    spent = (time.time() - begin) / done
    return f"{batch_size / spent:.1f} images/s  left {timedelta(seconds=round(spent * left))}"


@dataclass
class RandomState:
    """torch's generators as a part of a run; drop-path draws from them."""
    device: torch.device

    def state_dict(self):
        cuda = self.device.type == "cuda"
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None}

    def load_state_dict(self, state):
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])


def begin_run(out: Path, parts: dict, checkpoint: dict | None) -> list[dict]:
    """Make the run folder and put a checkpoint's states into the run's parts; returns the history
    of its epochs, if any. Raises BadInput."""
    try:
        for name, part in parts.items() if checkpoint else ():
            part.load_state_dict(checkpoint[name])
        out.mkdir(parents=True, exist_ok=True)
        return checkpoint["history"] if checkpoint else []
    except (RuntimeError, ValueError, LookupError) as error:
        raise BadInput(f"--resume: the checkpoint in {out} does not fit: {error}") from None
    except OSError as error:
        raise BadInput(f"--out {out}: {error}") from None


def write(path: Path, content: str | dict):
    """Replace a file whole, or not at all: text, or what torch.save takes."""
    temporary = path.with_name(path.name + ".tmp")
    if isinstance(content, str):
        temporary.write_text(content, encoding="utf-8")
    else:
        torch.save(content, temporary)
    os.replace(temporary, path)


def write_epoch(args, method: str, history: list[dict], parts: dict, alphas=None):
    """What a run leaves behind after each epoch: the log, a search's cell and its drawing, and the
    checkpoint (last, so that an interruption repeats the epoch). Stops at NaN and infinity."""
    line = history[-1]
    for name, value in line.items():
        if value is not None and not math.isfinite(value):
            sys.exit(f"error: {name} is {value} in epoch {line['epoch']}; the checkpoint stays")
    print(" ".join(f"{k} {v:.4g}" for k, v in line.items() if v is not None), flush=True)
    write(args.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    if alphas:
        cell = decode(alphas)
        write(args.out / "genotype.json", to_json(cell))
        write(args.out / "cells.svg", to_svg(cell, f"{args.out.name}, epoch {line['epoch']}"))
    write(args.out / "checkpoint.pt", {
        "method": method, "args": plain(args), "history": history,
        **{name: part.state_dict() for name, part in parts.items()}})


def print_next(args, dataset: str):
    """The command that evaluates what a search found."""
    parts = ["python evaluate.py --arch", shlex.quote(f"{args.out}/genotype.json"),
             "--dataset", shlex.quote(dataset)]
    if dataset in ("cifar10", "cifar100", "folder"):              # the others name their place
        parts.append(f"--data {shlex.quote(str(args.data))}")
    parts += [f"--image-size {args.image_size}"] if args.image_size else []
    parts += [f"--hold-out {args.hold_out}"] if args.hold_out else []
    print(*parts, *["--quick"] if args.quick else [])


def write_pictures(path: Path, rows: dict, size: int = 96):
    """A PNG of rows of images, `size` pixels each, under their titles and over their captions.

    rows: title -> list of (image (3, H, W) uint8, caption).
    """
    gap, columns = 10, max(map(len, rows.values()))
    heights = [size + (78 if any(caption for _, caption in row) else 40) for row in rows.values()]
    width, y = gap + columns * (size + gap), gap
    canvas = Image.new("RGB", (width, gap + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for (title, row), height in zip(rows.items(), heights):
        draw.text((gap, y), title, "black", ImageFont.load_default(15))
        for c, (pixels, caption) in enumerate(row):
            x = gap + c * (size + gap)
            image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
            canvas.paste(image.resize((size, size), Image.Resampling.NEAREST), (x, y + 24))
            draw.text((x, y + 27 + size), caption, "black", ImageFont.load_default(13))
        y += height
    canvas.save(path, "PNG")


def run(main, argv=None):
    """main(argv), with bad input reported as one line and exit code 2."""
    try:
        main(argv)
    except BadInput as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
