"""Learning by Self-Explanation (LeaSE) for neural architecture search.

Algorithm 1 of "Learning by Self-Explanation, with Application to Neural Architecture Search"
(Hosseini and Xie, arXiv 2012.12899), on DARTS. An explainer marks the pixels that its predictions
depend on; an audience learns from the marked images; the explainer's architecture serves both.

    min_A  L(E*(A), A, D_e^val) + gamma L(W*(Delta*), D_a^val)                             Eq. 5
    s.t.   W*     = argmin  mean l(f(delta*_i . x_i; W), t_i)                              Eq. 3
           Delta* = argmax  O_Delta = sum l(f(x_i + delta_i; E*), f(x_i; E*))              Eq. 2
           E*     = argmin  L(E, A, D_e^tr)                                                Eq. 1

    A  A          architecture of the explainer    D_e^tr = D_a^tr    train  (x, y, rows)
    E  e          weights of the explainer         D_e^val = D_a^val  val    (x, y, rows)
    W  w          weights of the audience          delta, delta'      delta, explanation
    E', W'        e_virtual, w_virtual             gamma              args.gamma

    python lease.py --dataset cifar100 --audience resnet18

Departures from the printed equations:
1. Eq. 7 descends O_Delta, which Eq. 2 maximises; here it ascends: Eq. 15's minus is a plus.
2. Delta starts at random in every step, where Algorithm 1 goes on from the step before: at zero the
   gradient of O_Delta is zero, and crops and flips are new in every step.
3. The paper gives no xi_Delta. It is per image, sqrt(CHW) / |grad_i O_Delta|, so that the step has
   unit root-mean-square (delta' 1.04) and delta' . x keeps the scale of x; through it too A changes
   delta'. A step of a learning rate's size moves delta by less than 1e-4 of its length.
4. The chain below Eq. 11 leaves out how the explanation depends on A directly, through the f of
   O_Delta: nearly all of the audience's gradient. It is kept, from the same two passes.
5. The audience's loss is the mean over the mini-batch, where Eq. 3 and 8 print a sum.
6. The last difference, for Eq. 11 and 17, is one along the explainer's and the audience's parts of
   v_e together: the product that it approximates is linear in its direction. The difference along
   delta has a radius of its own, --delta-radius: 0.01 over the 38,400 numbers of 50 images of 16
   pixels moves each by 5e-5 (root mean square), and the difference then sees single kinks.
7. The gradients that make E' and W' are also those that train E and W (Algorithm 1's order), and
   the steps are the actual optimizers', before clipping: momentum and weight decay included.
8. x in delta' . x is the normalised image, as the networks see it.
9. A starts to learn after one epoch, unless its base waits longer: before the explainer has learnt
   anything, a change of A in its fifth decimal turns delta' elsewhere. --warm-up 0 is Algorithm 1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import darts_ops as ops
from darts_ops import (
    at_weights,
    central_difference,
    descend,
    detached,
    grad,
    gradients,
    sgd_step,
    virtual_weights,
)

# -------------------------------------------------------------------------------------- arguments


def get_args(argv=None):
    parser = ops.new_parser("Search a cell by Learning by Self-Explanation (arXiv 2012.12899).",
                            "python lease.py --dataset cifar100 --audience resnet18")
    add = parser.add_argument
    add("--dataset", type=ops.dataset_name, default="cifar100",
        help="cifar10, cifar100, imagenet, folder (at --data), folder:DIR, synthetic[:CLASSES]")
    add("--audience", choices=("resnet18", "resnet50"), default="resnet18",
        help="network of the audience (§3.2)")
    add("--gamma", type=ops.real, default=1.0,
        help="weight of the audience's validation loss (§3.2)")
    add("--weighting", choices=("signed", "magnitude"), default="signed",
        help="the audience sees delta' . x as printed, or |delta'| . x; not in the paper")
    add("--delta-scale", type=ops.number(float, 1e-12), default=0.3,
        help="root mean square of delta's random start; not in the paper (departure 2)")
    add("--delta-radius", type=ops.number(float, 1e-12), default=1.0,
        help="radius of the difference along delta; the paper uses --radius for all differences")
    add("--audience-lr", type=ops.real, default=0.025,
        help="learning rate of the audience's W: SGD, cosine decay to 0 (§3.2)")
    ops.search_arguments(parser)
    return ops.parse_search(parser, argv, "lease", lambda chosen: {
        "batch_size": 64,                                                    # §3.2
        "warm_up": ops.BASES[chosen.base]["warm_up"] or int(chosen.epochs != 1)})  # departure 9


# --------------------------------------------------------------------------------------- learners


@dataclass
class Learners:
    """Explainer and audience with their optimizers."""
    explainer: nn.Module
    explainer_opt: torch.optim.SGD
    A: nn.Module
    alpha_opt: torch.optim.Adam | None
    audience: nn.Module
    audience_opt: torch.optim.SGD

    @property
    def alphas(self) -> list:
        return list(self.A.parameters())

    @property
    def e(self) -> list:
        return list(self.explainer.parameters())

    @property
    def w(self) -> list:
        return list(self.audience.parameters())


def random_delta(shape, scale, device, *keys):
    """Return the start of the perturbations, a pure function of keys: seed, step and rank."""
    generator = torch.Generator(device).manual_seed(ops.mixed_seed("delta", *keys))
    return scale * torch.randn(shape, generator=generator, device=device)


# ----------------------------------------------------------------------------------------- losses
# A network that a loss takes is a module, or a module at_weights: both are functions of the images.


def explainer_loss(explainer, A, batch):
    x, y, _ = batch
    return F.cross_entropy(explainer(x, A), y)                               # LeaSE Eq. 1


def explanation_objective(explainer, A, x, delta):
    """Return O_Delta = sum l(f(x + delta; E), f(x; E)), l(a, b) = - sum b log a."""
    log_a = F.log_softmax(explainer(x + delta, A), 1)
    b = F.softmax(explainer(x, A), 1)
    return -(b * log_a).sum()                                                # LeaSE Eq. 2


def step_sizes(g):
    """Return xi_Delta per image, (N, 1, 1, 1), such that xi_Delta g has root mean square 1; 0
    where g is 0."""
    norm = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    norm = torch.where(norm > 0, norm, torch.inf)
    return g[0].numel() ** 0.5 / norm                                        # departure 3


def explain(explainer, A, x, delta):
    """Return delta' (N, 3, H, W), one ascent step on O_Delta from delta, and its step sizes."""
    delta = delta.detach().requires_grad_()
    objective = explanation_objective(explainer, A, x, delta)
    g, = torch.autograd.grad(objective, delta)                 # of this process's own images
    return (delta + step_sizes(g) * g).detach(), step_sizes(g)               # LeaSE Eq. 7


