"""CISPO, the RL objective of MiniMax-M1, and its neighbours: tensors in, a loss out.

A response i of the group of G answers to one prompt has the advantage A_i. Its token t was drawn
with probability pi_old and now has pi; r = pi / pi_old. Every algorithm here is one formula,

    loss = - sum_{i,t} w_it * sg(rhat_it * M_it) * A_i * log pi_it       sg = no gradient through it

and differs only in the bounded ratio rhat, the mask M and the weights w (table ALGORITHMS). PPO's
family drops tokens whose ratio left the trust region (M = 0); CISPO keeps every token and bounds
its weight. Equation numbers: MiniMax-M1 report (arXiv:2506.13585) sec. 3.1; "ours" = decided here.

    1. The recipe            ALGORITHMS, Recipe
    2. Around the loss       group_advantages, informative_groups, overlong_penalty, token_weights
    3. The loss              policy_loss
    4. What to watch         statistics, prob_correlation
    5. See it run            main: `python cispo.py`, a token's gradient under every algorithm

Dimension key: N responses (prompts x G, those of a prompt contiguous), T tokens, G group size.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cli import check, fits, short, torch  # torch loads when it is first used

# ============================================================================
# 1. The recipe
# ============================================================================


class Algorithm(NamedTuple):
    """What an algorithm brings for each part of the formula; inf = no bound."""

    eps_low: float  # eq. 5: 1 - eps_low <= rhat <= 1 + eps_high
    eps_high: float
    masked: bool  # whether M drops tokens outside the trust region, or they are only reported
    clip_low: float  # eq. 7: the trust region is 1 - clip_low <= r <= 1 + clip_high
    clip_high: float
    token_weights: str


INF = float("inf")
ALGORITHMS = {
    "cispo": Algorithm(INF, 4.0, False, 0.2, 0.28, "batch"),  # eq. 4, 5
    "dapo": Algorithm(INF, INF, True, 0.2, 0.28, "batch"),  # the gradient of PPO's min form
    "grpo": Algorithm(INF, INF, True, 0.2, 0.2, "sequence"),  # eq. 1
    "reinforce": Algorithm(INF, INF, False, 0.2, 0.28, "batch"),  # eq. 3
    "unified": Algorithm(INF, 4.0, True, 0.2, 0.28, "batch"),  # eq. 6, 7
}
WEIGHT_MODES = ("batch", "group", "sequence", "combined")


@dataclass(frozen=True)
class Recipe:
    """The loss: an algorithm is complete; a part that is given replaces the algorithm's own."""

    algo: Literal["cispo", "dapo", "grpo", "reinforce", "unified"] = "cispo"
    """which loss: bounds of the ratio, trust region and token weights all follow"""
    eps_high: float | None = None
    """the ratio is capped at 1 + this; cispo, unified: 4 (the report never gave its value)"""
    eps_low: float | None = None
    """the ratio is at least 1 - this; none has such a bound by itself"""
    clip_low: float | None = None
    """trust region below 1: 0.2; cispo and reinforce only report what it would drop"""
    clip_high: float | None = None
    """trust region above 1: 0.28 (DAPO); grpo 0.2"""
    token_weights: Literal["batch", "group", "sequence", "combined"] | None = None
    """one mean over the batch, each group (eq. 4 to the letter) or each response (GRPO's own)"""
    overlong_buffer: int = 0
    """soft penalty over the last so many tokens of a response (DAPO, report sec. 3.1); 0 = off"""

    def __post_init__(self):
        some = (0, INF)  # so that no bound excludes r = 1
        check(self, eps_low=some, eps_high=some, clip_low=some, clip_high=some)
        check(self, overlong_buffer=(0, 10**7))
        for name in ("eps_low", "eps_high", "clip_low", "clip_high"):
            if 10**6 < (getattr(self, name) or 0) < INF:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be at most 1,000,000, or inf, which is no bound")

    def part(self, name):
        """A field of Algorithm: what was given, else what the algorithm brings."""
        given = getattr(self, name, None)
        return getattr(ALGORITHMS[self.algo], name) if given is None else given

    @property
    def bounds(self):
        """(low, high) of rhat, low never below 0."""
        return max(1 - self.part("eps_low"), 0.0), 1 + self.part("eps_high")


