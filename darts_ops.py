"""What the scripts share: the DARTS search space, its bases, gradients, images, the run.

Sections: operations and supernet; architecture; bases; gradients; images and streams; command line;
the run and its folder.
Sources: DARTS (Liu et al. 2019, arXiv 1806.09055) for the search space and the one-step gradient;
the bases' papers beside BASES; the methods' equations are in lpt.py, il.py and lease.py.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import resource
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont  # Pillow comes with torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from genotypes import PRIMITIVES, BadInput, Genotype, to_json, to_svg, weights_svg

# ------------------------------------------------------------------------ operations and supernet


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that takes its weight at the call: alpha * BN(x) is BN(x) with weight alpha."""

    def forward(self, x, weight=None):
        weight, kept = self.weight if weight is None else weight, (None, None)
        if self.track_running_stats or not self.training:
            kept = self.running_mean, self.running_var
        return F.batch_norm(x, *kept, weight, self.bias, self.training, self.momentum, self.eps)


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
    """Two 1 x 1 convolutions of stride 2, one shifted by a pixel, side by side; `edges` of them.

    The stride is taken by slicing: on the CPU the backward pass of a strided one writes beyond its
    memory at some shapes (8 channels, 56 x 56, channels_last; torch 2.6 and 2.15).
    """

    def __init__(self, C_in, C_out, edges=1, affine=False):
        super().__init__()
        self.edges = edges
        self.conv1 = nn.Conv2d(C_in, edges * (C_out // 2), 1, bias=False)
        self.conv2 = nn.Conv2d(C_in, edges * (C_out - C_out // 2), 1, bias=False)
        self.norm = BatchNorm(edges * C_out, affine=affine)

    def forward(self, x, weight=None):
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))      # an odd map is padded to even
        halves = zip(self.conv1(x[:, :, ::2, ::2]).chunk(self.edges, 1),
                     self.conv2(x[:, :, 1::2, 1::2]).chunk(self.edges, 1))
        return self.norm(torch.cat([half for pair in halves for half in pair], 1), weight)


def preprocess(C_in, C_out, reduce=False, affine=False):
    """A cell's input at its width and size. The ReLU in front of it is taken once, where the input
    is made: two cells share it."""
    return (FactorizedReduce(C_in, C_out, affine=affine) if reduce else
            nn.Sequential(nn.Conv2d(C_in, C_out, 1, bias=False), BatchNorm(C_out, affine=affine)))


def operation(name: str, C: int, stride: int, affine: bool) -> nn.Module:
    """One candidate operation on one edge, as the evaluated network uses it (DARTS §3.1.1)."""
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, 1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    if name == "skip_connect":
        return (nn.Identity() if stride == 1 else
                nn.Sequential(nn.ReLU(), FactorizedReduce(C, C, affine=affine)))
    kernel = int(name[-1])
    if name.startswith("sep_conv"):
        return nn.Sequential(nn.ReLU(), SeparableConv(C, kernel, stride, affine=affine),
                             nn.ReLU(inplace=True), SeparableConv(C, kernel, affine=affine))
    return nn.Sequential(nn.ReLU(), SeparableConv(C, kernel, stride, 2, affine=affine))


def nhwc(x):
    """(N, C, H, W) -> (N, H, W, C): a view, whole in memory where x is channels_last."""
    return x.permute(0, 2, 3, 1)


def nchw(x):
    return x.permute(0, 3, 1, 2)


def phases(x):
    """The four stride-2 phases of x along the batch: (N, C, H, W) -> (4N, C, H/2, W/2).

    A convolution of dilation 2 is a plain one on each phase, whose gradients cost far less on a
    CPU.
    """
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def merge_phases(x):                                              # the inverse of phases
    x = nhwc(x).unflatten(0, (2, 2, -1))                          # (2, 2, N, H/2, W/2, C)
    return nchw(x.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2))


NODES = 4
EDGES = sum(2 + i for i in range(NODES))                          # 14
# the rows of alpha that belong to state j's outgoing edges, in the order of the nodes they lead to
OUTGOING = [[sum(2 + n for n in range(i)) + j for i in range(max(0, j - 1), NODES)]
            for j in range(NODES + 1)]
ALL = [[list(PRIMITIVES)] * EDGES] * 2                            # every candidate on every edge


@dataclass
class Knobs:
    """What a base changes in its supernets while they train."""
    auxiliary: float = 0.0              # DARTS-: weight of the auxiliary skip
    skip_dropout: float = 0.0           # P-DARTS: rate
    seed: int = 0                       # of the dropped values; the same in every pass of a step
    generator: torch.Generator | None = None


def avg_pool(x, size, stride, padding):
    return F.avg_pool2d(x, size, stride, padding, count_include_pad=False)


class MixedEdges(nn.Module):
    """The mixed operations (DARTS Eq. 2) on all outgoing edges of one state at once.

    The convolutions of one type are merged over the edges into one grouped convolution; what has no
    weights (pooling with its BN, identity) is computed once; `none` adds zero and is left out.
    kept: per edge, the names of its candidates. partial: the operations see C / partial channels,
    the others pass by, and all are shuffled (PC-DARTS §3.2). auxiliary: DARTS-'s skip beside them.
    """

    def __init__(self, C, kept, stride, knobs, partial=1, auxiliary=False):
        super().__init__()
        self.edges, self.stride, self.partial, self.knobs = len(kept), stride, partial, knobs
        self.kept = {name: edges for name in PRIMITIVES
                     if (edges := tuple(e for e, names in enumerate(kept) if name in names))}
        c = C // partial
        for name, edges in self.kept.items():
            n = len(edges)
            if name.startswith("sep"):
                self.add_module(name + "_a", SeparableConv(c, int(name[-1]), stride, edges=n))
                self.add_module(name + "_b", SeparableConv(c, int(name[-1]), edges=n))
            elif name.startswith("dil"):
                self.add_module(name, SeparableConv(c, int(name[-1]), edges=n))
            elif name.endswith("pool_3x3"):
                self.add_module(name, BatchNorm(c, affine=False))
            elif name == "skip_connect" and stride == 2:
                self.skip_connect = FactorizedReduce(c, c, n)
        self.auxiliary = FactorizedReduce(c, c, len(kept)) if auxiliary and stride == 2 else None

    def forward(self, x, p, wide, q=None):
        """x (N, C, H, W), p (edges, 8) the weights of the operations, wide (edges * C,) for each
        operation the same per channel, q (edges,) those of the bypass
        -> (N, edges * C, H', W'), one edge beside the other."""
        C, bypass = x.shape[1] // self.partial, None
        if self.partial > 1:
            x, bypass = x.split([C, x.shape[1] - C], 1)
        r = F.relu(x)

        @functools.cache
        def repeat(x, n):                                         # n copies side by side
            return torch.cat([x] * n, 1)

        def weight(name):                                         # of an operation, per channel
            row, edges = wide[PRIMITIVES.index(name)], self.kept[name]
            return row if len(edges) == self.edges else torch.cat(
                [row[e * C:(e + 1) * C] for e in edges])

        def on_all(name, term):                                   # zero on edges without it
            edges = self.kept[name]
            if len(edges) == self.edges:
                return term
            parts = dict(zip(edges, term.chunk(len(edges), 1)))
            zero = torch.zeros_like(parts[edges[0]])
            return torch.cat([parts.get(e, zero) for e in range(self.edges)], 1)

        terms, dilated = [], []
        for name in ("sep_conv_3x3", "sep_conv_5x5"):
            if name in self.kept:
                many = repeat(r, len(self.kept[name]))
                once = F.relu_(self.get_submodule(name + "_a")(many))
                terms.append(on_all(name, self.get_submodule(name + "_b")(once, weight(name))))
        seen, dilation = r, 2
        if self.stride == 2:     # then dilation 2 reads one phase only
            seen, dilation = r[:, :, ::2, ::2], 1
        elif r.is_cpu and r.shape[2] % 2 == r.shape[3] % 2 == 0:
            seen, dilation = phases(r), 1
        for name in ("dil_conv_3x3", "dil_conv_5x5"):
            if name in self.kept:
                many = repeat(seen, len(self.kept[name]))
                term = self.get_submodule(name)(many, weight(name), dilation)
                dilated.append(on_all(name, term))
        if dilated:
            terms.append(merge_phases(sum(dilated)) if len(seen) > len(r) else sum(dilated))

        column = p.unbind(1)
        shared, columns = [], []                                  # the same on all edges
        for name, pool in (("max_pool_3x3", F.max_pool2d), ("avg_pool_3x3", avg_pool)):
            if name in self.kept:
                shared.append(self.get_submodule(name)(pool(x, 3, self.stride, 1)))
                columns.append(column[PRIMITIVES.index(name)])
        beta, rate = self.knobs.auxiliary, self.knobs.skip_dropout if self.training else 0.0
        if self.stride == 2:
            if "skip_connect" in self.kept:
                terms.append(on_all("skip_connect", self.skip_connect(r, weight("skip_connect"))))
            if self.auxiliary is not None:
                terms.append(self.auxiliary(r, torch.full_like(wide[0], beta)))
        else:
            direct = torch.full_like(column[0], beta)
            if "skip_connect" in self.kept and rate:              # P-DARTS §3.3
                many = repeat(x, len(self.kept["skip_connect"]))
                stay = torch.empty_like(many).bernoulli_(1 - rate, generator=self.knobs.generator)
                scale = weight("skip_connect").view(1, -1, 1, 1) / (1 - rate)
                terms.append(on_all("skip_connect", many * stay * scale))
            elif "skip_connect" in self.kept:
                direct = direct + column[PRIMITIVES.index("skip_connect")]
            shared.append(x)
            columns.append(direct)

        N, _, H, W = (terms + shared)[0].shape
        if shared:
            stacked = torch.stack([nhwc(s) for s in shared]).flatten(1)
            mixed = torch.stack(columns, 1) @ stacked             # (edges, N*H*W*C)
            terms.append(nchw(mixed.view(-1, N, H, W, C).permute(1, 2, 3, 0, 4).flatten(3)))
        out = functools.reduce(torch.Tensor.add_, terms)
        if self.partial == 1:
            return out
        if self.stride == 2:
            bypass = F.max_pool2d(bypass, 2, ceil_mode=True)
        out = nhwc(out).unflatten(3, (-1, C))
        out = torch.cat([out, q[:, None] * nhwc(bypass).unsqueeze(3)], 4)
        return nchw(out.unflatten(4, (self.partial, C)).transpose(4, 5).flatten(3))     # shuffled


class SearchCell(nn.Module):
    """kept: per edge, its candidates; what follows is MixedEdges'."""

    def __init__(self, C_prev_prev, C_prev, C, reduction, reduction_prev, kept, *options):
        super().__init__()
        self.reduction = reduction
        self.preprocess0 = preprocess(C_prev_prev, C, reduction_prev)
        self.preprocess1 = preprocess(C_prev, C)
        self.states = nn.ModuleList(
            MixedEdges(C, [kept[row] for row in rows], 2 if reduction and j < 2 else 1, *options)
            for j, rows in enumerate(OUTGOING))

    def forward(self, s0, s1, p, q):
        """p (14, 8), q (14,) or None: the weights of the edges' operations and bypasses, in the
        order of OUTGOING."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        C, counts = states[1].shape[1], [len(rows) for rows in OUTGOING]
        c = C // self.states[0].partial
        wide = p.t().unsqueeze(2).expand(-1, -1, c).flatten(1)    # (8, 14 * C)
        wide = zip(*(row.split([c * n for n in counts]) for row in wide.unbind()))
        each = zip(self.states, p.split(counts), wide, [None] * 5 if q is None else q.split(counts))
        nodes = 0                                                 # the sums that are not complete
        for j, (edges, *weights) in enumerate(each):
            nodes = nodes + edges(states[j], *weights)            # (N, their number * C, H', W')
            if 0 < j < NODES:                                     # node j - 1 has all its inputs
                done, nodes = nodes.split([C, nodes.shape[1] - C], 1)
                states.append(done)
        return torch.cat([*states[2:], nodes], 1)                 # (N, 4C, H', W')


def stem(C, imagenet):
    """The layers before the first cell and their last width: two modules, of which the second makes
    the second input of the first cell from the first. imagenet: three convolutions of stride 2."""
    def conv(a, b, stride=2):
        return nn.Conv2d(a, b, 3, stride, 1, bias=False), BatchNorm(b), nn.ReLU()
    if imagenet:
        return nn.Sequential(*conv(3, C // 2), *conv(C // 2, C)), nn.Sequential(*conv(C, C)), C
    return nn.Sequential(*conv(3, 3 * C, 1)), nn.Identity(), 3 * C


class Supernet(nn.Module):
    """The search network: cells of mixed operations; reduction cells at 1/3 and 2/3.

    Its parameters are the weights alone; the architecture comes with the call, so that one
    architecture can be shared by several networks. kept: of the normal and the reduction cell, the
    candidates per edge; partial, auxiliary: MixedEdges'; imagenet: the stem of stride 8.
    """

    def __init__(self, C, num_classes, layers, kept=ALL, partial=1, auxiliary=False,
                 imagenet=False):
        super().__init__()
        self.knobs = Knobs()
        self.stem0, self.stem1, C_prev = stem(C, imagenet)
        self.cells, C_prev_prev, reduction = nn.ModuleList(), C_prev, imagenet
        for i in range(layers):
            reduction_prev, reduction = reduction, i in (layers // 3, 2 * layers // 3)
            C *= 2 if reduction else 1
            self.cells.append(SearchCell(C_prev_prev, C_prev, C, reduction, reduction_prev,
                                         kept[reduction], self.knobs, partial, auxiliary))
            C_prev_prev, C_prev = C_prev, NODES * C
        self.classifier = nn.Linear(C_prev, num_classes)
        self.register_buffer("order", torch.tensor(sum(OUTGOING, [])), persistent=False)

    def forward(self, x, alphas):
        """x (N, 3, H, W), alphas: initial_alphas' -> logits (N, num_classes)."""
        if self.knobs.skip_dropout and self.training:
            self.knobs.generator = torch.Generator(x.device).manual_seed(self.knobs.seed)
        p = [weights[self.order] for weights in operation_weights(alphas)]
        q = [edge_weights(beta)[self.order] for beta in alphas[2:]] or [None, None]
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for cell in self.cells:
            out = cell(s0, s1, p[cell.reduction], q[cell.reduction])
            s0, s1 = s1, F.relu(out)
        return self.classifier(out.mean((2, 3)))


def place(module: nn.Module, device) -> nn.Module:
    """The module on its device, in the memory format that is fast there."""
    return module.to(device, memory_format=memory_format(device))


def memory_format(device):
    return torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format


# ----------------------------------------------------------------------------------- architecture

DROPPED = -1e9                  # alpha of a candidate no longer there: its softmax is exactly zero


def initial_alphas(device, kept=ALL, partial=1) -> list[Tensor]:
    """The architecture A: alpha of the normal and of the reduction cell, each (14, 8); with partial
    channels also their edges' beta, each (14,)."""
    alphas = [1e-3 * torch.randn(EDGES, len(PRIMITIVES)) for _ in range(2)]
    for alpha, edges in zip(alphas, kept):
        gone = [[name not in names for name in PRIMITIVES] for names in edges]
        alpha[torch.tensor(gone)] = DROPPED
    if partial > 1:
        alphas += [1e-3 * torch.randn(EDGES) for _ in range(2)]
    return [nn.Parameter(a.to(device)) for a in alphas]


def edge_weights(beta: Tensor) -> Tensor:
    """beta (14,), softmaxed over the edges into each node (PC-DARTS Eq. 3)."""
    return torch.cat([F.softmax(b, 0) for b in beta.split([2 + n for n in range(NODES)])])


def operation_weights(alphas: list[Tensor]) -> list[Tensor]:
    """The weights of all operations in the normal and the reduction cell, each (14, 8)."""
    weights = [F.softmax(alpha, -1) for alpha in alphas[:2]]                       # DARTS Eq. 2
    return [w * edge_weights(beta)[:, None] for w, beta in zip(weights, alphas[2:])] or weights


def decode(alphas: list[Tensor], max_skips: int = 8) -> Genotype:
    """The cell that alphas stand for (DARTS §2.4): per node the two incoming edges whose strongest
    operation other than `none` is strongest, with that operation; ties go to the lower index. Of
    more than max_skips skip connections in the normal cell the weakest go, one by one, and the
    cell is decoded again (P-DARTS §3.3)."""
    def cell(p):                                                  # (14, 7) -> [(row, state, op)]
        edges, first = [], 0
        for n in range(2, 2 + NODES):
            rows = p[first:first + n]
            edges += [(first + state, state, rows[state].index(max(rows[state])))
                      for state in sorted(range(n), key=lambda s: -max(rows[s]))[:2]]
            first += n
        return edges

    normal, reduce = (w[:, 1:].detach().float().cpu().tolist() for w in operation_weights(alphas))
    skip = PRIMITIVES.index("skip_connect") - 1
    while len(skips := [row for row, _, op in cell(normal) if op == skip]) > max_skips:
        normal[min(skips, key=lambda row: normal[row][skip])][skip] = 0.0
    concat = list(range(2, 2 + NODES))
    named = [[(PRIMITIVES[1 + op], state) for _, state, op in cell(p)] for p in (normal, reduce)]
    return Genotype(named[0], concat, named[1], concat)


def prune(alphas: list[Tensor], keep: int) -> list:
    """The `keep` strongest candidates of every edge, in their order (P-DARTS §3.2); of equal ones
    the lower index goes first."""
    return [[[PRIMITIVES[o] for o in sorted(sorted(range(len(row)), key=row.__getitem__)[-keep:])]
             for row in alpha.tolist()] for alpha in alphas[:2]]


def architecture_report(alphas: list[Tensor]) -> dict:
    """Mean entropy of softmax(alpha) in nats, and skip connections in the normal cell, decoded
    without a limit on them."""
    p = F.softmax(torch.cat([a.detach() for a in alphas[:2]]), -1)
    return {"alpha_entropy": torch.special.entr(p).sum(-1).mean().item(),
            "skip_connections": sum(op == "skip_connect" for op, _ in decode(alphas).normal)}


def mean_weights(alphas: list[Tensor]) -> dict:
    """The operations' weights in both cells, means over the edges, in PRIMITIVES' order."""
    return {kind: F.softmax(alpha.detach(), -1).mean(0).tolist()
            for kind, alpha in zip(("normal", "reduce"), alphas)}


# ------------------------------------------------------------------------------------------ bases

# A base search: the defaults it gives the command line. layers, candidates and skip_dropout have an
# entry per stage (weights and A start anew in each), epochs and warm_up count within a stage.
DARTS = dict(order=1, layers=[8], epochs=50, batch_size=64, lr=0.025, lr_min=0.001, alpha_lr=3e-4,
             warm_up=0, candidates=[8], skip_dropout=[0.0], max_skips=8, stop_at_skips=0, partial=1,
             auxiliary_skip=False)
BASES = {
    "darts-1st": DARTS,                                           # arXiv 1806.09055, §A.1
    "darts-2nd": DARTS | dict(order=2),
    "darts-": DARTS | dict(auxiliary_skip=True),                  # arXiv 2009.01027
    "darts+": DARTS | dict(stop_at_skips=2),                      # arXiv 1909.06035
    "pcdarts": DARTS | dict(batch_size=256, lr=0.1, lr_min=0.0, alpha_lr=6e-4, warm_up=15,
                            partial=4),                           # arXiv 1907.05737
    "pdarts": DARTS | dict(layers=[5, 11, 17], epochs=25, batch_size=96, lr_min=0.0, alpha_lr=6e-4,
                           warm_up=10, candidates=[8, 5, 3], skip_dropout=[0.1, 0.4, 0.7],
                           max_skips=2),                          # arXiv 1904.12760
}
IMAGENET = dict(image_size=224, subsets=[0.1, 0.025])
IMAGENET_BASES = {"pcdarts": dict(batch_size=1024, lr=0.5, alpha_lr=6e-3, warm_up=35)}


def new_stage(args, stage: int, kept, classes: list[int], device):
    """What starts anew in a stage of the search, from (seed, stage): a supernet for each entry of
    classes with its SGD, and the architecture A with its Adam.

    Returns (supernets, their optimizers, alphas, optimizer of alphas).
    """
    seed_all(args.seed, stage)
    nets = [place(Supernet(args.channels, n, args.layers[stage], kept, args.partial,
                           args.auxiliary_skip, "imagenet" in task_names(args)), device)
            for n in classes]
    opts = [torch.optim.SGD(net.parameters(), args.lr, args.momentum,
                            weight_decay=args.weight_decay) for net in nets]
    alphas = initial_alphas(device, kept, args.partial)
    alpha_opt = torch.optim.Adam(alphas, args.alpha_lr, (0.5, 0.999),
                                 weight_decay=args.alpha_weight_decay)
    kinds = {len(names) for cell in kept for names in cell}
    print(f"stage {stage + 1} of {len(args.layers)}: {args.layers[stage]} cells, "
          f"{'/'.join(map(str, sorted(kinds)))} candidates an edge")
    return nets, opts, alphas, alpha_opt


def schedule(args, stage: int, epoch: int, step: int, nets, opts) -> bool:
    """Set what a base changes from epoch to epoch of a stage: the learning rate, DARTS-'s auxiliary
    skip, P-DARTS' skip dropout. Returns whether A learns in this epoch."""
    learns, last = epoch >= args.warm_up, args.epochs - 1
    rate = args.skip_dropout[stage] * (math.exp(-0.2 * (epoch - args.warm_up)) if learns else
                                       (args.epochs - epoch - 1) / args.epochs)
    for net, opt in zip(nets, opts):
        opt.param_groups[0]["lr"] = cosine(args.lr, args.lr_min, epoch, args.epochs)
        net.knobs.skip_dropout, net.knobs.seed = rate, mixed_seed(args.seed, step, rank())
        net.knobs.auxiliary = args.auxiliary_skip * (1 - epoch / last if args.epochs > 1 else 0)
    return learns


# -------------------------------------------------------------------------------------- gradients


def rank() -> int:
    """This process's number among those that share the search; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce(tensors: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """The sums of tensors over all processes, times scale. Raises Gone."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        raise Gone(f"rank {rank()}: another process of this run is gone ({error})") from None
    parts = flat.mul_(scale).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


def global_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, whose gradient, averaged by grad, is the sum's."""
    if world_size() == 1:
        return x
    mine = world_size() * x
    return mine + (reduce([x])[0] - mine).detach()


def grad(loss: Tensor, inputs: list[Tensor], per_image: bool = False) -> list[Tensor]:
    """d loss / d inputs; touches no .grad. Every gradient of the methods is taken here, and
    averaged over the processes, each of which has its share of the batch: the inputs are common to
    all of them, unless they are per_image."""
    grads = list(torch.autograd.grad(loss, inputs))
    return grads if per_image or world_size() == 1 else reduce(grads, 1 / world_size())


def call(module: nn.Module, weights: list[Tensor], *inputs):
    """module(*inputs) at other weights (in the order of its parameters), in training by the batch's
    statistics alone: changes nothing in the module."""
    state = dict(zip((name for name, _ in module.named_parameters()), weights, strict=True))
    norms = [part for part in module.modules()
             if isinstance(part, nn.BatchNorm2d) and part.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = False
        return torch.func.functional_call(module, state, inputs)
    finally:
        for norm in norms:
            norm.track_running_stats = True


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


def central_difference(grad_at, w: list[Tensor], v: list[Tensor], radius: float = 1e-2,
                       per_image: bool = False):
    """(d2 L / da dw) v for every tensor a that grad_at differentiates by; zeros where v is zero.

    grad_at(w) returns dL/da at weights w. The step is eps = radius / |v|, with the norm over all
    of v (DARTS Eq. 8; LPT Eq. 17; LeaSE Eq. 11); per_image: v is spread over the processes.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(v)))
    if per_image and world_size() > 1:
        norm = reduce([norm.square()])[0].sqrt()
    eps = torch.where(norm > 0, radius / norm, radius)
    w, step = [t.detach() for t in w], torch._foreach_mul(v, eps)
    plus = grad_at(torch._foreach_add(w, step))
    minus = grad_at(torch._foreach_sub(w, step))
    return [(p - n) / (2 * eps) for p, n in zip(plus, minus)]


def finite(tensors) -> bool:
    return math.isfinite(torch.stack(torch._foreach_norm(list(tensors), math.inf)).sum().item())


def descend(optimizer, weights: list[Tensor], grads: list[Tensor], clip: float | None = None,
            learner: str = "a learner", loss: Tensor | None = None):
    """One optimizer step along given gradients, their total norm clipped at `clip`. Raises
    NotFinite, before the step where the loss or a gradient is NaN or infinite."""
    if not finite(grads if loss is None else [*grads, loss.detach()]):
        raise NotFinite(f"the loss or a gradient of {learner} is not finite")
    for w, g in zip(weights, grads):
        w.grad = g
    if clip:
        nn.utils.clip_grad_norm_(weights, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not finite([w.detach() for w in weights]):
        raise NotFinite(f"a weight of {learner} is not finite after its step")


def cosine(start: float, end: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch, annealed from start towards end (SGDR, Eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def mixed_seed(*keys: int) -> int:
    """A 64-bit seed from several numbers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]) >> 1


