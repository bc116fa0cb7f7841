"""What the three methods share, in two parts.

Part I is what the papers speak of: gradients, the DARTS search space, the architecture. Read it
first. Part II is what runs it, in the order of a script's main: command line, run folder, images,
base searches. Part I uses nothing of Part II.

Sources: DARTS (Liu et al. 2019, arXiv 1806.09055) for the search space and the one-step gradient;
each base's paper beside its line in BASES; the methods' equations are in their own scripts.
"""

import argparse
import contextlib
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import threading
import time
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps  # Pillow comes with torchvision
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from genotypes import PRIMITIVES, BadInput, Genotype, path, search_svg, to_json, to_svg

try:
    import fcntl
except ImportError:                                               # Windows
    fcntl = None

# =================================================================================================
# PART I. What the papers speak of: gradients, operations, supernet, architecture.

# -------------------------------------------------------------------------------------- gradients
# Every equation of the methods is computed with these. Only descend changes a weight; none of them
# changes a buffer or a .grad. Under torchrun each process holds a part of every batch.


class NotFinite(Exception):
    """A gradient is NaN or infinite."""


def world_size() -> int:
    """Return the number of processes that share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among them; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(tensors: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Return the sums of tensors over all processes, times scale."""
    flat = torch.cat([t.detach().flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.mul_(scale).split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors)]


def sum_of_all(x: Tensor) -> Tensor:
    """Return the sum of x over the whole batch, the parts of all processes included. Its gradient
    is of this process's part times the number of processes, over which grad averages."""
    if world_size() == 1:
        return x.sum()
    mine = world_size() * x.sum()
    others = all_sum([x.sum()])[0] - mine.detach()                # a constant
    return mine + others


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return sum w l / sum w over the whole batch; losses and weights (N,)."""
    return sum_of_all(weights * losses) / sum_of_all(weights)


def grad(loss: Tensor, tensors: list[Tensor], graph: bool = False) -> list[Tensor]:
    """Return d loss / d t for every tensor t. Averages over the processes and leaves .grad alone.

    graph: build a graph of the result, so that it can be differentiated again (one process only).
    """
    found = list(torch.autograd.grad(loss, tensors, create_graph=graph))
    return all_sum(found, 1 / world_size()) if world_size() > 1 else found


def gradients(loss: Tensor, *groups: list[Tensor]) -> list[list[Tensor]]:
    """Return grad's list for each group of tensors, from one backward pass."""
    found = iter(grad(loss, [t for group in groups for t in group]))
    return [list(itertools.islice(found, len(group))) for group in groups]


def at_weights(module: nn.Module, weights: list[Tensor]):
    """Return module as a function of its inputs at other weights, listed in the order of its
    parameters. Calling it changes nothing: in training every BatchNorm uses its batch without
    updating its running statistics."""
    state = dict(zip((name for name, _ in module.named_parameters()), weights, strict=True))
    norms = [part for part in module.modules()
             if isinstance(part, nn.BatchNorm2d) and part.track_running_stats]

    def call(*inputs):
        for norm in norms:
            norm.track_running_stats = False
        try:
            return torch.func.functional_call(module, state, inputs)
        finally:
            for norm in norms:
                norm.track_running_stats = True
    return call


def detached(weights: list[Tensor]) -> list[Tensor]:
    """Return the same weights as constants."""
    return [w.detach() for w in weights]


def sgd_step(optimizer: torch.optim.SGD, grads: list[Tensor]) -> list[Tensor]:
    """Return the weights one optimizer step ahead, w' = w - xi (mu buffer + grad + wd w), without
    taking it (DARTS Eq. 7, with its reference code's momentum and weight decay)."""
    group = optimizer.param_groups[0]
    weights = group["params"]
    step = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
    buffers = [optimizer.state[w].get("momentum_buffer") for w in weights if w in optimizer.state]
    if buffers and buffers[0] is not None:
        torch._foreach_add_(step, buffers, alpha=group["momentum"])
    return list(torch._foreach_add(weights, step, alpha=-group["lr"]))


@torch.no_grad()
def virtual_weights(optimizer: torch.optim.SGD, grads: list[Tensor]) -> list[Tensor]:
    """Return sgd_step's weights as leaves, by which an objective can then be differentiated."""
    return [w.requires_grad_() for w in sgd_step(optimizer, grads)]


def central_difference(grad_at, w: list[Tensor], v: list[Tensor], radius: float = 1e-2,
                       split: bool = False) -> list[Tensor]:
    """Return (d2 L / da dw) v for every tensor a, where grad_at(w) returns dL/da at weights w.
    If all of v is zero, so is the result.

    The step is eps = radius / |v|, with the norm over all of v (DARTS Eq. 8; LPT Eq. 17; LeaSE
    Eq. 11). split: each process holds its own part of v, as of LeaSE's perturbations.
    """
    norm = nn.utils.get_total_norm(v)
    if split and world_size() > 1:
        norm = all_sum([norm.square()])[0].sqrt()
    eps = torch.where(norm > 0, radius / norm, radius)
    w, step = detached(w), torch._foreach_mul(v, eps)
    plus = grad_at(torch._foreach_add(w, step))
    minus = grad_at(torch._foreach_sub(w, step))
    return [(p - n) / (2 * eps) for p, n in zip(plus, minus)]


def descend(optimizer, grads: list[Tensor], learner: str = "a learner", clip: float = 0.0):
    """Take an optimizer's step along grads, whose total norm is clipped at `clip` (0: not at all);
    they are clipped in place. Raises NotFinite, before the step, if one is NaN or infinite."""
    weights = optimizer.param_groups[0]["params"]
    for w, g in zip(weights, grads, strict=True):
        w.grad = g
    if not math.isfinite(nn.utils.clip_grad_norm_(weights, clip or math.inf)):
        raise NotFinite(f"the gradient of {learner} is not finite")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------- operations
# The candidate operations (DARTS §3.1.1): merged over edges in the supernet (edges > 1), one by one
# in the evaluated network. A change here changes both.


def memory_format(device):
    """Return the one layout of all maps on a device. On a CPU channels_last halves the time of a
    step; elsewhere maps stay contiguous (on mps some versions differentiate BatchNorm wrongly in
    channels_last)."""
    return torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format


def place(module: nn.Module, device) -> nn.Module:
    """Return the module on its device, in the device's layout."""
    return module.to(device, memory_format=memory_format(device))


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that can take its weight at the call: alpha * BN(x) is BN(x) with weight alpha."""

    def forward(self, x, weight=None):
        weight, statistics = self.weight if weight is None else weight, (None, None)
        if self.track_running_stats or not self.training:
            statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, weight, self.bias, self.training, self.momentum,
                            self.eps)


class SeparableConv(nn.Module):
    """Depthwise k x k convolution, 1 x 1 convolution, BN; for `edges` edges side by side."""

    def __init__(self, C, kernel, stride=1, dilation=1, edges=1, affine=False):
        super().__init__()
        wide = edges * C
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, dilation * (kernel // 2), dilation,
                                   groups=wide, bias=False)
        self.pointwise = nn.Conv2d(wide, wide, 1, groups=edges, bias=False)
        self.norm = BatchNorm(wide, affine=affine)

    def forward(self, x, weight=None):
        return self.norm(self.pointwise(self.depthwise(x)), weight)


class FactorizedReduce(nn.Module):
    """Two 1 x 1 convolutions of stride 2, one shifted by a pixel, side by side, then BN.

    The stride is taken by slicing, since on a CPU the backward pass of a strided 1 x 1 convolution
    writes beyond its memory at some shapes (8 channels, 56 x 56, channels_last; torch 2.6, 2.15).
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


def preprocess(C_in, C_out, after_reduction=False, affine=False):
    """Return what follows the ReLU on a cell's input: a FactorizedReduce after a reduction cell,
    else a 1 x 1 convolution with BN. The ReLU is applied once, where the input is made, because two
    cells share it."""
    return (FactorizedReduce(C_in, C_out, affine=affine) if after_reduction else
            nn.Sequential(nn.Conv2d(C_in, C_out, 1, bias=False), BatchNorm(C_out, affine=affine)))


def stem(C, large):
    """Return the layers before the first cell and their last width. There are two modules, as the
    first cell has two inputs: stem1 makes the second from the first. large: stride 8 in all, as for
    ImageNet."""
    def conv(a, b, stride=2):
        return nn.Conv2d(a, b, 3, stride, 1, bias=False), BatchNorm(b), nn.ReLU()
    if large:
        return nn.Sequential(*conv(3, C // 2), *conv(C // 2, C)), nn.Sequential(*conv(C, C)), C
    return nn.Sequential(*conv(3, 3 * C, 1)), nn.Identity(), 3 * C


# --------------------------------------------------------------------------------------- supernet
# The search network. Its outputs and gradients equal those of one mixed operation per edge (DARTS
# Eq. 2; tested to 1e-10). Its parameters are the weights alone; A is an argument of the call.

NODES = 4
EDGES = sum(2 + node for node in range(NODES))                    # 14
# the rows of alpha that belong to state j's outgoing edges, in the order of the nodes they lead to
OUTGOING = [[sum(2 + n for n in range(i)) + j for i in range(max(0, j - 1), NODES)]
            for j in range(NODES + 1)]
ALL = [[list(PRIMITIVES)] * EDGES] * 2                            # every candidate on every edge


@dataclass
class Knobs:
    """What a base changes in its supernet while it trains; set_epoch sets them."""
    auxiliary: float = 0.0              # DARTS-: weight of the auxiliary skip
    skip_dropout: float = 0.0           # P-DARTS: rate


def as_it_is(x):
    """Return x."""
    return x


def every_second(x):
    """Return every second pixel of a map, (N, C, H/2, W/2)."""
    return x[:, :, ::2, ::2]


def phases(x):
    """Return the four stride-2 phases of a map along the batch, (4N, C, H/2, W/2)."""
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])


