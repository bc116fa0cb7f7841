"""Learning by Self-Explanation (LeaSE) for neural architecture search.

Algorithm 1 of "Learning by Self-Explanation, with Application to Neural Architecture Search"
(Hosseini and Xie, arXiv 2012.12899), on DARTS. An explainer marks the pixels that its predictions
hang on; an audience learns from the marked images; the explainer's architecture serves both.

    min_A  L(E*(A), A, D_e^val) + gamma L(W*(Delta*), D_a^val)                             Eq. 5
    s.t.   W*     = argmin  mean l(f(delta*_i . x_i; W), t_i)                              Eq. 3
           Delta* = argmax  O_Delta = sum l(f(x_i + delta_i; E*), f(x_i; E*))              Eq. 2
           E*     = argmin  L(E, A, D_e^tr)                                                Eq. 1

    A  alphas     architecture of the explainer    D_e^tr = D_a^tr    x, y      train stream
    E  e          weights of the explainer         D_e^val = D_a^val  x, y      val stream
    W  w          weights of the audience          delta, delta'      delta, explanation
    E', W'        e_virtual, w_virtual             gamma              gamma

    python lease.py --dataset cifar100 --audience resnet18

Departures from the printed equations:
1. Eq. 7 descends O_Delta, which Eq. 2 maximises; here it ascends.
2. Delta starts at random, near zero, in every step: at zero the gradient of O_Delta is zero, and
   crops and flips are new in every step.
3. The paper gives no xi_Delta. It is per image, sqrt(CHW) / |grad_i O_Delta|, held constant, so
   that delta' has unit root-mean-square and delta' . x the scale of x. With a small fixed one
   the audience's share of the gradient vanishes.
4. The chain below Eq. 11 leaves out how the explanation depends on A directly, through the f of
   O_Delta: nearly all of the audience's gradient. It is kept, from the same two passes.
5. The audience's loss is the mean over the mini-batch, where Eq. 3 and 8 print a sum.
6. The gradients that make E' and W' are also those that train E and W (Algorithm 1's order), and
   the steps are the actual optimizers', before clipping: momentum and weight decay included.
7. x in delta' . x is the normalised image, as the networks see it.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import darts_ops as ops
from darts_ops import call, central_difference, descend, grad, virtual_weights


@dataclass
class Learners:
    """Explainer and audience with the optimizers of their weights; alphas is A."""
    explainer: nn.Module
    alphas: list
    explainer_opt: torch.optim.SGD
    audience: nn.Module
    audience_opt: torch.optim.SGD


def explanation_objective(explainer, alphas, e, x, delta):
    """O_Delta = sum l(f(x + delta; E), f(x; E)), l(a, b) = - sum b log a.          # LeaSE Eq. 2"""
    log_a = F.log_softmax(call(explainer, e, x + delta, alphas), 1)
    b = F.softmax(call(explainer, e, x, alphas), 1)
    return -(b * log_a).sum()


def explain(explainer, alphas, e, x, delta):
    """One ascent step on O_Delta: (delta', xi), xi (N, 1, 1, 1) the step size per image.
                                                                       # LeaSE Eq. 7, departure 1-3
    """
    delta = delta.detach().requires_grad_()
    g, = grad(explanation_objective(explainer, alphas, [t.detach() for t in e], x, delta), [delta])
    norm = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    xi = torch.where(norm > 0, x[0].numel() ** 0.5 / norm, 0)
    return (delta + xi * g).detach(), xi


def audience_loss(audience, explanation, x, y, weighting):
    """mean l(f(delta' . x; W), t); audience(x) returns logits.                     # LeaSE Eq. 3"""
    weight = explanation.abs() if weighting == "magnitude" else explanation
    return F.cross_entropy(audience(weight * x), y)


@dataclass
class Ahead:
    """One step ahead in stages 1 to 3: E', delta' with its step sizes, and the steps' gradients."""
    e_virtual: list
    explanation: torch.Tensor       # (N, 3, H, W)
    xi: torch.Tensor                # (N, 1, 1, 1)
    grads_e: list
    grads_w: list
    losses: tuple                   # of the explainer and of the audience, in training