def seed_all(*keys: int):
    """torch's generators as a pure function of `keys`."""
    torch.manual_seed(mixed_seed(*keys))


def evaluating(*modules: nn.Module):
    """Set modules to evaluation, with rank 0's BatchNorm statistics in all processes."""
    for module in modules:
        module.eval()
        statistics = [b for b in module.buffers() if b.is_floating_point()]
        if world_size() > 1 and statistics:
            sums = reduce([torch.zeros_like(b) if rank() else b for b in statistics])
            torch._foreach_copy_(statistics, sums)


def autocast(device, on: bool):
    """bfloat16 where torch finds it safe; nothing is cached between passes at several weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False)


# ----------------------------------------------------------------------------- images and streams


@dataclass
class ImageSet:
    """Labelled images in memory, whole, on the device."""
    images: Tensor          # (n, 3, H, W) uint8
    labels: Tensor          # (n,) int64
    classes: list[str]
    mean: Tensor            # (3, 1, 1), of the training images, in units of 0 to 1
    std: Tensor             # (3, 1, 1)

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.images.shape[2:])

    @property
    def device(self) -> torch.device:
        return self.images.device

    def pixels(self, rows) -> Tensor:
        """The images `rows` as they are, (N, 3, H, W) uint8."""
        return self.images[rows]

    def batch(self, rows, rng=None, cutout: int = 0, part=slice(None)) -> Tensor:
        """The images `rows`, normalised, (N, 3, H, W) float32. With a generator each is cropped
        out of its zero-padded self (by 1/8: 4 pixels at 32), flipped by even odds and, if asked,
        loses a square of `cutout` pixels' side. part: those of them that are wanted."""
        x, device, N = self.images[rows[part]], self.device, len(rows)
        n, _, H, W = x.shape
        ys, xs = torch.arange(H, device=device), torch.arange(W, device=device)

        def draw(high):                                           # (n, 1) integers below high
            return torch.from_numpy(rng.integers(high, size=(N, 1))[part]).to(device)

        if rng is not None:
            pad = H // 8
            x = F.pad(x, (pad,) * 4)
            down, across = ys + draw(2 * pad + 1), xs + draw(2 * pad + 1)
            across = torch.where(draw(2) == 1, across.flip(1), across)
            i, c = (torch.arange(k, device=device)[:, None, None] for k in (n, 3))
            x = x[i[..., None], c, down[:, None, :, None], across[:, None, None, :]]
        x = normalised(x, self)
        if cutout:
            inside = [(at - centre + cutout // 2).div(cutout, rounding_mode="floor") == 0
                      for at, centre in ((ys, draw(H)), (xs, draw(W)))]
            x = x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
        return x.contiguous(memory_format=memory_format(device))


@dataclass
class ImageFiles:
    """Labelled images in files, read when they are asked for: ImageNet."""
    folder: torchvision.datasets.ImageFolder
    labels: Tensor          # (n,) int64, on the CPU
    classes: list[str]
    side: int               # of the square images, in pixels
    device: torch.device    # where the batches go
    workers: int            # processes that read
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)      # ImageNet's
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def read(self, rows, rng=None, part=slice(None)) -> Tensor:
        """The images `rows`, (N, 3, H, W) uint8 on the CPU. With a generator each is a random
        resized crop, flipped by even odds, its colours jittered; else the centre of the image."""
        side = self.side
        centre = v2.Compose([v2.Resize(round(side * 256 / 224)), v2.CenterCrop(side)])
        random = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(),
                             v2.ColorJitter(0.4, 0.4, 0.4, 0.2)])
        seeds = rng and rng.integers(2 ** 63, size=len(rows))[part]
        images, state = [], torch.get_rng_state()
        for i, row in enumerate(np.asarray(rows)[part]):
            image = read_image(self.folder, row)
            if rng:                                               # v2 draws from this generator
                torch.default_generator.manual_seed(int(seeds[i]))
            images.append(v2.functional.pil_to_tensor((random if rng else centre)(image)))
        torch.set_rng_state(state)
        return torch.stack(images)

    def pixels(self, rows) -> Tensor:
        return self.read(torch.as_tensor(rows).cpu().numpy())

    def batch(self, rows) -> Tensor:
        return self.finish(self.pixels(rows))

    def finish(self, x: Tensor) -> Tensor:
        x = normalised(x.to(self.device, non_blocking=True), self)
        return x.contiguous(memory_format=memory_format(self.device))


