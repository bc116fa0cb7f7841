"""Interleaving Learning (IL) for neural architecture search.

Algorithm 3 of "Skillearn: Machine Learning Inspired by Humans' Learning Skills" (Xie, Du and Ban,
arXiv 2012.04863), on DARTS. K learners of K tasks share an architecture and learn in turns, for M
rounds; each turn's encoder is pulled towards the one before it.

    min_A  sum_k L(A, W_k^(M)(A), H_k^(M)(A), D_k^val)                                   Eq. 31, 32
    s.t.   W_l, H_l = argmin  L(A, W_l, H_l, D^tr) + lambda |W_l - W_(l-1)|^2             Eq. 29, 30
    for the stages l = 1 ... MK: tasks 1 ... K of round 1, then of round 2, ... (Eq. 28)

    A  alphas     architecture, shared             D_k^tr   x, y      a stream per stage
    W  w          encoder weights, per stage       D_k^val  x, y      a stream per task
    H             a stage's linear head            W'_l     bars[l]   W one step ahead, W bar
    lambda        lam, --coupling                  eta      lr        the stages' learning rate

    python il.py --tasks cifar100 cifar10 --rounds 2 --coupling 100
    python il.py --tasks cifar100 cifar10 --joint              # the joint baseline JL, Eq. 38
    python il.py --tasks cifar10 --rounds 1 --coupling 0 --alpha-lr 3e-4   # second-order DARTS

Departures from the printed equations:
1. The step of Eq. 35 diverges at the paper's settings: 2 eta lambda = 5, so consecutive stages
   move apart about fourfold a step. The default is the proximal step on the same objective,
   (W - eta grad L + 2 eta lambda W'_(l-1)) / (1 + 2 eta lambda), which is stable for every
   lambda and equals Eq. 35 to first order in eta lambda. --step printed is Eq. 35.
2. The gradients that make W' are also those that train W, as in Algorithm 3's order (weights, then
   A); DARTS has A first and takes the weights' gradient again.
3. The step is the actual optimizer's, before clipping: momentum and weight decay included.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import darts_ops as ops
from darts_ops import call, central_difference, descend, grad, virtual_weights

HEAD = 2                        # a network's last parameters, weight and bias, are the head H


@dataclass
class Stage:
    """Learning stage l: task k's learner in one round, with its optimizer."""
    task: int
    net: nn.Module
    opt: torch.optim.SGD


def coupling(lr: float, lam: float, step: str, first: bool):
    """(pull, gain) of a stage's step W' = W - gain eta grad L + pull (W'_(l-1) - W)."""
    if first or lam == 0:
        return 0.0, 1.0                                                            # IL Eq. 34
    if step == "printed":
        return 2 * lr * lam, 1.0                                                   # IL Eq. 35
    return 2 * lr * lam / (1 + 2 * lr * lam), 1 / (1 + 2 * lr * lam)               # departure 1


@torch.no_grad()
def coupled(w, stepped, before, pull, gain):
    """The stage's weights after its step, from those after plain SGD: the encoder is pulled towards
    the one before, the head is not.                                               # IL Eq. 33-36"""
    if not pull:
        return stepped
    encoder = [a + gain * (b - a) + pull * (c - a)
               for a, b, c in zip(w[:-HEAD], stepped[:-HEAD], before)]
    return [t.requires_grad_() for t in encoder] + stepped[-HEAD:]


def outer_gradient(stages, alphas, grads, train, val, lam, step="proximal", order=2, radius=1e-2):
    """dJ/dA of J = sum_k L(A, W_k^(M), H_k^(M), D_k^val), one step of every stage ahead.

    grads: per stage, dL/d(W, H) on its training batch (x, y) in train; val: a batch per task.
    order 1 keeps the direct part. Returns (gradients of alphas, J). Changes no state.
    """
    # Stages 1 ... MK: one step each                                               # IL Eq. 33-36
    pulls, bars = [], []
    for l, (stage, g) in enumerate(zip(stages, grads)):
        w = list(stage.net.parameters())
        pulls.append(coupling(stage.opt.param_groups[0]["lr"], lam, step, l == 0))
        before = bars[-1][:-HEAD] if l else None
        bars.append(coupled(w, virtual_weights(stage.opt, w, g), before, *pulls[-1]))

    # Validation stage: the learners of the last round                             # IL Eq. 31, 37
    last_round, total, g_alpha = len(stages) - len(val), 0.0, [torch.zeros_like(a) for a in alphas]
    u = [[torch.zeros_like(t) for t in bar] for bar in bars[:last_round]]
    for stage, bar, (x, y) in zip(stages[last_round:], bars[last_round:], val):
        loss = F.cross_entropy(call(stage.net, bar, x, alphas), y)
        parts = grad(loss, [*alphas, *bar] if order == 2 else alphas)
        g_alpha = [g + p for g, p in zip(g_alpha, parts)]
        u.append(parts[len(alphas):])
        total += loss.detach()
    if order == 1:
        return g_alpha, total

    # The sweep back over the stages, u_l = dJ / d(W'_l, H'_l)                     # IL Eq. 37
    for l in reversed(range(len(stages))):
        stage, (x, y), (pull, gain) = stages[l], train[l], pulls[l]

        def grad_alpha(w):
            return grad(F.cross_entropy(call(stage.net, w, x, alphas), y), alphas)

        if l < last_round and not pulls[l + 1][0]:
            continue                                           # nothing depends on this stage
        direction = [gain * t for t in u[l][:-HEAD]] + u[l][-HEAD:]
        eta = stage.opt.param_groups[0]["lr"]
        product = central_difference(grad_alpha, list(stage.net.parameters()), direction, radius)
        g_alpha = [g - eta * p for g, p in zip(g_alpha, product)]
        if pull:
            torch._foreach_add_(u[l - 1][:-HEAD], u[l][:-HEAD], alpha=pull)
    return g_alpha, total