def merge_phases(x):
    """Undo phases."""
    x = x.permute(0, 2, 3, 1).unflatten(0, (2, 2, -1))            # (2, 2, N, H/2, W/2, C)
    return x.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def weighted_copies(x, weight):
    """Return x (N, C, H, W) once per edge times weight (edges, C) or (edges, 1), channels last:
    (N, H, W, edges, C)."""
    return x.permute(0, 2, 3, 1).unsqueeze(3) * weight


def side_by_side(x):
    """Return maps of edges (N, H, W, edges, ...) beside each other, (N, edges * C, H, W)."""
    x = x.flatten(3).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=memory_format(x.device))


class State:
    """A state of a cell as the operations on its outgoing edges see it: x (N, C, H, W), its ReLU,
    and copies(part, n), a part of that ReLU n times side by side, which two operations share."""

    def __init__(self, x):
        relu = F.relu(x)
        self.x, self.relu = x, relu
        self.copies = functools.cache(lambda part, n: torch.cat([part(relu)] * n, 1))


# The candidates on n edges at once: op(state, weight) returns their outputs side by side,
# (N, n * C, H', W'), each times its edge's weight; weight (n * C,) repeats it for every channel.


class SepConv(nn.Module):
    """ReLU, depthwise and 1 x 1 convolution, BN, twice."""

    def __init__(self, C, kernel, stride, n):
        super().__init__()
        self.n = n
        self.first = SeparableConv(C, kernel, stride, edges=n)
        self.second = SeparableConv(C, kernel, edges=n)

    def forward(self, state, weight):
        return self.second(F.relu_(self.first(state.copies(as_it_is, self.n))), weight)


