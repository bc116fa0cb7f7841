"""Learning by Self-Explanation (LeaSE) for neural architecture search.

Algorithm 1 of "Learning by Self-Explanation, with Application to Neural Architecture Search"
(Hosseini and Xie, arXiv 2012.12899), on DARTS. An explainer marks the pixels that its predictions
hang on; an audience learns from the marked images; the explainer's architecture serves both.

    min_A  L(E*(A), A, D_e^val) + gamma L(W*(Delta*), D_a^val)                             Eq. 5
    s.t.   W*     = argmin  mean l(f(delta*_i . x_i; W), t_i)                              Eq. 3
           Delta* = argmax  O_Delta = sum l(f(x_i + delta_i; E*), f(x_i; E*))              Eq. 2
           E*     = argmin  L(E, A, D_e^tr)                                                Eq. 1

    A  alphas     architecture of the explainer    D_e^tr = D_a^tr    x, y      train stream
    E  e          weights of the explainer         D_e^val = D_a^val  x_val, y_val    val stream
    W  w          weights of the audience          delta, delta'      delta, explanation
    E', W'        e_virtual, w_virtual             gamma              gamma

    python lease.py --dataset cifar100 --audience resnet18

Departures from the printed equations:
1. Eq. 7 descends O_Delta, which Eq. 2 maximises; here it ascends: Eq. 15's minus is a plus.
2. Delta starts at random in every step, where Algorithm 1 goes on from the step before: at zero the
   gradient of O_Delta is zero, and crops and flips are new in every step.
3. The paper gives no xi_Delta. It is per image, sqrt(CHW) / |grad_i O_Delta|, so that delta' has
   unit root-mean-square and delta' . x the scale of x; through it too A changes delta'. A step of
   a learning rate's size moves delta by less than 1e-4 of its length.
4. The chain below Eq. 11 leaves out how the explanation depends on A directly, through the f of
   O_Delta: nearly all of the audience's gradient. It is kept, from the same two passes.
5. The audience's loss is the mean over the mini-batch, where Eq. 3 and 8 print a sum.
6. The last difference, for Eq. 11 and 17, is one along the explainer's and the audience's parts of
   v_e together: the product that it approximates is linear in its direction. The difference along
   delta has a radius of its own, --delta-radius: 0.01 would move each of a batch's 38,400 numbers
   and more by less than 5e-5, and what it then sees is rounding and single kinks.
7. The gradients that make E' and W' are also those that train E and W (Algorithm 1's order), and
   the steps are the actual optimizers', before clipping: momentum and weight decay included.
8. x in delta' . x is the normalised image, as the networks see it.
9. A waits for one epoch, where its base does not let it wait longer: before the explainer has
   learnt, a change of A in its fifth decimal turns delta' elsewhere. --warm-up 0 is Algorithm 1.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import darts_ops as ops
from darts_ops import call, central_difference, descend, detached, grad, virtual_weights

# -------------------------------------------------------------------------------------- arguments


def get_args(argv=None):
    parser = ops.new_parser("Search a cell by Learning by Self-Explanation (arXiv 2012.12899).",
                            "python lease.py --dataset cifar100 --audience resnet18")
    add = parser.add_argument
    add("--dataset", type=ops.dataset_name, default="cifar100",
        help="cifar10, cifar100, imagenet, folder (in --data), folder:DIR, synthetic[:CLASSES]")
    add("--audience", choices=("resnet18", "resnet50"), default="resnet18",
        help="its network (§3.2)")
    add("--gamma", type=ops.real, default=1.0, help="weight of the audience's validation (§3.2)")
    add("--weighting", choices=("signed", "magnitude"), default="signed",
        help="the audience sees delta' . x as printed, or |delta'| . x; not in the paper")
    add("--delta-scale", type=ops.number(float, 1e-12), default=0.3,
        help="root-mean-square of the random start of delta; not in the paper (departure 2)")
    add("--delta-radius", type=ops.number(float, 1e-12), default=1.0,
        help="radius of the difference along delta; the paper has one for all, --radius")
    add("--audience-lr", type=ops.real, default=0.025, help="of W, cosine to 0 (§3.2)")
    ops.search_arguments(parser)
    # departure 9
    waits = {base: {"warm_up": 1} for base, recipe in ops.BASES.items() if not recipe["warm_up"]}
    return ops.parse_search(parser, argv, "lease", {"all": {"batch_size": 64}, **waits})  # §3.2


# --------------------------------------------------------------------------------------- learners


@dataclass
class Learners:
    """Explainer and audience with the optimizers of their weights; alphas is A."""
    explainer: nn.Module
    alphas: list
    explainer_opt: torch.optim.SGD
    audience: nn.Module
    audience_opt: torch.optim.SGD


def random_delta(shape, scale, device, *keys):
    """Return the start of the perturbations, a pure function of keys: seed, step and rank."""
    generator = torch.Generator(device).manual_seed(ops.mixed_seed(0xDE17A, *keys))
    return scale * torch.randn(shape, generator=generator, device=device)


# ----------------------------------------------------------------------------------------- losses


def explanation_objective(explainer, alphas, e, x, delta):
    """Return O_Delta = sum l(f(x + delta; E), f(x; E)), l(a, b) = - sum b log a."""
    log_a = F.log_softmax(call(explainer, e, x + delta, alphas), 1)
    b = F.softmax(call(explainer, e, x, alphas), 1)
    return -(b * log_a).sum()                                                # LeaSE Eq. 2


def step_sizes(g):
    """Return xi_Delta per image, (N, 1, 1, 1): with it the step along g has a root mean square of
    1; 0 where g is 0."""
    norm = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    norm = torch.where(norm > 0, norm, torch.inf)
    return g[0].numel() ** 0.5 / norm                                        # departure 3


def explain(explainer, alphas, e, x, delta):
    """Return delta' (N, 3, H, W), one ascent step on O_Delta from delta, and its step sizes."""
    delta = delta.detach().requires_grad_()
    objective = explanation_objective(explainer, detached(alphas), detached(e), x, delta)
    g, = grad(objective, [delta], shared=False)
    return (delta + step_sizes(g) * g).detach(), step_sizes(g)               # LeaSE Eq. 7


