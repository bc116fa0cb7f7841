"""Tests: every gradient, network and file against an oracle, then small runs from end to end.

    python -m pytest -q test_smoke.py               # every kind of check once
    RUN_SLOW=1 python -m pytest -q test_smoke.py    # all of them

.ci/measure.py measures with the same oracles.
"""

import argparse
import contextlib
import copy
import errno
import functools
import gc
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
import xml.etree.ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

import darts_ops as ops
import evaluate
import genotypes
import il
import lease
import lpt

HERE = Path(__file__).resolve().parent
slow = pytest.mark.skipif(not os.environ.get("RUN_SLOW"), reason="RUN_SLOW=1 runs it")


def slow_but(always, cases):
    """Mark the cases slow, but for those whose numbers are in `always`."""
    return [case if i in always else
            pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=slow)
            for i, case in enumerate(cases)]


def relative_error(a, b):
    a, b = (torch.cat([t.flatten() for t in part]) for part in (a, b))
    return ((a - b).norm() / b.norm()).item()


def difference(a, b):
    return [x - y for x, y in zip(a, b)]


def cosine(a, b):
    a, b = (torch.cat([t.flatten().double().cpu() for t in part]) for part in (a, b))
    return F.cosine_similarity(a, b, 0).item()


# ------------------------------------------------------------------ supernet: the per-edge oracle


def naive_operation(name, C, stride):
    """One candidate operation on one edge, spelt out (DARTS §3.1.1); no BN has an affine part."""
    def norm():
        return nn.BatchNorm2d(C, affine=False)

    def separable(k, stride, dilation):
        return [nn.ReLU(), nn.Conv2d(C, C, k, stride, dilation * (k - 1) // 2, dilation, C, False),
                nn.Conv2d(C, C, 1, bias=False), norm()]

    if name == "none":
        return Zero(stride)
    if name == "max_pool_3x3":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), norm())
    if name == "avg_pool_3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), norm())
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else NaiveReduce(C, C)
    k = int(name[-1])
    if name.startswith("sep"):
        return nn.Sequential(*separable(k, stride, 1), *separable(k, 1, 1))
    return nn.Sequential(*separable(k, stride, 2))


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return 0 * x[:, :, ::self.stride, ::self.stride]