class DilConv(nn.Module):
    """ReLU, depthwise convolution of dilation 2 and 1 x 1 convolution, BN.

    Dilation 2 is a plain convolution of each phase by itself, whose gradients take far less time on
    a CPU; at stride 2 one phase is the whole input.
    """

    def __init__(self, C, kernel, stride, n):
        super().__init__()
        self.n, self.stride = n, stride
        self.conv = SeparableConv(C, kernel, dilation=2, edges=n)

    def forward(self, state, weight):
        _, _, H, W = state.x.shape
        if self.stride == 2:
            return self.plain(state.copies(every_second, self.n), weight)
        if state.x.device.type == "cpu" and H % 2 == W % 2 == 0:
            return merge_phases(self.plain(state.copies(phases, self.n), weight))
        return self.conv(state.copies(as_it_is, self.n), weight)

    def plain(self, x, weight):
        """Return the convolution of x without its dilation."""
        kernel = self.conv.depthwise.weight                       # (n * C, 1, k, k)
        x = F.conv2d(x, kernel, padding=kernel.shape[2] // 2, groups=len(kernel))
        return self.conv.norm(self.conv.pointwise(x), weight)


class Pool(nn.Module):
    """Pooling, BN: the same map on every edge."""

    def __init__(self, C, pool):
        super().__init__()
        self.pool, self.norm = pool, BatchNorm(C, affine=False)

    def forward(self, state, weight):
        x = self.norm(self.pool(state.x))
        return side_by_side(weighted_copies(x, weight.view(-1, x.shape[1])))


class Skip(nn.Module):
    """The state itself; at stride 2 ReLU and a FactorizedReduce. At stride 1 P-DARTS drops values
    (§3.3), on every edge others."""

    def __init__(self, C, stride, n, knobs):
        super().__init__()
        self.n, self.knobs = n, knobs
        self.reduce = FactorizedReduce(C, C, n) if stride == 2 else None

    def forward(self, state, weight):
        if self.reduce is not None:
            return self.reduce(state.relu, weight)
        copies = weighted_copies(state.x, weight.view(self.n, -1))
        return side_by_side(F.dropout(copies, self.knobs.skip_dropout, self.training))


def candidate(name, C, stride, n, knobs):
    """Return a candidate operation on n edges; `none` adds zero and has no module."""
    if name == "skip_connect":
        return Skip(C, stride, n, knobs)
    if name == "max_pool_3x3":
        return Pool(C, nn.MaxPool2d(3, stride, 1))
    if name == "avg_pool_3x3":
        return Pool(C, nn.AvgPool2d(3, stride, 1, count_include_pad=False))
    return (SepConv if name.startswith("sep") else DilConv)(C, int(name[-1]), stride, n)


# Convolutions first: their backward passes then come last, which takes 8% less time on a CPU.
CONVS_FIRST = [*PRIMITIVES[4:], *PRIMITIVES[1:4]]


class MixedEdges(nn.Module):
    """The mixed operations (DARTS Eq. 2) on all outgoing edges of one state at once. Their maps lie
    side by side along the channels, so that all convolutions of one kind are one grouped one.

    kept: the names of each edge's candidates. partial: the operations see C / partial channels, the
    others pass by, and all are shuffled (PC-DARTS §3.2). auxiliary: DARTS-'s skip beside them.
    test_supernet_is_the_per_edge_one holds it to one mixed operation per edge.
    """

    def __init__(self, C, kept, stride, knobs, partial=1, auxiliary=False):
        super().__init__()
        self.edges, self.stride, self.partial, self.knobs = len(kept), stride, partial, knobs
        self.kept = {name: edges for name in CONVS_FIRST          # the edges that have it
                     if (edges := [e for e, names in enumerate(kept) if name in names])}
        C = C // partial
        self.ops = nn.ModuleDict({name: candidate(name, C, stride, len(edges), knobs)
                                  for name, edges in self.kept.items()})
        self.auxiliary = Skip(C, stride, self.edges, Knobs()) if auxiliary else None

    def forward(self, x, p, q=None):
        """x (N, C, H, W), p (edges, 8) the weights of the operations, q (edges,) those of the
        bypass -> (N, edges * C, H', W'), one edge beside the other."""
        C, bypass = x.shape[1] // self.partial, None
        if self.partial > 1:
            x, bypass = x.split([C, x.shape[1] - C], 1)
        state, weights = State(x), dict(zip(PRIMITIVES, p.t().repeat_interleave(C, 1)))
        out = functools.reduce(Tensor.add_, (                                      # DARTS Eq. 2
            self.on_all(self.ops[name](state, self.on_kept(weights[name], edges)), edges)
            for name, edges in self.kept.items()))
        if self.auxiliary is not None:
            out += self.auxiliary(state, torch.full_like(weights["none"], self.knobs.auxiliary))
        return out if bypass is None else self.shuffled(out, bypass, q)

    def on_kept(self, weight, edges):
        """Return the part of weight (all edges * C,) that belongs to these edges."""
        if len(edges) == self.edges:
            return weight
        return weight.view(self.edges, -1)[edges].flatten()

    def on_all(self, out, edges):
        """Return out (N, len(edges) * C, H, W) with zeros for the other edges."""
        if len(edges) == self.edges:
            return out
        parts = dict(zip(edges, out.chunk(len(edges), 1)))
        zero = torch.zeros_like(parts[edges[0]])
        return torch.cat([parts.get(e, zero) for e in range(self.edges)], 1)

    def shuffled(self, out, bypass, q):
        """Return out (N, edges * C, H, W) with the bypass beside each edge, channels shuffled."""
        if self.stride == 2:
            bypass = F.max_pool2d(bypass, 2, ceil_mode=True)
        out = out.permute(0, 2, 3, 1).unflatten(3, (self.edges, -1))    # (N, H, W, edges, C)
        out = torch.cat([out, weighted_copies(bypass, q[:, None])], 4)
        return side_by_side(out.unflatten(4, (self.partial, -1)).transpose(4, 5))


class SearchCell(nn.Module):
    """A cell of mixed edges. kept: per edge, its candidates; options: MixedEdges'."""

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
        states, counts = [self.preprocess0(s0), self.preprocess1(s1)], [len(r) for r in OUTGOING]
        # nodes: side by side, the sums so far of all nodes that still lack inputs; state j adds to
        # the last ones of them, and node j - 1 is then complete
        C, nodes = states[1].shape[1], 0
        q = [None] * len(counts) if q is None else q.split(counts)
        for j, (edges, *weights) in enumerate(zip(self.states, p.split(counts), q)):
            nodes = nodes + edges(states[j], *weights)            # (N, their number * C, H', W')
            if 0 < j < NODES:
                done, nodes = nodes.split([C, nodes.shape[1] - C], 1)
                states.append(done)
        return torch.cat([*states[2:], nodes], 1)                 # (N, 4C, H', W')


class Supernet(nn.Module):
    """The search network: cells of mixed operations, with reduction cells at 1/3 and 2/3.

    kept: the candidates of every edge, of the normal and the reduction cell; partial, auxiliary:
    MixedEdges'; large: the stem of stride 8.
    """

    def __init__(self, C, num_classes, layers, kept=ALL, partial=1, auxiliary=False, large=False):
        super().__init__()
        self.knobs = Knobs()
        self.stem0, self.stem1, C_prev = stem(C, large)
        self.cells, C_prev_prev, reduction = nn.ModuleList(), C_prev, large
        for i in range(layers):
            reduction_prev, reduction = reduction, i in (layers // 3, 2 * layers // 3)
            C *= 2 if reduction else 1
            self.cells.append(SearchCell(C_prev_prev, C_prev, C, reduction, reduction_prev,
                                         kept[reduction], self.knobs, partial, auxiliary))
            C_prev_prev, C_prev = C_prev, NODES * C
        self.classifier = nn.Linear(C_prev, num_classes)
        self.register_buffer("order", torch.tensor(sum(OUTGOING, [])), persistent=False)

    def forward(self, x, A):
        """x (N, 3, H, W), A: Architecture -> logits (N, num_classes)."""
        weights = [(p[self.order], None if q is None else q[self.order]) for p, q in A.weights()]
        with same_draws(x.device) if self.knobs.skip_dropout else contextlib.nullcontext():
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
            for cell in self.cells:
                out = cell(s0, s1, *weights[cell.reduction])
                s0, s1 = s1, F.relu(out)
        return self.classifier(out.mean((2, 3)))


@contextlib.contextmanager
def same_draws(device):
    """Make every forward pass within a step draw the same random numbers, so that the two passes of
    a finite difference see the same dropout mask: those of the seed that Run.steps set for the
    step."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed())
        yield


# ----------------------------------------------------------------------------------- architecture


class Architecture(nn.Module):
    """The architecture A: its parameters, the weights that they give a supernet, the cell that they
    decode to, and the base's penalty. To weigh operations differently, change this class only.

    alpha: of the normal and of the reduction cell, (14, 8) each; beta: with partial channels the
    edges', (14,) each. kept: the candidates of every edge, as Supernet's; max_skips: cell's.
    """

    def __init__(self, kept=ALL, partial=1, max_skips=8):
        super().__init__()
        self.alpha = nn.ParameterList(1e-3 * torch.randn(EDGES, len(PRIMITIVES)) for _ in range(2))
        self.beta = nn.ParameterList(1e-3 * torch.randn(EDGES) for _ in range(2 * (partial > 1)))
        self.register_buffer("dropped", torch.tensor(
            [[[name not in names for name in PRIMITIVES] for names in cell] for cell in kept]))
        self.register_buffer("max_skips", torch.tensor(max_skips))
        self.epoch = 0                  # of the present stage; set_epoch sets it

    def weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return for the normal and the reduction cell the weights of the edges' operations p
        (14, 8) and, with partial channels, of their bypasses q (14,), else None."""
        found = []
        for i, (alpha, dropped) in enumerate(zip(self.alpha, self.dropped)):
            p, q = F.softmax(alpha.masked_fill(dropped, -torch.inf), -1), None        # DARTS Eq. 2
            if len(self.beta):
                into = self.beta[i].split([2 + node for node in range(NODES)])
                q = torch.cat([F.softmax(beta, 0) for beta in into])               # PC-DARTS Eq. 3
                p = q[:, None] * p
            found.append((p, q))
        return found

    def penalty(self) -> Tensor | None:
        """Return what the base adds to A's loss in epoch self.epoch, a scalar, or None; none of
        BASES adds anything. step takes its gradient."""
        return None

    def step(self, optimizer, gradient: list[Tensor]):
        """Take A's step along a method's gradient and that of the base's own penalty."""
        penalty = self.penalty()
        if penalty is not None:
            own = torch.autograd.grad(penalty, list(self.parameters()), allow_unused=True,
                                      materialize_grads=True)
            gradient = [g + o for g, o in zip(gradient, own)]
        descend(optimizer, gradient, "the architecture")

    def cell(self, max_skips: int | None = None) -> Genotype:
        """Return the cell that A stands for (DARTS §2.4): per node the two incoming edges whose
        strongest operation other than `none` is strongest, with that operation; the lower index
        wins a tie. While the normal cell has more than max_skips skip connections, the weakest
        one's weight is set to 0 and the cell decoded again (P-DARTS §3.3); one without alternative
        stays."""
        def strongest(p):                                         # (14, 7) -> [(row, state, op)]
            edges, first = [], 0
            for n in range(2, 2 + NODES):
                rows = p[first:first + n]
                edges += [(first + state, state, rows[state].index(max(rows[state])))
                          for state in sorted(range(n), key=lambda s: -max(rows[s]))[:2]]
                first += n
            return edges

        normal, reduce = (p.detach().masked_fill(dropped, -1)[:, 1:].tolist()    # -1: never chosen
                          for (p, _), dropped in zip(self.weights(), self.dropped))
        skip = PRIMITIVES.index("skip_connect") - 1
        limit = self.max_skips if max_skips is None else max_skips
        while len(skips := [row for row, _, op in strongest(normal) if op == skip]) > limit:
            if not (removable := [row for row in skips if normal[row][skip] > 0]):
                break
            normal[min(removable, key=lambda row: normal[row][skip])][skip] = 0.0
        concat = list(range(2, 2 + NODES))
        named = [[(PRIMITIVES[1 + op], state) for _, state, op in strongest(p)]
                 for p in (normal, reduce)]
        return Genotype(named[0], concat, named[1], concat)

    def report(self) -> tuple[dict, dict]:
        """Return figures, the mean entropy of an edge's operations in nats and the number of skip
        connections in the normal cell when it is decoded without a limit on them; and each
        operation's weight, in PRIMITIVES' order, as a mean over the edges of the normal and of the
        reduction cell. An edge's weights are scaled to add up to 1."""
        p = [(p / p.sum(-1, keepdim=True)).detach().cpu() for p, _ in self.weights()]
        entropy = torch.special.entr(torch.cat(p)).sum(-1).mean().item()
        skips = sum(op == "skip_connect" for op, _ in self.cell(max_skips=2 * NODES).normal)
        return ({"alpha_entropy": entropy, "skip_connections": skips},
                {kind: rows.mean(0).tolist() for kind, rows in zip(("normal", "reduce"), p)})

    def prune(self, keep: int) -> list:
        """Return the `keep` strongest candidates of every edge in PRIMITIVES' order (P-DARTS §3.2);
        of equal ones the lower index is dropped first."""
        kept = []
        for alpha, dropped in zip(self.alpha, self.dropped):
            alpha = alpha.detach().masked_fill(dropped, -torch.inf).cpu()
            rows = alpha.argsort(stable=True)[:, -keep:].sort().values.tolist()
            kept.append([[PRIMITIVES[o] for o in row] for row in rows])
        return kept


# =================================================================================================
# PART II. What runs it, in the order in which a script's main uses it: command line, run, images,
# bases; then what all of it uses, processes and CUDA graphs. Skip it on a first reading.

# ------------------------------------------------------------------------------------ command line
# Arguments and their defaults by base and data set.

# Arguments that do not define a run: where it lives, where it computes, how it reports. All others
# do: they name its folder and its row in the tables. --resume compares them (parse), the images and
# the number of processes (Run).
FREE = ("out", "resume", "device", "data", "workers", "graphs", "checkpoint_minutes", "log_every")


def identity(args) -> dict:
    """Return the arguments that define a run and, once parse has set it, `changed`: those of them
    that differ from their defaults."""
    return {k: v for k, v in vars(args).items() if k not in FREE}


def number(kind, low, high=math.inf):
    """Return an argparse type: an int or float from low to high."""
    largest = min(high, 2 ** 31 - 1) if kind is int else high

    def parse(text):
        value = kind(text)
        if not low <= value <= largest or value == math.inf:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} from {low}" + (f" to {high}" if high < math.inf else "")
    return parse


def dataset_name(text: str) -> str:
    """Check a data set's name as an argparse type; the names are those of load_images."""
    name, colon, option = text.partition(":")
    known = name in ("cifar10", "cifar100", "imagenet", "folder", "synthetic") and not colon
    classes = name == "synthetic" and option.isascii() and option.isdigit()
    if known or (name == "folder" and option) or (classes and 2 <= int(option) <= 1000):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no data set: cifar10, cifar100, imagenet, "
                                     "folder[:DIR] or synthetic[:CLASSES]")


real, flag = number(float, 0), argparse.BooleanOptionalAction