def audience_loss(audience, explanation, x, y, weighting):
    """Return mean l(f(delta' . x; W), t); audience(x) gives logits."""
    weight = explanation.abs() if weighting == "magnitude" else explanation
    return F.cross_entropy(audience(weight * x), y)                          # LeaSE Eq. 3


# ------------------------------------------------------------------------------------ formulation


def formulation(m: Learners, train, val, delta, gamma=1.0, weighting="signed", order=2):
    """Return LeaSE in Skillearn's general form: the stages (LeaSE Eq. 1 to 3), the objective of the
    validation stage (Eq. 5) and the remaining parameters, A."""
    (x, y), (x_val, y_val) = train, val

    def explainer_loss(e, learned):
        return F.cross_entropy(call(m.explainer, e, x, m.alphas), y)         # LeaSE Eq. 1

    def explanation_loss(delta, learned):                      # which its step ascends
        return explanation_objective(m.explainer, m.alphas, learned["explainer"], x, *delta)

    def marked_loss(w, learned):
        return audience_loss(lambda x: call(m.audience, w, x), *learned["delta"], x, y, weighting)

    def validation(learned):
        J = F.cross_entropy(call(m.explainer, learned["explainer"], x_val, m.alphas), y_val)
        audience_val = F.cross_entropy(call(m.audience, learned["audience"], x_val), y_val)
        return [J + gamma * audience_val]                                    # LeaSE Eq. 5

    def explainer_step(e, g, learned):
        return ops.sgd_step(m.explainer_opt, g) if order == 2 else detached(e)  # LeaSE Eq. 6

    def explanation_step(delta, g, learned):
        return [delta[0] + step_sizes(g[0]) * g[0]]                          # LeaSE Eq. 7

    def audience_step(w, g, learned):
        return ops.sgd_step(m.audience_opt, g)                               # LeaSE Eq. 8

    e, w = list(m.explainer.parameters()), list(m.audience.parameters())
    stages = [ops.Stage("explainer", e, explainer_loss, explainer_step),
              ops.Stage("delta", [delta.detach().requires_grad_()], explanation_loss,
                        explanation_step),
              ops.Stage("audience", w, marked_loss, audience_step)]
    return stages, validation, [m.alphas]