def audience_loss(audience, explanation, batch, args):
    """Return mean l(f(delta' . x; W), t)."""
    x, y, _ = batch
    weight = explanation.abs() if args.weighting == "magnitude" else explanation
    return F.cross_entropy(audience(weight * x), y)                          # LeaSE Eq. 3


def audience_val_loss(audience, batch):
    x, y, _ = batch
    return F.cross_entropy(audience(x), y)                                   # LeaSE Eq. 9


# ------------------------------------------------------------------------------------ the problem


def objective(m: Learners, batches, args):
    """Return J with one step in place of each argmin, in a graph that reaches A.

    Written in Skillearn's general form: stage by stage a step on the stage's loss, given what the
    stages before have learned (its Eq. 1, 3, 4), then the validation objective of the parameters
    that no stage learns (its Eq. 5).
    """
    (train, val, delta), e, w = batches, m.e, m.w

    # Stage 1: the explainer learns
    if args.order == 2:
        loss = explainer_loss(at_weights(m.explainer, e), m.A, train)        # LeaSE Eq. 1
        e = sgd_step(m.explainer_opt, grad(loss, e, graph=True))             # LeaSE Eq. 6
    explainer = at_weights(m.explainer, e)

    # Stage 2: it marks the pixels that its predictions depend on
    delta = delta.detach().requires_grad_()
    g, = grad(explanation_objective(explainer, m.A, train[0], delta), [delta],
              graph=True)                                                    # LeaSE Eq. 2
    explanation = delta + step_sizes(g) * g                                  # LeaSE Eq. 7

    # Stage 3: the audience learns from the marked images
    loss = audience_loss(at_weights(m.audience, w), explanation, train, args)  # LeaSE Eq. 3
    w = sgd_step(m.audience_opt, grad(loss, w, graph=True))                  # LeaSE Eq. 8

    # Validation stage
    return (explainer_loss(explainer, m.A, val)
            + args.gamma * audience_val_loss(at_weights(m.audience, w), val))  # LeaSE Eq. 5


# -------------------------------------------------------------------------------------- algorithm


class Ahead(NamedTuple):
    """E and Delta one step ahead, and the gradients that E and W are about to follow."""
    e_virtual: list             # E', or at order 1 E, a constant
    explanation: torch.Tensor   # delta' (N, 3, H, W)
    xi_delta: torch.Tensor      # its step sizes (N, 1, 1, 1)
    grads_e: list
    grads_w: list
    losses: dict