def normalised(x: Tensor, data) -> Tensor:
    return (x.float() / 255 - data.mean.to(x.device)) / data.std.to(x.device)


def read_image(folder, row) -> Image.Image:
    """An image of an ImageFolder, RGB. Raises BadInput, which names its file."""
    file = folder.samples[row][0]
    try:
        return folder.loader(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read the image {file}: {error}") from None


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
                test: bool = False, workers: int = 0):
    """The training (or test) images of a data set: an ImageSet, of imagenet an ImageFiles.

    dataset: cifar10, cifar100, folder or folder:DIR (an ImageFolder tree: train/, and test/ or
    val/), imagenet (the same, read from its files), synthetic or synthetic:CLASSES. Raises
    BadInput where they cannot be had.
    """
    name, _, option = dataset.partition(":")
    if name == "synthetic":
        return synthetic(int(option or 10), image_size or 32, device, test)
    if name in ("folder", "imagenet"):
        data = Path(option or data)
        parts = [data / part for part in (("test", "val") if test else ("train",))]
        path = next((p for p in parts if p.is_dir()), None)
        if path is None:
            raise BadInput(f"no folder {' or '.join(map(str, parts))}: --data must hold train/, "
                           "and test/ or val/, with one folder of images per class")
        try:
            folder = torchvision.datasets.ImageFolder(path)
        except (FileNotFoundError, PermissionError) as error:
            raise BadInput(f"no images in {path}: {error}") from None
        if name == "imagenet":
            return ImageFiles(folder, torch.tensor(folder.targets), folder.classes,
                              image_size or 224, torch.device(device), workers)
        return read_folder(folder, image_size, device)
    if image_size not in (None, 32):
        raise BadInput(f"--image-size {image_size}: the images of {dataset} have 32 pixels")
    source = getattr(torchvision.datasets, name.upper())
    try:
        if rank():                                                # one process downloads
            reduce([torch.zeros(1, device=device)])
        cifar = source(data, train=not test, download=True)       # checks its files' checksums
        if world_size() > 1 and not rank():
            reduce([torch.zeros(1, device=device)])
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{dataset} is not in {data} and cannot be downloaded ({error}): put "
                       f"{source.filename} there, or use --dataset folder --data DIR") from None
    return image_set(torch.from_numpy(cifar.data).permute(0, 3, 1, 2), cifar.targets,
                     cifar.classes, device)