def exact_gradient(*problem):
    """Return what outer_gradient does but for the audience's share, by exact differentiation of the
    formulation; problem: formulation's arguments."""
    (J,), g_alpha = ops.skillearn(*formulation(*problem))
    return g_alpha, J.detach()


# -------------------------------------------------------------------------------------- algorithm


def outer_gradient(m: Learners, train, val, delta, gamma, weighting, order, e_virtual, explanation,
                   xi_delta, grads_w, radius=1e-2, delta_radius=None):
    """Return dJ/dA of J = L(E', A, D_e^val) + gamma L(W', D_a^val), by finite differences.

    train, val: batches (x, y); delta: start of the perturbations; e_virtual: E', or at order 1 E, a
    constant; explanation, xi_delta: delta' (N, 3, H, W) and its step sizes (N, 1, 1, 1); grads_w:
    of W on train, which make W'; delta_radius: of the difference along delta, else radius.
    Returns (gradients of alphas, J, |audience's direct part| / |explainer's|). Changes no state.
    """
    (x, y), (x_val, y_val) = train, val
    e, w = list(m.explainer.parameters()), list(m.audience.parameters())
    e_wanted = e_virtual if order == 2 else []

    # Stage 4: the explainer validates itself
    loss = F.cross_entropy(call(m.explainer, e_virtual, x_val, m.alphas), y_val)  # LeaSE Eq. 9
    g_alpha, v_e = grad(loss, m.alphas, e_wanted)                            # LeaSE Eq. 10
    J, share = loss.detach(), torch.zeros_like(loss)

    # The audience validates itself, and v_w goes back: to v_delta, then to A and v_e
    if gamma:
        w_virtual = virtual_weights(m.audience_opt, grads_w)                 # LeaSE Eq. 8
        loss = F.cross_entropy(call(m.audience, w_virtual, x_val), y_val)
        v_w = grad(gamma * loss, w_virtual)                                  # below LeaSE Eq. 11
        J = J + gamma * loss.detach()                                        # LeaSE Eq. 9

        def grad_delta(w):
            at = explanation.clone().requires_grad_()
            loss = audience_loss(lambda x: call(m.audience, w, x), at, x, y, weighting)
            return grad(loss, [at], shared=False)

        xi_w = m.audience_opt.param_groups[0]["lr"]
        product, = central_difference(grad_delta, w, v_w, radius)
        v_delta = -xi_w * product                                            # LeaSE Eq. 12, 13
        # d(xi g) = xi (1 - unit unit^T) dg, as xi = sqrt(CHW) / |g|: departure 3
        unit = (explanation - delta) / x[0].numel() ** 0.5     # g / |g|
        v_delta = v_delta - unit * (unit * v_delta).sum((1, 2, 3), keepdim=True)

        def grad_alpha_e(at):
            objective = explanation_objective(m.explainer, m.alphas, e_virtual, x, at[0])
            return grad(objective, [*m.alphas, *e_wanted])

        product = central_difference(grad_alpha_e, [delta], [xi_delta * v_delta],
                                     delta_radius or radius, shared=False)   # departure 6
        by_a, by_e = product[:len(m.alphas)], product[len(m.alphas):]        # LeaSE Eq. 14, 15
        share = nn.utils.get_total_norm(by_a) / nn.utils.get_total_norm(g_alpha)
        g_alpha = [g + p for g, p in zip(g_alpha, by_a)]                     # departure 4
        v_e = [v + p for v, p in zip(v_e, by_e)]

    # Both parts go on through E'
    if order == 2:
        def grad_alpha(e):
            return grad(F.cross_entropy(call(m.explainer, e, x, m.alphas), y), m.alphas)

        xi_e = m.explainer_opt.param_groups[0]["lr"]
        product = central_difference(grad_alpha, e, v_e, radius)             # LeaSE Eq. 11
        g_alpha = [g - xi_e * p for g, p in zip(g_alpha, product)]           # LeaSE Eq. 10, 16, 17
    return g_alpha, J, share


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.start(args)
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

    shown = train_rows[::-(-len(train_rows) // 8)]             # up to eight, from all classes

    for stage in ops.stages(run):                              # several in P-DARTS: a new explainer
        (explainer,), (explainer_opt,), alphas, alpha_opt = ops.new_stage(
            run, [num_classes], device)
        e = list(explainer.parameters())
        m = Learners(explainer, alphas, explainer_opt, audience, audience_opt)
        run.load({"explainer": explainer, "outer": nn.ParameterList(alphas),
                  "audience": audience, "explainer_opt": explainer_opt, "alpha_opt": alpha_opt,
                  "audience_opt": audience_opt})
        for epoch in run.epochs(train_stream.epoch_steps()):
            learns = ops.schedule(args, stage, epoch, [explainer], [explainer_opt], audience_opt,
                                  args.audience_lr)
            for step in run.steps():
                train, val = train_stream(step)[:2], val_stream(step)[:2]
                x, y = train
                delta = random_delta(x.shape, args.delta_scale, device, args.seed, step, ops.rank())
                figures = {}

                # Algorithm 1, 1. and 2.: one step ahead of E, Delta and W
                with ops.autocast(device, args.amp != "off"):
                    loss = F.cross_entropy(explainer(x, alphas), y)          # LeaSE Eq. 1
                    grads_e = grad(loss, e)
                    e_virtual = detached(e)
                    if args.order == 2:
                        e_virtual = virtual_weights(explainer_opt, grads_e)  # LeaSE Eq. 6
                    explanation, xi_delta = explain(explainer, alphas, e_virtual, x, delta)
                    loss_w = audience_loss(audience, explanation, x, y, args.weighting)
                    grads_w = grad(loss_w, w)                                # LeaSE Eq. 8

                # 3. A's step, through the steps that E, Delta and W are about to take; then theirs
                if learns:
                    problem = m, train, val, delta, args.gamma, args.weighting, args.order
                    with ops.autocast(device, args.amp == "bf16-all"):
                        g_alpha, J, *share = (
                            exact_gradient(*problem) if args.gradient == "exact" else
                            outer_gradient(*problem, e_virtual, explanation, xi_delta, grads_w,
                                           args.radius, args.delta_radius))
                    with ops.foresight(run, formulation(*problem), alphas, g_alpha):
                        descend(alpha_opt, g_alpha, run.at("the architecture"), J)
                    figures = {"val_loss": J, **dict(zip(["audience_share"], share))}
                descend(explainer_opt, grads_e, run.at("the explainer"), loss, args.grad_clip)
                descend(audience_opt, grads_w, run.at("the audience"), loss_w)
                run.log(train_loss=loss, audience_loss=loss_w, **figures)

            with ops.evaluating(explainer):
                accuracy, = ops.accuracies(lambda x: explainer(x, alphas), data, val_rows,
                                           args.batch_size)
                # by the batches' statistics: the running ones are of explanations, not of images
                accuracy_w, = ops.accuracies(lambda x: call(audience, w, x), data, val_rows,
                                             args.batch_size)
                (x, _), = ops.batches(data, shown, 8)
                delta = random_delta(x.shape, args.delta_scale, device, args.seed, 0)
                explanation, _ = explain(explainer, alphas, e, x, delta)
            ops.end_epoch(run, alphas, val_accuracy=accuracy, audience_val_accuracy=accuracy_w)
            run.picture("explanations", explanations(data, shown, explanation), 128, keep=True)

    ops.print_next(run)


# --------------------------------------------------------------------------------------- pictures


def explanations(data, rows, explanation):
    """Return the images `rows` and |delta'| of them, by itself and laid over the grey image, as
    rows of a picture; explanation (N, 3, H, W)."""
    images, labels = data.pixels(rows).cpu(), data.labels.cpu()[rows]
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