@ops.graphed
def look_ahead(m: Learners, batches, args):
    """Return Ahead. These passes also train E and W, so they update BatchNorm's statistics."""
    train, _, delta = batches
    loss = explainer_loss(m.explainer, m.A, train)                           # LeaSE Eq. 1
    grads_e, e_virtual = grad(loss, m.e), detached(m.e)
    if args.order == 2:
        e_virtual = virtual_weights(m.explainer_opt, grads_e)                # LeaSE Eq. 6
    explanation, xi_delta = explain(at_weights(m.explainer, detached(e_virtual)), m.A,
                                    train[0], delta)
    loss_w = audience_loss(m.audience, explanation, train, args)
    grads_w = grad(loss_w, m.w)                                              # LeaSE Eq. 8
    return Ahead(e_virtual, explanation, xi_delta, grads_e, grads_w,
                 {"train_loss": loss.detach(), "audience_loss": loss_w.detach()})


@ops.graphed
def outer_gradient(m: Learners, batches, args, ahead: Ahead):
    """Return dJ/dA of objective, by finite differences, J, and the length of the audience's direct
    part of dJ/dA over the explainer's (None if gamma is 0). Changes no state."""
    (train, val, delta), x, e, w = batches, batches[0][0], m.e, m.w
    if args.gradient == "exact":
        J = objective(m, batches, args)
        return grad(J, m.alphas), J.detach(), None
    e_virtual, explanation, xi_delta, _, grads_w, _ = ahead
    e_wanted = e_virtual if args.order == 2 else []
    explainer, share = at_weights(m.explainer, e_virtual), None

    # Stage 4: the explainer validates itself
    J = explainer_loss(explainer, m.A, val)                                  # LeaSE Eq. 9
    g_alpha, v_e = gradients(J, m.alphas, e_wanted)                          # LeaSE Eq. 10

    # The audience validates itself, and v_w goes back: to v_delta, then to A and v_e
    if args.gamma:
        w_virtual = virtual_weights(m.audience_opt, grads_w)                 # LeaSE Eq. 8
        loss = args.gamma * audience_val_loss(at_weights(m.audience, w_virtual), val)
        v_w, J = grad(loss, w_virtual), J + loss                             # below LeaSE Eq. 11

        def grad_delta(w):
            at = explanation.clone().requires_grad_()
            loss = audience_loss(at_weights(m.audience, w), at, train, args)
            return torch.autograd.grad(loss, [at])             # of this process's own images

        xi_w = m.audience_opt.param_groups[0]["lr"]
        product, = central_difference(grad_delta, w, v_w, args.radius)       # LeaSE Eq. 12
        v_delta = -xi_w * product                                            # LeaSE Eq. 13
        # delta' = delta + xi g, xi = sqrt(CHW) / |g|, so d delta' = xi (1 - unit unit^T) dg
        unit = (explanation - delta) / x[0].numel() ** 0.5     # g / |g|
        v_delta = v_delta - unit * (unit * v_delta).sum((1, 2, 3), keepdim=True)

        def grad_alpha_e(at):
            objective = explanation_objective(explainer, m.A, x, at[0])
            return grad(objective, [*m.alphas, *e_wanted])

        product = central_difference(grad_alpha_e, [delta], [xi_delta * v_delta],
                                     args.delta_radius, split=True)          # LeaSE Eq. 15
        by_a, by_e = product[:len(m.alphas)], product[len(m.alphas):]        # LeaSE Eq. 14
        share = nn.utils.get_total_norm(by_a) / nn.utils.get_total_norm(g_alpha)
        g_alpha = [g + p for g, p in zip(g_alpha, by_a)]                     # departure 4
        v_e = [v + p for v, p in zip(v_e, by_e)]

    # Both parts go on through E', LeaSE Eq. 16
    if args.order == 2:
        def grad_alpha(e):
            return grad(explainer_loss(at_weights(m.explainer, e), m.A, train), m.alphas)

        xi_e = m.explainer_opt.param_groups[0]["lr"]
        product = central_difference(grad_alpha, e, v_e, args.radius)        # LeaSE Eq. 11
        g_alpha = [g - xi_e * p for g, p in zip(g_alpha, product)]           # LeaSE Eq. 17
    return g_alpha, J.detach(), share