class NaiveReduce(nn.Module):
    def __init__(self, C_in, C):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(C_in, C // 2, 1, 2, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(C, affine=False)

    def forward(self, x):
        x = F.pad(F.relu(x), (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        return self.norm(torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], 1))


class NaiveSupernet(nn.Module):
    """The search network with one mixed operation per edge (DARTS Eq. 2), for every base."""

    def __init__(self, C, num_classes, layers, kept=ops.ALL, partial=1, auxiliary=False,
                 imagenet=False):
        super().__init__()
        self.kept, self.partial, self.beta, C_p = kept, partial, 0.0, C if imagenet else 3 * C
        self.stem0 = nn.Sequential(nn.Conv2d(3, C_p, 3, padding=1, bias=False), nn.BatchNorm2d(C_p))
        self.stem1 = nn.Identity()
        if imagenet:
            def conv(a, b):
                return nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b)
            self.stem0 = nn.Sequential(*conv(3, C // 2), nn.ReLU(), *conv(C // 2, C))
            self.stem1 = nn.Sequential(nn.ReLU(), *conv(C, C))
        self.pre, self.edges, self.reduction = nn.ModuleList(), nn.ModuleList(), []
        self.auxiliary, C_pp = nn.ModuleList(), C_p
        for i in range(layers):
            before = self.reduction[-1] if self.reduction else imagenet
            self.reduction.append(i in (layers // 3, 2 * layers // 3))
            reduction = self.reduction[-1]
            C *= 2 if reduction else 1

            def one(C_in, C=C):
                return nn.Sequential(nn.ReLU(), nn.Conv2d(C_in, C, 1, bias=False),
                                     nn.BatchNorm2d(C, affine=False))
            self.pre.append(nn.ModuleList([NaiveReduce(C_pp, C) if before else one(C_pp),
                                           one(C_p)]))
            strides = [2 if reduction and j < 2 else 1
                       for node in range(4) for j in range(2 + node)]
            self.edges.append(nn.ModuleList(
                nn.ModuleDict({o: naive_operation(o, C // partial, stride) for o in names})
                for names, stride in zip(kept[reduction], strides)))
            self.auxiliary.append(nn.ModuleList(
                nn.Identity() if not auxiliary or stride == 1 else NaiveReduce(C, C)
                for stride in strides))
            C_pp, C_p = C_p, 4 * C
        self.classifier = nn.Linear(C_p, num_classes)

    def forward(self, x, alphas):
        s0 = self.stem0(x)
        s1 = self.stem1(s0)
        for pre, edges, auxiliary, reduction in zip(self.pre, self.edges, self.auxiliary,
                                                    self.reduction):
            states, e = [pre[0](s0), pre[1](s1)], 0
            for node in range(4):
                total, first = 0, e
                for j in range(2 + node):
                    x, alpha = states[j], alphas[reduction][e]
                    names = self.kept[reduction][e]
                    exps = {o: alpha[genotypes.PRIMITIVES.index(o)].exp() for o in names}
                    some = x.shape[1] // self.partial
                    seen, rest = x[:, :some], x[:, some:]
                    mixed = sum(exps[o] / sum(exps.values()) * op(seen)
                                for o, op in edges[e].items())
                    if self.beta:
                        mixed = mixed + self.beta * auxiliary[e](seen)
                    if self.partial > 1:
                        if mixed.shape[2] < x.shape[2]:
                            rest = F.max_pool2d(rest, 2)
                        mixed = torch.cat([mixed, rest], 1)
                        n, c, h, w = mixed.shape
                        mixed = mixed.view(n, self.partial, c // self.partial, h, w)
                        mixed = mixed.transpose(1, 2).reshape(n, c, h, w)
                        into = alphas[2 + reduction][first:first + 2 + node].exp()
                        mixed = mixed * into[j] / into.sum()
                    total = total + mixed
                    e += 1
                states.append(total)
            s0, s1 = s1, torch.cat(states[2:], 1)
        return self.classifier(s1.mean((2, 3)))


def weight_pairs(net, naive):
    """(merged parameter, its rows, per-edge parameter) for every parameter of the naive network."""
    whole = slice(None)
    for part in ("stem0", "stem1", "classifier"):
        for a, b in zip(net.get_submodule(part).parameters(),
                        naive.get_submodule(part).parameters(), strict=True):
            yield a, whole, b
    for cell, pre, edges, auxiliary in zip(net.cells, naive.pre, naive.edges, naive.auxiliary):
        for a, b in zip([*cell.preprocess0.parameters(), *cell.preprocess1.parameters()],
                        pre.parameters()):
            yield a, whole, b
        for j, state in enumerate(cell.states):
            rows = [sum(2 + i for i in range(node)) + j for node in range(max(0, j - 1), 4)]
            for m, e in enumerate(rows):
                for o, op in edges[e].items():
                    has_it = [r for r in rows if o in edges[r]]
                    if o.startswith("sep"):
                        parts = [getattr(state, f"{o}_{ab}").get_parameter(f"{kind}.weight")
                                 for ab in "ab" for kind in ("depthwise", "pointwise")]
                    elif o.startswith("dil"):
                        parts = [getattr(state, o).get_parameter(f"{kind}.weight")
                                 for kind in ("depthwise", "pointwise")]
                    elif o == "skip_connect" and state.stride == 2:
                        parts = [state.skip_connect.conv1.weight, state.skip_connect.conv2.weight]
                    else:
                        parts = []
                    for a, b in zip(parts, op.parameters(), strict=True):
                        k = has_it.index(e)
                        yield a, slice(k * len(b), (k + 1) * len(b)), b
                if isinstance(auxiliary[e], NaiveReduce):
                    for a, b in zip(state.auxiliary.parameters(), auxiliary[e].parameters()):
                        yield a, slice(m * len(b), (m + 1) * len(b)), b


def pruned(keep, seed=0):
    """`keep` candidates of every edge, drawn at random: the candidates of a P-DARTS stage."""
    rng = np.random.default_rng(seed)
    return [[[genotypes.PRIMITIVES[o] for o in sorted(rng.permutation(8)[:keep])]
             for _ in range(14)] for _ in range(2)]


def twins(C=4, num_classes=5, layers=3, dtype=torch.float64, kept=ops.ALL, partial=1, **options):
    torch.manual_seed(0)
    net = ops.place(ops.Supernet(C, num_classes, layers, kept, partial, **options), "cpu").to(dtype)
    naive = NaiveSupernet(C, num_classes, layers, kept, partial, **options).to(dtype)
    with torch.no_grad():
        for merged, rows, single in weight_pairs(net, naive):
            single.copy_(merged[rows])
    alphas = [nn.Parameter(a.detach() + torch.randn(a.shape).to(dtype))
              for a in ops.initial_alphas("cpu", kept, partial)]
    net.knobs.auxiliary = naive.beta = 0.7 * bool(options.get("auxiliary"))
    return net, naive, alphas


@pytest.mark.parametrize("size,options", slow_but({0, 3, 5, 7, 9}, [    # maps of
    (16, {}), (12, dict(layers=4)), (8, dict(layers=6)),          # 16..4, 12..3, 8..2
    (16, dict(kept=pruned(5))), (12, dict(kept=pruned(3, 1), layers=5)),           # P-DARTS
    (16, dict(partial=4, C=8)), (16, dict(partial=2, layers=4)),  # PC-DARTS
    (16, dict(auxiliary=True)), (12, dict(auxiliary=True, layers=6)),              # DARTS-
    (64, dict(imagenet=True, partial=4, C=8)), (40, dict(imagenet=True))]),
    ids=lambda v: str(v)[:40])
def test_supernet_is_the_per_edge_one(size, options):
    net, naive, alphas = twins(**options)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in naive.parameters())
    x, y = torch.randn(3, 3, size, size, dtype=torch.float64), torch.tensor([0, 1, 2])
    a, b = net(x, alphas), naive(x, alphas)
    assert relative_error([a], [b]) < 1e-10
    n = len(alphas)
    ours = torch.autograd.grad(F.cross_entropy(a, y), [*alphas, *net.parameters()])
    theirs = torch.autograd.grad(F.cross_entropy(b, y), [*alphas, *naive.parameters()])
    for g, h in zip(ours[:n], theirs[:n]):
        assert relative_error([g], [h]) < 1e-10
    of, to = dict(zip(naive.parameters(), theirs[n:])), dict(zip(net.parameters(), ours[n:]))
    seen = {merged: torch.zeros_like(merged) for merged in to}
    for merged, rows, single in weight_pairs(net, naive):
        seen[merged][rows] += of.pop(single)
    assert not of                                                  # each has been compared, once
    assert max(relative_error([to[w]], [seen[w]]) for w in to) < 1e-10
    net.eval(), naive.eval()                                       # the same statistics were kept
    assert relative_error([net(x, alphas)], [naive(x, alphas)]) < 1e-10


def test_supernet_float32_and_softmax_rows():
    net, naive, alphas = twins(C=8, layers=5, dtype=torch.float32)
    x = torch.randn(4, 3, 16, 16)
    a, b = net(x, alphas), naive(x, alphas)
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    with pytest.raises((RuntimeError, TypeError, IndexError, ValueError)):
        net(x, [alphas[0][:13], alphas[1]])


# -------------------------------------------------------------- LPT: exact differentiation oracle


class SmoothTestee(nn.Module):
    """A small network without kinks whose layers mix two operations by softmaxed alphas."""

    def __init__(self, inputs=6, hidden=5, classes=4):
        super().__init__()
        self.a, self.b = nn.Linear(inputs, hidden), nn.Linear(inputs, hidden)
        self.c = nn.Linear(hidden, classes)

    def forward(self, x, alphas):
        p, q, x = F.softmax(alphas[0], -1), F.softmax(alphas[1], -1), x.flatten(1)
        a, b = self.a(x), self.b(x)
        h = p[0] * torch.tanh(a / 2) + p[1] * F.softplus(b / 2) + p[2] * a
        return self.c(q[0] * h + q[1] * torch.tanh(h / 2))


class SmoothTester(nn.Module):
    def __init__(self, inputs=6, hidden=5, classes=4):
        super().__init__()
        self.encoder, self.executor = nn.Linear(inputs, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        features = torch.tanh(self.encoder(x.flatten(1)))
        return self.executor(features), features


def momentum_step(optimizer, loss):
    """Gives the optimizer momentum buffers, as in the middle of a search."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


SMOOTH = (40, 3, 2, 1)                  # images of 2 x 1 pixels
# On smooth networks the error is the central difference's own, O(radius^2).
RADII = {1e-2: 1e-4, 1e-3: 1e-6}        # radius: largest relative error


def smooth_batches(count):
    return [(torch.randn(SMOOTH, dtype=torch.float64), torch.randint(4, SMOOTH[:1]),
             torch.randint(20, SMOOTH[:1])) for _ in range(count)]


def smooth_alphas():
    return [torch.randn(n, dtype=torch.float64).requires_grad_() for n in (3, 2)]


def smooth_problem(ablation=0):
    torch.manual_seed(3)
    testee, tester = SmoothTestee().double(), SmoothTester().double()
    creator = list(nn.Linear(5, 1).double().parameters())
    if ablation == 1:
        creator = [torch.randn(20, dtype=torch.float64).requires_grad_()]
    batches = smooth_batches(3)
    return learners(testee, smooth_alphas(), tester, creator, batches), batches


def learners(testee, alphas, tester, creator, batches, lr=0.1):
    sgd = dict(lr=lr, momentum=0.9, weight_decay=3e-4)
    testee_opt = torch.optim.SGD(testee.parameters(), **sgd)
    tester_opt = torch.optim.SGD(tester.parameters(), **sgd)
    x, y, _ = batches[0]
    momentum_step(testee_opt, F.cross_entropy(testee(x, alphas), y))
    momentum_step(tester_opt, F.cross_entropy(tester(x)[0], y))
    for t in [*alphas, *creator]:
        t.grad = None
    return lpt.Learners(testee, alphas, testee_opt, tester, creator, tester_opt)


def supernet_alphas(dtype=torch.float64):
    return [torch.randn(14, 8, dtype=dtype).requires_grad_() for _ in range(2)]


def supernet_problem(base=None):
    torch.manual_seed(0)
    kept, partial = pruned(3) if base == "pdarts" else ops.ALL, 4 if base == "pcdarts" else 1
    testee = ops.place(ops.Supernet(8 if partial > 1 else 4, 5, 3, kept, partial,
                                    base == "darts-"), "cpu").double()
    testee.knobs.skip_dropout, testee.knobs.auxiliary = 0.3 * (base == "pdarts"), base == "darts-"
    tester = ops.place(lpt.Tester("resnet18", 5), "cpu").double()
    alphas = supernet_alphas()
    if base:
        alphas = [nn.Parameter(a.detach().double() + torch.randn(a.shape).double())
                  for a in ops.initial_alphas("cpu", kept, partial)]
    creator = list(nn.Linear(tester.executor.in_features, 1).double().parameters())
    batches = tuple((torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.randint(5, (4,)),
                     torch.arange(4)) for _ in range(3))
    return learners(testee, alphas, tester, creator, batches, lr=0.025), batches


def exact(formulation):
    """A formulation's gradients by exact differentiation: the total ones, a list per group, and the
    direct parts, with what the stages have learned held fixed."""
    def groups(stages):
        grads = ops.skillearn(stages, *formulation[1:])[1]
        return grads if len(formulation[2]) > 1 else [grads]

    fixed = [stage._replace(step=lambda *args, step=stage.step: ops.detached(step(*args)))
             for stage in formulation[0]]
    return groups(formulation[0]), groups(fixed)


def second_order_errors(got, formulation):
    """Relative errors of the second-order terms by themselves, one per group; a gradient without
    one must be equal as it is."""
    errors = []
    for g, total, direct in zip(got, *exact(formulation)):
        second = difference(total, direct)
        if max(t.abs().max() for t in second) > 1e-13:
            errors.append(relative_error(difference(g, direct), second))
        else:
            errors.append(relative_error(g, total))
    return errors


def lpt_errors(m, batches, module=lpt, radius=1e-2, **kw):
    got = module.outer_gradients(m, batches, radius=radius, **kw)[:2]
    return second_order_errors(got, lpt.formulation(m, batches, **kw))


CASES = [dict(order=o, ablation=a, lam=lam, gamma=gamma, created=created) for o in (1, 2)
         for a in (0, 1, 2) for lam, gamma, created in ((1.0, 1.0, "printed"),
                                                        (0.5, 2.0, "normalized"))]


@pytest.mark.parametrize("kw", CASES, ids=lambda kw: "-".join(map(str, kw.values())))
def test_lpt_gradients_on_the_smooth_network(kw):
    m, batches = smooth_problem(kw["ablation"])
    for radius, bound in RADII.items():
        assert max(lpt_errors(m, batches, radius=radius, **kw)) < bound


@pytest.mark.parametrize("base,kw", slow_but({0}, [
    (None, dict()), (None, dict(order=1)), (None, dict(ablation=2, lam=0.5, gamma=2.0)),
    ("darts-", dict()), ("pcdarts", dict()), ("pdarts", dict())]), ids=str)
def test_lpt_gradients_on_the_supernet_with_resnet18(base, kw):
    m, batches = supernet_problem(base)
    assert max(lpt_errors(m, batches, radius=1e-8, **kw)) < 1e-4


MUTATIONS = {
    "divisor": ("(p - n) / (2 * eps)", "(p - n) / 2 * eps"),
    "sign of A's term": ("g - xi * p for g, p in zip(g_alpha, product)",
                         "g + xi * p for g, p in zip(g_alpha, product)"),
    "sign of C's term": ("[g - gamma * xi * p", "[g + gamma * xi * p"),
    "gamma left out": ("[g - gamma * xi * p", "[g - xi * p"),
    "no df/dC (Eq. 23)": ("f = selection(m.creator, call(",
                          "f = 0 * sum(c.sum() for c in m.creator) + selection("
                          "detached(m.creator), call("),
    "no df/dC in the numerator only": (
        "R = ops.global_sum((f * losses).sum())",
        "R = (selection(detached(m.creator), call(m.tester, ex, x_bank)[1]) * losses).sum()"),
    "no 1/sum f": ("R = ops.global_sum((f * losses).sum()) / ops.global_sum(f.sum())",
                   "R = (f * losses).mean()"),
    "no momentum": ("torch._foreach_add_(step, buffers, alpha=group[\"momentum\"])", "pass"),
    "lambda's sign": ("R - lam * tester_val_loss", "R + lam * tester_val_loss"),
    "f not differentiated by E": ("return (f * losses).mean()",
                                  "return (selection(creator, features.detach()) * losses).mean()"),
}


def mutant(method, old, new):
    """The method's module with one piece of its source, or of darts_ops, replaced."""
    modules, hits = {}, 0
    for name in ("darts_ops", method):
        source = (HERE / f"{name}.py").read_text()
        hits += source.count(old)
        modules[name] = types.ModuleType(f"mutant_{name}")
        held, sys.modules["darts_ops"] = sys.modules["darts_ops"], modules["darts_ops"]
        sys.modules[f"mutant_{name}"] = modules[name]
        try:
            exec(compile(source.replace(old, new), name, "exec"), modules[name].__dict__)
        finally:
            sys.modules["darts_ops"] = held
    assert hits == 1, f"{old!r} is there {hits} times"
    return modules[method]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_lpt_gradient_is_seen(name):
    m, batches = smooth_problem()
    assert max(lpt_errors(m, batches, module=mutant("lpt", *MUTATIONS[name]), gamma=2.0)) > 1e-3


def darts_gradient(testee, alphas, optimizer, train, val):
    """Second-order DARTS (its Eq. 7) by exact differentiation."""
    def loss(w, batch):
        return F.cross_entropy(ops.call(testee, w, batch[0], alphas), batch[1])

    stage = ops.Stage("w", list(testee.parameters()), lambda w, learned: loss(w, train),
                      lambda w, g, learned: ops.sgd_step(optimizer, g))
    return ops.skillearn([stage], lambda learned: [loss(learned["w"], val)], [alphas])[1]


def test_central_difference_of_a_zero_direction_is_zero():
    w, a = [torch.randn(3)], torch.randn(3, requires_grad=True)

    def grad_at(w):
        return ops.grad((w[0] * a).sin().sum(), [a])

    assert ops.central_difference(grad_at, w, [torch.zeros(3)])[0].abs().max() == 0
    assert ops.central_difference(grad_at, w, [torch.full((3,), float("nan"))])[0].isnan().all()


def snapshot(*parts):
    """Every tensor of modules and optimizers, and every .grad, copied."""
    tensors = []
    for part in parts:
        if isinstance(part, nn.Module):
            tensors += [*part.state_dict().values(), *(p.grad for p in part.parameters())]
        elif isinstance(part, torch.optim.Optimizer):
            tensors += [t for s in part.state.values() for t in s.values()]
        else:
            tensors += [*part, *(t.grad for t in part)]
    return [t.detach().clone() if torch.is_tensor(t) else t for t in tensors]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) if torch.is_tensor(x) and torch.is_tensor(y)
                                    else x is y or x == y for x, y in zip(a, b))


def test_call_leaves_a_norm_without_statistics_as_it_is():
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    ops.call(norm, list(norm.parameters()), torch.randn(3, 2, 4, 4))
    assert not norm.track_running_stats


def test_virtual_weights_are_the_optimizers_step():
    m, batches = smooth_problem()
    w = list(m.testee.parameters())
    grads = ops.grad(F.cross_entropy(m.testee(batches[0][0], m.alphas), batches[0][1]), w)
    for fresh in (False, True):                                    # with and without momentum
        if fresh:
            m.testee_opt.state.clear()
        virtual = ops.virtual_weights(m.testee_opt, grads)
        before = [t.detach().clone() for t in w]
        ops.descend(m.testee_opt, grads)
        assert relative_error(virtual, w) < 1e-14
        with torch.no_grad():
            torch._foreach_copy_(w, before)


# --------------------------------------------------------------- IL: exact differentiation oracle


def il_problem(K, M, supernet=False, lr=0.025):
    """Stages with momentum buffers, A, and batches for training (per stage) and validation."""
    torch.manual_seed(3)
    stages, train, val = [], [], []
    for l in range(K * M):
        classes = 4 + l % K                                        # tasks differ in classes
        if supernet:
            net = ops.place(ops.Supernet(4, classes, 3), "cpu").double()
        else:
            net = SmoothTestee(classes=classes).double()
        opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=3e-4)
        stages.append(il.Learner(l % K, net, opt))
    alphas = supernet_alphas() if supernet else smooth_alphas()
    for l, stage in enumerate(stages):
        shape = (4, 3, 16, 16) if supernet else SMOOTH
        for batches in (train, val)[:2 if l < K else 1]:
            batches.append((torch.randn(shape, dtype=torch.float64),
                            torch.randint(4 + l % K, shape[:1])))
        momentum_step(stage.opt, F.cross_entropy(stage.net(train[l][0], alphas), train[l][1]))
    for a in alphas:
        a.grad = None
    return stages, alphas, train, val


def stage_gradients(stages, alphas, train):
    return [ops.grad(F.cross_entropy(ops.call(s.net, list(s.net.parameters()), x, alphas), y),
                     list(s.net.parameters())) for s, (x, y) in zip(stages, train)]


def il_gradient(problem, lam, step="proximal", module=il, radius=1e-2, order=2):
    stages, alphas, train, val = problem
    grads = stage_gradients(stages, alphas, train)
    return module.outer_gradient(*problem, lam, step, order, grads, radius)[0]


def il_error(problem, lam, step, module=il, radius=1e-2):
    got = il_gradient(problem, lam, step, module, radius)
    return second_order_errors([got], il.formulation(*problem, lam, step))[0]


@pytest.mark.parametrize("step", ["proximal", "printed"])
@pytest.mark.parametrize("lam", slow_but({0, 2}, [0.0, 1.0, 10.0, 100.0]))
@pytest.mark.parametrize("M", slow_but({1}, [1, 2, 3]))
@pytest.mark.parametrize("K", slow_but({1}, [1, 2, 3]))
def test_il_gradient_on_the_smooth_network(K, M, lam, step):
    for radius, bound in RADII.items():
        assert il_error(il_problem(K, M), lam, step, radius=radius) < bound


@slow
@pytest.mark.parametrize("step,lam", [("proximal", 100.0), ("printed", 1.0)])
def test_il_gradient_on_the_supernet(step, lam):
    assert il_error(il_problem(2, 2, supernet=True), lam, step, radius=1e-8) < 1e-4


IL_MUTATIONS = {
    "the pull left out of the sweep": ("[a + pull * b for", "[a + b for"),
    "1/(1 + pull) left out of the sweep": ("[t / (1 + pull) for t in encoder]", "encoder"),
    "1/(1 + pull) left out of the step": ("[(s + pull * b) / (1 + pull)",
                                                  "[s + pull * (b - s) / (1 + pull) / 2"),
    "first stage first": ("for l in reversed(range(0 if lam else first, len(learners))):",
                          "for l in range(len(learners)):"),
    "head coupled": ("encoder = [t / (1 + pull) for t in encoder]",
                     "encoder, head = ([t / (1 + pull) for t in part] for part in (encoder, head))"
                     ),
    "sign": ("[g - learner.eta * p", "[g + learner.eta * p"),
}


@pytest.mark.parametrize("name", IL_MUTATIONS)
def test_a_wrong_il_gradient_is_seen(name):
    module = mutant("il", *IL_MUTATIONS[name])
    assert il_error(il_problem(2, 2), 10.0, "proximal", module) > 1e-3


def test_il_weights_take_the_virtual_step():
    """update_weights without clipping is the step that outer_gradient looks ahead by."""
    for step, lam in (("proximal", 100.0), ("printed", 10.0)):
        stages, alphas, train, val = il_problem(2, 2)
        grads = stage_gradients(stages, alphas, train)
        bars = il.look_ahead(stages, grads, lam, step)
        il.update_weights(stages, grads, [torch.zeros(())] * 4, lam, step)
        for s, bar in zip(stages, bars, strict=True):
            assert relative_error(s.weights, bar) < 1e-12


@pytest.mark.parametrize("step", ["proximal", "printed"])
def test_500_coupled_steps(step):
    """lambda = 100, eta = 0.025: the proximal step is stable, the printed one is not."""
    stages, alphas, train, _ = il_problem(2, 2)

    def state():
        encoders = [[t.detach() for t in s.net.parameters()][:-2] for s in stages]
        apart = max(sum((a - b).square().sum() for a, b in zip(p, q)).sqrt().item()
                    for p, q in zip(encoders, encoders[1:]))
        with torch.no_grad():
            return apart, sum(F.cross_entropy(s.net(x, alphas), y).item()
                              for s, (x, y) in zip(stages, train))

    (apart, loss), largest = state(), 0.0
    for _ in range(500 if step == "proximal" else 14):
        il.update_weights(stages, stage_gradients(stages, alphas, train), [torch.zeros(())] * 4,
                          100.0, step, clip=5.0)
        largest = max(largest, state()[0])
    if step == "proximal":
        assert largest <= apart and state()[1] < 0.8 * loss
    else:
        assert not largest < 1e6 * apart


# ------------------------------------------------------------ LeaSE: exact differentiation oracle


class SmoothAudience(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def lease_problem(supernet=False):
    torch.manual_seed(1 if supernet else 3)
    if supernet:
        explainer = ops.place(ops.Supernet(4, 5, 3), "cpu").double()
        audience = ops.place(torchvision.models.resnet18(num_classes=5), "cpu").double()
        alphas, shape, classes = supernet_alphas(), (4, 3, 32, 32), 5
    else:
        explainer, audience = SmoothTestee().double(), SmoothAudience().double()
        alphas, shape, classes = smooth_alphas(), SMOOTH, 4
    train, val = ((torch.randn(shape, dtype=torch.float64), torch.randint(classes, shape[:1]))
                  for _ in range(2))
    sgd = {"lr": 0.025 if supernet else 0.1, "momentum": 0.9, "weight_decay": 3e-4}
    m = lease.Learners(explainer, alphas, torch.optim.SGD(explainer.parameters(), **sgd),
                       audience, torch.optim.SGD(audience.parameters(), **sgd))
    momentum_step(m.explainer_opt, F.cross_entropy(explainer(train[0], alphas), train[1]))
    momentum_step(m.audience_opt, F.cross_entropy(audience(train[0]), train[1]))
    for a in alphas:
        a.grad = None
    return m, train, val, 0.01 * torch.randn(shape, dtype=torch.float64)


def lease_ahead(m, train, delta, weighting="signed", order=2, module=lease):
    """One step ahead, as in LeaSE's loop: E', delta' with its step sizes, the gradients of W."""
    x, y = train
    e, w = list(m.explainer.parameters()), list(m.audience.parameters())
    loss = F.cross_entropy(ops.call(m.explainer, e, x, m.alphas), y)
    e_virtual = (ops.virtual_weights(m.explainer_opt, ops.grad(loss, e)) if order == 2 else
                 ops.detached(e))
    explanation, xi = module.explain(m.explainer, m.alphas, e_virtual, x, delta)
    loss = module.audience_loss(lambda x: ops.call(m.audience, w, x), explanation, x, y, weighting)
    return e_virtual, explanation, xi, ops.grad(loss, w)


def lease_gradient(problem, module=lease, radius=1e-2, gamma=1.0, **kw):
    m, train, val, delta = problem
    ahead = lease_ahead(m, train, delta, module=module, **kw)
    return module.outer_gradient(*problem, gamma, kw.get("weighting", "signed"),
                                 kw.get("order", 2), *ahead, radius)[0]


def lease_errors(problem, module=lease, radius=1e-2, weighting="signed"):
    """Relative errors of the second-order terms: the explainer's own (Eq. 11), the audience's with
    xi_e = 0 (Eq. 13, 15 and v_A), the audience's whole chain (with Eq. 17), and the total."""
    errors, kw = [], {"weighting": weighting}
    own, heard, both = ((lease_gradient(problem, module, radius, gamma, **kw, order=order),
                         *[part[0] for part in exact(lease.formulation(*problem, gamma, **kw,
                                                                       order=order))])
                        for gamma, order in ((0.0, 2), (1.0, 1), (1.0, 2)))
    for got, total, direct in (own, heard, both):
        errors.append(relative_error(difference(got, direct), difference(total, direct)))
    errors.append(relative_error(difference(both[0], own[0]), difference(both[1], own[1])))
    return errors


@pytest.mark.parametrize("weighting", ["signed", "magnitude"])
def test_lease_gradient_on_the_smooth_network(weighting):
    """Its bounds are twenty times the others', and O(radius^2) too: what the projection of v_Delta
    leaves is a small difference of large terms."""
    for radius, bound in RADII.items():
        assert max(lease_errors(lease_problem(), radius=radius, weighting=weighting)) < 20 * bound


def test_the_difference_along_delta_has_its_radius(monkeypatch):
    """It alone is not shared between processes; without one of its own it takes the others'."""
    (m, train, val, delta), seen = lease_problem(), []
    ahead, real = lease_ahead(m, train, delta), ops.central_difference
    monkeypatch.setattr(lease, "central_difference", lambda grad_at, w, v, radius, shared=True: (
        seen.append((radius, shared)) or real(grad_at, w, v, radius, shared)))
    for own, along_delta in ((3.0, 3.0), (None, 0.02)):
        seen.clear()
        lease.outer_gradient(m, train, val, delta, 1.0, "signed", 2, *ahead, 0.02, own)
        assert seen == [(0.02, True), (along_delta, False), (0.02, True)]


@slow
@pytest.mark.parametrize("terms", ["the total", "each by itself"])
def test_lease_gradient_on_the_supernet_with_resnet18(terms):
    problem = lease_problem(supernet=True)
    if terms == "the total":
        got = lease_gradient(problem, radius=1e-8)
        assert second_order_errors([got], lease.formulation(*problem))[0] < 1e-4
    else:
        assert max(lease_errors(problem, radius=1e-8)) < 1e-4


LEASE_MUTATIONS = {
    "descent in Eq. 7": ("(delta + step_sizes(g) * g).detach()",
                         "(delta - step_sizes(g) * g).detach()"),
    "no dO/dA": ("[g + p for g, p in zip(g_alpha, by_a)]", "g_alpha"),
    "no chain through E'": ("[v + p for v, p in zip(v_e, by_e)]", "v_e"),
    "no step size per image": ("[xi_delta * v_delta]", "[v_delta]"),
    "the step size a constant": ("v_delta - unit * (unit * v_delta).sum((1, 2, 3), keepdim=True)",
                                 "v_delta"),
    "sign of Eq. 13": ("v_delta = -xi_w * product", "v_delta = xi_w * product"),
    "sign of Eq. 17": ("[g - xi_e * p", "[g + xi_e * p"),
    "one argument of l held fixed": ("b = F.softmax(call(explainer, e, x, alphas), 1)",
                                     "b = F.softmax(call(explainer, e, x, alphas), 1).detach()"),
}


@pytest.mark.parametrize("name", LEASE_MUTATIONS)
def test_a_wrong_lease_gradient_is_seen(name):
    assert max(lease_errors(lease_problem(), mutant("lease", *LEASE_MUTATIONS[name]))) > 1e-3


@pytest.mark.parametrize("method,name,i,expected,abs", slow_but({0, 1}, [
    ("lpt", "no df/dC (Eq. 23)", 1, 0.13, 5e-3), ("lpt", "no momentum", 0, 0.983, 5e-3),
    ("lease", "descent in Eq. 7", 0, 0.02, 0.05), ("lease", "no dO/dA", 0, 0.25, 0.05)]))
def test_what_the_papers_print_points_elsewhere(method, name, i, expected, abs):
    """The cosine of A's (0) or C's gradient, as printed, with the exact one; the code's is 1."""
    if method == "lpt":
        m, batches = smooth_problem()
        total = exact(lpt.formulation(m, batches))[0]
        wrong = mutant("lpt", *MUTATIONS[name]).outer_gradients(m, batches, radius=1e-3)
    else:
        problem = lease_problem(supernet=True)
        total = exact(lease.formulation(*problem))[0]
        wrong = [lease_gradient(problem, mutant("lease", *LEASE_MUTATIONS[name]), radius=1e-8)]
    assert cosine(wrong[i], total[i]) == pytest.approx(expected, abs=abs)


def test_lpt_with_a_constant_test_il_of_one_stage_and_lease_without_audience_are_darts():
    m, batches = smooth_problem()
    with torch.no_grad():
        m.creator[0].zero_()                                       # f = sigmoid(bias) everywhere
    got = lpt.outer_gradients(m, batches, lam=0.0)[0]
    darts = darts_gradient(m.testee, m.alphas, m.testee_opt, *[b[:2] for b in batches[:2]])
    assert relative_error(got, darts) < 1e-6
    stages, alphas, train, val = problem = il_problem(1, 1)
    darts = darts_gradient(stages[0].net, alphas, stages[0].opt, train[0], val[0])
    assert relative_error(il_gradient(problem, 0.0), darts) < 1e-5
    direct = exact(il.formulation(*problem, 0.0))[1][0]
    assert relative_error(il_gradient(problem, 0.0, order=1), direct) < 1e-12
    m, train, val, _ = problem = lease_problem()
    darts = darts_gradient(m.explainer, m.alphas, m.explainer_opt, train, val)
    assert relative_error(lease_gradient(problem, gamma=0.0), darts) < 1e-5


real = functools.partial(torch.tensor, dtype=torch.float64)


class Given(nn.Module):
    """A network whose parameter is its answer, whatever it sees."""

    def __init__(self, logits, features=None):
        super().__init__()
        self.logits, self.features = nn.Parameter(real(logits)), features

    def forward(self, x, alphas=None):
        return self.logits if self.features is None else (self.logits, self.features)


def test_the_losses_by_hand():
    """Formulation and algorithm share them, so that each has an example worked out by hand."""
    log, f = math.log, [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5))]
    creator = [real([[1.0, -1.0]]), real([0.5])]
    features, y = real([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 1])
    logits = [[0.0, 0.0], [log(3), 0.0]]                           # losses log 2 and log 4
    tester, testee = Given(logits, features), Given([[log(7), 0.0], [0.0, 0.0]])
    assert lpt.selection(creator, features).tolist() == pytest.approx(f)             # Eq. 12
    answers, near = tester(None), lambda value: pytest.approx(value, rel=1e-12)
    printed, size = f[0] * log(2) + f[1] * log(4), f[0] + f[1]
    assert lpt.created_test_loss(creator, *answers, y).item() == near(printed / 2)   # Eq. 13
    assert lpt.created_test_loss(creator, *answers, y, "normalized").item() == near(printed / size)
    batches = (None, y, None), (None, y, torch.tensor([2, 0])), (None, torch.tensor([1, 1]), None)
    own = (log(2) + log(4)) / 2
    for ablation, value in ((0, own + 3 * printed / 2), (2, 3 * printed / 2)):       # Eq. 7, 26
        assert lpt.tester_loss(tester, creator, batches, 3.0, ablation).item() == near(value)
    m = lpt.Learners(testee, [], None, tester, creator, None)
    weights = [[net.logits.detach()] for net in (testee, tester)]
    J, R, _ = lpt.validation_objective(m, *weights, batches, 2.0, 0)
    expected = (f[0] * log(8 / 7) + f[1] * log(2)) / size                            # Eq. 9, 14
    assert R.item() == near(expected)
    assert J.item() == near(expected - 2 * (log(2) + log(4)) / 2)                    # Eq. 15, 19
    m.creator = [real([0.0, 9.0, log(3)])]        # s = 3/4 and 1/2 of rows 2 and 0
    J, R, _ = lpt.validation_objective(m, *weights, batches, 2.0, 1)
    assert J.item() == R.item() == near((0.75 * log(8 / 7) + 0.5 * log(2)) / 1.25)   # Eq. 25

    one, two, four = ([real(v)] for v in (1.0, 2.0, 4.0))
    assert il.coupled(one, two, four, 0.5, "printed")[0] == 2      # 1 - 0.5 (2 - 4), Eq. 35
    assert il.coupled(one, two, four, 0.5, "proximal")[0] == 2     # (1 + 0.5 * 4) / 1.5
    net = nn.Linear(2, 2)
    learner = il.Learner(0, net, torch.optim.SGD(net.parameters(), 0.1, 0.75))
    assert learner.pull(3.0) == near(2 * 0.1 * 3 / 0.25)

    class Linear(nn.Linear):
        def forward(self, x, alphas=None):
            return super().forward(x.flatten(1))

    explainer = Linear(2, 2, bias=False).double()
    w = [real([[log(3), 0.0], [0.0, 0.0]])]       # logits (log 3 x_1, 0)
    x, delta = real([0.0, 0.0]).view(1, 2, 1, 1), real([1.0, 5.0]).view(1, 2, 1, 1)
    objective = lease.explanation_objective(explainer, [], w, x, delta)
    assert objective.item() == near(-0.5 * log(0.75) - 0.5 * log(0.25))              # Eq. 2
    g = real([3.0, 4.0]).view(1, 2, 1, 1)
    assert lease.step_sizes(g).item() == near(2 ** 0.5 / 5) and lease.step_sizes(0 * g) == 0
    explanation, xi = lease.explain(explainer, [], w, x, delta)    # gradient log 3 (3/4 - 1/2, 0)
    assert xi.item() == near(2 ** 0.5 / (0.25 * log(3)))
    assert explanation.flatten().tolist() == near([1 + 2 ** 0.5, 5.0])               # Eq. 7
    seen = []
    for weighting, sign in (("signed", -1), ("magnitude", 1)):                       # Eq. 3
        loss = lease.audience_loss(lambda x: seen.append(x) or x.flatten(1), -g, g + 1,
                                   torch.tensor([0]), weighting)
        assert seen[-1].flatten().tolist() == near([sign * 12.0, sign * 20.0])
        assert loss.item() == near(log(1 + math.exp(sign * 8.0)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("step,lam", [("proximal", 100.0), ("proximal", 1.0), ("printed", 1.0)])
def test_coupled_learners_settle_where_the_penalty_says(step, lam, momentum):
    """On (W - 1)^2 / 2 with W'_(l-1) = 0 that is 1 / (1 + 2 lambda), with momentum and without."""
    nets = [nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1)) for _ in range(2)]
    learners = [il.Learner(0, net, torch.optim.SGD(net.parameters(), 0.025, momentum))
                for net in nets]
    with torch.no_grad():
        nets[0][0].weight.zero_()
    for _ in range(300):
        w = [learner.weights for learner in learners]
        grads = [[torch.zeros_like(t) for t in weights] for weights in w]
        grads[1][0] = w[1][0].detach() - 1
        il.update_weights(learners, grads, [torch.zeros(())] * 2, lam, step)
    assert nets[1][0].weight.item() == pytest.approx(1 / (1 + 2 * lam), rel=1e-4)


def test_foresight_by_hand():
    """On a^2 from a = 3 a step of -1 promises -6 and brings -5; no graph takes memory."""
    alphas, run = [torch.tensor(3.0, requires_grad=True)], types.SimpleNamespace(noted={})

    def validation(learned):
        assert not torch.is_grad_enabled()
        return [alphas[0] ** 2]

    formulation = [], validation, [alphas]
    for last in (False, True):
        run.last_step = lambda last=last: last
        with torch.no_grad():
            alphas[0].fill_(3.0)
        g = [torch.tensor(6.0)]
        with ops.foresight(run, formulation, alphas, g), torch.no_grad():
            alphas[0] -= 1
        assert run.noted == ({"predicted_change": -6.0, "realised_change": -5.0} if last else {})


def test_an_image_that_is_not_asked_about_keeps_its_scalar(tmp_path, monkeypatch):
    """Ablation 1: Adam's moments must not move the scalars of other steps' images."""
    descend, steps = ops.descend, []

    def watched(optimizer, grads, name, *args):
        theta = optimizer.param_groups[0]["params"][0]
        before = theta.detach().clone()
        descend(optimizer, grads, name, *args)
        if "creator" in name:
            moved = (theta != before).nonzero().flatten().tolist()
            steps.append((moved, grads[0].coalesce().indices()[0].tolist()))

    monkeypatch.setattr(lpt, "descend", watched)
    assert run_script(lpt, *TINY, *FIRST, "--batch-size", 10, "--epochs", 1, "--ablation", 1,
                      "--out", tmp_path / "run") == 0
    assert len(steps) == 10 and all(moved == asked and len(asked) == 10 for moved, asked in steps)


def test_an_explanation_has_unit_scale_and_raises_the_objective():
    m, (x, _), _, delta = lease_problem()
    e = list(m.explainer.parameters())
    explanation, _ = lease.explain(m.explainer, m.alphas, e, x, delta)
    assert ((explanation - delta).square().mean((1, 2, 3)).sqrt() - 1).abs().max() < 1e-12

    def objective(delta):
        return lease.explanation_objective(m.explainer, m.alphas, e, x, delta)

    assert objective(explanation) > objective(delta) > objective(torch.zeros_like(delta))


def test_the_start_of_the_perturbations():
    """Of the scale that is asked for, and another for another seed, step or rank."""
    starts = [lease.random_delta((8, 3, 32, 32), 0.3, "cpu", *keys)
              for keys in ((1, 5, 0), (1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1))]
    assert all(abs(start.std() - 0.3) < 0.01 and abs(start.mean()) < 0.01 for start in starts)
    assert torch.equal(starts[0], starts[1])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(starts[1:], 2))


@slow
def test_a_start_at_zero_and_a_fixed_step_explain_nothing():
    """LeaSE Eq. 7 as printed: at zero the gradient is zero, and a step of 0.025 stays there."""
    m, (x, _), _, delta = lease_problem(supernet=True)
    e = list(m.explainer.parameters())

    def gradient(delta):
        at = delta.clone().requires_grad_()
        return ops.grad(lease.explanation_objective(m.explainer, m.alphas, e, x, at), [at])[0]

    assert gradient(torch.zeros_like(delta)).norm() < 1e-9 * gradient(delta).norm()
    assert 0.025 * gradient(delta).norm() < 1e-4 * delta.norm()


@pytest.mark.parametrize("method,kw", slow_but({0, 4}, [
    ("lpt", dict(order=2)), ("lpt", dict(order=1)), ("lpt", dict(ablation=1)),
    ("lpt", dict(ablation=2)), ("il", {}), ("lease", {})]), ids=str)
def test_a_gradient_evaluation_changes_no_state(method, kw):
    if method == "lpt":
        m, batches = supernet_problem()
        if kw.get("ablation") == 1:
            m.creator = [torch.zeros(4, dtype=torch.float64, requires_grad=True)]
        net, alphas, x = m.testee, m.alphas, batches[0][0]
        parts = [net, m.tester, m.testee_opt, m.tester_opt, alphas, m.creator]
    elif method == "il":
        stages, alphas, train, val = il_problem(2, 1, supernet=True)
        net, x = stages[0].net, train[0][0]
        parts = [*(s.net for s in stages), *(s.opt for s in stages), alphas]
    else:
        problem = m, (x, _), _, delta = lease_problem(supernet=True)
        net, alphas = m.explainer, m.alphas
        parts = [net, m.audience, m.explainer_opt, m.audience_opt, alphas, [delta]]
    for w in net.parameters():
        w.grad = torch.ones_like(w)
    before = snapshot(*parts)
    if method == "lpt":
        lpt.outer_gradients(m, batches, **kw)
    elif method == "il":
        il_gradient((stages, alphas, train, val), 1.0)
    else:
        lease_gradient(problem)
    assert same(before, snapshot(*parts))
    net(x, alphas)                                                 # an ordinary pass does change it
    assert not same(before, snapshot(*parts))


def test_passes_of_a_step():
    """As many forward passes as .ci/measurements.md counts."""
    def counted(*modules):
        seen = [0]
        for module in modules:
            module.register_forward_hook(lambda *_: seen.__setitem__(0, seen[0] + 1))
        return seen

    m, batches = smooth_problem()
    testee, tester = counted(m.testee), counted(m.tester)
    lpt.outer_gradients(m, batches)
    assert (testee, tester) == ([4], [6])                          # the tester: 3 x 2 batches
    stages, alphas, train, val = il_problem(3, 2)
    seen = counted(*(stage.net for stage in stages))
    il_gradient((stages, alphas, train, val), 1.0)
    assert seen == [3 * 2 * 3 + 3]
    m, train, val, delta = lease_problem()
    explainer, audience = counted(m.explainer), counted(m.audience)
    lease_gradient((m, train, val, delta))
    assert (explainer, audience) == ([10], [4])


# ---------------------------------------------------------------------------- genotypes and cells

PARAMS = {                              # millions: cifar10, cifar100, imagenet
    "DARTS_V1": (3.169, 3.221, 4.51),
    "DARTS_V2": (3.349, 3.401, 4.719),
    "PDARTS": (3.434, 3.486, 4.944),
    "PC_DARTS_cifar": (3.635, 3.687, 5.271),
    "PC_DARTS_image": (3.722, 3.773, 5.342),
    "LPT_DARTS_1ST_R18_CIFAR100": (2.09, 2.142, 3.261),
    "LPT_DARTS_R18_CIFAR100": (2.116, 2.168, 3.307),
    "LPT_DARTS_R50_CIFAR100": (2.481, 2.533, 3.731),
    "LPT_DARTS_PLUS_R18_CIFAR100": (3.716, 3.768, 5.167),
    "LPT_PDARTS": (3.857, 3.908, 5.446),
    "LPT_PDARTS_R50_CIFAR100": (3.212, 3.264, 4.668),
    "LPT_DARTS_MINUS_R18_CIFAR100": (2.774, 2.826, 4.113),
    "LPT_DARTS_1ST_R18_CIFAR10": (2.702, 2.754, 3.95),
    "LPT_DARTS_R18_CIFAR10": (3.422, 3.474, 4.783),
    "LPT_DARTS_R50_CIFAR10": (3.434, 3.486, 4.866),
    "LPT_DARTS_PLUS_R18_CIFAR10": (3.626, 3.678, 5.013),
    "LPT_DARTS_MINUS_R18_CIFAR10": (3.331, 3.383, 4.75),
    "LPT_PDARTS_R18_CIFAR10": (3.242, 3.293, 4.72),
    "LPT_PC_DARTS_R18_IMAGENET": (4.542, 4.594, 6.223),
    "LPT_PDARTS_CIFAR100_ABLATION_1": (3.787, 3.838, 5.374),
    "LPT_PDARTS_CIFAR100_ABLATION_2": (3.213, 3.265, 4.647),
    "LPT_DARTS_CIFAR10_ABLATION_1": (3.045, 3.097, 4.377),
    "LPT_DARTS_CIFAR10_ABLATION_2": (3.463, 3.514, 4.916),
}


@pytest.mark.parametrize("name", slow_but({1, 9}, list(genotypes.PUBLISHED)))
def test_parameter_counts(name, capsys):
    counts = []
    for dataset in ("cifar10", "cifar100", "imagenet"):
        evaluate.main(["--arch", name, "--dataset", dataset, "--count-params"])
        counts.append(json.loads(capsys.readouterr().out)["params_M"])
    assert tuple(counts) == PARAMS[name]


def test_decoding_by_hand():
    """Rows: an edge each, in the order none max avg skip sep3 sep5 dil3 dil5."""
    alpha = torch.zeros(14, 8)
    alpha[0, 4], alpha[1, 6] = 2, 1                                # node 2 has two edges: both stay
    alpha[2, 0], alpha[3, 3], alpha[4, 5] = 9, 1, 2                # none is no reason to stay
    alpha[5:9] = 0                                                 # all tied: states 0, 1, max_pool
    alpha[9, 2] = alpha[9, 7] = 3                                  # a tie within an edge: the first
    alpha[12, 1], alpha[13, 1] = 1, 1.5                            # three edges compete: 5 <- 0, 4
    cell = ops.decode([alpha, torch.zeros(14, 8)])
    assert cell.normal == [
        ("sep_conv_3x3", 0), ("dil_conv_3x3", 1),
        ("sep_conv_5x5", 2), ("skip_connect", 1),
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("avg_pool_3x3", 0), ("max_pool_3x3", 4)]
    assert cell.reduce == [("max_pool_3x3", s) for _ in range(4) for s in (0, 1)]
    # the softmax comes before the ranking: a large `none` takes from its edge's other operations
    alpha = torch.zeros(14, 8)
    alpha[2, 4], alpha[3, 4], alpha[4, 4] = 3, 2, 1
    alpha[2, 0] = 9
    assert ops.decode([alpha, alpha]).normal[2:4] == [("sep_conv_3x3", 1), ("sep_conv_3x3", 2)]


def test_decoding_with_edge_weights_by_hand():
    """PC-DARTS: an edge counts by its softmaxed weight times its strongest operation."""
    alpha, beta = torch.zeros(14, 8), torch.zeros(14)
    alpha[2, 4], alpha[3, 5], alpha[4, 6] = 3, 2, 2.5              # node 3's edges: 0.74 0.51 0.63
    beta[2], beta[3], beta[4] = -1, 0, 1                           # times 0.09 0.24 0.67
    beta[5], beta[8] = 1, 2                                        # node 4: states 3 and 0
    cell = ops.decode([alpha, alpha, beta, torch.zeros(14)])
    assert cell.normal[2:6] == [("dil_conv_3x3", 2), ("sep_conv_5x5", 1),
                                ("max_pool_3x3", 3), ("max_pool_3x3", 0)]
    assert cell.reduce[2:4] == [("sep_conv_3x3", 0), ("dil_conv_3x3", 2)]
    assert abs(ops.edge_weights(beta)[2:5].sum() - 1) < 1e-6


def test_at_most_two_skip_connections_by_hand():
    """P-DARTS: the weakest skips of the decoded cell go, one at a time; each makes room for its
    edge's next operation or for another edge."""
    alpha = torch.zeros(14, 8)
    skip, sep = genotypes.PRIMITIVES.index("skip_connect"), 4
    for row, value in ((0, 4), (1, 3), (2, 2.0), (3, 1.5), (9, 2.5)):
        alpha[row, skip] = value
    alpha[4, sep] = 0.3                                            # comes in when row 3 goes
    alpha[2, sep] = 1.0                                            # and when row 2's goes
    normal = ops.decode([alpha, alpha]).normal
    assert normal[:4] == [("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 0),
                          ("skip_connect", 1)] and normal[6] == ("skip_connect", 0)
    limited = ops.decode([alpha, alpha], max_skips=2)
    assert limited.normal[:4] == [("skip_connect", 0), ("skip_connect", 1), ("sep_conv_3x3", 0),
                                  ("sep_conv_3x3", 2)]
    assert ("skip_connect", 0) not in limited.normal[6:]
    assert limited.reduce == ops.decode([alpha, alpha]).reduce     # alone is limited


def test_pruning_by_hand():
    """P-DARTS: 8, 5, 3 candidates; the lower index goes first where alphas are equal."""
    names = genotypes.PRIMITIVES
    alpha = torch.zeros(14, 8)
    alpha[0] = torch.tensor([0.5, -1, 2, 0.1, 0.2, -3, 1, 0.3])
    kept = ops.prune([alpha, -alpha], 5)
    assert kept[0][0] == ["none", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_3x3", "dil_conv_5x5"]
    assert kept[1][0] == ["max_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
                          "dil_conv_5x5"]
    assert kept[0][1] == names[3:]
    second = [a.detach() for a in ops.initial_alphas("cpu", kept)]
    for cell, a in zip(kept, second):
        assert [[n for n, v in zip(names, row) if v != ops.DROPPED] for row in a.tolist()] == cell
    assert F.softmax(second[0], -1)[0, 1] == 0
    second[0][0, 0] = -1                                           # `none` goes, of the survivors
    second[0][0, 4] = -2
    assert ops.prune(second, 3)[0][0] == ["avg_pool_3x3", "dil_conv_3x3", "dil_conv_5x5"]
    second[0][0, 0] = 5                                            # strongest, and yet not decoded
    assert "none" not in [op for op, _ in ops.decode(second).normal]


def test_genotypes_as_json_text_and_svg(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in [*genotypes.PUBLISHED, "random:3"]:
        cell = genotypes.load(name)
        (tmp_path / "g.json").write_text(genotypes.to_json(cell))
        assert genotypes.load("g.json") == cell
        genotypes.main([name])
        assert genotypes.to_text(cell) in capsys.readouterr().out
        svg = xml.etree.ElementTree.parse(f"{name.replace(':', '_')}.svg")
        words = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert sorted(w for w in words if w in genotypes.PRIMITIVES) == sorted(
            op for op, _ in cell.normal + cell.reduce)
    assert genotypes.random_cell(1) == genotypes.random_cell(1) != genotypes.random_cell(2)


def test_a_search_as_a_picture():
    alphas = [torch.zeros(14, 8), torch.zeros(14, 8)]
    alphas[0][:7, 4] = math.log(3)                                 # 0.3 on half of the edges
    weights = ops.mean_weights(alphas)
    assert np.allclose(weights["normal"], [0.1125 if o != 4 else 0.2125 for o in range(8)])
    assert np.allclose(weights["reduce"], 1 / 8)
    flat = {"normal": [1 / 8] * 8, "reduce": [1 / 8] * 8}
    history = [{"train_loss": 2.0, "val_accuracy a/<b>": 0.1, "alpha_entropy": 2.08,
                "skip_connections": 1, "mean_weights": flat},
               {"train_loss": 1.0, "val_accuracy a/<b>": 0.5, "alpha_entropy": 2.0, "val_loss": 3.0,
                "skip_connections": 3, "mean_weights": weights}]
    root = xml.etree.ElementTree.fromstring(genotypes.search_svg(history, "a <b> & c"))
    lines = [[[float(v) for v in point.split(",")] for point in line.get("points").split()]
             for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    accuracy, val_loss, train_loss, entropy, skips, *mean = lines
    assert accuracy[1][1] < accuracy[0][1] and train_loss[1][1] > train_loss[0][1]
    assert len(val_loss) == 1 and len(train_loss) == 2             # there was none in epoch 1
    assert entropy[1][1] > entropy[0][1] and skips[1][1] < skips[0][1]
    assert len(mean) == 16 and all(len(line) == 2 for line in mean)
    assert mean[0][1][1] < mean[1][1][1] == mean[7][1][1]          # the strongest is on top
    assert len({line[0][1] for line in mean[:8]}) == 1             # all began alike
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "<b> 0.5" in texts and "sep_conv_3x3 0.213" in texts


@slow
def test_a_search_prefers_what_the_data_needs(tmp_path, monkeypatch):
    """On `synthetic`, cells of skip connections or average pools alone fail where others do not;
    first-order DARTS' --quick search turns away from both, from seeds 1 to 3 alike."""
    def test_error(name):
        edges = [(name, state) for _ in range(4) for state in (0, 1)]
        cell = genotypes.Genotype(edges, [2, 3, 4, 5], edges, [2, 3, 4, 5])
        (tmp_path / name).with_suffix(".json").write_text(genotypes.to_json(cell))
        assert run_script(evaluate, "--arch", tmp_path / f"{name}.json", "--quick", "--dataset",
                          "synthetic", "--image-size", 16, "--out", tmp_path / name) == 0
        return json.loads((tmp_path / name / "result.json").read_text())["test_error"]

    monkeypatch.undo()                                             # all images, not make_small's
    need_not = "avg_pool_3x3", "skip_connect"
    assert min(map(test_error, need_not)) > 50 > 40 > test_error("max_pool_3x3")
    assert run_script(il, "--tasks", "synthetic", "--rounds", 1, "--coupling", 0, "--quick",
                      "--out", tmp_path / "search") == 0
    last = json.loads((tmp_path / "search" / "log.jsonl").read_text().splitlines()[-1])
    weights = dict(zip(genotypes.PRIMITIVES, map(sum, zip(*last["mean_weights"].values()))))
    unwanted = sum(weights.pop(name) for name in need_not) / 2
    assert unwanted < 0.9 * min(weights.values())


def test_summary_of_results(tmp_path, capsys):
    """Means and deviations by hand; the papers' values by their rows; what is no result."""
    def write(name, **changes):
        (tmp_path / name).mkdir()
        result = {"cell": "LPT-R18-DARTS-2nd", "dataset": "cifar100", "data": "cifar100",
                  "test_error": 20.0, "params_M": 2.0, "layers": 20, "channels": 36, "epochs": 600,
                  "search": {"lam": 1.0, "gamma": 1.0}, "search_seconds": 86400.0,
                  "training": {"lr": 0.025}} | changes
        (tmp_path / name / "result.json").write_text(json.dumps(result))

    write("a"), write("b", test_error=21.0, params_M=3.0), write("c", test_error=22.0)
    write("d", cell="LPT_PDARTS", test_error=16.5), write("e", cell="random", epochs=5)
    write("f", cell="LPT_PDARTS", data="cifar10", dataset="cifar10")
    assert run_script(evaluate, "--summary", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    line = "cifar100 | 20 cells, C 36, 600 epochs | 21.00 ± 1.00 | 3 | 2.33 | 1 | 19.47±0.20 |"
    assert f"| LPT-R18-DARTS-2nd | {line}" in lines and len(lines) == 4
    assert sum("| 16.28±0.10 |" in each for each in lines) == 1    # where the cell was searched
    write("h", search={"lam": 0.5, "gamma": 1.0})                  # two searches of one name
    assert run_script(evaluate, "--summary", tmp_path) == 0
    page = capsys.readouterr().out
    assert f"| LPT-R18-DARTS-2nd, lam 1.0 | {line}" in page and "2nd, lam 0.5 | cifar100" in page
    write("i", cell="LPT_PDARTS", training={"lr": 0.1})            # other settings, same network
    assert run_script(evaluate, "--summary", tmp_path) == 0
    assert "| LPT_PDARTS, evaluate lr 0.1 | cifar100" in capsys.readouterr().out
    (tmp_path / "g").mkdir()
    assert run_script(evaluate, "--summary", tmp_path / "a", tmp_path / "g") == 2
    for text in ("", "[]", "{}", '{"layers": 1, "channels": 1, "epochs": 1, "data": [],'
                 '"cell": 1, "search": 1, "training": {}}'):
        (tmp_path / "g" / "result.json").write_text(text)
        capsys.readouterr()
        assert run_script(evaluate, "--summary", tmp_path) == 2
        assert capsys.readouterr().err.count("\n") == 1
    rows = [genotypes.row("lpt", {"base": "pdarts", "encoder": "resnet50", "ablation": 0}),
            genotypes.row("lease", {"base": "darts-2nd", "audience": "resnet18"}),
            genotypes.row("il", {"base": "pcdarts", "tasks": "ab", "rounds": 2, "joint": False}),
            genotypes.row("il", {"base": "darts-2nd", "tasks": ["a"], "rounds": 1, "joint": False}),
            genotypes.row("lpt", {"base": "pdarts", "encoder": "resnet18", "ablation": 2})]
    assert [genotypes.paper_error(name, "cifar100") for name in rows] == [
        "16.38±0.07", "19.26", "17.83±0.14", "20.58±0.44", "17.54±0.07"]
    for name in genotypes.PUBLISHED:                               # the authors' cells have rows
        data = "imagenet" if "IMAGENET" in name else "cifar10" if "CIFAR10_" in f"{name}_" else (
            "cifar100")
        assert ("±" in genotypes.paper_error(name, data) or genotypes.paper_error(name, data)
                == "23.4") == name.startswith("LPT_"), name


def test_the_readme_has_its_files_and_the_papers_errors():
    assert sum(map(len, readme_commands())) > 20                   # which are tried below
    for page in PAGES:
        assert all((page.parent / to).exists()
                   for to in re.findall(r"\]\(([^):]+)\)", page.read_text()))
    printed = PAGES[1].read_text().splitlines()
    for name, errors in genotypes.PAPER.items():
        row, = (line.strip("| ").split(" | ") for line in printed if line.startswith(f"| {name} |"))
        assert [cell.split(" (")[0] for cell in row[1:1 + len(errors)]] == list(errors)


def test_network_sizes_and_auxiliary_head():
    cell = genotypes.load("LPT_PDARTS")
    for size in (28, 30, 32, 33, 48, 64, 96):
        network = evaluate.Network(cell, 4, 7, 3, size=(size, size))
        logits, auxiliary = network(torch.randn(2, 3, size, size))
        assert logits.shape == auxiliary.shape == (2, 7)
        without = evaluate.Network(cell, 4, 7, 3, auxiliary=False)
        assert evaluate.count_params(network) == evaluate.count_params(without)
        network.eval()
        assert network(torch.randn(1, 3, size, size))[1] is None
    wide = evaluate.Network(cell, 8, 7, 3, imagenet=True, size=(64, 64))
    assert wide(torch.randn(2, 3, 64, 64))[1].shape == (2, 7)


def test_a_trained_network_in_ones_own_code(tmp_path, monkeypatch, capsys):
    """The README's lines, whose answers are those that the run was tested by."""
    monkeypatch.chdir(tmp_path)
    assert run_script(evaluate, *TINY, "--arch", "random:1", "--epochs", 1, "--out",
                      "runs/network") == 0
    result = json.loads(Path("runs/network/result.json").read_text())
    assert f"test error {result['test_error']:.2f}% after" in capsys.readouterr().out
    block, = [b for b in python_blocks() if "evaluate.load" in b]
    test = ops.synthetic(3, 8, "cpu", test=True)
    scope = {"image": test.images[-1]}
    exec(block, scope)
    logits, class_named = scope["logits"], capsys.readouterr().out.splitlines()[-1]
    assert class_named == test.classes[logits.argmax()]
    network, transform = scope["network"], scope["transform"]
    found = torch.cat([network(transform(image)[None])[0] for image in test.images])
    assert torch.equal(found[-1:], logits)
    wrong = (found.argmax(1) != test.labels).double().mean().item()
    assert 100 * wrong == pytest.approx(result["test_error"], abs=1e-3)
    assert logits.shape == (1, 3) and not network.training
    pil = torchvision.transforms.functional.to_pil_image(test.images[-1])
    assert torch.equal(network(transform(pil)[None])[0], logits)
    before = (Path("runs/network/checkpoint.pt").read_bytes(), capsys.readouterr())[0]
    assert run_script(evaluate, "--resume", "--device", "cpu", "--out", "runs/network") == 0
    assert "tested again" in capsys.readouterr().out              # of a run that has ended
    assert json.loads(Path("runs/network/result.json").read_text()) == result
    assert Path("runs/network/checkpoint.pt").read_bytes() == before
    assert run_script(lpt, *TINY, "--epochs", 1, "--out", "runs/search") == 0
    for folder, word in (("runs/search", "a run of lpt.py"), ("runs/none", "there is no")):
        with pytest.raises(ops.BadInput, match=word):
            evaluate.load(folder)


PAGES = HERE / "README.md", HERE / ".ci" / "measurements.md"


def python_blocks():
    return re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)


def test_a_fourth_skill():
    """The README's formulation: its gradients are those of the finite differences of its value."""
    block, = [b for b in python_blocks() if "def formulation" in b]
    torch.manual_seed(0)
    net, theta = SmoothTestee().double(), torch.zeros(20, dtype=torch.float64).requires_grad_()
    opt = torch.optim.SGD(net.parameters(), 0.1)
    train, (x, y, _) = smooth_batches(2)
    scope = dict(torch=torch, F=F, **{name: getattr(ops, name) for name in (
        "Stage", "call", "sgd_step", "skillearn")}, net=net, opt=opt, alphas=smooth_alphas(),
        theta=theta, train=train, val=(x, y))
    exec(block, scope)
    (g_theta,), eps, value = scope["g_theta"], 1e-5, {}
    for row in train[2][:3].tolist():
        for sign in (1, -1):
            with torch.no_grad():
                theta[row] += sign * eps
            value[sign] = ops.skillearn(*scope["formulation"](*(scope[name] for name in (
                "net", "opt", "alphas", "theta", "train", "val"))), exact=False)[0][0].item()
            with torch.no_grad():
                theta[row] -= sign * eps
        assert g_theta[row].item() == pytest.approx((value[1] - value[-1]) / (2 * eps), rel=1e-4)
    assert any(g.abs().max() > 0 for g in scope["g_alpha"])


def test_drop_path_drops_whole_paths_and_keeps_the_mean():
    torch.manual_seed(0)
    cell = evaluate.Cell(genotypes.load("LPT_PDARTS"), 4, 4, 4, False, False)
    x = torch.randn(4, 4, 8, 8)
    assert torch.equal(cell(x, x, 0.0), cell(x, x, 0.0))
    assert not torch.equal(cell(x, x, 0.5), cell(x, x, 0.0))
    cell.eval()
    assert torch.equal(cell(x, x, 0.5), cell(x, x, 0.0))


# ------------------------------------------------------------------------------------------ bases


def test_skip_dropout_is_one_mask_a_step():
    torch.manual_seed(0)
    net = ops.Supernet(4, 5, 3)
    alphas = [nn.Parameter(a) for a in ops.initial_alphas("cpu")]
    x, knobs = torch.randn(2, 3, 16, 16), net.knobs
    plain = net(x, alphas)
    knobs.skip_dropout = 0.5
    torch.manual_seed(1)
    once = net(x, alphas)
    assert torch.equal(once, net(x, alphas)) and not torch.equal(once, plain)
    torch.manual_seed(2)
    assert not torch.equal(once, net(x, alphas))
    net.eval()
    assert torch.equal(net(x, alphas), net(x, alphas))
    edges = ops.MixedEdges(2, [["none", "skip_connect"]] * 3, 1, ops.Knobs(skip_dropout=0.25))
    p = torch.zeros(3, 8)
    p[:, 3] = torch.tensor([0.1, 0.2, 0.3])
    edges.knobs.generator = torch.Generator().manual_seed(0)
    outs = edges(torch.ones(8, 2, 32, 32), p).chunk(3, 1)
    for out, weight in zip(outs, p[:, 3]):                         # a mask per edge, the mean kept
        assert torch.allclose(out.unique(), torch.tensor([0, weight / 0.75]))
        assert abs(out.mean() - weight) < 0.02
    assert not torch.equal(outs[0] > 0, outs[1] > 0)


def test_schedules_of_the_bases():
    def values(base, epochs, **changes):
        args = argparse.Namespace(**ops.BASES[base] | dict(seed=1, epochs=epochs) | changes)
        net, found = ops.Supernet(4, 5, 3), []
        opt, other = (torch.optim.SGD(net.parameters(), 1) for _ in range(2))
        for stage in range(len(args.layers)):
            for epoch in range(epochs):
                learns = ops.schedule(args, stage, epoch, [net], [opt], other, 0.5)
                found.append((learns, opt.param_groups[0]["lr"], net.knobs.auxiliary,
                              net.knobs.skip_dropout, other.param_groups[0]["lr"]))
        return list(zip(*found))

    learns, lr, auxiliary, dropout, _ = values("darts-", 50)
    assert all(learns) and auxiliary[0] == 1 and auxiliary[-1] == 0 and not any(dropout)
    assert np.allclose(np.diff(auxiliary), -1 / 49) and (lr[0], round(lr[49], 4)) == (0.025, 0.001)
    learns, lr, auxiliary, dropout, over_all = values("pdarts", 25)
    assert learns == ((False,) * 10 + (True,) * 15) * 3 and not any(auxiliary)
    assert np.isclose(dropout[25], 0.4 * 24 / 25) and np.isclose(dropout[34], 0.4 * 15 / 25)
    assert np.isclose(dropout[60], 0.7) and np.isclose(dropout[62], 0.7 * np.exp(-0.4))
    assert lr[0] == lr[25] == 0.025 and lr[24] < 2e-4
    assert np.allclose(over_all, 0.25 + 0.25 * np.cos(np.pi * np.arange(75) / 75))    # one cosine
    learns, lr, *_ = values("pcdarts", 50)
    assert learns == (False,) * 15 + (True,) * 35 and lr[0] == 0.1
    imagenet = lpt.get_args(["--dataset", "imagenet", "--base", "pcdarts"])[0]
    assert (imagenet.lr, imagenet.alpha_lr, imagenet.batch_size, imagenet.warm_up,
            imagenet.subsets, imagenet.image_size) == (0.5, 6e-3, 1024, 35, [0.1, 0.025], 224)


@pytest.mark.parametrize("module,base,expected", [
    (lpt, "darts-2nd", (2, 64, 0.025, 3e-4)), (lpt, "darts-1st", (1, 64, 0.025, 3e-4)),
    (lpt, "pcdarts", (1, 64, 0.1, 6e-4)), (lpt, "pdarts", (1, 64, 0.025, 6e-4)),
    (il, "darts-2nd", (2, 64, 0.025, 3e-5)), (il, "pcdarts", (1, 256, 0.1, 3e-3)),
    (il, "pdarts", (1, 64, 0.025, 6e-4)), (lease, "darts+", (1, 64, 0.025, 3e-4))],
    ids=lambda v: getattr(v, "__name__", str(v)))
def test_recipes(module, base, expected):
    args, _ = module.get_args(["--base", base])
    assert (args.order, args.batch_size, args.lr, args.alpha_lr) == expected
    args, _ = module.get_args(["--base", base, "--order", "2", "--lr", "0.5"])
    assert (args.order, args.lr, args.alpha_lr) == (2, 0.5, expected[3])
    waits = ops.BASES[base]["warm_up"] or (1 if module is lease else 0)
    assert args.warm_up == waits                                   # LeaSE's departure 9


SEARCH = dict(channels=16, momentum=0.9, weight_decay=3e-4, grad_clip=5, alpha_weight_decay=1e-3,
              radius=0.01, epochs=50, layers=[8], lr_min=0.001)
EVALUATE = dict(layers=20, channels=36, epochs=600, batch_size=96, lr=0.025, decay="cosine",
                momentum=0.9, weight_decay=3e-4, grad_clip=5, cutout=16, auxiliary_weight=0.4,
                warm_up=0, label_smoothing=0)


@pytest.mark.parametrize("module,argv,expected", [
    (lpt, [], SEARCH | dict(lam=1, gamma=1, tester_lr=0.025, creator_lr=3e-4,
                            creator_weight_decay=1e-3, encoder="resnet18")),      # §3.2.2
    (il, [], SEARCH | dict(lam=100, rounds=2, tasks=["cifar100", "cifar10"])),    # §4.3.1
    (lease, [], SEARCH | dict(gamma=1, audience_lr=0.025, audience="resnet18")),  # LeaSE §3.2
    (evaluate, ["--arch", "LPT_PDARTS"], EVALUATE),                               # DARTS §A.2
    (evaluate, ["--arch", "LPT_PDARTS", "--dataset", "imagenet"], EVALUATE | dict(
        layers=14, channels=48, epochs=250, batch_size=1024, lr=0.5, decay="linear", cutout=0,
        weight_decay=3e-5, warm_up=5, label_smoothing=0.1, drop_path=0))])        # P-DARTS §4.3
def test_the_papers_settings_are_the_defaults(module, argv, expected):
    args = vars(module.get_args(argv)[0])
    assert {name: args[name] for name in expected} == expected


def test_help_shows_the_defaults_of_the_chosen_base(capsys):
    with pytest.raises(SystemExit):
        lpt.main(["--help", "--base", "pdarts"])
    assert "(default: [5, 11, 17])" in " ".join(capsys.readouterr().out.split())


# ----------------------------------------------------------------------------- images and streams


def test_streams_are_pure_shuffled_and_independent():
    data = ops.synthetic(10, 8, "cpu")
    train, val, held = ops.split_rows(data.labels, seed=3, hold_out=100)
    assert sorted([*train, *val, *held]) == list(range(2000)) and len(train) == len(val) == 950
    assert np.array_equal(held, ops.split_rows(data.labels, seed=4, hold_out=100)[2])
    assert not np.array_equal(train, ops.split_rows(data.labels, seed=4, hold_out=100)[0])
    streams = [ops.Stream(data, val, 64, 3, name) for name in ("bank", "val", "bank")]
    drawn = [torch.cat([s(i)[2] for i in range(streams[0].epoch_steps())]) for s in streams]
    assert sorted(drawn[0][:950].tolist()) == sorted(val)          # each image once a pass
    assert sorted(streams[0].rows) == sorted(torch.cat([drawn[0][950:], streams[0](15)[2],
                                                        *(streams[0](i)[2] for i in range(16, 31))])
                                             [:950].tolist())      # and once in the next, which
    assert not torch.equal(drawn[0], drawn[1])                     # runs on across batches
    for step in (40, 3):                                           # any order of asking
        for a, b in zip(streams[0](step), streams[2](step)):
            assert torch.equal(a, b)
    other = ops.Stream(data, val, 64, 4, "bank")
    assert not torch.equal(other(0)[2], streams[0](0)[2])


def test_augmentation_is_a_crop_flip_and_cutout_of_each_image():
    data = ops.synthetic(10, 16, "cpu")
    rows = torch.arange(64)
    plain, mean, std = data.images[rows], data.mean, data.std
    def read(*request):
        return next(data.read([ops.Request(rows.numpy(), *request)]))[0]

    assert torch.allclose(read(), (plain / 255 - mean) / std, atol=1e-6)
    got = read((0,)) * std + mean
    padded, found = F.pad(plain, (2,) * 4) / 255, set()
    for i in range(64):                                            # find each image's own crop
        hits = [(dy, dx, flip) for dy in range(5) for dx in range(5) for flip in (0, 1)
                if torch.allclose((padded[i, :, dy:dy + 16, dx:dx + 16].flip(-1) if flip else
                                   padded[i, :, dy:dy + 16, dx:dx + 16]), got[i], atol=1e-5)]
        assert len(hits) == 1
        found.add(hits[0])
    assert len(found) > 30                                         # drawn per image, not per batch
    assert {f for _, _, f in found} == {0, 1} and {d for d, _, _ in found} == set(range(5))
    cut = read((0,), slice(None), 6)
    holes = (cut == 0).all(1) & ~((got - mean) / std == 0).all(1)
    assert (holes.sum((1, 2)) <= 36).all() and (holes.sum((1, 2)) == 36).any()
    for hole in holes:
        ys, xs = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
        assert hole.sum() == (ys[-1] - ys[0] + 1) * (xs[-1] - xs[0] + 1) > 0


def synthetic_truth(classes, size, n=2000):
    """The right labels of synthetic's training images: its first draw."""
    return torch.from_numpy(np.random.default_rng([classes, size, False]).integers(classes, size=n))


def test_synthetic_images_have_a_few_wrong_labels_and_fixed_content():
    a, b = ops.synthetic(10, 16, "cpu"), ops.synthetic(10, 16, "cpu")
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert 0.02 < (a.labels != synthetic_truth(10, 16)).double().mean() < 0.06
    assert len(ops.synthetic(3, 16, "cpu").labels.unique()) == 3


def write_cifar(root, monkeypatch, kind="CIFAR10", n=40):
    """A small CIFAR in the original format, its checksums patched into torchvision's class; returns
    the pixels of its test images, (n, 3072)."""
    source = getattr(torchvision.datasets, kind)
    folder, rng, pixels = root / source.base_folder, np.random.default_rng(0), []
    folder.mkdir(parents=True)
    fine = kind == "CIFAR100"
    names = [f"class{i}" for i in range(100 if fine else 10)]

    def dump(name, value):
        (folder / name).write_bytes(pickle.dumps(value))
        return [name, torchvision.datasets.utils.calculate_md5(folder / name)]

    def part(k):
        pixels.append(rng.integers(0, 256, (n, 3072), dtype=np.uint8))
        return {"data": pixels[-1],
                "fine_labels" if fine else "labels": [(k + i) % len(names) for i in range(n)]}

    lists = {key: [dump(name, part(k)) for k, (name, _) in enumerate(getattr(source, key))]
             for key in ("train_list", "test_list")}
    meta = dump(source.meta["filename"], {source.meta["key"]: names})
    for key, value in lists.items():
        monkeypatch.setattr(source, key, value)
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": meta[1]})
    return pixels[-1]                                              # the test part is the last


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_cifar_files(kind, tmp_path, monkeypatch):
    pixels = write_cifar(tmp_path, monkeypatch, kind)
    train = ops.load_images(kind.lower(), tmp_path, "cpu")
    test = ops.load_images(kind.lower(), tmp_path, "cpu", test=True)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 32, 32)
    assert torch.equal(test.images.flatten(1), torch.from_numpy(pixels))
    assert torch.allclose(train.mean.flatten(), (train.images / 255.).mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(train.std.flatten(), (train.images / 255.).std((0, 2, 3)), atol=1e-4)


def offline(*args, **kwargs):
    raise OSError("no network")


class Malicious:
    """Unpickled, it calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def write_folder(root, sizes=(12,), classes=("cat", "dog"), n=12, parts=("train", "test")):
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                size = sizes[i % len(sizes)]
                shape = size, size + 2 * (len(sizes) > 1), 3
                pixels = ops.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                pixels.save(root / part / name / f"{i}.png")
    return root


def test_folder_of_images(tmp_path):
    root = write_folder(tmp_path / "a")
    data = ops.load_images("folder", root, "cpu")
    assert data.images.shape == (24, 3, 12, 12) and data.classes == ["cat", "dog"]
    first = np.asarray(ops.Image.open(root / "train" / "cat" / "0.png"))
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), first)
    mixed = write_folder(tmp_path / "b", sizes=(12, 20), parts=("train", "val"))
    assert ops.load_images("folder", mixed, "cpu", 16).images.shape == (24, 3, 16, 16)
    assert ops.load_images("folder", mixed, "cpu", 16, test=True).images.shape == (24, 3, 16, 16)
    with pytest.raises(ops.BadInput, match="--image-size"):
        ops.load_images("folder", mixed, "cpu")


# --------------------------------------------------------------------------------------- the runs

SMALL = ["--image-size", "8", "--layers", "3", "--channels", "2", "--batch-size", "50",
         "--device", "cpu"]
FILES = {"genotype.json", "checkpoint.pt", "checkpoint.previous.pt", "cells.svg", "search.svg",
         "log.jsonl"}
TINY = ["--dataset", "synthetic:3", *SMALL]
LEASE = [*TINY, "--warm-up", 0]
FIRST = ["--order", 1]                  # where a search, and not its gradient, is tested


class SmallResNet(nn.Sequential):
    """In place of ResNet-18 and ResNet-50, where a test runs a script."""

    def __init__(self, name, weights=None, num_classes=1000):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, num_classes)


def make_small(replace=setattr):
    """200 synthetic images for training and 100 for testing, and a small ResNet."""
    synthetic = ops.synthetic

    def few(classes, size, device, test=False):
        data = synthetic(classes, size, device, test)
        n = 100 if test else 200
        data.images, data.labels = data.images[:n], data.labels[:n]
        return data

    replace(ops, "synthetic", few)
    replace(torchvision.models, "get_model", SmallResNet)


@pytest.fixture(autouse=True)
def small_runs(request, monkeypatch):
    if os.environ.get("RUN_SLOW") == "only" and slow.mark not in request.node.iter_markers():
        pytest.skip("RUN_SLOW=only: the slow cases, for who has run the others")
    torch.set_num_threads(1)            # networks this small do not gain by a second, which waits
    if "tmp_path" in request.fixturenames:
        make_small(monkeypatch.setattr)


def run_script(module, *argv):
    """The exit code of a script run in this process."""
    try:
        ops.run(module.main, [str(a) for a in argv])
    except SystemExit as stop:
        return stop.code
    return 0


def tree(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("module,extra,picture", slow_but({0, 3, 6}, [
    (lpt, TINY, "tests.png"), (lpt, [*TINY, "--ablation", 1], "tests.png"),
    (lpt, [*TINY, "--ablation", 2], "tests.png"),
    (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2", "--rounds", 1], None),
    (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2"], None),
    (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2", "--joint", "--order", 1], None),
    (lease, LEASE, "explanations-1.png"),
    (lease, [*LEASE, "--order", 1, "--weighting", "magnitude"], "explanations-1.png")]),
    ids=["lpt", "ablation 1", "ablation 2", "il", "two rounds", "joint", "lease", "lease order 1"])
def test_search_then_evaluation(module, extra, picture, tmp_path, monkeypatch, capsys):
    """The search's last line is the command that trains its cell."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert run_script(module, *extra, "--batch-size", 100, "--epochs", 1, "--out", run) == 0
    assert {p.name for p in run.iterdir()} == {*FILES, *([picture] if picture else [])}
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert command[:2] == ["python", "evaluate.py"] and "synthetic" in command[5]
    line = json.loads((run / "log.jsonl").read_text())
    if module is lpt:
        assert line["epoch"] == 1 and 0 < line["selection"] < 1 and 0 <= line["val_accuracy"] <= 1
        assert ops.Image.open(run / "tests.png").size[0] > 1000
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    if module is il:                                               # a learner per task and round
        nets, args = {name.split(".")[0] for name in state["parts"]["nets"]}, state["args"]
        assert len(nets) == 2 * (1 if args["joint"] else args["rounds"])
    small = ["--layers", 3, "--channels", 2, "--epochs", 1, "--batch-size", 50, "--out", "e"]
    assert run_script(evaluate, *command[2:], *small) == 0
    result = json.loads((tmp_path / "e" / "result.json").read_text())
    assert 0 <= result["test_error"] <= 100 and result["test_images"] == 100


METHODS = "lpt", "il", "lease"
RUNS = {"lpt": (lpt, TINY), "lease": (lease, LEASE),
        "il": (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2", "--rounds", 1]),
        "evaluate": (evaluate, [*TINY, "--arch", "random:1"])}
PRUNED = ["--base", "pdarts", "--layers", 3, 4, "--epochs", 1, "--warm-up", 0, "--candidates", 8, 5,
          "--skip-dropout", 0.3, 0.3]


def search(method, *argv):
    module, given = RUNS[method]
    return run_script(module, *given, *argv)


@pytest.mark.parametrize("method,base", [
    pytest.param(method, base, marks=() if (method, base) in (("lpt", "pcdarts"), ("lpt", "pdarts"))
                 else slow)
    for method in METHODS for base in ops.BASES])
def test_every_base_in_every_method(method, base, tmp_path, monkeypatch, capsys):
    seen, new_stage = [], ops.new_stage
    monkeypatch.setattr(ops, "new_stage", lambda *a: seen.append(new_stage(*a)) or seen[-1])
    changes = {"pdarts": ["--layers", 3, 3, 3], "pcdarts": ["--channels", 8]}.get(base, [])
    warm_up = ["--warm-up", 1] if ops.BASES[base]["warm_up"] else []
    run = tmp_path / "run"
    assert search(method, "--base", base, *changes, *warm_up, "--batch-size", 100, "--epochs", 2,
                  "--out", run) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    out = capsys.readouterr().out
    assert ("--drop-path 0.3" in out.splitlines()[-1]) == (base in ("pdarts", "pcdarts"))
    if base == "pdarts":
        assert [len(state["run"]["kept"][0][e]) for e in range(14)] == [3] * 14
        assert all(f"{n} candidates" in out for n in (8, 5, 3)) and len(lines) == 6
    if base == "darts-":                                           # its auxiliary skips have gone
        net = seen[0][0][0]
        assert net.knobs.auxiliary == 0 and any("auxiliary" in name for name, _ in
                                                net.named_parameters())
    assert ("difficulty" in lines[0] or "val_loss" in lines[0]) == (not warm_up)
    assert "difficulty" in lines[-1] or "val_loss" in lines[-1]
    alphas = [t for name, t in state["parts"]["outer"].items() if t.shape in ((14,), (14, 8))]
    assert len(alphas) == (4 if base == "pcdarts" else 2)
    if base == "pcdarts":                                          # beta learns, and is decoded
        assert state["parts"]["alpha_opt"]["state"][2]["exp_avg"].abs().max() > 0
    cell = genotypes.load(str(run / "genotype.json"))
    assert cell == ops.decode(alphas, 2 if base == "pdarts" else 8)
    assert {op for op, _ in cell.normal + cell.reduce} <= set(genotypes.PRIMITIVES[1:])


@slow
def test_pdarts_grows_to_17_cells(tmp_path, capsys):
    assert search("il", "--base", "pdarts", "--layers", 5, 11, 17, "--epochs", 1, "--warm-up", 0,
                  "--joint", "--out", tmp_path / "run") == 0
    out = capsys.readouterr().out
    for stage, cells, kept in ((1, 5, 8), (2, 11, 5), (3, 17, 3)):
        assert f"stage {stage} of 3: {cells} cells, {kept} candidates an edge" in out
    parts = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    assert max(int(name.split(".")[2]) for name in parts["nets"] if ".cells." in name) == 16


def test_epochs_without_architecture_leave_both_players_alone(tmp_path, monkeypatch):
    states, write_checkpoint = [], ops.write_checkpoint
    monkeypatch.setattr(ops, "write_checkpoint", lambda folder, content: (
        states.append(copy.deepcopy(content["parts"])),
        write_checkpoint(folder, content)))
    assert search("lpt", *FIRST, "--warm-up", 1, "--epochs", 2, "--out", tmp_path / "run") == 0
    _, first, second = states                                      # the first is of the beginning
    alpha = [first["outer"]["0"], first["outer"]["2"]]
    assert alpha[0].abs().max() < 6e-3 and not first["alpha_opt"]["state"]        # as they began
    assert not first["creator_opt"]["state"] and second["creator_opt"]["state"]
    assert not torch.equal(first["outer"]["2"], second["outer"]["2"])
    assert not torch.equal(first["outer"]["0"], second["outer"]["0"])
    assert first["tester_opt"]["state"] and first["testee_opt"]["state"]


def test_darts_plus_stops_at_planted_skips(tmp_path, monkeypatch, capsys):
    def planted(*args):
        alphas = initial(*args)
        with torch.no_grad():
            alphas[0][:2, 3] += 2                                  # both edges into node 2
        return alphas

    initial, run = ops.initial_alphas, tmp_path / "run"
    monkeypatch.setattr(ops, "initial_alphas", planted)
    assert search("lpt", "--base", "darts+", "--epochs", 3, "--out", run) == 0
    out = capsys.readouterr().out
    assert "the search ends here: the normal cell has" in out and "Train it" in out
    line, = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert "skip connections" in line["stopped"]
    assert sum(op == "skip_connect" for op, _ in genotypes.load(str(run / "genotype.json")).normal
               ) >= 2
    assert run_script(lpt, "--device", "cpu", "--resume", "--out", run) == 0     # and stays so
    assert len((run / "log.jsonl").read_text().splitlines()) == 1


def finals(folder):
    """What a run ended with and where that is, its durations left out."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for line in [state["run"], *state["run"]["history"]]:
        line.pop("seconds")
    return flat(state)


def flat(state):
    """Its values and where each of them is."""
    found = {str(path): value for path, value in tree_flatten_with_path(state)[0]}
    return [part for path in sorted(found) for part in (path, found[path])]


@pytest.mark.parametrize("module,picture", slow_but({0}, [
    (lpt, "tests.png"), (lease, "explanations.png")]))
def test_tensorboard_has_the_log_and_the_pictures(module, picture, tmp_path, monkeypatch, capsys):
    argv = [*TINY, *FIRST, "--epochs", 2, "--tensorboard", "--out"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run_script(module, *argv, tmp_path / "none") == 2 and not (tmp_path / "none").exists()
    assert "pip install tensorboard" in capsys.readouterr().err
    scalars, images = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "run" and purge_step == 0

        def add_scalar(self, *what):
            scalars.append(what)

        def add_image(self, name, pixels, step, dataformats):
            images.append((name, pixels.shape[2], step, dataformats))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=SummaryWriter))
    assert run_script(module, *argv, tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line.pop("mean_weights")
        assert {(f"epoch/{k}", v, 2 * i + 1) for k, v in line.items()} <= set(scalars)
    assert len({step for name, _, step in scalars if name == "step/train_loss"}) == 4
    assert images == [(picture, 3, 1, "HWC"), (picture, 3, 3, "HWC")]


@pytest.mark.parametrize("module,extra", slow_but({4}, [            # lpt's are killed below
    (lpt, [*TINY, "--hold-out", 50]), (lpt, [*TINY, "--ablation", 1]),
    (il, [*SMALL, "--tasks", "synthetic:3", "synthetic:2"]), (lease, LEASE),
    (evaluate, [*TINY, "--arch", "random:1", "--drop-path", 0.5, "--hold-out", 60]),
    (lpt, [*TINY, "--gradient", "exact", "--created-test", "normalized"]),
    (il, [*SMALL, "--tasks", "synthetic:3", "--gradient", "exact"]),
    (lease, [*LEASE, "--gradient", "exact"])]), ids=[
        "lpt", "ablation 1", "il", "lease", "evaluate", "lpt exact", "il exact", "lease exact"])
def test_resume_equals_an_uninterrupted_run(module, extra, tmp_path, monkeypatch):
    """And an uninterrupted one of another seed is another."""
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    epochs = 3 if module is evaluate else 2                        # drop-path begins in the second
    argv = [*extra, "--epochs", epochs]
    assert run_script(module, *argv, "--out", whole) == 0
    interrupted(module, argv, cut, monkeypatch, [epochs])         # in the last epoch
    assert run_script(module, "--device", "cpu", "--out", cut, "--resume") == 0
    a, b = finals(whole), finals(cut)
    assert same(a, b) and len(a) > 20
    assert run_script(module, "--out", cut, "--resume", "--seed", 2) == 2
    assert run_script(module, *argv, "--seed", 2, "--out", other) == 0
    weights = [[t for t in found if torch.is_tensor(t) and t.is_floating_point()]
               for found in (a, finals(other))]
    assert not same(*weights)


BAD = [
    (lpt, ["--dataset", "mnist"]), (lpt, ["--dataset", "synthetic:1"]), (lpt, ["--base", "enas"]),
    (lpt, ["--order", 3]), (lpt, ["--encoder", "vgg"]), (lpt, ["--epochs", 0]),
    (lpt, ["--gamma", "inf"]), (lpt, ["--layers", 2]), (lpt, ["--nonsense"]),
    (lpt, [*TINY, "--batch-size", 5000]), (lpt, ["--resume", "--out", "nowhere"]),
    (lpt, ["--dataset", "folder", "--data", "nowhere"]),
    (lpt, ["--dataset", "imagenet", "--data", "nowhere"]),
    (lpt, ["--dataset", "cifar10", "--image-size", 64]), (lpt, ["--dataset", "cifar100"]),
    (lpt, ["--dataset", "folder", "--data", "empty"]),
    (lpt, ["--dataset", "folder", "--data", "corrupt"]),
    *((lpt, [*TINY, "--epochs", 1, *wrong]) for wrong in (
        ["--gradient", "exact", "--amp", "bf16-all"], ["--layers", 3, 4], ["--warm-up", 1],
        ["--channels", 3], ["--batch-size", 2, "--subsets", 0.9, 0.2],
        ["--batch-size", 2, "--subsets", 0, 0.5],
        ["--base", "pdarts", "--layers", 3, 3, 3, "--candidates", 3, 5, 8, "--warm-up", 0])),
    (lpt, [*TINY, "--hold-out", 5000]), (lpt, [*TINY, "--epochs", 1, "--out", "full"]),
    (il, ["--tasks"]), (il, ["--tasks", "cifar10", "imagenet"]), (il, ["--rounds", 0]),
    (il, ["--tasks", "cifar100", "nothing"]),
    (il, [*SMALL, "--tasks", "synthetic:3", "--step", "printed"]),
    (il, [*SMALL, "--tasks", "synthetic:3", "--step", "printed", "--lr", 0.004, "--lr-min", 0.006]),
    (il, ["--tasks", "folder:corrupt/train", "synthetic:3"]),
    (il, ["--tasks", "folder:untested", "synthetic:3"]),
    (lease, ["--weighting", "unsigned"]), (lease, ["--audience", "vgg"]),
    (lease, ["--dataset", "folder:nowhere"]), (lease, [*TINY, "--delta-scale", 0]),
    (evaluate, []), (evaluate, ["--arch", "NOPE"]), (evaluate, ["--arch", "random:x"]),
    (evaluate, ["--arch", "full"]),
    (evaluate, [*TINY, "--epochs", 1, "--arch", "DARTS_V2", "--out", "full"]),
    (evaluate, [*TINY, "--arch", "DARTS_V2", "--drop-path", 1.5]),
    (evaluate, ["--arch", "DARTS_V2", "--dataset", "folder", "--data", "untested"]),
    (evaluate, ["--arch", "DARTS_V2", "--count-params", "--dataset", "synthetic"]),
]


@pytest.mark.parametrize("module,argv", BAD, ids=lambda v: " ".join(map(str, v))[-40:]
                         if isinstance(v, list) else v.__name__)
def test_bad_input_is_one_line_and_changes_nothing(module, argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    corrupt = next((write_folder(tmp_path / "corrupt") / "train" / "cat").iterdir())
    corrupt.write_bytes(corrupt.read_bytes()[:200])
    write_folder(tmp_path / "untested", parts=("train",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    assert run_script(module, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: " in error and "Traceback" not in error
    if "corrupt" in argv:
        assert str(corrupt.relative_to(tmp_path)) in error
    if "imagenet" in argv:
        assert ("no imagenet" in error) == (module is il)
    assert tree(tmp_path) == before


def png_claiming(side):
    """The head of a PNG of side x side pixels that are not there."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(
        ">I", zlib.crc32(head)) + struct.pack(">I", 99999) + b"IDAT"


IMAGE = {                               # what can be wrong with one image among good ones
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:200]),
    "cut at the end": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no image"),
    "noise": lambda file: file.write_bytes(bytes(range(256)) * 4),
    "only a head": lambda file: file.write_bytes(png_claiming(12)),
    "too large": lambda file: file.write_bytes(png_claiming(50000)),
    "large": lambda file: file.write_bytes(png_claiming(11000)),
    "a dead link": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "a link to itself": lambda file: (file.unlink(), file.symlink_to(file.name)),
    "a strange name": lambda file: file.rename(file.with_name("a\nb.png")).write_bytes(b""),
}
TREE = {                                # and with the folder train/, whose two classes have 12 each
    "no folder": shutil.rmtree,
    "a file": lambda train: (shutil.rmtree(train), train.write_text("")),
    "a link to itself": lambda train: (shutil.rmtree(train), train.symlink_to("train")),
    "no classes": lambda train: [shutil.rmtree(folder) for folder in list(train.iterdir())],
    "images without a class": lambda train: [
        (shutil.copytree(folder, train, dirs_exist_ok=True), shutil.rmtree(folder))
        for folder in list(train.iterdir())],
    "an empty class": lambda train: (train / "ant").mkdir(),
    "no images": lambda train: [file.rename(file.with_suffix(".txt"))
                                for file in list(train.glob("*/*"))],
    "too few images": lambda train: [file.unlink() for file in list(train.glob("*/*"))[2:]],
}
READERS = {
    lpt: ["--dataset", "folder", "--data", "tree"], il: ["--tasks", "folder:tree"],
    lease: ["--dataset", "imagenet", "--data", "tree", "--subsets", 0.5, 0.5, "--workers", 0],
    evaluate: ["--arch", "random:1", "--dataset", "folder:tree"]}


@pytest.mark.filterwarnings("ignore:Image size")                   # of the one that is too large
@pytest.mark.parametrize("module,what", [
    *((lpt, what) for what in [*IMAGE, *(f"train: {what}" for what in TREE)]),
    (il, "truncated"), (lease, "cut at the end"), (evaluate, "train: no images")],
    ids=lambda v: getattr(v, "__name__", v))
def test_broken_images_and_folders(module, what, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_folder(tmp_path / "tree")
    file = root / "train" / "dog" / "7.png"
    TREE[what[7:]](root / "train") if what[7:] in TREE else IMAGE[what](file)
    begin = time.time()
    some = [*SMALL[2:], "--image-size", 12, "--batch-size", 6, "--epochs", 9]
    assert run_script(module, *some, *READERS[module]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and time.time() - begin < 5
    if what in IMAGE and what != "a strange name":
        assert str(file.relative_to(tmp_path)) in error
    assert module is lease or not (tmp_path / "runs").exists()    # which reads as it goes


@pytest.mark.parametrize("kind,damage", [("CIFAR10", "flipped"), ("CIFAR100", "malicious")])
def test_damaged_cifar_files_are_not_opened(kind, damage, tmp_path, monkeypatch, capsys):
    write_cifar(tmp_path, monkeypatch, kind)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", offline)
    marker = tmp_path / "executed"
    for file in [file for file in sorted(tmp_path.rglob("*")) if file.is_file()]:
        good = file.read_bytes()
        if damage == "flipped":
            at = len(good) // 2
            file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
        else:
            file.write_bytes(pickle.dumps(Malicious(Path.touch, (marker,))))
        assert run_script(lpt, "--dataset", kind.lower(), "--data", tmp_path, *SMALL[2:]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot be downloaded" in error and not marker.exists()
        file.write_bytes(good)


GOOD = json.loads(genotypes.to_json(genotypes.load("DARTS_V2")))


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", "3", '"DARTS_V2"', "[" * 100000,
    *(json.dumps({**GOOD, **change}) for change in [
        {"normal": []}, {"normal": 3}, {"normal": GOOD["normal"][:3]}, {"extra": 1},
        {"normal": [["conv", 0], *GOOD["normal"][1:]]},
        {"normal": [["none", 0], *GOOD["normal"][1:]]},
        {"normal": [["skip_connect", 2], *GOOD["normal"][1:]]},
        {"normal": [["skip_connect", True], *GOOD["normal"][1:]]},
        {"normal": [["skip_connect", 1.0], *GOOD["normal"][1:]]},
        {"normal": [["skip_connect", 1], *GOOD["normal"][1:]]}, {"normal": [[["a"], 0]] * 8},
        {"reduce_concat": [2, 2]}, {"reduce_concat": [6]}, {"reduce_concat": []},
        {"reduce_concat": [0, 1]}, {"reduce_concat": None},
        {"normal_concat": [2, 4, 5]}, {"reduce_concat": [4, 5]},         # nothing reads node 3
        {"normal": [["skip_connect", 0], ["skip_connect", 1]] * 4, "normal_concat": [3, 4, 5]}]),
    json.dumps({k: v for k, v in GOOD.items() if k != "reduce"}), "\x00\xff"],
    ids=lambda t: t[:30])
def test_malformed_genotypes(text, tmp_path, capsys):
    (tmp_path / "g.json").write_text(text)
    assert run_script(evaluate, "--arch", tmp_path / "g.json", "--count-params") == 2
    assert capsys.readouterr().err.count("\n") == 1


def numbers(text):
    """The numbers that "6, 8-9" means."""
    found = []
    for part in text.replace("\N{EN DASH}", "-").strip(" ,-").split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def test_the_index_of_equations_is_true():
    """Every equation stands in one place, and the function it names cites it."""
    page = PAGES[0].read_text().split("<summary>Where each equation is")[1].split("</details>")[0]
    modules = {f"`{m.__name__}.py`": m for m in (lpt, il, lease, ops)}
    names, paper = {"Skillearn": "LPT|IL|Skillearn", "LeaSE": "LeaSE"}, ""
    seen = {name: [] for name in names}
    for line in page.splitlines()[4:-1]:
        title, file, entries = (cell.strip() for cell in line.strip("|").split("|"))
        paper = title or paper
        for entry in entries.split("; "):
            where, which = re.match(r"(?:`(\w+)` )?([\d, –]+)", entry).groups()
            seen[paper] += numbers(which)
            assert bool(where) == (file != "no code")
            if where:
                text = inspect.getsource(getattr(modules[file], where))
                cited = re.findall(rf"(?:{names[paper]}) Eq\. ([0-9][0-9, -]*)", text)
                assert set(numbers(which)) <= {n for part in cited for n in numbers(part)}, entry
    assert sorted(seen["Skillearn"]) == list(range(1, 39))
    assert sorted(seen["LeaSE"]) == list(range(1, 18))


def readme_commands():
    """Per code block of the pages, its commands that run a module of the top level; variables
    are put in, torchrun is left out."""
    text = "".join(page.read_text() for page in PAGES)
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        lines, values = [], {}
        for line in block.splitlines():
            words = [word for text in shlex.split(line, comments=True)
                     for word in values.get(text, [text])]
            name, equals, value = words[0].partition("=")
            if equals:
                values["$" + name] = value.split()
            lines.append(words[3:] if words[0] == "torchrun" else words[1:])
        yield [line for line in lines
               if line and re.fullmatch(r"\w+\.py", line[0]) and line[0] != Path(__file__).name]


@pytest.mark.parametrize("block", slow_but({0}, [block for block in readme_commands() if block]),
                         ids=lambda block: " ".join(block[0])[:40])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_commands_of_the_readme(block, tmp_path, monkeypatch, capsys):
    """They run as printed, on small images and with small defaults."""
    for kind, n in (("CIFAR10", 8), ("CIFAR100", 40)):
        write_cifar(tmp_path / "data", monkeypatch, kind, n)
    for name in ("DIR", "DIR10", "DIR100"):
        write_folder(tmp_path / name, sizes=(16,), n=52)
    parse, split = ops.parse, ops.split_rows

    def small(parser, argv, method, recipe):
        def tiny(chosen):
            found = recipe(chosen)
            layers = [3] * len(found["layers"]) if method != "evaluate" else 3
            imagenet = ops.task_names(chosen) == ["imagenet"]
            return found | ({"image_size": 32} if imagenet else {}) | dict(
                layers=layers, channels=8 if found.get("partial", 1) > 1 else 2, epochs=1,
                warm_up=0, batch_size=2 if imagenet else 15, workers=0)
        return parse(parser, argv, method, tiny)

    monkeypatch.setattr(ops, "parse", small)
    monkeypatch.setattr(ops, "split_rows", lambda labels, seed, hold_out=0, subsets=None: split(
        labels, seed, hold_out // 500, subsets))
    monkeypatch.chdir(tmp_path)
    for script, *argv in block:
        module = importlib.import_module(script[:-3])
        if module is genotypes:
            module.main(argv)
        else:
            assert run_script(module, *argv) == 0, (script, argv, capsys.readouterr().err)


@slow
def test_scripts_stand_alone():
    """Importing does nothing; --help works."""
    strict = ["-W", "error", "-W", "ignore::ResourceWarning"]      # torch 2.6 leaves a folder open
    started = [subprocess.Popen([sys.executable, *strict, HERE / f"{name}.py", "--help"], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for name in ("lpt", "il", "lease", "evaluate", "genotypes")]
    for code, out, error in finish(started):
        assert code == 0 and "--out" in out and not error


# ------------------------------------------------------------------------------------ reliability

KILLED = {"lpt": [*FIRST, "--epochs", 2], "lease": ["--epochs", 2],
          "il": ["--tasks", "synthetic:3", "--rounds", 2, *PRUNED],
          "evaluate": ["--drop-path", 0.5, "--epochs", 3]}


def child(job, *argv):
    """Fork a process that runs a script; of use where torch has started no threads yet."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1), os.dup2(nothing.fileno(), 2)
        try:
            code = run_script(RUNS[job][0], *argv)
        except BaseException:
            code = 99
        os._exit(code)
    return pid


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kills(job, folder, count):
    """`count` kills of runs of a script at random times, half of them SIGKILL, a quarter SIGTERM
    and SIGINT; every run is resumed until it ends, and must end as one that nobody disturbed."""
    make_small()
    rng = random.Random(count)
    argv = [*RUNS[job][1], *KILLED[job], "--checkpoint-minutes", 0]
    begin = time.time()
    assert wait(child(job, *argv, "--out", folder / "whole")) == 0
    seconds, whole, done, slowest, n = time.time() - begin, finals(folder / "whole"), 0, 0.0, 0
    while done < count:
        n, code = n + 1, None
        cut = folder / f"cut{n}"
        while code != 0:
            saved = any(cut.glob("checkpoint*.pt")) if cut.exists() else False
            pid = child(job, *(["--resume", "--device", "cpu"] if saved else argv), "--out", cut)
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            if done < count:
                time.sleep(rng.uniform(0.05, 0.6 * seconds))
                begin, ended = time.time(), os.waitpid(pid, os.WNOHANG)
                if ended[0]:
                    code = os.waitstatus_to_exitcode(ended[1])
                    assert code == 0, code
                    continue
                os.kill(pid, number)
                done += 1
            code = wait(pid)
            if code:
                slowest = max(slowest, time.time() - begin)
                assert code in (-number, 128 + number), code
                assert number == signal.SIGKILL or code > 0
        assert same(finals(cut), whole), cut
        shutil.rmtree(cut)
    return {"job": job, "kills": done, "runs": n, "slowest stop": round(slowest, 2)}


def killed(count, *jobs):
    """kills of several jobs at once, each in a process that has started no threads."""
    started = [subprocess.Popen([sys.executable, __file__, "kills", job, str(count)], text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for job in jobs]
    for job, (code, out, error) in zip(jobs, finish(started, 60 + 20 * count)):
        assert code == 0, error
        found = json.loads(out)
        assert found["job"] == job and found["kills"] == count and found["slowest stop"] < 10
        yield found


def growth(job, folder, measure, steps, epoch_steps, replace=setattr):
    """What measure() gives after the given steps of a script's run."""
    found, log = [], ops.Run.log

    def measured(run, **figures):
        if run.state["step"] + 1 in steps:
            found.append(measure())
        return log(run, **figures)

    replace(ops.Run, "log", measured)
    assert search(job, *KILLED[job], "--batch-size", 100 // epoch_steps, "--epochs",
                  -(-max(steps) // epoch_steps), "--out", folder / job) == 0
    replace(ops.Run, "log", log)
    return found


@pytest.mark.parametrize("job", slow_but({0}, list(RUNS)))
def test_steps_leave_no_tensors_behind(job, tmp_path, monkeypatch):
    def alive():
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                        # of what torch has deprecated
            return sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.Tensor))

    first, last = growth(job, tmp_path, alive, (2, 4), 4, monkeypatch.setattr)
    assert first == last > 0


@pytest.mark.parametrize("count,jobs", slow_but({0}, [
    (2, ("lpt",)), (8, ("lpt", "il")), (8, ("lease", "evaluate"))]), ids=str)
def test_killed_runs_end_as_undisturbed_ones(count, jobs):
    assert [found["kills"] for found in killed(count, *jobs)] == [count] * len(jobs)


def interrupted(module, argv, folder, monkeypatch, saves):
    """A run that is stopped as if by a kill after its n-th checkpoint, n in saves; the content of
    the checkpoints then."""
    write, found = ops.write_checkpoint, []

    def interrupt(where, content):
        write(where, content)
        found.append(ops.read_checkpoint(where))
        if len(found) == max(saves):
            raise KeyboardInterrupt

    monkeypatch.setattr(ops, "write_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_script(module, *argv, "--out", folder)
    monkeypatch.setattr(ops, "write_checkpoint", write)
    return [found[n - 1] for n in saves]


@pytest.mark.parametrize("group", slow_but({1}, ["parts", "run"]))
def test_every_saved_field_is_needed(group, tmp_path, monkeypatch):
    """With one field of a checkpoint as it was in the beginning a run ends elsewhere, or not."""
    argv = [*TINY, *FIRST, *PRUNED, "--checkpoint-minutes", 0]
    assert run_script(lpt, *argv, "--out", tmp_path / "whole") == 0
    whole = finals(tmp_path / "whole")
    first, second, late = interrupted(lpt, argv, tmp_path / "cut", monkeypatch, (1, 2, 4))
    assert late["run"]["stage"] == 1 and late["run"]["step"] == 3 and late["run"]["sums"]

    def resumed(changed):
        ops.write_checkpoint(tmp_path / "cut", changed)
        code = run_script(lpt, "--resume", "--device", "cpu", "--out", tmp_path / "cut")
        return code == 0 and same(finals(tmp_path / "cut"), whole)

    assert resumed(late)
    for field in [f for f in late[group] if f not in ("seconds", "stopped")]:
        early = {"testee": None, "testee_opt": None}.get(field, first[group].get(field))
        changed = {**late, group: {**late[group], field: early}}
        if early is None:                                          # of another shape in stage 2
            fresh = {k: torch.zeros_like(v) for k, v in late["parts"]["testee"].items()}
            changed["parts"][field] = fresh if field == "testee" else {
                **late["parts"][field], "state": {}}
        assert not resumed(changed), field
    assert not resumed({k: v for k, v in late.items() if k != "parts"} | {"parts": {}})


def test_signals_save_and_end_a_run(tmp_path):
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    started = {number: subprocess.Popen(
        [sys.executable, HERE / "il.py", *map(str, RUNS["il"][1]), "--log-every", "1", "--epochs",
         "500", "--out", tmp_path / str(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for number, code in codes.items()}
    for process in started.values():
        assert "peak memory" in "".join(itertools.islice(process.stdout, 2))
    time.sleep(0.5)
    for number, process in started.items():
        begin = time.time()
        os.killpg(process.pid, number)
        _, error = process.communicate(timeout=20)
        assert process.returncode == codes[number] and time.time() - begin < 10
        assert error.count("\n") == 1 and "--resume goes on" in error
        saved = ops.read_checkpoint(tmp_path / str(codes[number]))["run"]["step"]
        assert f"after step {saved};" in error and saved > 0


@pytest.mark.parametrize("method,what", slow_but({0}, [
    ("evaluate", "loss"), *itertools.product(METHODS, ("loss", "gradient"))]), ids=str)
def test_what_is_not_finite_is_not_saved(method, what, tmp_path, monkeypatch, capsys):
    """Each loss and each gradient of the third step in turn is NaN or infinite."""
    module, argv = RUNS[method]
    argv = [*argv, "--checkpoint-minutes", 0, "--epochs", 2]
    (third,) = interrupted(module, argv, tmp_path, monkeypatch, (3,))
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    assert third["run"]["step"] == 2
    where = (F, "cross_entropy") if what == "loss" else (torch.autograd, "grad")
    real, count, poison = getattr(*where), 0, 0

    def poisoned(*args, **kw):
        nonlocal count
        count, found = count + 1, real(*args, **kw)
        if count != poison:
            return found
        value = math.nan if (count + (what == "loss")) % 2 else math.inf
        return found * value if what == "loss" else (found[0] * value, *found[1:])

    monkeypatch.setattr(*where, poisoned)
    while True:                                                    # until the third step is done
        poison, count = poison + 1, 0
        capsys.readouterr()
        assert run_script(module, "--resume", "--device", "cpu", "--out", tmp_path) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "loss or a gradient" in error
        if "step 4" in error:
            break
        assert "step 3" in error and (tmp_path / "checkpoint.pt").read_bytes() == saved
    assert poison > (2 if method == "evaluate" else 5)


def test_descend_refuses_what_is_not_finite():
    for poison in ("loss", "gradient", "weight"):
        w, g, loss = torch.ones(3), torch.ones(3), torch.tensor(1.0)
        optimizer = torch.optim.SGD([w], lr=1e38 if poison == "weight" else 0.1)
        if poison == "weight":
            g *= 10
        else:
            (loss if poison == "loss" else g[1:2]).fill_(math.nan)
        with pytest.raises(ops.NotFinite, match="the testee"):
            ops.descend(optimizer, [g], "the testee", loss)
        assert poison == "weight" or torch.equal(w, torch.ones(3))


@pytest.fixture
def saved_run(tmp_path):
    """A run folder with a good checkpoint and the one before it."""
    run = tmp_path / "run"
    assert run_script(evaluate, *TINY, "--arch", "random:1", "--epochs", 1, "--out", run) == 0
    return run


def damages_seen(path, count):
    """How many of `count` truncations and as many flipped bits of a checkpoint are refused, or are
    bits (of padding) that change nothing."""
    good, rng, seen = path.read_bytes(), np.random.default_rng(0), 0
    whole = flat(ops.read_checkpoint(path.parent))
    damaged = [good[:n] for n in rng.integers(len(good), size=count)]
    for at, bit in zip(rng.integers(len(good), size=count), rng.integers(8, size=count)):
        damaged.append(good[:at] + bytes([good[at] ^ 1 << int(bit)]) + good[at + 1:])
    for body in damaged:
        path.write_bytes(body)
        try:
            seen += same(flat(ops.read_checkpoint(path.parent)), whole) and len(body) == len(good)
        except ops.BadInput as error:
            seen += "checkpoint.pt is damaged" in str(error)
    return seen


def test_damaged_checkpoints_are_seen(saved_run, capsys):
    path, previous = saved_run / "checkpoint.pt", saved_run / "checkpoint.previous.pt"
    assert torch.load(path, weights_only=True)["method"] == "evaluate"            # a plain archive
    held = previous.read_bytes()
    previous.unlink()
    assert damages_seen(path, 200) == 400
    previous.write_bytes(held)                                     # the one before it is good
    capsys.readouterr()
    assert run_script(evaluate, "--resume", "--device", "cpu", "--out", saved_run) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path} is damaged" in error and f"from {previous}" in error
    path.unlink()
    assert run_script(evaluate, "--resume", "--device", "cpu", "--out", saved_run) == 0
    for content in (b"", b"no checkpoint"):
        path.write_bytes(content), previous.write_bytes(content)
        capsys.readouterr()
        assert run_script(evaluate, "--resume", "--out", saved_run) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_no_pickle_is_executed(saved_run, tmp_path, capsys):
    """The whole file is a pickle, or one is in a good archive with a right checksum."""
    marker, path = tmp_path / "executed", saved_run / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    ops.write_checkpoint(saved_run, {**content, "args": Malicious(os.system, (f"touch {marker}",))})
    for body in (pickle.dumps(Malicious(Path.touch, (marker,)), 2), path.read_bytes()):
        path.write_bytes(body)
        (saved_run / "checkpoint.previous.pt").unlink(missing_ok=True)
        capsys.readouterr()
        assert run_script(evaluate, "--resume", "--out", saved_run) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not marker.exists()
    for name in ("darts_ops", "lpt", "il", "lease", "evaluate", "genotypes"):
        source = (HERE / f"{name}.py").read_text()
        assert "weights_only=False" not in source and "pickle.load" not in source


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path, capsys, monkeypatch):
    for name in ("lpt", "il"):
        assert search(name, *FIRST, "--epochs", 1, "--out", tmp_path / name) == 0
    for name, change, word in (
            ("lpt", ["--seed", 2], "seed"), ("lpt", ["--base", "pcdarts"], "base"),
            ("lpt", ["--epochs", 2], "epochs"), ("lpt", ["--dataset", "synthetic:4"], "dataset"),
            ("lpt", ["--amp", "bf16"], "amp"), ("il", ["--tasks", "synthetic:4"], "tasks"),
            ("il", ["--tasks", "synthetic:3"], "tasks"),
            ("il", ["--coupling", 1], "lam")):
        capsys.readouterr()
        before = tree(tmp_path / name)
        assert run_script(RUNS[name][0], "--resume", "--device", "cpu", *change, "--out",
                          tmp_path / name) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1 and before == tree(tmp_path / name)
    assert run_script(il, "--resume", "--out", tmp_path / "lpt") == 2
    assert "run of lpt.py" in capsys.readouterr().err
    few = ops.synthetic

    def other(*args):
        data = few(*args)
        data.images[0] += 1
        return data

    monkeypatch.setattr(ops, "synthetic", other)
    assert run_script(lpt, "--resume", "--device", "cpu", "--out", tmp_path / "lpt") == 2
    assert "the data is not that" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_script(lpt, "--resume", "--out", tmp_path / "lpt") == 2
    assert "world_size" in capsys.readouterr().err


@pytest.mark.parametrize("error", slow_but({0, 2}, [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")]), ids=str)
def test_what_ends_a_run_leaves_its_files(error, tmp_path, monkeypatch, capsys):
    def fail(*args):
        if (tmp_path / "run" / "log.jsonl").exists():
            raise error
        return real(*args)

    where = (os, "fsync") if isinstance(error, OSError) else (ops, "virtual_weights")
    real = getattr(*where)
    monkeypatch.setattr(*where, fail)
    monkeypatch.setattr(lpt, "virtual_weights", ops.virtual_weights)
    assert run_script(lpt, *TINY, "--epochs", 3, "--out", tmp_path / "run") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(error) in message
    assert isinstance(error, OSError) or "lower --batch-size" in message
    assert ops.read_checkpoint(tmp_path / "run")["run"]["step"] in (0, 2)


@pytest.mark.parametrize("module", [lpt, il, lease, evaluate], ids=lambda m: m.__name__)
def test_every_number_is_checked(module, tmp_path, monkeypatch, capsys):
    """Each flag that takes a number, with what is none or out of range; where there are no runs."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    page, tried = capsys.readouterr().out, 0
    words = {"--dataset", "--data", "--out", "--arch", "--tasks"}
    for name in sorted(set(re.findall(r"^  (--[a-z0-9-]+) [A-Z{]", page, re.M)) - words):
        for value in ("-1", "nan", "x", ""):
            assert run_script(module, name, value) == 2, (name, value)
            assert name in (error := capsys.readouterr().err) and error.count("\n") == 1
            tried += 1
    assert tried >= 60


# ------------------------------------------------------------------------------ several processes


def own_part(batch):
    """A rank's part of a batch."""
    n = len(batch[0]) // ops.world_size()
    return tuple(t[ops.rank() * n:(ops.rank() + 1) * n] for t in batch)


@torch.no_grad()
def settle(net, *inputs):
    """The network in evaluation mode, with its BatchNorm statistics those of the inputs."""
    norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    net.train()(*inputs)
    net.eval()


def shared_gradients(method):
    """Return A's (and C's) gradients, on supernets in evaluation mode but for the smooth networks;
    each process has its part of the batches."""
    if method == "smooth lpt":
        m, batches = smooth_problem()
        found = lpt.outer_gradients(m, [own_part(b) for b in batches])
    elif method == "lpt":
        m, batches = supernet_problem()
        settle(m.testee, batches[0][0], m.alphas)
        settle(m.tester, batches[0][0])
        m.tester_opt.param_groups[0]["lr"] = 1e-4                  # small enough in this mode
        found = lpt.outer_gradients(m, [own_part(b) for b in batches])
    elif method == "il":
        stages, alphas, train, val = il_problem(2, 2, supernet=True)
        for stage, (x, _) in zip(stages, train):
            settle(stage.net, x, alphas)
        train, val = ([own_part(b) for b in part] for part in (train, val))
        grads = stage_gradients(stages, alphas, train)
        found = il.outer_gradient(stages, alphas, train, val, 1.0, "proximal", 2, grads)
    else:
        m, train, val, delta = lease_problem(supernet=True)
        settle(m.explainer, train[0], m.alphas)
        settle(m.audience, train[0])
        train, val, delta = own_part(train), own_part(val), own_part([delta])[0]
        found = lease.outer_gradient(m, train, val, delta, 1.0, "signed", 2,
                                     *lease_ahead(m, train, delta))
    return [t.detach() for part in found for t in (part if isinstance(part, list) else [part])]


def worker(job, folder, argv):
    """One of several processes, started by `processes`."""
    if job == "gradients":
        ops.start(arguments())
        torch.save(shared_gradients(*argv), folder / f"{ops.rank()}.pt")
        return
    make_small()
    held, load = [], ops.Run.load
    ops.Run.load = lambda run, parts: (held.append(parts), load(run, parts))
    destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, int
    code = run_script(importlib.import_module(job), *argv)
    torch.save({name: part.state_dict() for name, part in held[-1].items()},
               folder / f"{ops.rank()}.pt")
    destroy()
    sys.exit(code)


def processes(job, folder, *argv, count=2):
    """The started processes of a job."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [subprocess.Popen(
        [sys.executable, __file__, "worker", job, folder, *map(str, argv)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
             "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
        for rank in range(count)]


def finish(started, seconds=120):
    """Each process's exit code, output and error output."""
    try:
        return [(*reversed(p.communicate(timeout=seconds)), p.returncode)[::-1] for p in started]
    finally:
        for p in started:
            p.kill()


@pytest.mark.parametrize("method", slow_but({0}, ["smooth lpt", *METHODS]))
def test_two_processes_have_one_process_gradients(method, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("gradients")                # with the real ResNet
    started = processes("gradients", tmp_path, method)
    whole = shared_gradients(method)
    results = finish(started)
    assert [r[0] for r in results] == [0, 0], results
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for i, (one, first, second) in enumerate(zip(whole, a, b, strict=True)):
        if one.ndim:
            assert torch.equal(first, second), i
        assert relative_error([(first + second) / 2], [one]) < 1e-10, i    # a loss is averaged


@slow
@pytest.mark.parametrize("job", list(RUNS))
def test_two_processes_stay_equal(job, tmp_path):
    small = [*RUNS[job][1], *(["--tasks", "synthetic:3", "--rounds", 2] if job == "il" else []),
             "--batch-size", 20 if job != "evaluate" else 40, "--epochs", 2]
    results = finish(processes(job, tmp_path, *small, "--out", tmp_path / "run"))
    assert [r[0] for r in results] == [0, 0], results
    assert results[1][1] == "" and "epoch 2" in results[0][1]       # rank 0 alone speaks
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    a, b = ([t for path, t in tree_flatten_with_path(state)[0]      # but BatchNorm's statistics,
             if torch.is_tensor(t) and "running" not in str(path)]  # which are each process's own
            for state in states)
    assert len(a) > 20 and same(a, b)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["run"]["step"] == 10 and saved["world_size"] == 2
    if job == "evaluate":
        assert json.loads((tmp_path / "run" / "result.json").read_text())["test_images"] == 100
    assert run_script(RUNS[job][0], "--resume", "--device", "cpu", "--out",
                      tmp_path / "run") == 2                       # as one process


def test_a_killed_process_ends_the_job(tmp_path):
    started = processes("lpt", tmp_path, *TINY, *FIRST, "--epochs", 500, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert started[0].poll() is None and started[1].poll() is None
        time.sleep(0.1)
    started[1].kill()
    begin = time.time()
    code, _, error = finish(started[:1], 60)[0]
    assert code == 1 and time.time() - begin < 30
    assert "another process of this run is gone" in error and "Traceback" not in error


def test_batches_of_processes_are_parts_of_one():
    data = ops.synthetic(3, 8, "cpu")
    whole = ops.Stream(data, range(100), 10, 1, "train", cutout=4)
    for step in (0, 7):
        x, y, rows = whole(step)
        for k in range(2):
            part = ops.Stream(data, range(100), 10, 1, "train", cutout=4)
            part.part = slice(5 * k, 5 * k + 5)
            for a, b in zip((x, y, rows), part(step)):
                assert torch.equal(a[part.part], b)


# --------------------------------------------------------------------------------------- ImageNet


def imagenet_folder(root, n=12):
    return write_folder(root, sizes=(70, 84, 66), classes=("cat", "dog", "eel"), n=n,
                        parts=("train", "val"))


@pytest.fixture
def started(monkeypatch):
    """The processes that multiprocessing starts."""
    found, begin = [], multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda process: (
        found.append(process), begin(process)))
    return found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_images_from_files_do_not_hang_on_the_workers(tmp_path, started):
    root = imagenet_folder(tmp_path)
    sets = [ops.load_images("imagenet", root, "cpu", 64, workers=n) for n in (0, 2, 8)]
    rows = np.arange(36)
    streams = [ops.Stream(data, rows, 8, 1, "train") for data in sets]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for step in (0, 1, 2, 7, 8, 3):                                # on, ahead and back
        got = [stream(step) for stream in streams]
        assert got[0][0].shape == (8, 3, 64, 64) and got[0][0].dtype == torch.float32
        for other in got[1:]:
            assert all(torch.equal(a, b) for a, b in zip(got[0], other))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(streams[0](0)[0], streams[0](5)[0])
    tests = [list(ops.batches(data, rows, 8)) for data in sets]
    assert [len(x) for x, _ in tests[0]] == [8, 8, 8, 8, 4]
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(tests[0], tests[2]))
    image = ops.Image.open(root / "train" / "cat" / "0.png")       # 70 x 72: 73 x 75, 64 of it
    image = ops.v2.functional.center_crop(ops.v2.functional.resize(image, [73]), [64])
    assert torch.equal(sets[0].pixels(torch.tensor([0]))[0], ops.v2.functional.pil_to_tensor(image))
    # a broken file is named, from a worker too
    broken = root / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:300])
    for data in sets[:2]:
        with pytest.raises(ops.BadInput, match="dog/3.png"):
            list(ops.batches(data, rows, 8))
        with pytest.raises(ops.BadInput, match="dog/3.png"):
            stream = ops.Stream(data, rows, 8, 1, "train")
            [stream(step) for step in range(5)]
    del sets, streams, stream, data     # with their readers the processes end: no cycle keeps them
    assert started and not any(process.is_alive() for process in started)


def test_subsets_of_every_class():
    labels = torch.arange(1000) % 5
    train, val, held = ops.split_rows(labels, 1, 0, [0.1, 0.025])
    assert len(train) == 100 and len(val) == 25 and not set(train) & set(val) and not len(held)
    assert (labels[train].bincount() == 20).all() and (labels[val].bincount() == 5).all()
    other = ops.split_rows(labels, 2, 0, [0.1, 0.025])
    assert not np.array_equal(other[0], train)
    assert np.array_equal(ops.split_rows(labels, 1, 0, [0.1, 0.025])[0], train)


def test_a_strided_reduction_stays_in_its_memory():
    """The backward pass that crashed with strided convolutions, in a process of its own."""
    code = ("import torch, darts_ops as ops; net = ops.place(ops.FactorizedReduce(8, 8), 'cpu'); "
            "x = torch.randn(10, 8, 56, 56).contiguous(memory_format=torch.channels_last)\n"
            "for _ in range(10): net(x).sum().backward()")
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


@slow
def test_imagenet_search_and_evaluation(tmp_path, capsys):
    root, run = imagenet_folder(tmp_path / "data"), tmp_path / "run"
    common = ["--dataset", "imagenet", "--data", root, "--image-size", 64, "--layers", 3,
              "--channels", 8, "--device", "cpu", "--workers", 1]
    assert run_script(lpt, *common, "--base", "pcdarts", "--epochs", 1, "--warm-up", 0,
                      "--batch-size", 6, "--subsets", 0.6, 0.4, "--out", run) == 0
    assert (run / "tests.png").exists()
    command = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert command[2:] == ["--arch", f"{run}/genotype.json", "--dataset", "imagenet", "--data",
                           str(root), "--image-size", "64"]
    assert run_script(evaluate, *command[2:], *common[6:], "--epochs", 2, "--warm-up", 1,
                      "--batch-size", 12, "--out", tmp_path / "e") == 0
    result = json.loads((tmp_path / "e" / "result.json").read_text())
    assert result["test_images"] == 36 and result["top5_error"] == 0 and result["drop_path"] == 0


def test_imagenet_recipe():
    args, _ = evaluate.get_args(["--arch", "PDARTS", "--dataset", "imagenet"])
    assert (args.layers, args.channels, args.epochs, args.batch_size, args.weight_decay,
            args.label_smoothing, args.drop_path, args.image_size) == (
                14, 48, 250, 1024, 3e-5, 0.1, 0, 224)
    rates = [evaluate.learning_rate(args, epoch) for epoch in range(250)]
    assert np.allclose(rates[:5], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert np.allclose(rates[5:], 0.5 * (1 - np.arange(5, 250) / 250))
    args, _ = evaluate.get_args(["--arch", "PDARTS"])
    assert (args.layers, args.channels, args.epochs, args.batch_size, args.cutout) == (
        20, 36, 600, 96, 16)
    assert evaluate.learning_rate(args, 0) == 0.025 and evaluate.learning_rate(args, 599) < 1e-6


# ---------------------------------------------------------------------------------------- devices

FOREIGN = torch.device("lazy:0")        # a device that exists in torch's dispatch, not in a machine


class Host(TorchDispatchMode):
    """Counts what makes the host wait for FOREIGN, and the operators called there that are not
    views; devices that meet and float64 there are errors. For FakeTensorMode."""

    def __init__(self):
        super().__init__()
        self.waits = self.calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        there = [t for t in tensors if t.device == FOREIGN]
        if name == "_local_scalar_dense":
            self.waits += bool(there)
            fake = isinstance(args[0], FakeTensor)
            return 1.0 if fake and args[0].is_floating_point() else 1 if fake else (
                args[0].numpy().item())
        if there and name not in ("_to_copy", "copy_"):
            assert all(t.device == FOREIGN or not t.ndim for t in tensors), f"{name}: two devices"
        out = op(*args, **kwargs)
        made = [t for t in tree_leaves(out) if torch.is_tensor(t)]
        assert not any(t.device == FOREIGN and t.dtype == torch.float64 for t in made), (
            f"{name}: float64")
        self.waits += bool(there) and name == "_to_copy" and made[0].device != FOREIGN
        self.waits += bool(there) and name in ("nonzero", "masked_select", "equal")
        self.calls += (op.namespace == "aten" and not op.is_view and not name.startswith("empty")
                       and name != "detach" and any(t.device == FOREIGN for t in made + there))
        return out


def abroad(replace, host):
    """Let a script run with its tensors on FOREIGN and values that are made up."""
    tolist, numpy, generator = torch.Tensor.tolist, torch.Tensor.numpy, torch.Generator
    kinds = {torch.uint8: np.uint8, torch.int64: np.int64, torch.bool: bool}

    def move(module, device, **layout):
        for part in module.modules():
            for kept in (part._parameters, part._buffers):
                for name, t in kept.items():
                    if t is not None:
                        moved = t.detach().to(device)
                        kept[name] = nn.Parameter(moved) if isinstance(t, nn.Parameter) else moved
        return module

    def listed(t):
        host.waits += t.device == FOREIGN
        made_up = (np.ones if t.is_floating_point() else np.zeros)(tuple(t.shape))
        return made_up.astype(kinds.get(t.dtype, float)).tolist() if (
            isinstance(t, FakeTensor)) else tolist(t)

    def array(t, *args, **kwargs):
        assert t.device != FOREIGN
        return np.zeros(tuple(t.shape), kinds.get(t.dtype, np.float32)) if (
            isinstance(t, FakeTensor)) else numpy(t)

    for owner in (torch.Tensor, FakeTensor):
        replace(owner, "tolist", listed)
        replace(owner, "numpy", array)
        replace(owner, "__array__", array)
    replace(nn.Module, "to", move)
    replace(torch, "Generator", lambda device="cpu": generator())
    for module in ("torch.optim.sgd", "torch.optim.adam"):         # as on a GPU
        replace(sys.modules[module], "_default_to_fused_or_foreach", lambda *args, **kw: (False,
                                                                                          True))
    for name in ("_has_foreach_support", "_device_has_foreach_support"):
        replace(sys.modules["torch.nn.utils.clip_grad"], name, lambda *args, **kwargs: True)
    replace(ops, "start", lambda args: FOREIGN)
    replace(ops, "autocast", lambda *args: contextlib.nullcontext())
    replace(ops, "write_checkpoint", lambda *args: None)
    replace(ops, "prune", lambda alphas, keep: pruned(keep))


def steps_abroad(module, argv, folder):
    """(waits, operator calls) of each step of a script on FOREIGN."""
    host, found, steps = Host(), [], ops.Run.steps

    def counted(run):
        for step in steps(run):
            before = host.waits, host.calls
            yield step
            found.append((host.waits - before[0], host.calls - before[1]))

    with pytest.MonkeyPatch.context() as patch:
        abroad(patch.setattr, host)
        patch.setattr(ops.Run, "steps", counted)
        with FakeTensorMode(allow_non_fake_inputs=True), host:
            module.main([*map(str, argv), "--out", str(folder / "abroad")])
    return found


# how often a step's host waits; the last one of an epoch, once more than these for its foresight
WAITS = {"lpt": 9, "il": 11, "lease": 7, "evaluate": 3}


@pytest.mark.parametrize("method,base", [
    *(pytest.param(m, b, marks=slow)                               # slowest late in a long process
      for m in METHODS for b in ("darts-2nd", "darts-", "pcdarts", "pdarts")), ("evaluate", "")])
def test_a_foreign_device_is_all_that_a_step_uses(method, base, tmp_path):
    module, given = RUNS[method]
    given = [*given, "--rounds", 2] if method == "il" else given
    changes = {"pdarts": ["--layers", 3, 4, 3], "pcdarts": ["--channels", 8]}.get(base, [])
    changes += ["--base", base, "--warm-up", 0] if base else []
    found = steps_abroad(module, [*given, "--batch-size", 100, *changes, "--epochs", 1], tmp_path)
    assert len(found) == {"pdarts": 3, "": 2}.get(base, 1)
    assert max(waits for waits, _ in found) <= WAITS[method] + bool(base)
    assert min(calls for _, calls in found) > 100


def test_a_foreign_device_is_guarded():
    with FakeTensorMode(allow_non_fake_inputs=True), Host():
        there = torch.ones(3, device=FOREIGN)
        for slip in (lambda: there + torch.ones(3), lambda: there.double()):
            with pytest.raises((AssertionError, RuntimeError)):
                slip()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", slow_but({0, 1}, [
    {}, dict(partial=4, C=8), dict(auxiliary=True), dict(kept=pruned(5)), dict(imagenet=True)]),
    ids=lambda v: str(v)[:20])
def test_one_layout_per_device(layout, options, monkeypatch):
    """Every map that a BatchNorm sees lies in the device's layout."""
    monkeypatch.setattr(ops, "memory_format", lambda device: layout)
    net, _, alphas = twins(dtype=torch.float32, **options)
    net.knobs.skip_dropout, seen = 0.3 if "kept" in options else 0.0, []

    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda norm, inputs: seen.append(
                inputs[0].is_contiguous(memory_format=layout)))
    x = torch.randn(2, 3, 64 if "imagenet" in options else 32, 64 if "imagenet" in options else 32)
    net(x.contiguous(memory_format=layout), alphas)
    assert len(seen) > 100 and all(seen), (seen.count(False), len(seen))


def test_the_contiguous_supernet_is_the_same(monkeypatch):
    for options in ({}, dict(partial=4, C=8), dict(kept=pruned(3))):
        net, _, alphas = twins(**options)
        x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        wanted = [*alphas, *net.parameters()]
        one = torch.autograd.grad(net(x, alphas).square().sum(), wanted)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "memory_format", lambda device: torch.contiguous_format)
            net = ops.place(net, "cpu")
            two = torch.autograd.grad(net(x, alphas).square().sum(), wanted)
        assert max(relative_error([a], [b]) for a, b in zip(one, two)) < 1e-10


def test_replicas_compute_in_bfloat16_and_drop_their_own_paths(monkeypatch):
    """What DataParallel's threads do: they have neither the caller's autocast nor its seed."""
    network = evaluate.Network(genotypes.load("LPT_PDARTS"), 4, 5, 3, amp=True)
    seen = []
    network.cells[0].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    thread = threading.Thread(target=network, args=(torch.randn(2, 3, 32, 32),))
    thread.start(), thread.join()
    assert seen == [torch.bfloat16]
    devices = [torch.Generator() for _ in range(3)]
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    ops.seed_all(1, 2)
    assert len({g.initial_seed() for g in devices}) == 3
    first = devices[0].initial_seed()
    ops.seed_all(1, 2)
    assert devices[0].initial_seed() == first


@pytest.mark.parametrize("module,argv,passes", slow_but({0, 3}, [    # off, bf16, bf16-all
    (lpt, [*TINY, *FIRST], (0, 2, 4)), (lease, [*LEASE, *FIRST], (0, 6, 16)),
    (il, [*SMALL, *FIRST, "--tasks", "synthetic:3", "--rounds", 1], (0, 2, 4)),
    (evaluate, [*TINY, "--arch", "random:1"], (0, 18))]), ids=["lpt", "lease", "il", "evaluate"])
def test_what_amp_computes_in_bfloat16(module, argv, passes, tmp_path, monkeypatch):
    """A search's passes of its network in 2 steps, those that train weights or A's too; evaluate's
    of 3 cells, in 4 steps and 2 batches of the test."""
    seen, part = [], evaluate.Cell if module is evaluate else ops.Supernet
    forward = part.forward
    monkeypatch.setattr(part, "forward", lambda *args: (
        seen.append(torch.is_autocast_enabled("cpu")), forward(*args))[1])
    for level, count in zip(("off", "bf16", "bf16-all"), passes):
        seen.clear()
        assert run_script(module, *argv, "--epochs", 1, "--amp", level, "--out",
                          tmp_path / level) == 0
        assert sum(seen) == count


def test_the_auxiliary_head_pools_as_the_adaptive_one():
    """Of which a GPU has no deterministic gradient; 7 and 8 pixels have the published windows."""
    for size in [(n, n) for n in range(2, 40)] + [(5, 9), (6, 13)]:
        pool, x = evaluate.auxiliary_head(3, 2, size)[0], torch.randn(2, 3, *size)
        if size[0] in (7, 8):
            assert (pool.kernel_size, pool.stride) == ((5, 5), (size[0] - 5,) * 2)
        else:
            assert torch.allclose(pool(x), F.adaptive_avg_pool2d(x, 2), atol=1e-6)
    assert evaluate.auxiliary_head(3, 2, (1, 1))(torch.randn(2, 3, 1, 1)).shape == (2, 2)


def arguments(**changes):
    return argparse.Namespace(**dict(device="cpu", tf32=False, deterministic=False, amp="off",
                                     resume=False, out=Path("nowhere")) | changes)


def test_devices_that_cannot_do_it_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated=True: emulated)
    with pytest.raises(ops.BadInput, match="emulates bfloat16"):
        ops.start(arguments(device="cuda", amp="bf16"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ops.BadInput, match="--device mps"):
        ops.start(arguments(device="mps"))


def test_all_processes_look_before_one_writes(tmp_path, monkeypatch):
    """A slow process must not find the folder that rank 0 has filled, nor download beside it."""
    def fill():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "log.jsonl").touch()

    monkeypatch.setattr(ops, "barrier", fill)
    ops.start(arguments(out=tmp_path / "out"))
    order = []
    monkeypatch.setattr(ops, "barrier", lambda: order.append("barrier"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *args, **kw: (
        order.append("download"), types.SimpleNamespace(
            data=np.zeros((4, 32, 32, 3), np.uint8), targets=[0] * 4, classes=["a"]))[1])
    for rank, expected in ((0, ["download", "barrier"]), (1, ["barrier", "download"])):
        order.clear()
        monkeypatch.setattr(ops, "rank", lambda rank=rank: rank)
        ops.load_images("cifar10", tmp_path, "cpu")
        assert order == expected


def test_a_maximum_that_drops_nan_does_not_hide_it(monkeypatch):
    """As on mps: the norm for what is not finite must not be the largest."""
    norm = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda tensors, ord=2, **kw: norm(
        [t.nan_to_num() if ord == math.inf else t for t in tensors], ord, **kw))
    test_descend_refuses_what_is_not_finite()


@slow
def test_without_what_windows_lacks(tmp_path):
    """A search and an evaluation where these are not there."""
    code = f"""
import os, sys
sys.modules["resource"] = None
for name in ("setpgrp", "sched_getaffinity", "O_DIRECTORY", "fork", "killpg"):
    delattr(os, name)
sys.path.insert(0, {str(HERE)!r})
import test_smoke
test_smoke.make_small()
small = {[str(v) for v in TINY]} + ["--epochs", "1", "--out"]
out = {str(tmp_path)!r}
assert test_smoke.run_script(test_smoke.lpt, *small, out + "/s") == 0
assert test_smoke.run_script(test_smoke.evaluate, "--arch", out + "/s/genotype.json", *small,
                             out + "/e") == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "test error" in done.stdout and "peak memory" not in done.stdout


START = ["fork", "spawn", "forkserver"]


@slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process")
def test_reading_processes_however_they_start(tmp_path, started):
    """A search and an evaluation on ImageNet end with the same bits; the processes are kept."""
    root, found = imagenet_folder(tmp_path / "data"), {}
    before, monkey = multiprocessing.get_start_method(), [*SMALL[2:], "--image-size", 64]
    common = ["--dataset", "imagenet", "--data", root, *monkey, "--epochs", 2]
    for method in START:
        multiprocessing.set_start_method(method, force=True)
        for workers in (0, 1):
            at = tmp_path / f"{method}{workers}"
            started.clear()
            assert run_script(lpt, *common, "--batch-size", 6, "--subsets", 0.6, 0.4, "--workers",
                              workers, "--out", at) == 0
            assert len(started) == 4 * workers                     # three streams and evaluation
            assert run_script(evaluate, "--arch", "random:1", *common, "--batch-size", 12,
                              "--workers", workers, "--out", f"{at}-e") == 0
            found[method, workers] = [flat(torch.load(f"{run}/checkpoint.pt")["parts"])
                                      for run in (at, f"{at}-e")]
    multiprocessing.set_start_method(before, force=True)
    first, *others = found.values()
    assert all(same(a, b) for other in others for a, b in zip(first, other))


def test_no_context_on_a_gpu_that_is_not_used(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ops, "DataLoader", lambda *args, **kw: asked.append(kw["pin_memory"]) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = ops.load_images("imagenet", imagenet_folder(tmp_path, 2), "cpu", 64)
    data.reader()
    data.device = torch.device("cuda")
    data.reader()
    assert asked == [False, True]


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for processes, expected in ((None, 8), (4, 3), (24, 1)):
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert ops.reading_processes() == expected


def test_no_batch_of_one(tmp_path, monkeypatch):
    """Where the images are 1 modulo the batch size: LeaSE's audience takes the batch's own."""
    data = ops.synthetic(3, 8, "cpu")
    for n, size in ((1, 5), (2, 5), (5, 5), (6, 5), (7, 5), (11, 5), (3, 2), (101, 50), (0, 5)):
        sizes = [len(y) for _, y in ops.batches(data, np.arange(n), size)]
        assert sum(sizes) == n and (n < 2 or min(sizes) > 1) and max(sizes + [0]) <= size + 1
    split = ops.split_rows
    monkeypatch.setattr(ops, "split_rows", lambda *args: (
        lambda train, val, held: (train, np.append(val, train[0]), held))(*split(*args)))
    assert run_script(lease, *LEASE, *FIRST, "--epochs", 1, "--out", tmp_path / "run") == 0
    monkeypatch.setattr(ops, "world_size", lambda: 2)
    with pytest.raises(ops.BadInput, match="two images or more"):
        ops.Stream(data, range(100), 2, 1, "train")


@slow
def test_processes_name_the_broken_image_and_end_odd_epochs(tmp_path):
    """An image that rank 1 alone reads; validation images of which a rank has one too many."""
    root = imagenet_folder(tmp_path / "data")
    data = ops.load_images("imagenet", root, "cpu", 64)
    key = ops.Stream(data, np.arange(36), 12, 1, "evaluate").key
    rows = next(ops.requests(np.arange(36), 12, key, slice(None), 0, 0)).rows[6:]
    seen_by_both = np.linspace(0, 35, 16).astype(int)              # for the data's fingerprint
    file = Path(data.folder.samples[next(r for r in rows if r not in seen_by_both)][0])
    file.write_bytes(file.read_bytes()[:200])
    argv = ["--dataset", "imagenet", "--data", root, *SMALL[2:], "--image-size", 64, "--arch",
            "random:1", "--batch-size", 12, "--epochs", 1, "--workers", 0]
    results = finish(processes("evaluate", tmp_path, *argv, "--out", tmp_path / "e"))
    assert results[1][0] == 2 and results[1][2].count("\n") == 1
    assert str(file.relative_to(root)) in results[1][2]
    argv = [*LEASE, "--batch-size", 44, "--epochs", 1, "--hold-out", 20]   # rank 0: 45 of 90 images
    results = finish(processes("lease", tmp_path, *argv, "--out", tmp_path / "run"))
    assert [r[0] for r in results] == [0, 0], results


def auc(low, high):
    """How often one of `high` is above one of `low`, equal ones counting half."""
    gap = high[:, None] - low
    return ((gap > 0).double() + (gap == 0).double() / 2).mean().item()


def test_auc_by_hand():
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0, 3.0, 4.0])) == 5.5 / 8


if __name__ == "__main__":              # a process that a test has started
    task, job, *rest = sys.argv[1:]
    if task == "worker":
        worker(job, Path(rest[0]), rest[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(kills(job, Path(folder), int(rest[0]))))