def update_weights(stages, grads, lam, step, clip=None):
    """Every stage's step, in order; each is pulled towards the one before it.     # IL Eq. 33-36"""
    before = None
    for l, (stage, g) in enumerate(zip(stages, grads)):
        w = list(stage.net.parameters())
        old = [t.detach().clone() for t in w]
        descend(stage.opt, w, g, clip)
        pull, gain = coupling(stage.opt.param_groups[0]["lr"], lam, step, l == 0)
        if pull:
            with torch.no_grad():
                torch._foreach_copy_(w, coupled(old, w, before, pull, gain))
        before = [t.detach() for t in w[:-HEAD]]


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Search a cell by Interleaving Learning (arXiv 2012.04863, Algorithm 3).",
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, yes_no, real = parser.add_argument, argparse.BooleanOptionalAction, ops.number(float, 0)
    add("--tasks", type=ops.dataset_name, nargs="+", default=["cifar100", "cifar10"],
        help="in their order: cifar10, cifar100, folder:DIR, synthetic or synthetic:CLASSES "
             "(§4.3.1)")
    add("--data", type=Path, default=Path("data"), help="where CIFAR is or goes")
    add("--image-size", type=ops.number(int, 8, 512), default=None,
        help="resize a folder's images to this many pixels; size of synthetic ones")
    add("--hold-out", type=ops.number(int, 0), default=0,
        help="training images of each task kept for evaluate.py to test on")
    # the method
    add("--rounds", type=ops.number(int, 1), default=2, help="M (§4.3.1)")
    add("--coupling", dest="lam", type=real, default=100.0, help="lambda (beta in §4.3.1)")
    add("--step", choices=("proximal", "printed"), default="proximal",
        help="of the coupled weights; printed: Eq. 35, which needs 2 eta lambda < 1")
    add("--joint", action=yes_no, default=False, help="the baseline JL: one round, no coupling")
    add("--order", type=int, choices=(1, 2), default=2, help="1: no sweep (DARTS §2.3)")
    add("--radius", type=ops.number(float, 1e-12), default=1e-2,
        help="of the central differences: eps = radius / |v| (DARTS Eq. 8)")
    # the learners (§4.3.1; DARTS §A.1)
    add("--layers", type=ops.number(int, 3), default=8, help="cells")
    add("--channels", type=ops.number(int, 2), default=16, help="C of the first cell")
    add("--epochs", type=ops.number(int, 1), default=50, help="passes over the largest task's half")
    add("--batch-size", type=ops.number(int, 2), default=64, help="of every stream")
    add("--lr", type=real, default=0.025, help="of W and H, cosine")
    add("--lr-min", type=real, default=0.001, help="where the cosine ends")
    add("--momentum", type=ops.number(float, 0, 1), default=0.9, help="of W and H")
    add("--weight-decay", type=real, default=3e-4, help="of W and H")
    add("--grad-clip", type=real, default=5.0, help="largest gradient norm of a stage; 0: any")
    add("--alpha-lr", type=real, default=3e-5, help="of A, Adam (0.5, 0.999); DARTS has 3e-4")
    add("--alpha-weight-decay", type=real, default=1e-3, help="of A")
    # the run
    add("--seed", type=ops.number(int, 0), default=1, help="of everything random")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--out", type=Path, default=None, help="run folder (default: runs/il-TASKS-SEED)")
    add("--resume", action=yes_no, default=False, help="go on from the run folder's checkpoint")
    add("--log-every", type=ops.number(int, 1), default=10, help="steps between printed lines")
    add("--quick", action=yes_no, default=False, help="a tiny run on synthetic images, 2 minutes")
    quick = dict(tasks=["synthetic:10", "synthetic:5"], image_size=16, layers=3, channels=4,
                 epochs=2, batch_size=80)
    args, checkpoint = ops.parse(parser, argv, "il", quick)
    if args.step == "printed" and not args.joint and 2 * max(args.lr, args.lr_min) * args.lam >= 1:
        raise ops.BadInput(f"--step printed diverges: 2 eta lambda = "
                           f"{2 * max(args.lr, args.lr_min) * args.lam:g} must stay below 1; lower "
                           "--coupling or --lr, or use --step proximal")
    return args, checkpoint


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.pick_device(args.device)
    tasks = [ops.load_images(task, args.data, device, args.image_size) for task in args.tasks]
    if len({data.images.shape[2:] for data in tasks}) > 1:
        raise ops.BadInput("--tasks: the images must have one size, not " + ", ".join(
            "{} x {} ({})".format(*data.images.shape[2:], name)
            for name, data in zip(args.tasks, tasks))
            + "; --image-size resizes folders and synthetic images")
    rounds, lam = (1, 0.0) if args.joint else (args.rounds, args.lam)              # IL Eq. 38
    halves = [ops.split_rows(len(data.labels), args.seed, args.hold_out) for data in tasks]
    K = len(tasks)
    order = [k for _ in range(rounds) for k in range(K)]                      # IL Eq. 28
    train_streams = [ops.Stream(tasks[k], halves[k][0], args.batch_size, args.seed, f"train {l}")
                     for l, k in enumerate(order)]
    val_streams = [ops.Stream(data, half[1], args.batch_size, args.seed, f"val {k}")
                   for k, (data, half) in enumerate(zip(tasks, halves))]

    torch.manual_seed(args.seed)
    nets = [ops.place(ops.Supernet(args.channels, len(tasks[k].classes), args.layers), device)
            for k in order]
    sgd = dict(momentum=args.momentum, weight_decay=args.weight_decay)
    stages = [Stage(k, net, torch.optim.SGD(net.parameters(), args.lr, **sgd))
              for k, net in zip(order, nets)]
    alphas = ops.initial_alphas(device)
    alpha_opt = torch.optim.Adam(alphas, args.alpha_lr, (0.5, 0.999),
                                 weight_decay=args.alpha_weight_decay)

    parts = {"nets": nn.ModuleList(nets), "outer": nn.ParameterList(alphas), "alpha_opt": alpha_opt,
             **{f"opt {l}": stage.opt for l, stage in enumerate(stages)}}
    history = ops.begin_run(args.out, parts, checkpoint)

    steps = max(stream.epoch_steps() for stream in train_streams)
    begin, done = time.time(), 0
    for epoch in range(len(history), args.epochs):
        for stage in stages:
            stage.opt.param_groups[0]["lr"] = ops.cosine(args.lr, args.lr_min, epoch, args.epochs)
        sums, epoch_begin = torch.zeros(2, device=device), time.time()
        for i in range(1, steps + 1):
            step = epoch * steps + i - 1
            train = [stream(step)[:2] for stream in train_streams]
            val = [stream(step)[:2] for stream in val_streams]

            # Algorithm 3, 1. to 4.: the stages' gradients                         # IL Eq. 33-36
            losses, grads = [], []
            for stage, (x, y) in zip(stages, train):
                loss = F.cross_entropy(stage.net(x, alphas), y)
                grads.append(grad(loss, list(stage.net.parameters())))
                losses.append(loss.detach())

            # 5. A's gradient, through the steps that the stages are about to take   # IL Eq. 37
            g_alpha, val_loss = outer_gradient(stages, alphas, grads, train, val, lam, args.step,
                                               args.order, args.radius)
            update_weights(stages, grads, lam, args.step, args.grad_clip)
            descend(alpha_opt, alphas, g_alpha)

            loss = torch.stack(losses).mean()
            sums += torch.stack([loss, val_loss / K])
            done += 1
            if i % args.log_every == 0 or i == steps:
                pace = ops.pace(begin, done, (args.epochs - epoch) * steps - i, args.batch_size)
                print(f"epoch {epoch + 1}/{args.epochs} step {i}/{steps}  train loss {loss:.3f}  "
                      f"val loss {val_loss / K:.3f}  {pace}", flush=True)

        train_loss, val_loss = (sums / steps).tolist()
        history.append({"epoch": epoch + 1, "train_loss": train_loss, "val_loss": val_loss,
                        **ops.architecture_report(alphas)})
        for stage in stages[-K:]:
            stage.net.eval()
            history[-1][f"val_accuracy {args.tasks[stage.task]}"] = ops.accuracy(
                lambda x: stage.net(x, alphas), tasks[stage.task], halves[stage.task][1],
                args.batch_size)
            stage.net.train()
        history[-1]["seconds"] = time.time() - epoch_begin
        ops.write_epoch(args, "il", history, parts, alphas)

    print(f"The cell is in {args.out}/genotype.json, drawn in cells.svg. Train it:")
    for task in args.tasks:
        ops.print_next(args, task)


if __name__ == "__main__":
    ops.run(main)
