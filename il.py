"""Interleaving Learning (IL) for neural architecture search.

Algorithm 3 of "Skillearn: Machine Learning Inspired by Humans' Learning Skills" (Xie, Du and Ban,
arXiv 2012.04863), on DARTS. K learners of K tasks share an architecture and learn in turns, for M
rounds; each turn's encoder is pulled towards the one before it.

    min_A  sum_k L(A, W_k^(M)(A), H_k^(M)(A), D_k^val)                                   Eq. 31, 32
    s.t.   W*_l, H*_l = argmin  L(A, W_l, H_l, D_k^tr) + lambda |W_l - W*_(l-1)|^2        Eq. 29, 30
    for the stages l = 1 ... MK: tasks 1 ... K of round 1, then of round 2, ... (Eq. 28)

    A  alphas     architecture, shared             D_k^tr   train[l]  (x, y), a stream per stage
    W  encoder    encoder weights, per stage       D_k^val  val[k]    (x, y), a stream per task
    H  head       a stage's linear head            W', H'   ahead     one step ahead, W bar, H bar
    lambda        lam, --coupling                  eta      eta       the stages' learning rate

    python il.py --tasks cifar100 cifar10 --rounds 2 --coupling 100
    python il.py --tasks cifar100 cifar10 --joint              # the joint baseline JL, Eq. 38
    python il.py --tasks cifar10 --rounds 1 --coupling 0 --alpha-lr 3e-4   # second-order DARTS

Departures from the printed equations:
1. The step of Eq. 35 diverges at the paper's settings: 2 eta lambda = 5, so consecutive stages
   move apart about fourfold a step. The default is the proximal step on the same objective,
   (W - eta grad L + 2 eta lambda W'_(l-1)) / (1 + 2 eta lambda), which is stable for every
   lambda and equals Eq. 35 to first order in eta. --step printed is Eq. 35.
2. In both steps 2 eta lambda is divided by 1 - mu. Under a constant gradient momentum's steps grow
   to eta / (1 - mu), and the pull acts outside the optimizer: undivided, the learners would settle
   where Eq. 30 with (1 - mu) lambda says.
3. All rounds' heads learn, as Eq. 30 has it; Algorithm 3's step 4 names those of round M alone.
4. The gradients that make W' are also those that train W, as in Algorithm 3's order (weights, then
   A); DARTS has A first and takes the weights' gradient again.
5. The step is the actual optimizer's, before clipping: momentum and weight decay included.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import darts_ops as ops
from darts_ops import call, central_difference, descend, detached, grad

# -------------------------------------------------------------------------------------- arguments


def get_args(argv=None):
    parser = ops.new_parser("Search a cell by Interleaving Learning (arXiv 2012.04863).",
                            "python il.py --tasks cifar100 cifar10 --rounds 2")
    add = parser.add_argument
    add("--tasks", type=ops.dataset_name, nargs="+", default=["cifar100", "cifar10"],
        help="in their order: cifar10, cifar100, folder:DIR, synthetic[:CLASSES] (§4.3.1)")
    add("--rounds", type=ops.number(int, 1), default=2, help="M (§4.3.1)")
    add("--coupling", dest="lam", type=ops.real, default=100.0, help="lambda (beta in §4.3.1)")
    add("--step", choices=("proximal", "printed"), default="proximal",
        help="of the coupled weights; printed: Eq. 35, which needs 2 eta lambda / (1 - mu) < 1")
    add("--joint", action=ops.flag, default=False, help="the baseline JL: one round, no coupling")
    ops.search_arguments(parser)
    args, checkpoint = ops.parse_search(parser, argv, "il", {                      # §4.3.1
        "darts-1st": {"alpha_lr": 3e-5}, "darts-2nd": {"alpha_lr": 3e-5},
        "pdarts": {"batch_size": 64}, "pcdarts": {"alpha_lr": 3e-3}})
    if "imagenet" in args.tasks:
        raise ops.BadInput("--tasks: no imagenet; the paper searches on CIFAR (§4.3.1)")
    pull = 2 * max(args.lr, args.lr_min) * args.lam / (1 - args.momentum)
    if args.step == "printed" and not args.joint and pull >= 1:
        # a chain of stages passes an alternating error on pull / (2 - pull) times; one stage alone
        # would diverge from 2
        raise ops.BadInput(f"--step printed diverges along the stages: 2 eta lambda / (1 - mu) = "
                           f"{pull:g} must stay below 1; lower --coupling or --lr, or use --step "
                           "proximal")
    return args, checkpoint


# --------------------------------------------------------------------------------------- learners


@dataclass
class Learner:
    """The learner of learning stage l: task k's in one round, with its optimizer."""
    task: int
    net: nn.Module
    opt: torch.optim.SGD

    @property
    def weights(self) -> list:
        """Encoder W, then head H."""
        return list(self.net.parameters())

    @property
    def eta(self) -> float:
        return self.opt.param_groups[0]["lr"]

    def pull(self, lam: float) -> float:
        """Return 2 eta lambda / (1 - mu) (departure 2)."""
        return 2 * self.eta * lam / (1 - self.opt.param_groups[0]["momentum"])


