"""Interleaving Learning (IL) for neural architecture search.

Algorithm 3 of "Skillearn: Machine Learning Inspired by Humans' Learning Skills" (Xie, Du and Ban,
arXiv 2012.04863; IL alone: arXiv 2103.07018), on DARTS. K learners of K tasks share an architecture
and learn in turns, for M rounds; each turn's encoder is pulled towards the one before it.

    min_A  sum_k L(A, W_k^(M)(A), H_k^(M)(A), D_k^val)                                   Eq. 31, 32
    s.t.   W*_l, H*_l = argmin  L(A, W_l, H_l, D_k^tr) + lambda |W_l - W*_(l-1)|^2        Eq. 29, 30
    for the stages l = 1 ... MK: tasks 1 ... K of round 1, then of round 2, ... (Eq. 28)

    A  A          architecture, shared             D_k^tr   train[l]  (x, y, rows), per stage
    W  encoder    encoder weights, per stage       D_k^val  val[k]    (x, y, rows), per task
    H  head       a stage's linear head            W', H'   ahead     after a step (W bar, H bar)
    lambda        args.lam, --coupling             eta      eta       the stages' learning rate

    python il.py --tasks cifar100 cifar10 --rounds 2 --coupling 100
    python il.py --tasks cifar100 cifar10 --joint              # the joint baseline JL, Eq. 38

At the paper's lambda = 100 the second task accounts for only 2.5% of the encoders' movement in a
reduced search; at lambda <= 1 both tasks count (docs/measurements.md).

Departures from the printed equations:
1. The step of Eq. 35 diverges at the paper's settings: 2 eta lambda = 5, so consecutive stages
   move apart about fourfold a step. The default is the proximal step on the same objective,
   (W - eta grad L + 2 eta lambda W'_(l-1)) / (1 + 2 eta lambda), which is stable for every
   lambda and equals Eq. 35 to first order in eta. --step printed is Eq. 35 but for departure 2.
2. In both steps 2 eta lambda is divided by 1 - mu. Under a constant gradient momentum's steps grow
   to eta / (1 - mu), and the pull acts outside the optimizer: undivided, the learners would settle
   where Eq. 30 with (1 - mu) lambda says.
3. All rounds' heads learn, as Eq. 30 has it; Algorithm 3's step 4 names those of round M alone.
4. The gradients that make W' are also those that train W, as in Algorithm 3's order (weights, then
   A); DARTS has A first and takes the weights' gradient again.
5. The step is the actual optimizer's, before clipping: momentum and weight decay included. So a
   coupled W'_l answers its gradient by -eta / (1 + p), p = 2 eta lambda / (1 - mu), which tends to
   -(1 - mu) / (2 lambda); Eq. 30's own minimum answers by -1 / (2 lambda). A loss step of size
   eta / (1 - mu) in the look-ahead would close the gap, but W' would no longer be the step that
   trains W, and stage 1, which is not coupled, would count 1 - mu times as much as the others.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import darts_ops as ops
from darts_ops import (
    at_weights,
    central_difference,
    descend,
    detached,
    grad,
    gradients,
    sgd_step,
)

# -------------------------------------------------------------------------------------- arguments


def get_args(argv=None):
    parser = ops.new_parser("Search a cell by Interleaving Learning (arXiv 2012.04863).",
                            "python il.py --tasks cifar100 cifar10 --rounds 2")
    add = parser.add_argument
    add("--tasks", type=ops.dataset_name, nargs="+", default=["cifar100", "cifar10"],
        help="tasks in order: cifar10, cifar100, folder:DIR, synthetic[:CLASSES] (§4.3.1)")
    add("--rounds", type=ops.number(int, 1), default=2, help="number of rounds M (§4.3.1)")
    add("--coupling", dest="lam", type=ops.real, default=100.0,
        help="weight lambda of the pull towards the stage before (beta in §4.3.1)")
    add("--step", choices=("proximal", "printed"), default="proximal",
        help="step of the coupled weights; printed: Eq. 35, stable at 2 eta lambda / (1 - mu) < 1")
    add("--joint", action=ops.flag, default=False, help="the baseline JL: one round, no coupling")
    ops.search_arguments(parser)
    recipes = {"darts-1st": {"alpha_lr": 3e-5}, "darts-2nd": {"alpha_lr": 3e-5},  # §4.3.1
               "pdarts": {"batch_size": 64}, "pcdarts": {"alpha_lr": 3e-3}}
    args, checkpoint = ops.parse_search(parser, argv, "il", lambda chosen: (
        recipes.get(chosen.base, {}) | (dict(rounds=1, lam=0.0) if chosen.joint else {})))
    if "imagenet" in args.tasks or len(set(args.tasks)) < len(args.tasks):
        raise ops.BadInput("--tasks: different data sets, and no imagenet; the paper searches on "
                           "CIFAR (§4.3.1)")
    pull = 2 * args.lr * args.lam / (1 - args.momentum)
    if args.step == "printed" and pull >= 1:
        # an alternating error grows by pull / (2 - pull) from stage to stage
        raise ops.BadInput(f"--step printed diverges along the stages: 2 eta lambda / (1 - mu) = "
                           f"{pull:g} must stay below 1; lower --coupling or --lr, or use --step "
                           "proximal")
    return args, checkpoint


# --------------------------------------------------------------------------------------- learners


@dataclass
class Learner:
    """The network of one learning stage, with its optimizer."""
    net: nn.Module
    opt: torch.optim.SGD

    @property
    def weights(self) -> list:
        """Encoder W, then head H."""
        return list(self.net.parameters())

    @property
    def eta(self) -> float:
        return self.opt.param_groups[0]["lr"]

    def pull(self, args) -> float:
        """Return 2 eta lambda / (1 - mu) (departure 2)."""
        return 2 * self.eta * args.lam / (1 - self.opt.param_groups[0]["momentum"])


@dataclass
class Learners:
    """The learners of all stages l = 1 ... MK, and A, which they share."""
    stages: list[Learner]
    A: nn.Module
    alpha_opt: torch.optim.Adam | None = None

    @property
    def alphas(self) -> list:
        return list(self.A.parameters())


def split(weights):
    """Return the encoder W and the head H, a linear layer's weight and bias, of a list."""
    return weights[:-2], weights[-2:]