def new_parser(description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=f"{description} Example: {example}", usage=argparse.SUPPRESS,
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def data_arguments(parser):
    add = parser.add_argument_group("the images").add_argument
    add("--data", type=path, default=Path("data"),
        help="folder with CIFAR (downloaded there if missing), ImageNet or your images")
    add("--image-size", type=number(int, 8, 512),
        help="pixels a side; unless given 224 for ImageNet, 32 for synthetic, else the images' own")
    add("--flip", action=flag, default=True,
        help="mirror half of the training images; --no-flip for digits, letters and the like")
    add("--hold-out", type=number(int, 0), default=0,
        help="training images left out for evaluate.py's test (Skillearn §3.2.4's lambda: 5000)")
    add("--workers", type=number(int, 0),
        help="reading processes of each stream; unless given 4 for files and on a GPU, else 0")


def search_arguments(parser):
    """Add the arguments of every search: its images, its base and the supernets' training."""
    data_arguments(parser)
    add = parser.add_argument_group(
        "the base search; the defaults are its paper's (BASES) unless the method has its own"
        ).add_argument
    add("--base", choices=BASES, default="darts-2nd", help="the search to build on")
    add("--order", type=int, choices=(1, 2),
        help="1: A's gradient leaves out the term through W' (xi = 0, DARTS §2.3); LeaSE then "
             "explains with E, IL still validates one step ahead")
    add("--layers", type=number(int, 3), nargs="+", help="number of cells, for each stage")
    add("--epochs", type=number(int, 1), help="epochs of each stage, over the training half")
    add("--warm-up", type=number(int, 0),
        help="epochs at the start of each stage that train weights alone")
    add("--batch-size", type=number(int, 2), help="images per step and stream, over all processes")
    add("--lr", type=real,
        help="initial learning rate of the searched networks' weights: SGD, cosine decay")
    add("--lr-min", type=real, help="learning rate at the end of that decay")
    add("--alpha-lr", type=real, help="learning rate of A: Adam with betas (0.5, 0.999)")
    add = parser.add_argument_group("the searched networks (DARTS §A.1)").add_argument
    add("--channels", type=number(int, 2), default=16, help="channels C of the first cell")
    add("--momentum", type=number(float, 0, 0.999), default=0.9, help="momentum of every SGD")
    add("--weight-decay", type=real, default=3e-4, help="weight decay of every SGD")
    add("--grad-clip", type=real, default=5.0,
        help="clip the gradient of a searched network's weights to this norm; 0: do not clip")
    add("--alpha-weight-decay", type=real, default=1e-3, help="weight decay of A")
    add("--radius", type=number(float, 1e-12), default=1e-2,
        help="radius of the central differences: eps = radius / |v| (DARTS Eq. 8, LPT Eq. 17)")
    add("--gradient", choices=("difference", "exact"), default="difference",
        help="compute A's gradient by the papers' finite differences, or by exact differentiation "
             "(one process)")
    add("--subsets", type=number(float, 0, 1), nargs=2,
        help="shares of every class that train weights and A; random halves unless given, on "
             "ImageNet 0.1 0.025 (PC-DARTS §4.3)")
    add("--amp", choices=("off", "bf16", "bf16-all"), default="off",
        help="compute in bfloat16: bf16 in the passes that train weights, bf16-all in A's as well")
    run_arguments(parser, log_every=10)


def run_arguments(parser, log_every: int):
    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=number(int, 0), default=1,
        help="random seed; the papers run LPT and LeaSE with ten")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="device to compute on")
    add("--tf32", action=flag, default=False, help="let NVIDIA's matrix units round to TF32")
    add("--graphs", action=flag, default=False,
        help="replay each pass of a step as a CUDA graph: the same results, faster where launching "
             "kernels is the bottleneck; never run on a GPU so far")
    add("--deterministic", action=flag, default=False,
        help="use only algorithms that give the same bits every time, on a GPU too; slower")
    add("--out", type=path, help="run folder; a new one in runs/ unless given")
    add("--resume", action=flag, default=False,
        help="go on from the run folder's checkpoint, if there is one")
    add("--checkpoint-minutes", type=real, default=10,
        help="minutes between checkpoints within an epoch")
    add("--log-every", type=number(int, 1), default=log_every, help="steps between printed lines")
    add("--quick", action=flag, default=False,
        help="finish in a few minutes: synthetic images of 16 pixels, few cells, channels "
             "and epochs; a search takes high learning rates and order 1")


def search_recipe(chosen, own: dict) -> dict:
    """Return a base's defaults for chosen.dataset (IL has tasks), with a method's own."""
    recipe = BASES[chosen.base] | own
    if task_names(chosen) == ["imagenet"]:
        recipe = recipe | IMAGENET | IMAGENET_BASES.get(chosen.base, {})
    if chosen.quick:
        images = ({"tasks": ["synthetic:10", "synthetic:5"]} if hasattr(chosen, "tasks") else
                  {"dataset": "synthetic"})
        recipe = recipe | images | dict(
            image_size=16, channels=4 * min(2, recipe["partial"]), batch_size=50, order=1, lr=0.1,
            alpha_lr=0.1)
        if len(recipe["layers"]) > 1:
            recipe = recipe | dict(epochs=1, warm_up=0)
        else:
            recipe = recipe | dict(epochs=3, warm_up=min(1, recipe["warm_up"]), layers=[3])
    return recipe


def parse(parser, argv, method: str, recipe):
    """Return the parsed arguments and, with --resume, the checkpoint to go on from, or None.

    recipe(chosen) gives the defaults that depend on other arguments, from a first parsing, and
    settings that have no argument, as a base's partial; args.changed is what differs from the
    defaults. With --resume the defaults are the saved run's, and what is given beside it must
    agree. Raises BadInput.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**recipe(chosen))
    args = parser.parse_args(argv)
    args.changed = {k: v for k, v in identity(args).items() if v != parser.get_default(k)}
    args.out = args.out or Path("runs") / run_name(method, args)
    if not args.resume:
        return args, None
    if not (args.out / "checkpoint.pt").exists():
        print(f"no checkpoint in {args.out}: starting")
        return args, None
    checkpoint = read_checkpoint(args.out, method)
    parser.set_defaults(**checkpoint["args"], out=args.out)
    args = parser.parse_args(argv)
    for name, saved in checkpoint["args"].items():
        if without_place(vars(args)[name]) != without_place(saved):
            raise BadInput(f"--resume: the run in {args.out} has {name} = {saved!r}, not "
                           f"{vars(args)[name]!r}")
    return args, checkpoint


def parse_search(parser, argv, method: str, own):
    """Parse for a search. own(chosen): the method's defaults where they differ from the base's."""
    args, checkpoint = parse(parser, argv, method, lambda chosen: search_recipe(
        chosen, own(chosen)))
    if len(args.layers) != len(args.keep) + 1:
        raise BadInput(f"--layers: {args.base} has {len(args.keep) + 1} stages")
    if args.warm_up >= args.epochs:
        raise BadInput(f"--warm-up {args.warm_up}: A would learn in none of a stage's "
                       f"{args.epochs} epochs")
    if args.subsets and (sum(args.subsets) > 1 or not min(args.subsets) > 0):
        raise BadInput("--subsets: two shares above 0, together at most 1")
    if args.gradient == "exact" and (args.amp == "bf16-all" or "RANK" in os.environ):
        raise BadInput("--gradient exact: needs one process, and not --amp bf16-all")
    return args, checkpoint


def task_names(args) -> list[str]:
    return getattr(args, "tasks", None) or [args.dataset]


def without_place(value):
    """Return an argument with folder:DIR as folder, in a list too: a folder may have moved, and
    Run compares its images."""
    if isinstance(value, list):
        return [without_place(each) for each in value]
    return "folder" if str(value).startswith("folder:") else value


def run_name(method: str, args) -> str:
    """Return the default name of a run's folder: the method, its base or its cell, its data, what
    else differs from the defaults, the seed."""
    rest = {k: v for k, v in args.changed.items()
            if k not in ("base", "arch", "dataset", "tasks", "seed", "quick")}
    words = [method, args.changed.get("base"), args.changed.get("arch"), *task_names(args),
             *(v if isinstance(v, str) else k if v is True else f"{k}{v}"
               for k, v in rest.items()), str(args.seed)]
    name = "-".join(word.removesuffix("/genotype.json").rstrip("/").split("/")[-1]
                    for word in words if word)
    return re.sub(r"[^\w.+-]", "", name)[:200]


# -------------------------------------------------------------------------------------------- run
# A run's process group, folder and place in its schedule; it knows no architecture. The tests kill
# runs at random times and compare every bit of what they end with.


def start(args) -> torch.device:
    """Return the device to compute on. Under torchrun join the other processes, of which rank 0
    alone prints and writes. Raises BadInput."""
    name = args.device
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if args.graphs:
        refuse_graphs(args, device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if "RANK" not in os.environ:                                  # torchrun sets it
        return device
    if name == "cuda":
        device = torch.device(name, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if name == "cuda" else "gloo",
                            timeout=timedelta(hours=1))           # CIFAR may be downloaded
    if rank():
        sys.stdout = open(os.devnull, "w")
    return device


def claim(folder: Path):
    """Create a run's folder and return a lock on it, which the system drops when this process ends.
    Raises BadInput if another run holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        if fcntl:                                                 # not on Windows
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(f"{folder}: another run is using this folder") from None
    except OSError:                                               # a file system without locks
        pass
    return lock