def read_folder(folder, image_size: int | None, device) -> ImageSet:
    """All images of an ImageFolder, resized and centre-cropped to image_size if given."""
    images = []
    for row, (file, _) in enumerate(folder.samples):
        image = read_image(folder, row)
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


def split_rows(labels, seed: int, hold_out: int = 0, subsets=None):
    """Rows of the training half, the validation half and the held-out images: a random partition.
    The held-out ones are the same for every seed, so that another script can test on them.
    subsets: instead of halves, these two shares of every class (PC-DARTS §4.3)."""
    n = len(labels)
    order = np.random.default_rng(0).permutation(n)
    held, rest = np.sort(order[:hold_out]), np.sort(order[hold_out:])
    rest = np.random.default_rng([seed, 0]).permutation(rest)
    if not subsets:
        return rest[:len(rest) // 2], rest[len(rest) // 2:], held
    halves, labels = ([], []), np.asarray(torch.as_tensor(labels).cpu())
    for k in range(labels.max() + 1):
        rows = rest[labels[rest] == k]
        a, b = (max(1, round(share * len(rows))) for share in subsets)
        halves[0].append(rows[:a])
        halves[1].append(rows[a:a + b])
    return *map(np.concatenate, halves), held


class Stream:
    """Endless mini-batches of some rows of the images, shuffled without replacement and augmented.

    stream(step) is a pure function of (seed, name, step): x (N, 3, H, W), y (N,), rows (N,); of
    several processes each has its own part of the batch.
    """

    def __init__(self, data, rows, batch_size: int, seed: int, name: str, cutout=0):
        if batch_size > len(rows):
            raise BadInput(f"--batch-size {batch_size}: the {name} stream has {len(rows)} images")
        if batch_size % world_size():
            raise BadInput(f"--batch-size {batch_size}: not a multiple of {world_size()} processes")
        self.data, self.rows, self.batch_size, self.cutout = data, rows, batch_size, cutout
        self.key, self.order = (seed, zlib.crc32(name.encode())), (-1, None)
        n = batch_size // world_size()
        self.part = slice(rank() * n, (rank() + 1) * n)
        self.reader, self.next = None, -1

    def epoch_steps(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def _row(self, position: int) -> int:
        lap, k = divmod(position, len(self.rows))
        if lap != self.order[0]:
            self.order = lap, np.random.default_rng([*self.key, 0, lap]).permutation(self.rows)
        return self.order[1][k]

    def draw(self, step: int):
        """The rows of a step's whole batch, the generator of its augmentation, this part."""
        first = step * self.batch_size
        return (np.array([self._row(first + k) for k in range(self.batch_size)]),
                np.random.default_rng([*self.key, 1, step]), self.part)

    def __call__(self, step: int):
        if isinstance(self.data, ImageSet):
            rows, rng, part = self.draw(step)
            rows = torch.from_numpy(rows).to(self.data.device)
            x, rows = self.data.batch(rows, rng, self.cutout, part), rows[part]
            return x, self.data.labels[rows], rows
        if step != self.next:
            self.reader = read_ahead(self.data, self.draw, itertools.count(step))
        self.next = step + 1
        return next(self.reader)


@dataclass
class Reading(Dataset):
    """What a reading process does: images i are those of draw(i), the arguments of read."""
    data: ImageFiles
    draw: Callable

    def __getitem__(self, i):
        rows, rng, part = self.draw(i)
        try:
            return self.data.read(rows, rng, part), rows[part]
        except BadInput as error:
            return error, None


def read_ahead(data: ImageFiles, draw, order):
    """x, y, rows of draw(i) for i in order, read by worker processes if there are any."""
    answers = iter(DataLoader(Reading(data, draw), batch_size=None, sampler=order,
                              num_workers=data.workers, pin_memory=torch.cuda.is_available(),
                              worker_init_fn=apart, generator=torch.Generator()))
    for x, rows in answers:                                       # rows are a tensor by now
        if rows is None:
            raise x
        yield data.finish(x), data.labels[rows].to(data.device), rows.to(data.device)


def apart(_):
    """A worker in a process group of its own: a signal to the run's group is not for it."""
    os.setpgrp()


def batches(data, rows, batch_size: int):
    """Each image of `rows` once, in order and as it is: x, y."""
    parts = [np.asarray(rows[i:i + batch_size]) for i in range(0, len(rows), batch_size)]
    if isinstance(data, ImageSet):
        for part in parts:
            part = torch.from_numpy(part).to(data.device)
            yield data.batch(part), data.labels[part]
        return
    draws = [(part, None, slice(None)) for part in parts]
    for x, y, _ in read_ahead(data, draws.__getitem__, range(len(parts))):
        yield x, y


@torch.no_grad()
def accuracies(predict, data, rows, batch_size: int, top=(1, 5)) -> list[float]:
    """The shares of images `rows` whose label is among the k largest logits of predict(x), for
    each k in top."""
    rows, hits = np.asarray(rows), torch.zeros(len(top), device=data.device)
    for x, y in batches(data, rows[rank()::world_size()], batch_size):
        found = predict(x).topk(min(max(top), len(data.classes)), 1).indices == y[:, None]
        hits += torch.stack([found[:, :k].sum() for k in top])
    if world_size() > 1:
        hits = reduce([hits])[0]
    return (hits.double() / len(rows)).tolist()


def accuracy(predict, data, rows, batch_size: int) -> float:
    """The share of images `rows` whose largest logit, of predict(x), is their label's."""
    return accuracies(predict, data, rows, batch_size, top=(1,))[0]


# ------------------------------------------------------------------------------------ command line


class NotFinite(Exception):
    """A loss, gradient or weight is NaN or infinite."""


class Gone(Exception):
    """Another process of the run has ended."""


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
real, flag = number(float, 0), argparse.BooleanOptionalAction


def new_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def data_arguments(parser):
    add = parser.add_argument_group("the images").add_argument
    add("--data", type=Path, default=Path("data"),
        help="where CIFAR is or goes; the root of a folder or of ImageNet")
    add("--image-size", type=number(int, 8, 512), default=None,
        help="resize a folder's images to this many pixels; size of synthetic ones; else as they "
             "are, ImageNet's 224")
    add("--hold-out", type=number(int, 0), default=0,
        help="training images kept for evaluate.py to test on; Skillearn's lambda study has 5000 "
             "(§3.2.4)")
    add("--workers", type=number(int, 0), default=min(4, os.cpu_count()),
        help="processes that read ImageNet's files")


def search_arguments(parser):
    """The arguments of every search: its images, its base and the supernets' training."""
    data_arguments(parser)
    add = parser.add_argument_group(
        "the base search; the defaults are its paper's (BASES), or the method's").add_argument
    add("--base", choices=BASES, default="darts-2nd", help="whose recipe and supernet to take")
    add("--order", type=int, choices=(1, 2), help="1: xi = 0 for A (DARTS §2.3)")
    add("--layers", type=number(int, 3), nargs="+", help="cells, per stage")
    add("--epochs", type=number(int, 1), help="of a stage, over the training half")
    add("--warm-up", type=number(int, 0), help="first epochs of a stage that train weights only")
    add("--batch-size", type=number(int, 2), help="of each stream, over all processes")
    add("--lr", type=real, help="of the searched networks' weights, SGD, cosine")
    add("--lr-min", type=real, help="where the cosine ends")
    add("--alpha-lr", type=real, help="of A, Adam (0.5, 0.999)")
    add("--candidates", type=number(int, 2, len(PRIMITIVES)), nargs="+",
        help="operations of an edge, per stage (P-DARTS §3.2)")
    add("--skip-dropout", type=number(float, 0, 0.99), nargs="+",
        help="initial rate on skip connections, per stage (P-DARTS §3.3)")
    add("--max-skips", type=number(int, 0, 8),
        help="most skip connections in the normal cell (P-DARTS §3.3)")
    add("--stop-at-skips", type=number(int, 0, 8),
        help="end the search at so many skip connections in the normal cell (DARTS+); 0: do not")
    add("--partial", type=number(int, 1),
        help="operations see 1/partial of the channels, edges have weights (PC-DARTS)")
    add("--auxiliary-skip", action=flag, help="a skip beside every edge, weight 1 to 0 (DARTS-)")
    add = parser.add_argument_group("the searched networks (DARTS §A.1)").add_argument
    add("--channels", type=number(int, 2), default=16, help="C of the first cell")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of every SGD")
    add("--weight-decay", type=real, default=3e-4, help="of every SGD")
    add("--grad-clip", type=real, default=5.0,
        help="largest gradient norm of a searched network; 0: any")
    add("--alpha-weight-decay", type=real, default=1e-3, help="of A")
    add("--radius", type=number(float, 1e-12), default=1e-2,
        help="of the central differences: eps = radius / |v| (DARTS Eq. 8, LPT Eq. 17)")
    add("--subsets", type=number(float, 0, 1), nargs=2, default=None,
        help="shares of every class that train weights and A, else halves; ImageNet's 0.1 0.025 "
             "(PC-DARTS §4.3)")
    run_arguments(parser, 10, "off, bf16 (the passes that train weights) or bf16-all (A's too)",
                  ("off", "bf16", "bf16-all"))


def run_arguments(parser, log_every: int, amp: str, levels: tuple):
    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=number(int, 0), default=1,
        help="of everything random; LPT and LeaSE have 1 to 10")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--amp", choices=levels, default="off", help=amp)
    add("--tf32", action=flag, default=False, help="let NVIDIA's matrix units round to TF32")
    add("--deterministic", action=flag, default=False,
        help="only algorithms that repeat their bits on a GPU too; slower")
    add("--out", type=Path, default=None, help="run folder; else one in runs/")
    add("--resume", action=flag, default=False, help="go on from the run folder's checkpoint")
    add("--checkpoint-minutes", type=real, default=10, help="between checkpoints within an epoch")
    add("--log-every", type=number(int, 1), default=log_every, help="steps between printed lines")
    add("--tensorboard", action=flag, default=False,
        help="write the figures and pictures for tensorboard too, which must be installed")
    add("--quick", action=flag, default=False,
        help="a tiny run on synthetic images: few cells, channels and epochs")


def search_recipe(chosen, changes: dict) -> dict:
    """A base's defaults for chosen.dataset, with a method's own: base (or "all") -> defaults."""
    recipe = BASES[chosen.base] | changes.get("all", {}) | changes.get(chosen.base, {})
    if chosen.dataset == "imagenet":
        recipe = recipe | IMAGENET | IMAGENET_BASES.get(chosen.base, {})
    if chosen.quick:
        images = ({"dataset": "synthetic"} if chosen.dataset else
                  {"tasks": ["synthetic:10", "synthetic:5"]})
        recipe = recipe | images | dict(
            image_size=16, channels=4 * min(2, recipe["partial"]), batch_size=100, log_every=5)
        if len(recipe["layers"]) > 1:
            recipe = recipe | dict(epochs=1, warm_up=0)
        else:
            recipe = recipe | dict(epochs=2, warm_up=min(1, recipe["warm_up"]), layers=[3])
    return recipe


def check_search(args):
    """Raises BadInput where a search's arguments do not go together."""
    stages = {len(args.layers), len(args.candidates), len(args.skip_dropout)}
    if len(stages) > 1:
        raise BadInput("--layers, --candidates and --skip-dropout: give each one value per stage")
    if sorted(args.candidates, reverse=True) != args.candidates:
        raise BadInput(f"--candidates {' '.join(map(str, args.candidates))}: cannot grow")
    if args.warm_up >= args.epochs:
        raise BadInput(f"--warm-up {args.warm_up}: A would learn in none of a stage's "
                       f"{args.epochs} epochs")
    if args.channels % (2 * args.partial):
        raise BadInput(f"--channels {args.channels}: not a multiple of {2 * args.partial}")
    if args.subsets and (sum(args.subsets) > 1 or not min(args.subsets) > 0):
        raise BadInput("--subsets: two shares above 0, together at most 1")


def parse(parser, argv, method: str, recipe):
    """The parsed arguments and, with --resume, the checkpoint to go on from.

    recipe(chosen) gives the defaults that hang on --base, --dataset and --quick. --resume takes the
    saved run's arguments, and an argument given with it must agree. Raises BadInput.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--base", choices=BASES, default=parser.get_default("base"))
    early.add_argument("--dataset", default=parser.get_default("dataset"))
    early.add_argument("--quick", action=flag, default=False)
    try:
        chosen, _ = early.parse_known_args(argv)
    except argparse.ArgumentError:                                # the parser itself says which
        chosen = early.parse_args([])
    parser.set_defaults(**recipe(chosen))
    args = parser.parse_args(argv)
    arch = Path(getattr(args, "arch", None) or "")
    cell = arch.parent.name or arch.stem if arch.suffix == ".json" else arch.name
    base = getattr(args, "base", "")
    base = base if base != parser.get_default("base") else ""
    words = (method, base, cell, *task_names(args), str(args.seed))
    name = "-".join(word for word in words if word).replace(":", "").replace("/", "_")
    args.out = args.out or Path("runs") / name
    checkpoint = None
    if args.resume:
        checkpoint = read_checkpoint(args.out)
        if checkpoint["method"] != method:
            raise BadInput(f"--resume: {args.out} is a run of {checkpoint['method']}.py, not "
                           f"{method}.py")
        saved, out = checkpoint["args"], args.out
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        args.out = out
        for name, value in plain(args).items():
            if saved.get(name) != value and name not in WHERE:
                raise BadInput(f"--resume: the run in {out} has {name} = {saved.get(name)!r}, not "
                               f"{value!r}")
        if checkpoint["world_size"] != int(os.environ.get("WORLD_SIZE", 1)):
            raise BadInput(f"--resume: the run in {out} has world_size = "
                           f"{checkpoint['world_size']}; start as many processes")
    elif (not getattr(args, "count_params", False)                # which write nothing
          and not getattr(args, "summary", None)
          and args.out.exists() and (not args.out.is_dir() or any(
              path.suffix != ".tmp" for path in args.out.iterdir()))):
        raise BadInput(f"{args.out} is not an empty folder: give another --out, or --resume to go "
                       "on from its checkpoint")
    return args, checkpoint


def parse_search(parser, argv, method: str, changes: dict):
    """parse, for a search whose method changes its bases' defaults: base (or "all") -> defaults."""
    args, checkpoint = parse(parser, argv, method, lambda chosen: search_recipe(chosen, changes))
    check_search(args)
    return args, checkpoint


def task_names(args) -> list[str]:
    return getattr(args, "tasks", None) or [args.dataset]


WHERE = ("data", "workers", "checkpoint_minutes", "tensorboard")    # what may change on --resume


def plain(args) -> dict:
    """The arguments that make a run what it is, and where its data is, as plain values."""
    here = ("out", "device", "resume", "quick", "log_every")
    return {k: str(v) if k == "data" else v for k, v in vars(args).items() if k not in here}


def pick_device(args) -> torch.device:
    """The device to compute on; under torchrun, this process's, among the others."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = args.device
    if name == "auto":
        name = "cuda" if has["cuda"] else "mps" if has["mps"] else "cpu"
    if not has[name]:
        raise BadInput(f"--device {name}: torch sees no such device here")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "RANK" not in os.environ:                                  # torchrun sets it
        return torch.device(name)
    device = torch.device(name, int(os.environ["LOCAL_RANK"]) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if name == "cuda" else "gloo")
    if rank():                                                    # rank 0 alone speaks and writes
        sys.stdout = open(os.devnull, "w")                        # noqa: SIM115
    return device


# ------------------------------------------------------------------------- the run and its folder


def write(path: Path, content: str | bytes):
    """Replace a file whole, or not at all, so that it survives a kill and a power cut. Of several
    processes only rank 0 writes."""
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_checkpoint(folder: Path, content: dict):
    """checkpoint.pt, with its SHA-256 as the comment of the zip archive that torch.save makes; the
    one before it stays as checkpoint.previous.pt."""
    if rank():
        return
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()[:-2] + (64).to_bytes(2, "little")    # the comment's length
    path = folder / "checkpoint.pt"
    body += hashlib.sha256(body).hexdigest().encode()
    write(folder / "checkpoint.new.pt", body)
    if path.exists() and intact(path.read_bytes()):               # a damaged one takes no place
        os.replace(path, folder / "checkpoint.previous.pt")
    os.replace(folder / "checkpoint.new.pt", path)


def intact(body: bytes) -> bool:
    return hashlib.sha256(body[:-64]).hexdigest().encode() == body[-64:]


def read_checkpoint(folder: Path) -> dict:
    """The newest good checkpoint of a run folder. Raises BadInput."""
    problems = []
    for name in ("checkpoint.pt", "checkpoint.new.pt", "checkpoint.previous.pt"):
        path = folder / name
        try:
            body = path.read_bytes()
            if not intact(body):
                raise ValueError("its checksum is wrong")
            content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or not {"method", "args", "run"} <= content.keys():
                raise ValueError("it is no checkpoint of a run")
        except FileNotFoundError:
            problems += [f"there is no {path}"] if name == "checkpoint.pt" else []
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            problems.append(f"{path} is damaged: {error}")
        else:
            if problems:
                sys.stderr.write(f"{problems[0]}; going on from {path}\n")
            return content
    raise BadInput("--resume: " + "; ".join(problems))


def fingerprint(data) -> str:
    """What tells one data set from another: its sizes, classes, labels and a sample of it."""
    rows = np.linspace(0, len(data.labels) - 1, 16).astype(int)
    seen = [str((len(data.labels), data.size, data.classes)).encode(),
            data.labels.cpu().numpy().tobytes(), data.pixels(rows).cpu().numpy().tobytes()]
    return hashlib.sha256(b"".join(seen)).hexdigest()[:16]


class Signals:
    """SIGTERM and SIGINT end a run after its step, with a checkpoint; a second one, or a step that
    takes longer than eight seconds more, ends it at once. Outside the steps there is nothing to
    save."""
    number, stepping = 0, False

    @classmethod
    def receive(cls, number, frame):
        if number == signal.SIGALRM:
            sys.stderr.write("the step takes too long: the last checkpoint stays as it is\n")
            os._exit(128 + cls.number)
        if cls.number or not cls.stepping:
            os._exit(128 + number) if cls.number else sys.exit(128 + number)
        cls.number = number
        signal.alarm(8)

    @classmethod
    @contextlib.contextmanager
    def caught(cls):
        numbers = signal.SIGTERM, signal.SIGINT, signal.SIGALRM
        before = [signal.signal(number, cls.receive) for number in numbers]
        cls.number, cls.stepping = 0, False
        try:
            yield
        finally:
            signal.alarm(0)
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)


class Run:
    """A run's folder and its place in the schedule: all that --resume needs beside the learners.

    state: the stage; the step of the run that comes next; kept, the candidates of each edge; the
    sums of this epoch's figures and the seconds spent on it; the lines of the epochs before; why
    the search ended early, if it did.
    """

    def __init__(self, method: str, args, checkpoint: dict | None, sets: list):
        self.method, self.args, self.checkpoint = method, args, checkpoint
        self.data = [fingerprint(data) for data in sets]
        self.state = dict(stage=0, step=0, kept=ALL, sums={}, seconds=0.0, history=[], stopped=None)
        if checkpoint:
            if checkpoint["data"] != self.data:
                raise BadInput(f"--resume: the data is not that of the run in {args.out}")
            self.state = checkpoint["run"]
        try:
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out {args.out}: {error}") from None
        except ImportError:
            raise BadInput("--tensorboard: pip install tensorboard") from None
        self.board = None
        if args.tensorboard and not rank():
            self.board = SummaryWriter(args.out, purge_step=self.state["step"])
        self.due, self.new = False, True

    def stages(self):
        """The stages that are left; between two of them the candidates are pruned."""
        args, state = self.args, self.state
        while state["stage"] < len(args.layers) and not state["stopped"]:
            yield state["stage"]
            state["stage"] += 1
            if state["stage"] < len(args.layers):
                state["kept"] = prune(self.alphas, args.candidates[state["stage"]])

    def load(self, parts: dict, alphas=None):
        """Take a stage's learners, optimizers and alphas; a checkpoint's states go into them."""
        self.parts, self.alphas = parts, alphas
        if self.checkpoint:
            try:
                for name, part in parts.items():
                    part.load_state_dict(self.checkpoint["parts"][name])
            except (RuntimeError, ValueError, LookupError) as error:
                raise BadInput(f"--resume: the checkpoint in {self.args.out} does not fit: "
                               f"{error}") from None
            self.checkpoint = None
        elif not self.state["step"]:                              # so that --resume always can
            self.save()

    def save(self):
        write_checkpoint(self.args.out, {
            "method": self.method, "args": plain(self.args), "data": self.data,
            "world_size": world_size(), "run": self.state,
            "parts": {name: part.state_dict() for name, part in self.parts.items()}})
        self.saved, self.due = time.time(), False

    def steps(self, epoch_steps: int):
        """The steps that are left of the present stage: (epoch of the stage, step of the run).

        After each the run is saved if an epoch or --checkpoint-minutes have passed, or if a signal
        came, which ends it.
        """
        state, self.epoch_steps = self.state, epoch_steps
        self.begin = self.lap = self.saved = time.time()
        self.done = 0
        Signals.stepping, stage_steps = True, self.args.epochs * epoch_steps
        try:
            while state["step"] < (state["stage"] + 1) * stage_steps and not state["stopped"]:
                yield state["step"] % stage_steps // epoch_steps, state["step"]
                state["step"] += 1
                state["seconds"] += time.time() - self.lap
                self.lap = time.time()
                late = self.lap - self.saved > 60 * self.args.checkpoint_minutes
                if self.due or late or (Signals.number and not rank()):
                    self.save()
                if Signals.number and not rank():
                    sys.stderr.write(f"stopped after step {state['step']}; --resume goes on\n")
                    sys.exit(128 + Signals.number)
        finally:
            Signals.stepping = False

    def at(self, learner: str) -> str:
        """Where the run is, for an error message."""
        return f"{learner} (stage {self.state['stage'] + 1}, step {self.state['step'] + 1})"

    def log(self, **figures: Tensor) -> bool:
        """Add a step's figures to the epoch's sums and print them now and then. Returns whether
        this was the epoch's last step."""
        args, state, i = self.args, self.state, self.state["step"] % self.epoch_steps + 1
        values = torch.stack([value.detach().double() for value in figures.values()])
        if world_size() > 1:
            values = reduce([values.float()], 1 / world_size())[0]
        for name, value in zip(figures, values.tolist()):
            state["sums"][name] = state["sums"].get(name, 0.0) + value
            if self.board:
                self.board.add_scalar(f"step/{name}", value, state["step"])
        self.done += 1
        if self.new:
            print(f"peak memory {peak_memory(values.device):.0f} MiB after the first step")
            self.new = False
        if i % args.log_every == 0 or i == self.epoch_steps:
            spent = (time.time() - self.begin) / self.done
            stages = len(getattr(args, "candidates", [0]))
            left = stages * args.epochs * self.epoch_steps - state["step"] - 1
            words = "  ".join(f"{name.replace('_', ' ')} {value:.3f}"
                              for name, value in zip(figures, values.tolist()))
            print(f"epoch {state['step'] // self.epoch_steps + 1}/{stages * args.epochs} "
                  f"step {i}/{self.epoch_steps}  {words}  {args.batch_size / spent:.1f} images/s  "
                  f"left {timedelta(seconds=round(spent * left))}", flush=True)
        return i == self.epoch_steps

    def end_epoch(self, **figures):
        """Write what an epoch leaves behind: the line in the log, a search's cell and its drawing.
        The checkpoint comes last, after the step, so that an interruption repeats what is here."""
        args, state, alphas = self.args, self.state, self.alphas
        line = {"epoch": len(state["history"]) + 1}
        line |= {name: value / self.epoch_steps for name, value in state["sums"].items()}
        line |= (architecture_report(alphas) if alphas else {}) | figures
        for name, value in line.items():
            if not math.isfinite(value):
                raise NotFinite(self.at(f"{name} is {value}: the run"))
        line["seconds"] = state["seconds"] + time.time() - self.lap
        if alphas and 0 < args.stop_at_skips <= line["skip_connections"]:
            state["stopped"] = (f"the normal cell has {line['skip_connections']} skip connections, "
                                f"--stop-at-skips is {args.stop_at_skips}")
            print("the search ends here:", state["stopped"])
        print(" ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True)
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(f"epoch/{name}", value, state["step"])
        line |= {"stopped": state["stopped"]} if state["stopped"] else {}
        if alphas:
            line["mean_weights"] = mean_weights(alphas)
        self.lap, self.due = time.time(), True
        state |= dict(sums={}, seconds=0.0, history=[*state["history"], line])
        write(args.out / "log.jsonl", "".join(json.dumps(each) + "\n" for each in
                                              state["history"]))
        if alphas:
            cell, title = decode(alphas, args.max_skips), f"{args.out.name}, epoch {line['epoch']}"
            write(args.out / "genotype.json", to_json(cell))
            write(args.out / "cells.svg", to_svg(cell, title))
            weights = [line["mean_weights"] for line in state["history"]]
            write(args.out / "weights.svg", weights_svg(weights, title))

    def picture(self, name: str, rows: dict, size: int = 96):
        """Write a PNG of an epoch into the run's folder; rows, size: draw_pictures'."""
        canvas, content = draw_pictures(rows, size), io.BytesIO()
        canvas.save(content, "PNG")
        write(self.args.out / name, content.getvalue())
        if self.board:
            self.board.add_image(name, np.asarray(canvas), self.state["step"], dataformats="HWC")


def peak_memory(device) -> float:
    """The largest memory so far, in MiB: a GPU's by torch, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


def print_next(args):
    """Where a search's cell is, and the commands that evaluate it."""
    print(f"The cell is in {args.out}/genotype.json, drawn in cells.svg. Train it:")
    for dataset in task_names(args):
        parts = ["python evaluate.py --arch", shlex.quote(f"{args.out}/genotype.json"),
                 "--dataset", shlex.quote(dataset)]
        if dataset in ("cifar10", "cifar100", "folder", "imagenet"):  # the others name their place
            parts.append(f"--data {shlex.quote(str(args.data))}")
        if args.base in ("pdarts", "pcdarts") and dataset != "imagenet":
            parts.append("--drop-path 0.3")                       # as their papers have it
        parts += [f"--image-size {args.image_size}"] if args.image_size else []
        parts += [f"--hold-out {args.hold_out}"] if args.hold_out else []
        print(*parts, *["--quick"] if args.quick else [])


def draw_pictures(rows: dict, size: int) -> Image.Image:
    """A picture of rows of images, `size` pixels each, under their titles and over their captions.

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
    return canvas


def run(main, argv=None):
    """main(argv), where bad input ends in one line and exit code 2, and what goes wrong later in
    one line and exit code 1."""
    def end(code, message):
        if code == 1 or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
        sys.exit(Signals.number + 128 if Signals.number else code)

    with Signals.caught():
        try:
            main(argv)
        except BadInput as error:
            end(2, error)
        except (NotFinite, Gone, OSError) as error:
            end(1, error)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and (
                    "allocate memory" not in str(error)):
                raise
            end(1, f"out of memory: lower --batch-size, --channels or --layers ({error})")
    if dist.is_initialized():
        dist.destroy_process_group()