# ----------------------------------------------------------------------------------------- losses


def loss_of(net, A, batch):
    """Return L(A, W, H, D) of a stage's network, which may be at other weights."""
    x, y, _ = batch
    return F.cross_entropy(net(x, A), y)                                          # IL Eq. 29


def coupled(stepped, w, before, pull, rule):
    """Return a stage's encoder W'_l after its coupled step, IL Eq. 33.

    stepped: after the optimizer's step on L, from w; before: W'_(l-1), the stage before's; pull:
    Learner.pull.
    """
    if rule == "printed":
        return [s - pull * (t - b) for s, t, b in zip(stepped, w, before)]        # IL Eq. 35
    return [(s + pull * b) / (1 + pull) for s, b in zip(stepped, before)]         # departure 1


def one_step(stage: Learner, g, before, args):
    """Return W'_l and H'_l, a stage's weights after one step along g, its gradient of L; before:
    W'_(l-1) and H'_(l-1), None in the first stage."""
    encoder, head = split(sgd_step(stage.opt, g))                 # IL Eq. 34; of H: IL Eq. 36
    if before and args.lam:
        encoder = coupled(encoder, split(stage.weights)[0], split(before)[0],
                          stage.pull(args), args.step)
    return encoder + head


# ------------------------------------------------------------------------------------ the problem


