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
2. Delta starts at random, near zero, in every step, where Algorithm 1 goes on from the step before:
   at zero the gradient of O_Delta is zero, and crops and flips are new in every step.
3. The paper gives no xi_Delta. It is per image, sqrt(CHW) / |grad_i O_Delta|, held constant, so
   that delta' has unit root-mean-square and delta' . x the scale of x. A step of a learning rate's
   size moves delta by less than 1e-4 of its length.
4. The chain below Eq. 11 leaves out how the explanation depends on A directly, through the f of
   O_Delta: nearly all of the audience's gradient. It is kept, from the same two passes.
5. The audience's loss is the mean over the mini-batch, where Eq. 3 and 8 print a sum.
6. The gradients that make E' and W' are also those that train E and W (Algorithm 1's order), and
   the steps are the actual optimizers', before clipping: momentum and weight decay included.
7. x in delta' . x is the normalised image, as the networks see it.
"""

from dataclasses import dataclass

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
    spread = explanation_objective(explainer, alphas, [t.detach() for t in e], x, delta)
    g, = grad(spread, [delta], per_image=True)
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
    loss_w = audience_loss(audience, explanation, x, y, weighting)
    grads_w = grad(loss_w, w)                                                       # LeaSE Eq. 8
    return Ahead(e_virtual, explanation, xi, grads_e, grads_w, (loss.detach(), loss_w.detach()))


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
            loss = audience_loss(lambda x: call(m.audience, w, x), at, x, y, weighting)
            return grad(loss, [at], per_image=True)

        xi_w = m.audience_opt.param_groups[0]["lr"]
        v_delta, = (-xi_w * p for p in central_difference(grad_delta, w, v_w, radius))

        def grad_alpha_e(at):                                                 # LeaSE Eq. 14, 15
            return grad(explanation_objective(m.explainer, m.alphas, e_virtual, x, at[0]), wanted)

        parts = central_difference(grad_alpha_e, [delta], [ahead.xi * v_delta], radius,
                                   per_image=True)
        norm = nn.utils.get_total_norm
        share = norm(parts[:len(m.alphas)]) / norm(g_alpha)
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
    parser = ops.new_parser("Search a cell by Learning by Self-Explanation (arXiv 2012.12899).")
    add = parser.add_argument
    add("--dataset", type=ops.dataset_name, default="cifar100",
        help="cifar10, cifar100, imagenet, folder (in --data), folder:DIR, synthetic[:CLASSES]")
    add("--audience", choices=("resnet18", "resnet50"), default="resnet18",
        help="its network (§3.2)")
    add("--gamma", type=ops.real, default=1.0, help="weight of the audience's validation (§3.2)")
    add("--weighting", choices=("signed", "magnitude"), default="signed",
        help="the audience sees delta' . x as printed, or |delta'| . x; not in the paper")
    add("--delta-scale", type=ops.number(float, 1e-12), default=1e-2,
        help="root-mean-square of the random start of delta; not in the paper (departure 2)")
    add("--audience-lr", type=ops.real, default=0.025, help="of W, cosine to 0 (§3.2)")
    ops.search_arguments(parser)
    return ops.parse_search(parser, argv, "lease", {"all": {"batch_size": 64}})    # §3.2


def random_delta(shape, scale, device, *keys):
    """The start of the perturbations, a pure function of keys: seed, step and rank."""
    draw = np.random.default_rng([0xDE17A, *keys]).standard_normal(shape, np.float32)
    return torch.from_numpy(draw).mul_(scale).to(device)


def explanations(data, rows, maps):
    """For explanations.png: the images, and per epoch in maps {epoch: (N, H, W)} |delta'| as heat,
    by itself and laid over the grey image."""
    images = data.pixels(rows).cpu()
    labels = data.labels[rows.cpu()]
    pictures = {"Images": [(image, data.classes[y]) for image, y in zip(images, labels)]}
    for epoch, heat in maps.items():
        top = heat.flatten(1).quantile(0.99, 1).view(-1, 1, 1).clamp_min(1e-12)
        h = (3 * heat / top).cpu()                            # black, red, yellow, white
        colour = 255 * torch.stack([h, h - 1, h - 2], 1).clamp(0, 1)
        share = (h / 3).clamp(0, 1)[:, None]
        overlay = (1 - share) * images.float().mean(1, keepdim=True) + share * colour
        for title, what in (("|delta'|", colour), ("The same over the image,", overlay)):
            pictures[f"{title} after epoch {epoch}"] = [(t.byte(), "") for t in what]
    return pictures


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.pick_device(args)
    data = ops.load_images(args.dataset, args.data, device, args.image_size, workers=args.workers)
    train_rows, val_rows, _ = ops.split_rows(data.labels, args.seed, args.hold_out, args.subsets)
    train_stream = ops.Stream(data, train_rows, args.batch_size, args.seed, "train")
    val_stream = ops.Stream(data, val_rows, args.batch_size, args.seed, "val")
    run = ops.Run("lease", args, checkpoint, [data])

    torch.manual_seed(args.seed)
    num_classes = len(data.classes)
    audience = ops.place(torchvision.models.get_model(args.audience, weights=None,
                                                      num_classes=num_classes), device)
    w = list(audience.parameters())
    audience_opt = torch.optim.SGD(w, args.audience_lr, args.momentum,
                                   weight_decay=args.weight_decay)
    shown = torch.as_tensor(train_rows[:8], device=device)               # in explanations.png
    first_heat = nn.Parameter(torch.zeros(len(shown), *data.size, device=device), False)

    for stage in run.stages():                                 # several in P-DARTS: a new explainer
        (explainer,), (explainer_opt,), alphas, alpha_opt = ops.new_stage(
            args, stage, run.state["kept"], [num_classes], device)
        e = list(explainer.parameters())
        m = Learners(explainer, alphas, explainer_opt, audience, audience_opt)
        run.load({"explainer": explainer, "outer": nn.ParameterList(alphas),
                  "audience": audience, "explainer_opt": explainer_opt, "alpha_opt": alpha_opt,
                  "audience_opt": audience_opt, "first_heat": nn.ParameterList([first_heat])},
                 alphas)
        steps = train_stream.epoch_steps()
        for epoch, step in run.steps(steps):
            learns = ops.schedule(args, stage, epoch, step, [explainer], [explainer_opt])
            audience_opt.param_groups[0]["lr"] = ops.cosine(args.audience_lr, 0, step // steps,
                                                            len(args.layers) * args.epochs)
            train, val = train_stream(step)[:2], val_stream(step)[:2]
            delta = random_delta(train[0].shape, args.delta_scale, device, args.seed, step,
                                 ops.rank())
            figures = {}

            # Algorithm 1, 1. and 2.: the steps that E, Delta and W are about to take
            with ops.autocast(device, args.amp != "off"):
                ahead = look_ahead(m, train, delta, args.weighting, args.order,
                                   lambda x: explainer(x, alphas), audience)       # LeaSE Eq. 6-8
            # 3. A's gradient, through those steps                               # LeaSE Eq. 9-17
            if learns:
                with ops.autocast(device, args.amp == "bf16-all"):
                    g_alpha, val_loss, share = outer_gradient(
                        m, train, val, delta, ahead, args.gamma, args.weighting, args.order,
                        args.radius)
                figures = {"val_loss": val_loss, "audience_share": share}
            loss, loss_w = ahead.losses
            descend(explainer_opt, e, ahead.grads_e, args.grad_clip, run.at("the explainer"), loss)
            descend(audience_opt, w, ahead.grads_w, None, run.at("the audience"), loss_w)
            if learns:
                descend(alpha_opt, alphas, g_alpha, None, run.at("the architecture"), val_loss)

            if not run.log(train_loss=loss, audience_loss=loss_w, **figures):
                continue
            ops.evaluating(explainer)
            accuracy = ops.accuracy(lambda x: explainer(x, alphas), data, val_rows, args.batch_size)
            # by the batches' statistics: the running ones are of explanations, not of images
            accuracy_w = ops.accuracy(lambda x: call(audience, w, x), data, val_rows,
                                      args.batch_size)
            x = data.batch(shown)
            delta = random_delta(x.shape, args.delta_scale, device, args.seed, 0)
            heat = explain(explainer, alphas, e, x, delta)[0].abs().mean(1)
            explainer.train()
            run.end_epoch(val_accuracy=accuracy, audience_val_accuracy=accuracy_w)
            if step < steps:
                first_heat.copy_(heat)
            run.picture("explanations.png", explanations(
                data, shown, {1: first_heat, step // steps + 1: heat}), size=128)

    ops.print_next(args)


if __name__ == "__main__":
    ops.run(main)