def split(weights):
    """Return the encoder W and the head H, a linear layer's weight and bias, of a list."""
    return weights[:-2], weights[-2:]


# ----------------------------------------------------------------------------------------- losses


def loss_of(learner: Learner, weights, batch, alphas):
    """Return L(A, W, H, D) of a stage at given weights, batch (x, y)."""
    x, y = batch
    return F.cross_entropy(call(learner.net, weights, x, alphas), y)


def coupled(stepped, w, before, pull, rule):
    """Return a stage's encoder W'_l after its coupled step (IL Eq. 33).

    stepped: after the optimizer's step on L, from w; before: W'_(l-1), the stage before's; pull:
    Learner.pull.
    """
    if rule == "printed":
        return [s - pull * (t - b) for s, t, b in zip(stepped, w, before)]        # IL Eq. 35
    return [(s + pull * b) / (1 + pull) for s, b in zip(stepped, before)]         # departure 1


def one_step(learner: Learner, g, before, lam, rule):
    """Return W'_l and H'_l, a stage's weights after one step (IL Eq. 33) along g, its gradient of
    L; before: W'_(l-1) and H'_(l-1), None in the first stage."""
    encoder, head = split(ops.sgd_step(learner.opt, g))                           # IL Eq. 34, 36
    if before and lam:
        encoder = coupled(encoder, split(learner.weights)[0], split(before)[0],
                          learner.pull(lam), rule)                                # IL Eq. 35
    return encoder + head


# ------------------------------------------------------------------------------------ formulation


def formulation(learners, alphas, train, val, lam, rule="proximal", order=2):
    """Return IL in Skillearn's general form: the stages (its Tables 13 and 14), the objective of
    the validation stage (Table 15) and the remaining parameters, A. lam 0, one round: JL."""
    def stage(l, learner):
        def advance(w, g, learned):
            weights = one_step(learner, g, learned.get(l - 1), lam, rule)         # IL Eq. 33
            return weights if order == 2 else detached(weights)

        def loss(w, learned):              # L alone: advance applies the pull of Eq. 30
            return loss_of(learner, w, train[l], alphas)

        return ops.Stage(l, learner.weights, loss, advance)                       # IL Eq. 29, 30

    def validation(learned):
        first = len(learners) - len(val)                       # stage of the last round
        return [sum(loss_of(learner, learned[first + k], val[k], alphas)
                    for k, learner in enumerate(learners[first:]))]          # IL Eq. 31, 32

    return [stage(l, learner) for l, learner in enumerate(learners)], validation, [alphas]


def exact_gradient(*problem):
    """Return what outer_gradient does, by exact differentiation of the formulation;
    problem: formulation's arguments."""
    (J,), g_alpha = ops.skillearn(*formulation(*problem))
    return g_alpha, J.detach()


# -------------------------------------------------------------------------------------- algorithm


def look_ahead(learners, grads, lam, rule):
    """Return the weights of every stage one step ahead, W'_l and H'_l, as leaves."""
    ahead = []
    for learner, g in zip(learners, grads, strict=True):
        with torch.no_grad():
            weights = one_step(learner, g, ahead[-1] if ahead else None, lam, rule)  # IL Eq. 34-36
        ahead.append([w.requires_grad_() for w in weights])
    return ahead


def outer_gradient(learners, alphas, train, val, lam, rule, order, grads, radius=1e-2):
    """Return dJ/dA of J = sum_k L(A, W_k^(M), H_k^(M), D_k^val), one step of every stage ahead, by
    finite differences.

    train: a batch (x, y) per stage; val: per task; grads: per stage, dL/d(W, H) on train. order 1
    keeps the direct part, taken one step ahead, as Algorithm 3 has it, not at W as DARTS' first
    order. Returns (gradients of alphas, J). Changes no state.
    """
    # Stages 1 ... MK: one step each
    ahead = look_ahead(learners, grads, lam, rule)

    # Validation stage: the learners of the last round; u_l = dJ / d(W'_l, H'_l)
    first = len(learners) - len(val)                           # stage of the last round
    J, g_alpha = 0.0, [torch.zeros_like(a) for a in alphas]
    u = [[torch.zeros_like(w) for w in weights] for weights in ahead[:first]]
    for learner, weights, batch in zip(learners[first:], ahead[first:], val):
        loss = loss_of(learner, weights, batch, alphas)
        g, v = grad(loss, alphas, weights if order == 2 else [])
        g_alpha = [a + b for a, b in zip(g_alpha, g)]                             # IL Eq. 37
        u.append(v)
        J += loss.detach()                                                        # IL Eq. 31
    if order == 1:
        return g_alpha, J

    # The sweep back over the stages: the chain rule within Eq. 37, which the paper does not print
    for l in reversed(range(0 if lam else first, len(learners))):
        learner, pull = learners[l], learners[l].pull(lam) if l else 0.0
        encoder, head = split(u[l])
        if pull and rule == "proximal":
            encoder = [t / (1 + pull) for t in encoder]        # dW'_l / d(the step on L)

        def grad_alpha(w):
            return grad(loss_of(learner, w, train[l], alphas), alphas)

        product = central_difference(grad_alpha, learner.weights, encoder + head, radius)
        g_alpha = [g - learner.eta * p for g, p in zip(g_alpha, product)]         # IL Eq. 34-36
        if pull:
            before, its_head = split(u[l - 1])
            u[l - 1] = [a + pull * b for a, b in zip(before, encoder)] + its_head  # dW'_l/dW'_(l-1)
    return g_alpha, J