def objective(m: Learners, batches, args):
    """Return J with one step in place of each argmin, in a graph that reaches A.

    Written in Skillearn's general form: stage by stage a step on the stage's loss, given what the
    stage before has learned (its Eq. 1, 3, 4; Tables 13, 14), then the validation objective of the
    parameters that no stage learns (Eq. 5; Table 15). lambda = 0 and one round: JL.
    """
    (train, val), ahead, before = batches, [], None

    # Stages 1 ... MK: each learner takes a step, pulled towards the one before
    for stage, batch in zip(m.stages, train):
        loss = loss_of(at_weights(stage.net, stage.weights), m.A, batch)          # IL Eq. 29
        before = one_step(stage, grad(loss, stage.weights, graph=True), before, args)  # IL Eq. 30
        ahead.append(before if args.order == 2 else detached(before))

    # Validation stage: the learners of the last round, IL Eq. 31; the whole problem is IL Eq. 32
    return sum(loss_of(at_weights(stage.net, weights), m.A, batch) for stage, weights, batch
               in zip(m.stages[-len(val):], ahead[-len(val):], val))


# -------------------------------------------------------------------------------------- algorithm


def look_ahead(m: Learners, grads, args):
    """Return the weights of every stage one step ahead, W'_l and H'_l, as leaves."""
    ahead = []
    for stage, g in zip(m.stages, grads, strict=True):
        with torch.no_grad():
            weights = one_step(stage, g, ahead[-1] if ahead else None, args)      # IL Eq. 33
        ahead.append([w.requires_grad_() for w in weights])
    return ahead


@ops.graphed
def train_gradients(m: Learners, batches, args):
    """Return dL/d(W, H) of every stage on its training batch, and the losses."""
    losses, grads = [], []
    for stage, batch in zip(m.stages, batches[0]):
        with ops.autocast(batch[0].device, args.amp != "off"):
            loss = loss_of(stage.net, m.A, batch)
        grads.append(grad(loss, stage.weights))
        losses.append(loss.detach())
    return grads, losses


@ops.graphed
def outer_gradient(m: Learners, batches, args, grads):
    """Return dJ/dA of objective, by finite differences, and J. Changes no state.

    grads: per stage, dL/d(W, H) on its training batch. order 1 keeps the direct part, taken one
    step ahead, as Algorithm 3 has it, not at W as DARTS' first order.
    """
    train, val = batches
    if args.gradient == "exact":
        J = objective(m, batches, args)
        return grad(J, m.alphas), J.detach()

    # Stages 1 ... MK: one step each
    ahead = look_ahead(m, grads, args)

    # Validation stage: the learners of the last round; u_l = dJ / d(W'_l, H'_l)
    first = len(m.stages) - len(val)                # index of the last round's first stage
    J, g_alpha = 0.0, [torch.zeros_like(a) for a in m.alphas]
    u = [[torch.zeros_like(w) for w in weights] for weights in ahead[:first]]
    for stage, weights, batch in zip(m.stages[first:], ahead[first:], val):
        loss = loss_of(at_weights(stage.net, weights), m.A, batch)
        g, v = gradients(loss, m.alphas, weights if args.order == 2 else [])
        g_alpha = [a + b for a, b in zip(g_alpha, g)]                             # IL Eq. 37
        u.append(v)
        J += loss.detach()                                                        # IL Eq. 31
    if args.order == 1:
        return g_alpha, J

    # The sweep back over the stages: the chain rule within IL Eq. 37, not printed in the paper
    for l in reversed(range(len(m.stages))):
        if l < first and not args.lam:
            break                                              # uncoupled, it does not reach J
        stage, pull = m.stages[l], m.stages[l].pull(args) if l else 0.0
        encoder, head = split(u[l])
        if pull and args.step == "proximal":
            encoder = [t / (1 + pull) for t in encoder]        # dW'_l / d(the step on L)

        def grad_alpha(w):
            return grad(loss_of(at_weights(stage.net, w), m.A, train[l]), m.alphas)

        product = central_difference(grad_alpha, stage.weights, encoder + head, args.radius)
        g_alpha = [g - stage.eta * p for g, p in zip(g_alpha, product)]
        if pull:                                               # dW'_l / dW'_(l-1)
            before, its_head = split(u[l - 1])
            u[l - 1] = [a + pull * b for a, b in zip(before, encoder)] + its_head
    return g_alpha, J