# ============================================================================
# 2. Around the loss                                             (eq. 2; DAPO)
# ============================================================================


def _groups(values, group_size):
    """(N,) -> (N / G, G) in fp64, or a ValueError that says why not."""
    good = fits(group_size, int) and group_size > 0
    if values.ndim != 1 or len(values) == 0 or not good or len(values) % group_size:
        need = f"(N,) values with N > 0 a multiple of the group size {group_size}"
        raise ValueError(f"need {need}, found {tuple(values.shape)}")
    groups = values.double().view(-1, group_size)
    if not (groups.abs() < 1e37).all():
        raise ValueError("rewards must be finite, and below 1e37")
    return groups


def group_advantages(rewards, group_size, normalize_std=True):
    """Eq. 2: how much better a response is than its siblings, A_i = (R_i - mean(R)) / std(R).

    rewards (N,), the G responses of a prompt contiguous. The std divides by G. A group with equal
    rewards has A = 0 exactly: it teaches nothing. normalize_std=False leaves the division out (Dr.
    GRPO). Returns (N,) fp32, or fp64 for fp64 rewards.
    """
    groups = _groups(rewards, group_size)
    if normalize_std:  # in units of the spread, so that no square over- or underflows
        least = groups.amin(1, keepdim=True)
        groups = (groups - least) / (groups.amax(1, keepdim=True) - least)
        groups = groups / groups.std(1, correction=0, keepdim=True)
    advantages = groups - groups.mean(1, keepdim=True)
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    flat = ~informative_groups(rewards, group_size)
    return advantages.masked_fill(flat[:, None], 0.0).flatten().to(dtype)


def informative_groups(rewards, group_size):
    """Dynamic sampling (DAPO): which groups disagree and so teach. (N,) -> (N / G,) bool.

    Rewards equal up to rounding agree: the division by their std must not blow that up.
    """
    groups, exact = _groups(rewards, group_size), not rewards.is_floating_point()
    rounding = 0.0 if exact else 4 * torch.finfo(rewards.dtype).eps
    return groups.amax(1) - groups.amin(1) > rounding * groups.abs().amax(1)