def algorithm_1(m: Learners, batches, args, learns=True):
    """Take one iteration of Algorithm 1, A's step only if A learns. Returns its figures."""
    device, figures = batches[0][0].device, {}

    # 1. and 2. One step ahead of E, Delta and W
    with ops.autocast(device, args.amp != "off"):
        ahead = look_ahead(m, batches, args)

    # 3. A's step, through the steps that E, Delta and W are about to take; then theirs
    if learns:
        with ops.autocast(device, args.amp == "bf16-all"):
            g_alpha, J, share = outer_gradient(m, batches, args, ahead)
        m.A.step(m.alpha_opt, g_alpha)
        figures = {"val_loss": J} | ({} if share is None else {"audience_share": share})
    descend(m.explainer_opt, ahead.grads_e, "the explainer", args.grad_clip)
    descend(m.audience_opt, ahead.grads_w, "the audience")
    return ahead.losses | figures


# ------------------------------------------------------------------------------------------- main


def row(args):
    """Return the search's row in the papers' tables."""
    return ops.row(f"LeaSE-R{args.audience[6:]}-{args.title}", args, "audience")


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.start(args)
    data = ops.load_images(args.dataset, args, device)
    train_rows, val_rows, _ = ops.split_rows(data.labels, args.seed, args.hold_out, args.subsets)
    streams = [ops.Stream(data, rows, args.batch_size, args.seed, name, args.flip)
               for name, rows in (("train", train_rows), ("val", val_rows))]
    run = ops.Run("lease", args, checkpoint, [data], row(args))

    ops.seed_all("audience", args.seed)
    audience = ops.place(torchvision.models.get_model(args.audience, weights=None,
                                                      num_classes=len(data.classes)), device)
    audience_opt = torch.optim.SGD(audience.parameters(), args.audience_lr, args.momentum,
                                   weight_decay=args.weight_decay)
    shown = train_rows[ops.evenly(len(train_rows), 8)]
    mixed = np.random.default_rng(args.seed).permutation(val_rows)   # --subsets sorts by class

    for stage in ops.stages(run):                              # several in P-DARTS: a new explainer
        A, alpha_opt = ops.new_architecture(run, device)
        (explainer,), (explainer_opt,) = ops.new_networks(run, [data], device)
        m = Learners(explainer, explainer_opt, A, alpha_opt, audience, audience_opt)
        run.load({"explainer": explainer, "explainer_opt": explainer_opt, "A": A,
                  "alpha_opt": alpha_opt, "audience": audience, "audience_opt": audience_opt})
        for epoch in run.epochs(streams[0].epoch_steps()):
            ops.set_epoch(args, stage, epoch, A, [explainer], [explainer_opt], audience_opt,
                          args.audience_lr)
            for step in run.steps(m):
                train, val = (stream(step) for stream in streams)
                delta = random_delta(train[0].shape, args.delta_scale, device, args.seed, step,
                                     ops.rank())
                run.log_step(**algorithm_1(m, (train, val, delta), args, ops.learns(args, epoch)))

            figures = {}
            with ops.evaluating(explainer):
                figures["val_accuracy"] = ops.accuracy(lambda x: explainer(x, A), data, val_rows,
                                                       args.batch_size)
                # by the batches' statistics: the running ones are of explanations, not of images
                figures["audience_val_accuracy"] = ops.accuracy(
                    at_weights(audience, m.w), data, mixed, args.batch_size)
                (x, _), = ops.batches(data, shown, 8)
                delta = random_delta(x.shape, args.delta_scale, device, args.seed, 0)
                explanation, _ = explain(explainer, A, x, delta)
            ops.end_epoch(run, A, **figures)
            run.picture(f"explanations-{len(run.state['history'])}",
                        explanations(data, shown, explanation), 128)
        ops.end_stage(run, A)

    ops.print_next(args)


# --------------------------------------------------------------------------------------- pictures


def explanations(data, rows, explanation):
    """Return the images `rows` and |delta'| of them, by itself and laid over the grey image, as
    rows of a picture; explanation (N, 3, H, W)."""
    images, labels = data.pixels(rows), data.labels[rows]
    heat = explanation.cpu().abs().mean(1)                                # (N, H, W)
    top = heat.flatten(1).quantile(0.99, 1).view(-1, 1, 1).clamp_min(1e-12)
    h = 3 * heat / top                                         # black, red, yellow, white
    colour = 255 * torch.stack([h, h - 1, h - 2], 1).clamp(0, 1)
    opacity = (h / 3).clamp(0, 1)[:, None]
    overlay = (1 - opacity) * images.float().mean(1, keepdim=True) + opacity * colour
    return {"Images": [(image, data.classes[y]) for image, y in zip(images, labels)],
            "|delta'|": [(t.byte(), "") for t in colour],
            "The same over the image": [(t.byte(), "") for t in overlay]}


if __name__ == "__main__":
    ops.run(main)