def write(path: Path, content: str | bytes):
    """Replace a file whole, or not at all. Of several processes only rank 0 writes."""
    if rank():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(folder: Path, method: str) -> dict:
    """Return the checkpoint of a script's run folder. Its checksums are compared, and nothing but
    weights and plain values is read. Raises BadInput."""
    path = folder / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:                    # torch.save makes one
            if archive.testzip() or any(each.external_attr for each in archive.infolist()):
                raise zipfile.BadZipFile("a checksum or an attribute is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"there is no {path}") from None
    except Exception as error:                                    # whatever a damaged file raises
        raise BadInput(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise BadInput(f"{path} is of another version of this code")
    if content["method"] != method:
        raise BadInput(f"{folder} is a run of {content['method']}.py, not of {method}.py")
    return content


VERSION = 4             # of what a checkpoint holds


class Run:
    """A run's folder and its place in the schedule: all that --resume needs beside the learners.

    about: what the run is, as plain values, its row in the tables among them (run.json).
    state: the stage; the next step of the run; the sums of the current epoch's figures and the
    seconds spent on it; one line per finished epoch; why the run ended early, or None.
    more: further plain values to save in the checkpoint.
    """

    def __init__(self, method: str, args, checkpoint: dict | None, sets: list, row: str = "",
                 more: dict | None = None):
        self.args, self.checkpoint, self.more = args, checkpoint, more or {}
        stages = len(args.layers) if isinstance(args.layers, list) else 1
        self.about = {"version": VERSION, "method": method, "row": row, "args": identity(args),
                      "epochs": stages * args.epochs, "data": [data.fingerprint() for data in sets],
                      "sources": [data.source for data in sets], "world_size": world_size(),
                      "folders": [data.folder for data in sets]}
        self.state = dict(stage=0, step=0, sums={}, seconds=0.0, history=[], stopped=None)
        if checkpoint:
            for name in ("data", "world_size"):
                if checkpoint[name] != self.about[name]:
                    raise BadInput(f"--resume: the run in {args.out} has another {name}")
            self.state = checkpoint["run"]
        if rank():
            return
        self.lock = claim(args.out)
        begun = any(each.name not in (".lock", "run.json") and each.suffix != ".tmp"
                    for each in args.out.iterdir())               # run.json: killed as it began
        if begun and not checkpoint:
            raise BadInput(f"{args.out} is not empty: give another --out, or --resume to go on "
                           "from its checkpoint")

    def load(self, parts: dict):
        """Take the learners and optimizers of a stage; a checkpoint's states go into them."""
        self.parts = parts
        if self.checkpoint:
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint["parts"][name])
            self.checkpoint = None
        elif not self.state["step"]:                              # so that --resume always can
            write(self.args.out / "run.json", json.dumps(self.about, indent=1) + "\n")
            self.save()

    def save(self):
        """Write checkpoint.pt."""
        content, parts = io.BytesIO(), {k: part.state_dict() for k, part in self.parts.items()}
        torch.save({**self.about, **self.more, "run": self.state, "parts": parts}, content)
        write(self.args.out / "checkpoint.pt", content.getvalue())
        self.saved = time.monotonic()

    def epochs(self, epoch_steps: int):
        """Yield the epochs that are left of the present stage; after each the run is saved."""
        args, state, self.epoch_steps, self.done = self.args, self.state, epoch_steps, 0
        self.begin = self.saved = time.monotonic()
        end = (state["stage"] + 1) * args.epochs * epoch_steps
        while state["step"] < end and not state["stopped"]:
            yield state["step"] // epoch_steps - state["stage"] * args.epochs
            self.save()

    def steps(self, learners):
        """Yield the steps of the run that are left of the present epoch. Within it the run is saved
        every --checkpoint-minutes; what is drawn in a step is a function of (seed, step, rank).
        The learners' recordings (graphed) are dropped, as an epoch changes numbers in them."""
        state, lap, learners.recordings = self.state, time.monotonic(), {}
        end = (state["step"] // self.epoch_steps + 1) * self.epoch_steps
        while state["step"] < end:
            seed_all("step", self.args.seed, state["step"], rank())
            yield state["step"]
            state["step"] += 1
            now = time.monotonic()
            state["seconds"] += now - lap
            lap = now
            if state["step"] < end and now - self.saved > 60 * self.args.checkpoint_minutes:
                self.save()                                       # epochs saves its last step

    def log_step(self, **figures: Tensor):
        """Add a step's figures to the epoch's sums and print them now and then."""
        state, i = self.state, self.state["step"] % self.epoch_steps + 1
        values = torch.stack([value.detach().float() for value in figures.values()])
        if world_size() > 1:
            values = all_sum([values], 1 / world_size())[0]
        values, self.done = values.tolist(), self.done + 1
        for name, value in zip(figures, values):
            state["sums"][name] = state["sums"].get(name, 0.0) + value
        if i % self.args.log_every == 0 or i == self.epoch_steps:
            spent = (time.monotonic() - self.begin) / self.done   # seconds a step
            left = self.about["epochs"] * self.epoch_steps - state["step"] - 1
            words = "  ".join(f"{name.replace('_', ' ')} {value:.3f}"
                              for name, value in zip(figures, values))
            print(f"epoch {state['step'] // self.epoch_steps + 1}/{self.about['epochs']} "
                  f"step {i}/{self.epoch_steps}  {words}  "
                  f"{self.args.batch_size / spent:.1f} images/s  "
                  f"left {timedelta(seconds=round(spent * left))}", flush=True)

    def log_epoch(self, figures: dict | None = None, more: dict | None = None) -> list[dict]:
        """Write an epoch's line to the log: the means of its steps, figures, and more that is not
        printed. Returns the lines so far. The checkpoint comes after it, so that an interruption
        repeats what is done here."""
        state = self.state
        line = {"epoch": len(state["history"]) + 1}
        line |= {name: value / self.epoch_steps for name, value in state["sums"].items()}
        line |= figures or {}
        line["seconds"] = state["seconds"]                        # of its steps
        print(" ".join(f"{k} {v:.4g}" for k, v in line.items()), flush=True)
        if state["stopped"]:
            line["stopped"] = state["stopped"]
            print("the search ends here:", state["stopped"])
        line |= more or {}
        state |= dict(sums={}, seconds=0.0, history=[*state["history"], line])
        write(self.args.out / "log.jsonl", "".join(json.dumps(each) + "\n" for each in
                                                   state["history"]))
        return state["history"]

    def picture(self, name: str, rows: dict, size: int = 96):
        """Write NAME.png; rows, size: draw_pictures'."""
        content = io.BytesIO()
        draw_pictures(rows, size).save(content, "PNG")
        write(self.args.out / f"{name}.png", content.getvalue())


def run(main, argv=None):
    """Run main(argv). Bad input ends in one line and exit code 2, a gradient that is not finite and
    what the system refuses in one line and exit code 1, Ctrl-C in 130."""
    try:
        main(argv)
    except (KeyboardInterrupt, BadInput, NotFinite, OSError) as error:
        message = str(error) or "interrupted; --resume goes on from the last checkpoint"
        sys.stderr.write(f"error: {' '.join(message.split())}\n")
        sys.exit({KeyboardInterrupt: 130, BadInput: 2}.get(type(error), 1))
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------- the images
# Data sets, their augmentation and their mini-batches. A batch is a pure function of (seed, stream,
# step): --resume relies on it.

LARGE = 96              # images of this many pixels a side are treated as ImageNet's are
ZOOM = 256 / 224        # ImageNet's test images: resized to 256 pixels, of which 224 are cropped
STATISTICS = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]         # ImageNet's: means, deviations


class Request(NamedTuple):
    """Images to be read together."""
    rows: np.ndarray
    seeds: np.ndarray | None = None     # of their augmentation; None: as they are
    flip: bool = True                   # whether half of them are mirrored
    cutout: int = 0                     # side of the square cut out, in pixels


def normalised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return images x (N, 3, H, W) uint8 as a network sees them, float32."""
    x = (x.float() / 255 - mean.to(x.device)) / std.to(x.device)
    return x.contiguous(memory_format=memory_format(x.device))


@dataclass(eq=False)
class Images(Dataset):
    """Labelled images, in memory or in files that are read when they are asked for."""
    images: Tensor | list[str]          # (n, 3, H, W) uint8, or files
    labels: Tensor                      # (n,) int64; both are on the CPU
    classes: list[str]
    size: tuple[int, int]               # (H, W)
    mean: Tensor                        # (3, 1, 1), in units of 0 to 1
    std: Tensor
    device: torch.device                # where the batches go
    source: str                         # what they were read from, whatever their size here
    workers: int | None = None          # processes that read for each stream; None: 0 or 4
    folder: str = ""                    # the absolute path of the data set, if it is a folder

    def __post_init__(self):
        if self.workers is None:
            self.workers = 0 if torch.is_tensor(self.images) and self.device.type == "cpu" else 4

    @property
    def large(self) -> bool:
        """Return whether these images are treated as ImageNet's: the stem, the augmentation."""
        return min(self.size) >= LARGE

    @property
    def zoom(self) -> float:
        """Return how much larger than size an image is resized before its centre is cropped."""
        return 1.0 if torch.is_tensor(self.images) else ZOOM

    def read(self, requests):
        """Yield each request's x (N, 3, H, W) as a network sees it, y (N,), rows (N,)."""
        # numpy goes through a pipe; torch would send its tensors through /dev/shm, which is too
        # small for a batch in many containers
        loader = DataLoader(self, batch_size=None, sampler=requests, collate_fn=as_it_is,
                            num_workers=self.workers, generator=torch.Generator(),
                            worker_init_fn=end_with_the_run)
        try:
            for x, rows in loader:
                x, rows = torch.from_numpy(x), torch.from_numpy(rows)
                x = x.pin_memory() if self.device.type == "cuda" else x
                x = normalised(x.to(self.device, non_blocking=True), self.mean, self.std)
                yield x, self.labels[rows].to(self.device), rows.to(self.device)
        except BadInput as error:                                 # torch adds the process's lines
            raise BadInput(str(error).splitlines()[-1]) from None

    def __getitem__(self, request: Request):
        """Return the images of a request, (N, 3, H, W) uint8, and their rows."""
        if request.seeds is None:
            return self.pixels(request.rows).numpy(), request.rows
        state = torch.get_rng_state()
        found = [self.augmented(row, int(seed), request.flip, request.cutout)
                 for row, seed in zip(request.rows, request.seeds)]
        torch.set_rng_state(state)                                # from which v2 draws
        return torch.stack(found).numpy(), request.rows

    def pixels(self, rows) -> Tensor:
        """Return images as they are, (N, 3, H, W) uint8; of those in files the centre."""
        if torch.is_tensor(self.images):
            return self.images[rows]
        return torch.stack([v2.functional.pil_to_tensor(
            centre(read_image(self.images[row]), self.size, self.zoom)) for row in rows])

    def augmented(self, row: int, seed: int, flip: bool, cutout: int) -> Tensor:
        """Return an image as it is trained on. A small one is cropped out of its zero-padded self
        (by 1/8: 4 pixels at 32) and mirrored half of the time; a large one is cropped at a random
        size, mirrored, and its colours are jittered. cutout: of either a square is erased."""
        rng, (H, W) = np.random.default_rng(seed), self.size
        if self.large:
            torch.default_generator.manual_seed(seed)
            image = (v2.functional.to_pil_image(self.images[row]) if torch.is_tensor(self.images)
                     else read_image(self.images[row]))
            change = v2.Compose([
                v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip(0.5 * flip),
                v2.ColorJitter(0.4, 0.4, 0.4, 0.2)])
            image = v2.functional.pil_to_tensor(change(image))
        else:
            pad, mirror = H // 8, rng.random() < 0.5 * flip
            y, x = rng.integers(2 * pad + 1, size=2)
            image = F.pad(self.images[row], (pad,) * 4)[:, y:y + H, x:x + W]
            image = image.flip(2) if mirror else image
        if cutout:
            y, x = rng.integers((H, W)) - cutout // 2
            image[:, max(0, y):max(0, y + cutout), max(0, x):max(0, x + cutout)] = self.mean * 255
        return image

    def fingerprint(self) -> str:
        """Return a hash of the images as they are here: those in memory whole; of those in files
        the names and lengths (source) and 16 of them."""
        some = slice(None) if torch.is_tensor(self.images) else evenly(len(self.labels), 16)
        digest = hashlib.sha256(repr((self.source, self.size, self.classes)).encode())
        for tensor in (self.labels, self.pixels(some)):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:16]


