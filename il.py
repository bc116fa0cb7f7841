"""Interleaving Learning (IL) for neural architecture search.

Algorithm 3 of "Skillearn: Machine Learning Inspired by Humans' Learning Skills" (Xie, Du and Ban,
arXiv 2012.04863), on DARTS. K learners of K tasks share an architecture and learn in turns, for M
rounds; each turn's encoder is pulled towards the one before it.

    min_A  sum_k L(A, W_k^(M)(A), H_k^(M)(A), D_k^val)                                   Eq. 31, 32
    s.t.   W*_l, H*_l = argmin  L(A, W_l, H_l, D^tr) + lambda |W_l - W*_(l-1)|^2          Eq. 29, 30
    for the stages l = 1 ... MK: tasks 1 ... K of round 1, then of round 2, ... (Eq. 28)

    A  alphas     architecture, shared             D_k^tr   x, y      a stream per stage
    W  w          encoder weights, per stage       D_k^val  x, y      a stream per task
    H             a stage's linear head            W'_l     bars[l]   W one step ahead, W bar
    lambda        lam, --coupling                  eta      eta       the stages' learning rate

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

from dataclasses import dataclass

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


def coupling(eta: float, lam: float, step: str, first: bool):
    """(pull, gain) of a stage's step W' = W - gain eta grad L + pull (W'_(l-1) - W)."""
    if first or lam == 0:
        return 0.0, 1.0                                                            # IL Eq. 34
    if step == "printed":
        return 2 * eta * lam, 1.0                                                  # IL Eq. 35
    return 2 * eta * lam / (1 + 2 * eta * lam), 1 / (1 + 2 * eta * lam)            # departure 1


@torch.no_grad()
def coupled(w, stepped, before, pull, gain):
    """The stage's weights after its step, from those after the optimizer's own: the encoder is
    pulled towards the one before, the head is not.                               # IL Eq. 33-36"""
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

    # The sweep back, u_l = dJ / d(W'_l, H'_l): the chain that Eq. 37 asks for; not in the paper
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


def update_weights(stages, grads, lam, step, clip=None, at="{}".format, losses=None):
    """Every stage's step, in order; each is pulled towards the one before it.     # IL Eq. 33-36"""
    before = None
    for l, (stage, g) in enumerate(zip(stages, grads)):
        w = list(stage.net.parameters())
        old = [t.detach().clone() for t in w]
        descend(stage.opt, w, g, clip, at(f"learner {l + 1}"), losses and losses[l])
        pull, gain = coupling(stage.opt.param_groups[0]["lr"], lam, step, l == 0)
        if pull:
            with torch.no_grad():
                torch._foreach_copy_(w, coupled(old, w, before, pull, gain))
        before = [t.detach() for t in w[:-HEAD]]


def get_args(argv=None):
    parser = ops.new_parser("Search a cell by Interleaving Learning (arXiv 2012.04863).")
    add = parser.add_argument
    add("--tasks", type=ops.dataset_name, nargs="+", default=["cifar100", "cifar10"],
        help="in their order: cifar10, cifar100, folder:DIR, synthetic[:CLASSES] (§4.3.1)")
    add("--rounds", type=ops.number(int, 1), default=2, help="M (§4.3.1)")
    add("--coupling", dest="lam", type=ops.real, default=100.0, help="lambda (beta in §4.3.1)")
    add("--step", choices=("proximal", "printed"), default="proximal",
        help="of the coupled weights; printed: Eq. 35, which needs 2 eta lambda < 1")
    add("--joint", action=ops.flag, default=False, help="the baseline JL: one round, no coupling")
    ops.search_arguments(parser)
    args, checkpoint = ops.parse_search(parser, argv, "il", {                      # §4.3.1
        "darts-1st": {"alpha_lr": 3e-5}, "darts-2nd": {"alpha_lr": 3e-5},
        "pdarts": {"batch_size": 64}, "pcdarts": {"alpha_lr": 3e-3}})
    if "imagenet" in args.tasks:
        raise ops.BadInput("--tasks: no imagenet; the paper searches on CIFAR (§4.3.1)")
    if args.step == "printed" and not args.joint and 2 * max(args.lr, args.lr_min) * args.lam >= 1:
        raise ops.BadInput(f"--step printed diverges: 2 eta lambda = "
                           f"{2 * max(args.lr, args.lr_min) * args.lam:g} must stay below 1; lower "
                           "--coupling or --lr, or use --step proximal")
    return args, checkpoint


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.pick_device(args)
    tasks = [ops.load_images(task, args.data, device, args.image_size, workers=args.workers)
             for task in args.tasks]
    if len({data.size for data in tasks}) > 1:
        raise ops.BadInput("--tasks: the images must have one size, not " + ", ".join(
            "{} x {} ({})".format(*data.size, name) for name, data in zip(args.tasks, tasks))
            + "; --image-size resizes folders and synthetic images")
    rounds, lam = (1, 0.0) if args.joint else (args.rounds, args.lam)              # IL Eq. 38
    halves = [ops.split_rows(data.labels, args.seed, args.hold_out, args.subsets) for data in tasks]
    K = len(tasks)
    order = [k for _ in range(rounds) for k in range(K)]                           # IL Eq. 28
    train_streams = [ops.Stream(tasks[k], halves[k][0], args.batch_size, args.seed, f"train {l}")
                     for l, k in enumerate(order)]
    val_streams = [ops.Stream(data, half[1], args.batch_size, args.seed, f"val {k}")
                   for k, (data, half) in enumerate(zip(tasks, halves))]
    run = ops.Run("il", args, checkpoint, tasks)

    for stage in run.stages():             # of the base: several in P-DARTS, with new learners
        nets, opts, alphas, alpha_opt = ops.new_stage(
            args, stage, run.state["kept"], [len(tasks[k].classes) for k in order], device)
        stages = [Stage(k, net, opt) for k, net, opt in zip(order, nets, opts)]
        run.load({"nets": nn.ModuleList(nets), "outer": nn.ParameterList(alphas),
                  "alpha_opt": alpha_opt, **{f"opt {l}": opt for l, opt in enumerate(opts)}},
                 alphas)
        for epoch, step in run.steps(max(stream.epoch_steps() for stream in train_streams)):
            learns = ops.schedule(args, stage, epoch, step, nets, opts)
            train = [stream(step)[:2] for stream in train_streams]
            val = [stream(step)[:2] for stream in val_streams]

            # Algorithm 3, 1. to 4.: the stages' gradients                         # IL Eq. 33-36
            losses, grads = [], []
            for learner, (x, y) in zip(stages, train):
                with ops.autocast(device, args.amp != "off"):
                    loss = F.cross_entropy(learner.net(x, alphas), y)
                grads.append(grad(loss, list(learner.net.parameters())))
                losses.append(loss.detach())

            # 5. A's gradient, through the steps that the stages are about to take   # IL Eq. 37
            if learns:
                with ops.autocast(device, args.amp == "bf16-all"):
                    g_alpha, val_loss = outer_gradient(stages, alphas, grads, train, val, lam,
                                                       args.step, args.order, args.radius)
            update_weights(stages, grads, lam, args.step, args.grad_clip, run.at, losses)
            if learns:
                descend(alpha_opt, alphas, g_alpha, None, run.at("the architecture"), val_loss)

            figures = {"val_loss": val_loss / K} if learns else {}
            if not run.log(train_loss=torch.stack(losses).mean(), **figures):
                continue
            accuracies = {}
            for learner in stages[-K:]:
                ops.evaluating(learner.net)
                accuracies[f"val_accuracy {args.tasks[learner.task]}"] = ops.accuracy(
                    lambda x: learner.net(x, alphas), tasks[learner.task], halves[learner.task][1],
                    args.batch_size)
                learner.net.train()
            run.end_epoch(**accuracies)

    ops.print_next(args)


if __name__ == "__main__":
    ops.run(main)