def update_weights(learners, grads, losses, lam, rule, clip=None, at="{}".format):
    """Take every stage's step, in order, each pulled towards the stage before: the steps that
    look_ahead returns, but for clipping."""
    before = None
    for l, (learner, g) in enumerate(zip(learners, grads)):
        encoder, _ = split(learner.weights)
        w = [t.detach().clone() for t in encoder]
        descend(learner.opt, g, at(f"learner {l + 1}"), losses[l], clip)
        if l and lam:
            with torch.no_grad():
                new = coupled(encoder, w, before, learner.pull(lam), rule)        # IL Eq. 35
                for t, value in zip(encoder, new):
                    t.copy_(value)
        before = detached(encoder)


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.start(args)
    tasks = [ops.load_images(task, args.data, device, args.image_size, workers=args.workers)
             for task in args.tasks]
    if len({data.size for data in tasks}) > 1:
        raise ops.BadInput("--tasks: the images must have one size, not " + ", ".join(
            "{} x {} ({})".format(*data.size, name) for name, data in zip(args.tasks, tasks))
            + "; --image-size resizes folders and synthetic images")
    halves = [ops.split_rows(data.labels, args.seed, args.hold_out, args.subsets) for data in tasks]
    rounds, lam, K = (1, 0.0, len(tasks)) if args.joint else (args.rounds, args.lam, len(tasks))
    sequence = [k for _ in range(rounds) for k in range(K)]                       # IL Eq. 28, 38
    train_streams = [ops.Stream(tasks[k], halves[k][0], args.batch_size, args.seed, f"train {l}")
                     for l, k in enumerate(sequence)]
    val_streams = [ops.Stream(data, half[1], args.batch_size, args.seed, f"val {k}")
                   for k, (data, half) in enumerate(zip(tasks, halves))]
    run = ops.Run("il", args, checkpoint, tasks)

    for stage in ops.stages(run):          # of the base: several in P-DARTS, with new learners
        nets, opts, alphas, alpha_opt = ops.new_stage(
            run, [len(tasks[k].classes) for k in sequence], device)
        learners = [Learner(k, net, opt) for k, net, opt in zip(sequence, nets, opts)]
        run.load({"nets": nn.ModuleList(nets), "outer": nn.ParameterList(alphas),
                  "alpha_opt": alpha_opt, **{f"opt {l}": opt for l, opt in enumerate(opts)}})
        for epoch in run.epochs(max(stream.epoch_steps() for stream in train_streams)):
            learns = ops.schedule(args, stage, epoch, nets, opts)
            for step in run.steps():
                train = [stream(step)[:2] for stream in train_streams]
                val = [stream(step)[:2] for stream in val_streams]
                figures = {}

                # Algorithm 3, 1. to 4.: the gradients that the stages are about to follow
                losses, grads = [], []
                for learner, (x, y) in zip(learners, train):
                    with ops.autocast(device, args.amp != "off"):
                        loss = F.cross_entropy(learner.net(x, alphas), y)         # IL Eq. 29
                    grads.append(grad(loss, learner.weights))
                    losses.append(loss.detach())

                # 5. A's step, through the steps that the stages are about to take; then theirs
                if learns:
                    problem = learners, alphas, train, val, lam, args.step, args.order
                    with ops.autocast(device, args.amp == "bf16-all"):
                        g_alpha, J = (exact_gradient(*problem) if args.gradient == "exact" else
                                      outer_gradient(*problem, grads, args.radius))
                    with ops.foresight(run, formulation(*problem), alphas, g_alpha):
                        descend(alpha_opt, g_alpha, run.at("the architecture"), J)  # IL Eq. 37
                    figures = {"val_loss": J / K}
                update_weights(learners, grads, losses, lam, args.step, args.grad_clip, run.at)
                run.log(train_loss=torch.stack(losses).mean(), **figures)

            figures = {}
            for learner in learners[-K:]:
                with ops.evaluating(learner.net):
                    figures[f"val_accuracy {args.tasks[learner.task]}"], = ops.accuracies(
                        lambda x: learner.net(x, alphas), tasks[learner.task],
                        halves[learner.task][1], args.batch_size)
            ops.end_epoch(run, alphas, **figures)

    ops.print_next(run)


if __name__ == "__main__":
    ops.run(main)