def end_with_the_run(worker: int):
    """Let a reading process end when the run that started it has been killed. It would wait for
    ever to send its batch, and keep a pipeline waiting too."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def evenly(n: int, count: int) -> np.ndarray:
    """Return `count` numbers from 0 to n - 1, evenly spread."""
    return np.linspace(0, n - 1, count).astype(int)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB of 8 bits: upright; transparent parts on white; 16 bits divided by
    257; floats from 0 to 1 times 255. Raises ValueError for other deep images, whose white is not
    known."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image).astype(np.float64)
        low, high, white = pixels.min(), pixels.max(), 1 if image.mode == "F" else 65535
        if not 0 <= low <= high <= white:
            raise ValueError(f"its values run from {low:g} to {high:g}, where 0 to {white} are "
                             "expected; save it with 8 or 16 bits")
        image = Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre(image: Image.Image, size: tuple[int, int], zoom: float = 1.0) -> Image.Image:
    """Return the centre (H, W) of an image whose shorter side is resized to zoom times theirs."""
    if (image.height, image.width) == tuple(size) and zoom == 1:
        return image
    image = v2.functional.resize(image, [round(zoom * min(size))])
    return v2.functional.center_crop(image, list(size))


@contextlib.contextmanager
def opened(file: str):
    """Open the image in a file. Raises BadInput, which names the file, for whatever goes wrong with
    the image meanwhile."""
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:                                    # Pillow's decoders raise any
        raise BadInput(f"cannot read the image {file}: {error}") from None


def read_image(file: str) -> Image.Image:
    """Return the image in a file as RGB. Raises BadInput."""
    with opened(file) as image:
        return as_rgb(image)


def in_memory(images: Tensor, labels, classes, device, source, workers=None) -> Images:
    """Return images in memory, with the channel statistics of their own."""
    return Images(images, torch.as_tensor(labels).long(), classes, tuple(images.shape[2:]),
                  *statistics(images), torch.device(device), source, workers)


def statistics(images: Tensor) -> list[Tensor]:
    """Return the channels' means and standard deviations of images (n, 3, H, W) uint8, in units of
    0 to 1, (3, 1, 1) each."""
    sums = [(x.double().sum((0, 2, 3)), x.double().square().sum((0, 2, 3)))
            for x in images.split(256)]
    pixels = images[:, 0].numel()
    mean = sum(s for s, _ in sums) / pixels
    std = (sum(q for _, q in sums) / pixels - mean ** 2).clamp_min(0).sqrt().clamp_min(1)
    return [(s / 255).float().view(3, 1, 1) for s in (mean, std)]


def load_images(dataset: str, args, device, like: Images | None = None) -> Images:
    """Return the training images of a data set or, if those are given as `like`, its test images.

    dataset: cifar10, cifar100, folder or folder:DIR, imagenet (a folder, --data), synthetic or
    synthetic:CLASSES. args: data, image_size, hold_out and workers. Raises BadInput where they
    cannot be had.
    """
    name, _, option = dataset.partition(":")
    if name == "synthetic":
        images = synthetic(int(option or 10), args.image_size or 32, device, like is not None)
    elif name.startswith("cifar"):
        images = load_cifar(dataset, args, device, like is not None)
    else:
        images = load_folder(path(option or args.data), args, device, like)
    if like and images.size != like.size:
        raise BadInput("the test images are {} x {} pixels, the training images {} x {}: give "
                       "--image-size".format(*images.size, *like.size))
    if like:
        images.mean, images.std = like.mean, like.std
    elif args.hold_out and torch.is_tensor(images.images):        # of those that are learned from
        *halves, _ = split_rows(images.labels, 0, args.hold_out)
        images.mean, images.std = statistics(images.images[np.concatenate(halves)])
    return images


SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}   # no classes


class Folder(torchvision.datasets.ImageFolder):
    """An ImageFolder of every format that Pillow reads, without hidden files and folders."""

    def __init__(self, root):
        known = Image.registered_extensions()
        super().__init__(root, is_valid_file=lambda file: Path(file).suffix.lower() in known
                         and f"{os.sep}." not in file.removeprefix(str(root)))

    def find_classes(self, directory):
        names = class_names(directory)
        if len(names) < 2:
            raise FileNotFoundError(f"it has {len(names)} class folders, and two are needed")
        return names, {name: i for i, name in enumerate(names)}


def class_names(folder) -> list[str]:
    """Return the names of the visible subfolders of a folder."""
    return sorted(each.name for each in os.scandir(folder)
                  if each.is_dir() and not each.name.startswith("."))


def load_folder(root: Path, args, device, like: Images | None) -> Images:
    """Return the images in root/train/CLASS, or without such a folder in root/CLASS; if `like` is
    given, those in root/test or root/val, whichever has its classes. Large ones stay in files."""
    where = root / "train" if (root / "train").is_dir() else root
    try:
        folder = None if like else Folder(where)
        classes = (like or folder).classes
        if where == root and {name.lower() for name in classes} & SPLITS:
            raise BadInput(f"{root} has the folders {', '.join(classes)}: name them train and test")
        test = [each for each in (root / "test", root / "val")
                if where != root and each.is_dir() and class_names(each) == classes]
        if not test and not args.hold_out:
            raise BadInput(f"no test images: neither {root / 'test'} nor {root / 'val'} has the "
                           f"classes of {where}; --hold-out N, given to the search and to "
                           "evaluate.py, tests on N images that neither learns from")
        folder = Folder(test[0]) if like else folder
        files, labels = zip(*folder.samples)
        size = (args.image_size,) * 2 if args.image_size else common_size(files)
        known = [(os.path.basename(file), os.path.getsize(file)) for file in files]
        source = hashlib.sha256(repr((folder.classes, labels, known)).encode()).hexdigest()[:16]
    except OSError as error:
        raise BadInput(f"no images in {where}: {error}; {root} must hold train/ and test/ or val/, "
                       "each with a folder of images per class, or such folders") from None
    if min(size) >= LARGE:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
        images = Images(list(files), torch.tensor(labels), folder.classes, size, mean, std,
                        torch.device(device), source, args.workers)
    else:
        pixels = torch.empty(len(files), 3, *size, dtype=torch.uint8)
        for row, file in enumerate(files):
            pixels[row] = v2.functional.pil_to_tensor(centre(read_image(file), size))
        images = in_memory(pixels, labels, folder.classes, device, source, args.workers)
    images.folder = str(root.resolve())
    largest = images.pixels(evenly(len(files), 16)).max()
    if largest < 32:
        raise BadInput(f"the images in {where} are nearly black: their largest value is {largest} "
                       "of 255. 16-bit files must use the whole range up to 65535")
    return images


def common_size(files) -> tuple[int, int]:
    """Return the (H, W) that all images in files have. Raises BadInput if they have several."""
    sizes = {}
    for file in files:
        with opened(file) as image:
            turned = image.getexif().get(0x112, 1) >= 5           # as as_rgb will turn it
            sizes.setdefault(image.size[::-1] if turned else image.size, file)
        if len(sizes) > 1:
            (first, a), (second, b) = sizes.items()
            raise BadInput("{} is {} x {} pixels and {} {} x {}: give --image-size".format(
                a, *first, b, *second))
    (width, height), = sizes
    return height, width


def load_cifar(dataset: str, args, device, test: bool) -> Images:
    """Return CIFAR from --data, downloaded to it by one process, its checksums compared."""
    source = getattr(torchvision.datasets, dataset.upper())
    try:
        for turn in (True, False):                                # rank 0 first, then the others
            if turn == (rank() == 0):
                cifar = source(args.data, train=not test, download=True)
            if world_size() > 1:
                dist.barrier()
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise BadInput(f"{dataset} is not in {args.data} and cannot be downloaded ({error}): put "
                       f"{source.filename} there, or use --dataset folder --data DIR") from None
    size = (args.image_size or 32,) * 2
    images = torch.stack([v2.functional.pil_to_tensor(centre(Image.fromarray(pixels), size))
                          for pixels in cifar.data])
    return in_memory(images, cifar.targets, cifar.classes, device, dataset, args.workers)


def synthetic(num_classes: int, image_size: int, device, test: bool = False) -> Images:
    """Return small procedural images that a network can learn: a class is a colour and a shape, on
    noise of another colour. 4% of the training labels are wrong on purpose, none of the test's."""
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
    return in_memory(torch.from_numpy(pixels), labels, names, device,
                     f"synthetic:{num_classes} of {image_size} pixels")