def look_ahead(m: Learners, train, delta, weighting="signed", order=2, explainer=None,
               audience=None) -> Ahead:
    """Stages 1 to 3, one step each. order 1 sets xi_e = 0, so E' = E.

    Changes no state; but explainer(x) and audience(x) may stand for the networks at their present
    weights, where BatchNorm's statistics are to follow.
    """
    x, y = train
    e, w = list(m.explainer.parameters()), list(m.audience.parameters())
    explainer = explainer or (lambda x: call(m.explainer, e, x, m.alphas))
    audience = audience or (lambda x: call(m.audience, w, x))
    loss = F.cross_entropy(explainer(x), y)                                         # LeaSE Eq. 1
    grads_e = grad(loss, e)
    e_virtual = [t.detach().requires_grad_() for t in e]
    if order == 2:
        e_virtual = virtual_weights(m.explainer_opt, e, grads_e)                    # LeaSE Eq. 6
    explanation, xi = explain(m.explainer, m.alphas, e_virtual, x, delta)           # LeaSE Eq. 7
    heard = audience_loss(audience, explanation, x, y, weighting)
    grads_w = grad(heard, w)                                                        # LeaSE Eq. 8
    return Ahead(e_virtual, explanation, xi, grads_e, grads_w, (loss.detach(), heard.detach()))


def outer_gradient(m: Learners, train, val, delta, ahead: Ahead, gamma=1.0, weighting="signed",
                   order=2, radius=1e-2):
    """dJ/dA of J = L(E', A, D_e^val) + gamma L(W', D_a^val).

    train, val: batches (x, y); delta: start of the perturbations; ahead: look_ahead of the same.
    Returns (gradients of alphas, J, |v_A| of the audience / |direct gradient of the explainer|).
    Changes no state.
    """
    (x, y), (x_val, y_val), e_virtual = train, val, ahead.e_virtual
    e, w = list(m.explainer.parameters()), list(m.audience.parameters())
    wanted = [*m.alphas, *e_virtual] if order == 2 else m.alphas     # at xi_e = 0 v_e goes nowhere

    # Stage 4: the explainer validates itself                                # LeaSE Eq. 9, 10
    loss = F.cross_entropy(call(m.explainer, e_virtual, x_val, m.alphas), y_val)
    parts = grad(loss, wanted)
    g_alpha, v_e = parts[:len(m.alphas)], parts[len(m.alphas):]
    total, share = loss.detach(), torch.zeros_like(loss)

    # Stage 4: the audience validates itself, and v goes back along W', Delta', E'
    if gamma:
        w_virtual = virtual_weights(m.audience_opt, w, ahead.grads_w)              # LeaSE Eq. 8
        loss = gamma * F.cross_entropy(call(m.audience, w_virtual, x_val), y_val)
        v_w = grad(loss, w_virtual)
        total += loss.detach()

        def grad_delta(w):                                                    # LeaSE Eq. 12, 13
            at = ahead.explanation.clone().requires_grad_()
            return grad(audience_loss(lambda x: call(m.audience, w, x), at, x, y, weighting), [at])

        xi_w = m.audience_opt.param_groups[0]["lr"]
        v_delta, = (-xi_w * p for p in central_difference(grad_delta, w, v_w, radius))

        def grad_alpha_e(at):                                                 # LeaSE Eq. 14, 15
            return grad(explanation_objective(m.explainer, m.alphas, e_virtual, x, at[0]), wanted)

        parts = central_difference(grad_alpha_e, [delta], [ahead.xi * v_delta], radius)
        share = torch.cat(parts[:len(m.alphas)]).norm() / torch.cat(g_alpha).norm()
        g_alpha = [g + p for g, p in zip(g_alpha, parts[:len(m.alphas)])]           # departure 4
        v_e = [v + p for v, p in zip(v_e, parts[len(m.alphas):])]
    if order == 1:
        return g_alpha, total, share

    def grad_alpha(e):                                                   # LeaSE Eq. 11, 16, 17
        return grad(F.cross_entropy(call(m.explainer, e, x, m.alphas), y), m.alphas)

    xi_e = m.explainer_opt.param_groups[0]["lr"]
    product = central_difference(grad_alpha, e, v_e, radius)
    return [g - xi_e * p for g, p in zip(g_alpha, product)], total, share


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Search a cell by Learning by Self-Explanation (arXiv 2012.12899).",
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, yes_no, real = parser.add_argument, argparse.BooleanOptionalAction, ops.number(float, 0)
    add("--dataset", type=ops.dataset_name, default="cifar100",
        help="cifar10, cifar100, folder (in --data), folder:DIR, synthetic, synthetic:CLASSES")
    add("--data", type=Path, default=Path("data"), help="where CIFAR is or goes; the folder's root")
    add("--image-size", type=ops.number(int, 8, 512), default=None,
        help="resize a folder's images to this many pixels; size of synthetic ones")
    add("--hold-out", type=ops.number(int, 0), default=0,
        help="training images kept for evaluate.py to test on")
    # the method
    add("--audience", choices=("resnet18", "resnet50"), default="resnet18", help="W's (§3.2)")
    add("--order", type=int, choices=(1, 2), default=2, help="1: xi_e = 0 (DARTS §2.3)")
    add("--gamma", type=real, default=1.0, help="weight of the audience's validation (§3.2)")
    add("--weighting", choices=("signed", "magnitude"), default="signed",
        help="the audience sees delta' . x as printed, or |delta'| . x")
    add("--delta-scale", type=ops.number(float, 1e-12), default=1e-2,
        help="root-mean-square of the random start of delta (departure 2)")
    add("--radius", type=ops.number(float, 1e-12), default=1e-2,
        help="of the central differences: eps = radius / |v| (below Eq. 11)")
    # the learners (§3.2; DARTS §A.1)
    add("--layers", type=ops.number(int, 3), default=8, help="cells")
    add("--channels", type=ops.number(int, 2), default=16, help="C of the first cell")
    add("--epochs", type=ops.number(int, 1), default=50, help="passes over the training half")
    add("--batch-size", type=ops.number(int, 2), default=64, help="of both streams")
    add("--lr", type=real, default=0.025, help="of E, cosine")
    add("--lr-min", type=real, default=0.001, help="where E's cosine ends")
    add("--momentum", type=ops.number(float, 0, 1), default=0.9, help="of E and W")
    add("--weight-decay", type=real, default=3e-4, help="of E and W")
    add("--grad-clip", type=real, default=5.0, help="largest gradient norm of E; 0: any")
    add("--alpha-lr", type=real, default=3e-4, help="of A, Adam (0.5, 0.999)")
    add("--alpha-weight-decay", type=real, default=1e-3, help="of A")
    add("--audience-lr", type=real, default=0.025, help="of W, cosine to 0")
    # the run
    add("--seed", type=ops.number(int, 0), default=1, help="the paper has 1 to 10")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--out", type=Path, default=None, help="run folder (default: runs/lease-DATASET-SEED)")
    add("--resume", action=yes_no, default=False, help="go on from the run folder's checkpoint")
    add("--log-every", type=ops.number(int, 1), default=10, help="steps between printed lines")
    add("--quick", action=yes_no, default=False, help="a tiny run on synthetic images, 2 minutes")
    quick = dict(dataset="synthetic", image_size=16, layers=3, channels=4, epochs=2, batch_size=50)
    return ops.parse(parser, argv, "lease", quick)