def update_weights(m: Learners, grads, args):
    """Take every stage's step, in order, each pulled towards the stage before: the steps that
    look_ahead returns, but for clipping."""
    before = None
    for l, (stage, g) in enumerate(zip(m.stages, grads)):
        encoder, _ = split(stage.weights)
        w = [t.detach().clone() for t in encoder]
        descend(stage.opt, g, f"learner {l + 1}", args.grad_clip)
        if l and args.lam:
            with torch.no_grad():
                new = coupled(encoder, w, before, stage.pull(args), args.step)
                for t, value in zip(encoder, new):
                    t.copy_(value)
        before = detached(encoder)


def algorithm_3(m: Learners, batches, args, learns=True):
    """Take one iteration of Algorithm 3, A's step only if A learns. Returns its figures."""
    (train, val), figures = batches, {}

    # 1. to 4. The gradients that the stages are about to follow
    grads, losses = train_gradients(m, batches, args)

    # 5. A's step, through the steps that the stages are about to take; then theirs
    if learns:
        with ops.autocast(train[0][0].device, args.amp == "bf16-all"):
            g_alpha, J = outer_gradient(m, batches, args, grads)
        m.A.step(m.alpha_opt, g_alpha)                                            # IL Eq. 37
        figures = {"val_loss": J / len(val)}
    update_weights(m, grads, args)
    return {"train_loss": torch.stack(losses).mean(), **figures}


# ------------------------------------------------------------------------------------------- main


def row(args):
    """Return the search's row in the papers' tables."""
    name = f"{'JL' if args.joint else 'IL'}-{args.title}"
    return ops.row(name + " of one task" * (len(args.tasks) == 1), args, "joint")


def main(argv=None):
    args, checkpoint = get_args(argv)
    device = ops.start(args)
    tasks = [ops.load_images(task, args, device) for task in args.tasks]
    parts = [ops.split_rows(data.labels, args.seed, args.hold_out, args.subsets) for data in tasks]
    sequence = list(range(len(tasks))) * args.rounds           # IL Eq. 28; of one round: IL Eq. 38
    train_streams = [ops.Stream(tasks[k], parts[k][0], args.batch_size, args.seed, f"train {l}",
                                args.flip) for l, k in enumerate(sequence)]
    val_streams = [ops.Stream(data, half[1], args.batch_size, args.seed, f"val {k}", args.flip)
                   for k, (data, half) in enumerate(zip(tasks, parts))]
    run = ops.Run("il", args, checkpoint, tasks, row(args))

    for base_stage in ops.stages(run):                         # P-DARTS has three: new learners
        A, alpha_opt = ops.new_architecture(run, device)
        nets, opts = ops.new_networks(run, [tasks[k] for k in sequence], device)
        m = Learners(list(map(Learner, nets, opts)), A, alpha_opt)
        run.load({"nets": nn.ModuleList(nets), "A": A, "alpha_opt": alpha_opt,
                  **{f"opt {l}": opt for l, opt in enumerate(opts)}})
        for epoch in run.epochs(max(stream.epoch_steps() for stream in train_streams)):
            ops.set_epoch(args, base_stage, epoch, A, nets, opts)
            for step in run.steps(m):
                batches = [[stream(step) for stream in streams]
                           for streams in (train_streams, val_streams)]
                run.log_step(**algorithm_3(m, batches, args, ops.learns(args, epoch)))

            figures = {}
            for k, net in enumerate(nets[-len(tasks):]):
                with ops.evaluating(net):
                    figures[f"val_accuracy {args.tasks[k]}"] = ops.accuracy(
                        lambda x: net(x, A), tasks[k], parts[k][1], args.batch_size)
            ops.end_epoch(run, A, **figures)
        ops.end_stage(run, A)

    ops.print_next(args)


if __name__ == "__main__":
    ops.run(main)