def split_rows(labels, seed: int, hold_out: int = 0, subsets=None):
    """Return the rows of the training half, the validation half and the held-out images: a random
    partition. The held-out ones are the same for every seed, so that another script can test on
    them. subsets: instead of halves, these two shares of every class (PC-DARTS §4.3)."""
    order = np.random.default_rng(0).permutation(len(labels))
    held, rest = np.sort(order[:hold_out]), np.sort(order[hold_out:])
    rest = np.random.default_rng([seed, 0]).permutation(rest)
    if not subsets:
        return rest[:len(rest) // 2], rest[len(rest) // 2:], held
    halves, labels = ([], []), np.asarray(labels)
    for k in range(labels.max() + 1):
        rows = rest[labels[rest] == k]
        a, b = (max(1, round(share * len(rows))) for share in subsets)
        halves[0].append(rows[:a])
        halves[1].append(rows[a:a + b])
    return *map(np.concatenate, halves), held


class Stream:
    """Endless mini-batches of some rows of the images, shuffled without replacement and augmented.

    stream(step) is a pure function of (seed, name, step): x (N, 3, H, W), y (N,), rows (N,); of
    several processes each has its own part of the batch. Raises BadInput.
    """

    def __init__(self, data, rows, batch_size: int, seed: int, name: str, flip=True, cutout=0):
        n = batch_size // world_size()
        if n < 2 or batch_size % world_size() or batch_size > len(rows):
            raise BadInput(f"--batch-size {batch_size}: give each of {world_size()} processes two "
                           f"images or more, and at most the {len(rows)} to train on in all")
        self.rows, self.batch_size = rows, batch_size
        self.key, self.options = (seed, zlib.crc32(name.encode())), (flip, cutout)
        self.part = slice(rank() * n, (rank() + 1) * n)
        self.data, self.next = data, -1

    def epoch_steps(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __call__(self, step: int):
        if step != self.next:                                     # the first, or not in order
            self.batches = self.data.read(self.requests(step))
        self.next = step + 1
        return next(self.batches)

    def requests(self, step: int):
        """Yield the requests from a step on; each lap over the rows has its own order."""
        size, n = self.batch_size, len(self.rows)
        order = functools.lru_cache(1)(
            lambda lap: np.random.default_rng([*self.key, 0, lap]).permutation(self.rows))
        for now in itertools.count(step):
            picked = [order(i // n)[i % n] for i in range(now * size, (now + 1) * size)]
            seeds = np.random.default_rng([*self.key, 1, now]).integers(2 ** 63, size=size)
            yield Request(np.array(picked)[self.part], seeds[self.part], *self.options)


def batches(data, rows, batch_size: int):
    """Yield x, y of each image of `rows` once, in order and as it is."""
    # the last image alone joins the batch before it: BatchNorm in training refuses one
    parts = np.split(np.asarray(rows), range(batch_size, len(rows) - 1, batch_size))
    for x, y, _ in data.read(Request(part) for part in parts if len(part)):
        yield x, y


@torch.no_grad()
def hits(predict, data, rows, batch_size: int, top=(1,)) -> Tensor:
    """Return how many images of each class have their label among the k largest logits of
    predict(x), for each k in top: (classes, len(top)), on the CPU."""
    found = torch.zeros(len(data.classes), len(top), device=data.device)
    for x, y in batches(data, np.asarray(rows)[rank()::world_size()], batch_size):
        best = predict(x).topk(min(max(top), len(data.classes)), 1).indices == y[:, None]
        found.index_add_(0, y, torch.stack([best[:, :k].sum(1).float() for k in top], 1))
    return (all_sum([found])[0] if world_size() > 1 else found).cpu()


def accuracy(predict, data, rows, batch_size: int) -> float:
    """Return the share of images `rows` that predict(x) gets right."""
    return hits(predict, data, rows, batch_size).sum().item() / len(rows)


def draw_pictures(rows: dict, size: int) -> Image.Image:
    """Return a picture of rows of images, `size` pixels each, under their titles and over their
    captions.

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
            canvas.paste(image.resize((size, size), Image.Resampling.BOX), (x, y + 24))
            draw.text((x, y + 27 + size), caption, "black", ImageFont.load_default(13))
        y += height
    return canvas


# ------------------------------------------------------------------------------------------ bases
# The base searches as data, and what they do in a search: its stages, what changes from epoch to
# epoch, when it ends. A new base is a line in BASES; its settings per epoch go into set_epoch, its
# end into end_epoch, its weights and its penalty into Architecture.

# title: its name in the papers' tables. layers and skip_dropout have an entry per stage, keep (how
# many candidates of an edge go on) one per stage but the first. Weights and A start anew in each
# stage, and epochs and warm_up count within it.
DARTS = dict(title="DARTS-1st", order=1, layers=[8], epochs=50, batch_size=64, lr=0.025,
             lr_min=0.001, alpha_lr=3e-4, warm_up=0, keep=[], skip_dropout=[0.0], max_skips=8,
             stop_at_skips=0, partial=1, auxiliary_skip=False)
BASES = {
    "darts-1st": DARTS,                                           # arXiv 1806.09055, §A.1
    "darts-2nd": DARTS | dict(title="DARTS-2nd", order=2),
    "darts-": DARTS | dict(title="DARTS-", auxiliary_skip=True),  # arXiv 2009.01027
    "darts+": DARTS | dict(title="DARTS+", stop_at_skips=2),      # arXiv 1909.06035
    "pcdarts": DARTS | dict(title="PC-DARTS", batch_size=256, lr=0.1, lr_min=0.0, alpha_lr=6e-4,
                            warm_up=15, partial=4),               # arXiv 1907.05737
    "pdarts": DARTS | dict(title="P-DARTS", layers=[5, 11, 17], epochs=25, batch_size=96,
                           lr_min=0.0, alpha_lr=6e-4, warm_up=10, keep=[5, 3],
                           skip_dropout=[0.1, 0.4, 0.7], max_skips=2),    # arXiv 1904.12760
}
IMAGENET = dict(image_size=224, subsets=[0.1, 0.025])
IMAGENET_BASES = {"pcdarts": dict(batch_size=1024, lr=0.5, alpha_lr=6e-3, warm_up=35)}


def row(name: str, args, *in_name: str) -> str:
    """Return a search's row in the tables: its name, and what else differs from the defaults.
    in_name: the arguments that the name tells."""
    return ", ".join([name, *settings(
        args.changed, *in_name, "base", "dataset", "tasks", "seed")])


def settings(changed: dict, *but: str) -> list[str]:
    """Return changed arguments as text, each like its flag without the dashes."""
    flags = {k: k.replace("lam", "lambda").replace("_", "-") for k in sorted(changed)
             if k not in but}
    return [flag if changed[k] is True else f"no-{flag}" if changed[k] is False else
            f"{flag} {changed[k]}" for k, flag in flags.items()]


def stages(run):
    """Yield the stages that are left of a search; end_stage ends each."""
    while run.state["stage"] < len(run.args.layers) and not run.state["stopped"]:
        yield run.state["stage"]


def end_stage(run, A):
    """Go on to the next stage, if there is one, with A's strongest candidates (P-DARTS §3.2)."""
    run.state["stage"] += 1
    if run.state["stage"] < len(run.args.layers):
        run.state["kept"] = A.prune(run.args.keep[run.state["stage"] - 1])


def new_architecture(run, device):
    """Return A, with which a stage starts, and its Adam; a function of (seed, stage)."""
    args, kept = run.args, run.state.get("kept", ALL)
    seed_all("architecture", args.seed, run.state["stage"])
    A = Architecture(kept, args.partial, args.max_skips).to(device)
    return A, torch.optim.Adam(A.parameters(), args.alpha_lr, (0.5, 0.999),
                               weight_decay=args.alpha_weight_decay)


def new_networks(run, sets: list[Images], device):
    """Return the supernets with which a stage starts, one for each data set of `sets`, and their
    SGDs; a function of (seed, stage)."""
    args, stage, kept = run.args, run.state["stage"], run.state.get("kept", ALL)
    seed_all("networks", args.seed, stage)
    nets = [place(Supernet(args.channels, len(data.classes), args.layers[stage], kept, args.partial,
                           args.auxiliary_skip, data.large), device) for data in sets]
    return nets, [torch.optim.SGD(net.parameters(), args.lr, args.momentum,
                                  weight_decay=args.weight_decay) for net in nets]


def cosine(start: float, end: float, epoch: int, epochs: int) -> float:
    """Return the learning rate of an epoch, annealed from start towards end (SGDR, Eq. 5)."""
    return end + (start - end) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def set_epoch(args, stage: int, epoch: int, A, nets, opts, other_opt=None, other_lr=0.0):
    """Set what changes from epoch to epoch of a stage: the learning rates, DARTS-'s auxiliary skip,
    P-DARTS' skip dropout.

    other_opt: of a learner that has no stages (LPT's tester, LeaSE's audience); its rate falls from
    other_lr to 0 over all of them.
    """
    A.epoch, last = epoch, args.epochs - 1
    falling = (math.exp(-0.2 * (epoch - args.warm_up)) if learns(args, epoch) else   # P-DARTS' code
               (args.epochs - epoch - 1) / args.epochs)
    for net, opt in zip(nets, opts):
        opt.param_groups[0]["lr"] = cosine(args.lr, args.lr_min, epoch, args.epochs)
        net.knobs.skip_dropout = args.skip_dropout[stage] * falling
        net.knobs.auxiliary = args.auxiliary_skip * (1 - epoch / last if args.epochs > 1 else 0)
    if other_opt:
        other_opt.param_groups[0]["lr"] = cosine(other_lr, 0, stage * args.epochs + epoch,
                                                 len(args.layers) * args.epochs)


def learns(args, epoch: int) -> bool:
    """Return whether A learns in an epoch of a stage."""
    return epoch >= args.warm_up


def end_epoch(run, A, **figures: float):
    """Write what an epoch of a search leaves behind: its line in the log, the cell and drawings.
    Ends the search if its cell has too many skip connections (DARTS+)."""
    args, cell, (report, weights) = run.args, A.cell(), A.report()
    if learns(args, A.epoch) and 0 < args.stop_at_skips <= report["skip_connections"]:
        run.state["stopped"] = f"the normal cell has {report['skip_connections']} skip connections"
    title = f"{args.out.name}, epoch {len(run.state['history']) + 1}"
    write(args.out / "genotype.json", to_json(cell))              # before the log tells its epoch
    write(args.out / "cells.svg", to_svg(cell, title))
    history = run.log_epoch(report | figures, {"mean_weights": weights, "genotype": cell._asdict()})
    write(args.out / "search.svg", search_svg(history, title))


def print_next(args):
    """Print where a search's cell is, and the commands that evaluate it."""
    print(f"The cell is in {args.out}/genotype.json, drawn in cells.svg. Train it:")
    for dataset in task_names(args):
        words = ["--arch", f"{args.out}/genotype.json", "--dataset", dataset]
        if dataset in ("cifar10", "cifar100", "folder", "imagenet"):  # the others name their place
            words += ["--data", args.data]
        words += ["--image-size", args.image_size] if args.image_size else []
        words += ["--hold-out", args.hold_out] if args.hold_out else []
        words += ["--no-flip"] * (not args.flip) + ["--quick"] * args.quick
        print("python evaluate.py", shlex.join(map(str, words)))


# -------------------------------------------------------------------------------------- processes
# Several processes stay one search only if whatever they must agree on goes through all_sum.


def mixed_seed(purpose: str, *keys: int) -> int:
    """Return a 64-bit seed, another one for every purpose and for other numbers."""
    keys = zlib.crc32(purpose.encode()), len(keys), *keys         # it drops zeros at the end
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]) >> 1


def seed_all(purpose: str, *keys: int):
    """Set torch's generators as a pure function of the arguments, each GPU's to another state: the
    replicas of DataParallel must not drop the same paths."""
    torch.manual_seed(mixed_seed(purpose, *keys))
    for i, generator in enumerate(torch.cuda.default_generators):
        generator.manual_seed(mixed_seed(f"{purpose}, GPU {i}", *keys))


@contextlib.contextmanager
def evaluating(*modules: nn.Module):
    """Put modules in evaluation mode, with rank 0's BatchNorm statistics in all processes."""
    for module in modules:
        module.eval()
        statistics = [b for b in module.buffers() if b.is_floating_point()]
        if world_size() > 1 and statistics:
            sums = all_sum([torch.zeros_like(b) if rank() else b for b in statistics])
            torch._foreach_copy_(statistics, sums)
    try:
        yield
    finally:
        for module in modules:
            module.train()


def autocast(device, on: bool):
    """Compute in bfloat16 where torch finds it safe. Nothing is cached between passes, as they are
    made at several weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False)


# ------------------------------------------------------------------------------------ CUDA graphs
# A step launches thousands of small kernels, and a GPU waits for each. With --graphs a pass's
# kernels are recorded once an epoch and replayed together.


def graphed(function):
    """Run function(m, batches, args, ...), a pass of the learners m, as a CUDA graph if args.graphs
    is set.

    A replay repeats the recorded kernels, with the numbers that they were given, in the memory that
    they used. Such numbers, as learning rates, change between epochs, and momenta exist after the
    first step: so in each epoch (Run.steps drops m.recordings) a pass runs as it is, is recorded at
    its second call and replayed from then on. Tensors among the arguments are copied into those of
    the recording; whatever m holds must stay where it is. Each call overwrites the result of the
    one before.
    """
    @functools.wraps(function)
    def call(m, batches, args, *more):
        if not args.graphs:
            return function(m, batches, args, *more)
        given = [t for t in tree_leaves((batches, more)) if torch.is_tensor(t)]
        key = function, *(t.shape for t in given)
        if key not in m.recordings:
            m.recordings[key] = None
            return function(m, batches, args, *more)
        if m.recordings[key] is None:
            graph = torch.cuda.CUDAGraph()
            pool = next((made[0].pool() for made in m.recordings.values() if made), None)
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                m.recordings[key] = graph, given, function(m, batches, args, *more)
        graph, recorded, result = m.recordings[key]
        with torch.no_grad():
            for old, new in zip(recorded, given):
                if old is not new:
                    old.copy_(new)
        graph.replay()
        return result
    return call


def refuse_graphs(args, device):
    """Raise BadInput where --graphs does not work."""
    for fits, why in (
            (device.type == "cuda", "needs a CUDA GPU"),
            ("RANK" not in os.environ, "needs one process"),
            (hasattr(args, "base") or torch.cuda.device_count() == 1,
             "evaluate.py needs exactly one visible GPU, e.g. CUDA_VISIBLE_DEVICES=0"),
            (getattr(args, "gradient", "") != "exact", "not with --gradient exact"),
            (not any(getattr(args, "skip_dropout", ())), "not with --base pdarts, whose skip "
             "dropout draws the same numbers in every pass")):
        if not fits:
            raise BadInput(f"--graphs: {why}")