def random_delta(shape, seed, step, scale, device):
    """The start of the perturbations, a pure function of (seed, step)."""
    draw = np.random.default_rng([seed, 0xDE17A, step]).standard_normal(shape, np.float32)
    return torch.from_numpy(draw).mul_(scale).to(device)


def write_explanations(path, data, rows, maps):
    """explanations.png: the images, and per epoch in maps {epoch: (N, H, W)} |delta'| as heat, by
    itself and laid over the grey image."""
    images = data.images[rows].cpu()
    pictures = {"Images": [(image, data.classes[y]) for image, y in zip(images, data.labels[rows])]}
    for epoch, heat in maps.items():
        top = heat.flatten(1).quantile(0.99, 1).view(-1, 1, 1).clamp_min(1e-12)
        h = (3 * heat / top).cpu()                            # black, red, yellow, white
        colour = 255 * torch.stack([h, h - 1, h - 2], 1).clamp(0, 1)
        share = (h / 3).clamp(0, 1)[:, None]
        overlay = (1 - share) * images.float().mean(1, keepdim=True) + share * colour
        for title, what in (("|delta'|", colour), ("The same over the image,", overlay)):
            pictures[f"{title} after epoch {epoch}"] = [(t.byte(), "") for t in what]
    ops.write_pictures(path, pictures, size=128)


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.pick_device(args.device)
    data = ops.load_images(args.dataset, args.data, device, args.image_size)
    train_rows, val_rows, _ = ops.split_rows(len(data.labels), args.seed, args.hold_out)
    train_stream = ops.Stream(data, train_rows, args.batch_size, args.seed, "train")
    val_stream = ops.Stream(data, val_rows, args.batch_size, args.seed, "val")

    torch.manual_seed(args.seed)
    num_classes = len(data.classes)
    sgd = dict(momentum=args.momentum, weight_decay=args.weight_decay)
    explainer = ops.place(ops.Supernet(args.channels, num_classes, args.layers), device)
    alphas = ops.initial_alphas(device)
    explainer_opt = torch.optim.SGD(explainer.parameters(), args.lr, **sgd)
    alpha_opt = torch.optim.Adam(alphas, args.alpha_lr, (0.5, 0.999),
                                 weight_decay=args.alpha_weight_decay)
    audience = ops.place(torchvision.models.get_model(args.audience, weights=None,
                                                      num_classes=num_classes), device)
    audience_opt = torch.optim.SGD(audience.parameters(), args.audience_lr, **sgd)
    m = Learners(explainer, alphas, explainer_opt, audience, audience_opt)
    w = list(audience.parameters())

    shown = torch.as_tensor(train_rows[:8], device=device)               # in explanations.png
    early = nn.Parameter(torch.zeros(len(shown), *data.images.shape[2:], device=device), False)
    parts = {"explainer": explainer, "outer": nn.ParameterList([*alphas, early]),
             "audience": audience, "explainer_opt": explainer_opt, "alpha_opt": alpha_opt,
             "audience_opt": audience_opt}
    history = ops.begin_run(args.out, parts, checkpoint)

    steps, begin, done = train_stream.epoch_steps(), time.time(), 0
    for epoch in range(len(history), args.epochs):
        explainer_opt.param_groups[0]["lr"] = ops.cosine(args.lr, args.lr_min, epoch, args.epochs)
        audience_opt.param_groups[0]["lr"] = ops.cosine(args.audience_lr, 0, epoch, args.epochs)
        sums, epoch_begin = torch.zeros(4, device=device), time.time()
        for i in range(1, steps + 1):
            step = epoch * steps + i - 1
            train, val = train_stream(step)[:2], val_stream(step)[:2]
            delta = random_delta(train[0].shape, args.seed, step, args.delta_scale, device)

            # Algorithm 1, 1. and 2.: the steps that E, Delta and W are about to take
            ahead = look_ahead(m, train, delta, args.weighting, args.order,
                               lambda x: explainer(x, alphas), audience)           # LeaSE Eq. 6-8
            # 3. A's gradient, through those steps                               # LeaSE Eq. 9-17
            g_alpha, val_loss, share = outer_gradient(m, train, val, delta, ahead, args.gamma,
                                                      args.weighting, args.order, args.radius)
            descend(explainer_opt, list(explainer.parameters()), ahead.grads_e, args.grad_clip)
            descend(audience_opt, w, ahead.grads_w)
            descend(alpha_opt, alphas, g_alpha)

            loss, heard = ahead.losses
            sums += torch.stack([loss, heard, val_loss, share])
            done += 1
            if i % args.log_every == 0 or i == steps:
                pace = ops.pace(begin, done, (args.epochs - epoch) * steps - i, args.batch_size)
                print(f"epoch {epoch + 1}/{args.epochs} step {i}/{steps}  train loss {loss:.3f}  "
                      f"audience loss {heard:.3f}  val loss {val_loss:.3f}  {pace}", flush=True)

        explainer.eval()
        train_loss, heard, val_loss, share = (sums / steps).tolist()
        history.append({
            "epoch": epoch + 1, "train_loss": train_loss, "audience_loss": heard,
            "val_loss": val_loss, "audience_share": share, **ops.architecture_report(alphas),
            "val_accuracy": ops.accuracy(lambda x: explainer(x, alphas), data, val_rows,
                                         args.batch_size),
            # by the batches' statistics: the running ones are of explanations, not of images
            "audience_val_accuracy": ops.accuracy(lambda x: call(audience, w, x), data, val_rows,
                                                  args.batch_size),
            "seconds": time.time() - epoch_begin})
        x = data.batch(shown)
        delta = random_delta(x.shape, args.seed, 0, args.delta_scale, device)
        heat = explain(explainer, alphas, list(explainer.parameters()), x, delta)[0].abs().mean(1)
        explainer.train()
        if epoch == 0:
            early.copy_(heat)
        write_explanations(args.out / "explanations.png", data, shown, {1: early, epoch + 1: heat})
        ops.write_epoch(args, "lease", history, parts, alphas)

    print(f"The cell is in {args.out}/genotype.json, drawn in cells.svg. Train it:")
    ops.print_next(args, args.dataset)


if __name__ == "__main__":
    ops.run(main)