def overlong_penalty(lengths, max_len, buffer):
    """Soft overlong penalty (DAPO), added to the reward: 0 up to max_len - buffer tokens, falling
    linearly to -1 at max_len, -1 beyond. lengths (N,) in tokens. Returns (N,) fp32.
    """
    if not 0 < buffer <= max_len:
        raise ValueError(f"need 0 < buffer <= max_len, found buffer {buffer}, max_len {max_len}")
    return ((max_len - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def token_weights(mask, mode="batch", group_size=None):
    """Weight of every response token in the loss; the weights of a batch sum to 1.

    mask (N, T) bool, True = a token to train on. Modes:
        batch      one mean over all tokens (DAPO, most libraries)
        group      token mean inside each prompt's group, then a mean over prompts (eq. 4)
        sequence   token mean inside each response, then a mean over responses (GRPO, eq. 1)
        combined   half batch, half sequence (the report combines both, without a formula; ours)
    Responses or groups without a token count for nothing. Computed once for all the data of an
    update, so that its micro-batches simply add up. Returns (N, T) fp32.
    """
    if mode not in WEIGHT_MODES:
        known = ", ".join(WEIGHT_MODES)
        raise ValueError(f"unknown token weighting {short(mode)}; choose from {known}")
    if mask.ndim != 2 or mask.dtype != torch.bool or not mask.any():
        found = f"{int(mask.sum())} in {mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"need a bool mask (N, T) with at least one token, found {found}")
    if mode == "combined":
        return (token_weights(mask, "batch") + token_weights(mask, "sequence")) / 2
    good = fits(group_size, int) and group_size > 0 and len(mask) % group_size == 0
    if mode == "group" and not good:
        raise ValueError(f"a group_size must divide the {len(mask)} responses, found {group_size}")
    rows = {"batch": len(mask), "group": group_size, "sequence": 1}[mode]  # that share one mean
    shares = mask.double().view(-1, rows * mask.shape[1])
    n_tokens = shares.sum(1, keepdim=True)
    weights = shares / n_tokens.clamp(min=1) / (n_tokens > 0).sum()
    return weights.view(mask.shape).float()


# ============================================================================
# 3. The loss                                                     (eq. 1, 3-7)
# ============================================================================


def policy_loss(logp, old_logp, advantages, weights, recipe=Recipe()):
    """The policy-gradient loss of one update.

        loss = - sum weights * sg(rhat * M) * A * logp           rhat and M as the recipe says

    Its gradient is d J / d logp = weights * rhat * M * A per token; its value says nothing by
    itself. For "grpo" and "dapo" the gradient is that of PPO's min(r A, clip(r) A).

    logp       log-probs of the tokens under the model being trained, (N, T), or (T,) when packed
    old_logp   the same before the first update of this rollout, no gradient
    advantages (N,) for (N, T) tokens, or of logp's shape
    weights    from token_weights; where 0 (prompt, padding) the others may hold anything. A pass
               that is a part of an update may have zeros alone: its loss is 0

    Returns (loss, log_ratio, dropped): a scalar in logp's dtype; log r where weights > 0, else 0;
    bool, the tokens outside the trust region, which masked algorithms drop and others keep. Raises
    ValueError naming the quantity that is not finite where a token counts.
    """
    if advantages.ndim == 1 < logp.ndim:
        advantages = advantages[:, None].expand(-1, logp.shape[1])
    advantages, trained = advantages.to(logp.dtype), weights > 0
    _check(trained, logp=logp, old_logp=old_logp, advantages=advantages, weights=weights)
    log_ratio = (logp.detach() - old_logp.detach().to(logp.dtype)).masked_fill(~trained, 0.0)
    ratio = log_ratio.exp()
    rises = (advantages > 0) & (ratio > 1 + recipe.part("clip_high"))
    falls = (advantages < 0) & (ratio < 1 - recipe.part("clip_low"))
    dropped = (rises | falls) & trained
    factor = ratio.clamp(*recipe.bounds)  # rhat
    if recipe.part("masked"):
        factor = factor.masked_fill(dropped, 0.0)  # rhat * M
    if not factor.isfinite().all():
        moved = f"log-probs moved by up to {log_ratio.max():.1f} nats"
        raise ValueError(f"ratio overflows: {moved}, unbounded in {recipe.algo}")
    terms = (x[trained] for x in (weights.to(logp.dtype), factor, advantages, logp))
    return -math.prod(terms).sum(), log_ratio, dropped


def _check(trained, **tensors):
    """ValueError unless the tensors share one shape and are finite where a token is trained on."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"all must share one shape, found {shapes}")
    if not (tensors["weights"] >= 0).all():
        raise ValueError("weights must be numbers >= 0")
    for name, x in tensors.items():
        if bad := int((~x[trained].isfinite()).sum()):
            raise ValueError(f"{name} is not finite for {bad} of {int(trained.sum())} tokens")


# ============================================================================
# 4. What to watch                                           (report sec. 3.2)
# ============================================================================


def statistics(log_ratio, dropped, weights, recipe=Recipe()):
    """What policy_loss did, as floats over the tokens with weight > 0.

    weight_clip_frac_high, weight_clip_frac_low: tokens whose weight was bounded;
    ppo_would_drop_frac: `dropped`, whether or not this algorithm drops them; kl_k1, kl_k3:
    estimates of KL(old || new), nats per token; ess: effective sample size, 1 = equal ratios.
    """
    trained, (low, high) = weights > 0, recipe.bounds
    if not trained.any():
        raise ValueError("no token has a weight > 0")
    log_ratio, dropped = log_ratio[trained], dropped[trained]
    log_ratio = log_ratio.clamp(max=88)  # e^88 and more: beyond fp32, so that means stay finite
    r, k1 = log_ratio.exp().double(), log_ratio.double()
    share = (log_ratio - log_ratio.max()).double().exp()  # r up to a factor, which cancels below
    measures = {
        "ratio_mean": r.mean(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
        "weight_clip_frac_high": (r > high).double().mean(),
        "weight_clip_frac_low": (r < low).double().mean(),
        "ppo_would_drop_frac": dropped.double().mean(),
        "kl_k1": -k1.mean(),
        "kl_k3": (torch.expm1(k1) - k1).mean(),
        "ess": share.sum() ** 2 / (len(share) * (share * share).sum()),
    }
    return dict(zip(measures, torch.stack(list(measures.values())).tolist()))


def prob_correlation(train_logp, infer_logp, mask=None):
    """Pearson correlation of the probabilities that training and rollout give to the same tokens.

    train_logp, infer_logp: one shape; mask: bool of that shape, the tokens to compare (None = all).
    Returns a float, nan if either side is constant. The report's runs (Fig. 3) failed at 0.987 and
    worked at 0.997, with an fp32 output head.
    """
    mask = torch.ones_like(train_logp, dtype=torch.bool) if mask is None else mask
    if mask.dtype != torch.bool or not mask.shape == train_logp.shape == infer_logp.shape:
        raise ValueError("log-probs and the bool mask must share one shape")
    p, q = train_logp[mask].double().exp(), infer_logp[mask].double().exp()
    if len(p) == 0:
        raise ValueError("the mask selects no token to compare")
    p, q = p - p.mean(), q - q.mean()
    return float((p * q).sum() / (p.norm() * q.norm()))


# ============================================================================
# 5. See it run
# ============================================================================


def main(argv=None):
    """Print what every algorithm puts into the formula and the gradient that tokens get from it."""
    argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False).parse_args(argv)
    r, signs = torch.tensor([0.5, 1, 1.5, 8], dtype=torch.float64), (1, -1)
    print("loss = - sum w * sg(rhat * M) * A * log pi         r = pi / pi_old\n")
    print(f"{'algorithm':12}{'rhat':16}{'w':10}M = 0, the token is dropped, where")
    for algo, parts in ALGORITHMS.items():
        low, high = Recipe(algo).bounds
        rhat = "r" if high == INF else f"clip(r, {low:g}, {high:g})"
        region = f"A > 0, r > {1 + parts.clip_high:g} or A < 0, r < {1 - parts.clip_low:g}"
        print(f"{algo:12}{rhat:16}{parts.token_weights:10}{region if parts.masked else 'never'}")

    print("\nGradient of J = -loss per token, d J / d log pi, by autograd (w = 1)\n")
    print(f"{'':12}" + "".join(f"{f'r = {x:g}':>16}" for x in r.tolist()))
    print(f"{'':12}" + "".join(f"{f'A = {A:+d}':>8}" for _ in r for A in signs))
    logp = r.log()[:, None].expand(-1, 2).clone().requires_grad_()  # pi_old = 1: only r matters
    one = torch.ones_like(logp)
    for algo in ALGORITHMS:
        loss, _, _ = policy_loss(logp, 0 * one, one * torch.tensor(signs), one, Recipe(algo))
        gradient = -torch.autograd.grad(loss, logp)[0].flatten()
        print(f"{algo:12}" + "".join(f"{round(g, 9) + 0.0:>8g}" for g in gradient.tolist()))

    print(
        "\nAt r = 1, the first update of a rollout, all agree. At r = 8 and A = +1 (a rare token,"
    )
    print("right, now 8 times as likely) unified, dapo and grpo learn nothing more; cispo does.")


if __name__ == "__main__":
    main()
