"""CISPO, the RL objective of MiniMax-M1, and its neighbours: tensors in, a scalar and its diagnostics out.

A response i of the group of G answers to one prompt has the advantage A_i. Its token t was drawn with probability
pi_old and now has pi; r = pi / pi_old is the importance-sampling ratio. Every algorithm here is one formula,

    loss = - sum_{i,t} w_it * sg(rhat_it) * M_it * A_i * log pi_it        sg = no gradient flows through it

and differs only in the bounded ratio rhat and in the mask M (table ALGORITHMS). PPO's family drops tokens whose ratio
left the trust region (M = 0); CISPO keeps every token and bounds its weight instead.
Equation numbers are those of the MiniMax-M1 report (arXiv:2506.13585) sec. 3.1. "ours" = decided here.

    1. Advantages, penalties, filters      group_advantages, overlong_penalty, informative_groups
    2. How much each token counts          token_weights
    3. The loss                            ALGORITHMS, policy_loss
    4. Training against rollout            prob_correlation
    5. See it run                          main: `python cispo.py`, the gradient of one token under every algorithm

Dimension key: N responses (prompts x G, those of a prompt contiguous), T response tokens, G responses per prompt.
"""

import argparse
from typing import NamedTuple

import torch

# ============================================================================
# 1. Advantages, penalties, filters                              (eq. 2; DAPO)
# ============================================================================


def _groups(values, group_size):
    """(N,) -> (N / G, G) in fp64, or a ValueError that says why not."""
    if values.ndim != 1 or len(values) == 0 or group_size < 1 or len(values) % group_size:
        raise ValueError(
            f"need (N,) values with N > 0 a multiple of the group size {group_size}, found {tuple(values.shape)}"
        )
    groups = values.double().view(-1, group_size)
    if not groups.isfinite().all():
        raise ValueError("rewards must be finite")
    return groups


def _flat(groups):
    """(N / G, 1) bool: groups whose rewards are equal up to rounding, which must not be blown up into a signal."""
    spread = groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)
    return spread <= 1e-6 * groups.abs().amax(1, keepdim=True)


def group_advantages(rewards, group_size, normalize_std=True):
    """Eq. 2: how much better a response is than its siblings, A_i = (R_i - mean(R)) / std(R) over its group.

    rewards (N,), the G responses of a prompt contiguous. The std divides by G. A group with equal rewards has A = 0
    exactly: it teaches nothing. normalize_std=False leaves the division out (Dr. GRPO). Returns (N,) fp32, or fp64 for
    fp64 rewards.
    """
    groups = _groups(rewards, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if normalize_std:
        centred = centred / groups.std(1, correction=0, keepdim=True)
    return (
        centred.masked_fill(_flat(groups), 0.0)
        .flatten()
        .to(rewards.dtype if rewards.is_floating_point() else torch.float32)
    )


def informative_groups(rewards, group_size):
    """Dynamic sampling (DAPO): which groups have unequal rewards and therefore a gradient. (N,) -> (N / G,) bool."""
    return ~_flat(_groups(rewards, group_size))[:, 0]


def overlong_penalty(lengths, max_len, buffer):
    """Soft overlong penalty (DAPO), added to the reward: 0 up to max_len - buffer tokens, falling linearly to -1 at
    max_len, -1 beyond. lengths (N,) in tokens. Returns (N,) fp32.
    """
    if not 0 < buffer <= max_len:
        raise ValueError(f"need 0 < buffer <= max_len, found buffer {buffer}, max_len {max_len}")
    return ((max_len - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


# ============================================================================
# 2. How much each token counts                       (the normaliser of eq. 4)
# ============================================================================

WEIGHT_MODES = ("batch", "group", "sequence", "combined")


def token_weights(mask, mode="batch", group_size=None):
    """Weight of every response token in the loss; the weights of a batch sum to 1.

    mask (N, T) bool, True = a token to train on. Modes:
        batch      one mean over all tokens (DAPO, most libraries)
        group      token mean inside each prompt's group, then a mean over prompts (eq. 4 to the letter)
        sequence   token mean inside each response, then a mean over responses (GRPO, eq. 1)
        combined   half batch, half sequence (the report combines both and gives no formula; ours)
    Responses or groups without a token count for nothing. Computed once for all the data of an update, so that its
    micro-batches simply add up. Returns (N, T) fp32.
    """
    if mode not in WEIGHT_MODES:
        raise ValueError(f"unknown token weighting {mode!r}; choose from {', '.join(WEIGHT_MODES)}")
    if mask.ndim != 2 or mask.dtype != torch.bool or not mask.any():
        found = f"{int(mask.sum())} in {mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"need a bool mask (N, T) with at least one token to train on, found {found}")
    if mode == "combined":
        return (token_weights(mask, "batch") + token_weights(mask, "sequence")) / 2
    if mode == "group" and (not group_size or group_size < 1 or len(mask) % group_size):
        raise ValueError(f"mode 'group' needs a group_size that divides the {len(mask)} responses, found {group_size}")
    rows = {"batch": len(mask), "group": group_size, "sequence": 1}[mode]  # responses that share one token mean
    shares = mask.double().view(-1, rows * mask.shape[1])
    n_tokens = shares.sum(1, keepdim=True)
    weights = shares / n_tokens.clamp(min=1) / (n_tokens > 0).sum()
    return weights.view(mask.shape).float()


# ============================================================================
# 3. The loss                                                     (eq. 1, 3-7)
# ============================================================================


class Algorithm(NamedTuple):
    """What an algorithm puts into the one formula. With all of them off it is REINFORCE with importance sampling."""

    bounded: bool  # rhat = clip(r, 1 - eps_low, 1 + eps_high) instead of r                        (eq. 5)
    masked: bool  # M = 0 where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low         (eq. 7)
    symmetric: bool = False  # the mask uses clip_low on both sides


ALGORITHMS = {
    "reinforce": Algorithm(bounded=False, masked=False),  # eq. 3
    "cispo": Algorithm(bounded=True, masked=False),  # eq. 4, 5
    "unified": Algorithm(bounded=True, masked=True),  # eq. 6, 7
    "dapo": Algorithm(bounded=False, masked=True),  # gradient of PPO's min form, clipped 0.2 / 0.28
    "grpo": Algorithm(bounded=False, masked=True, symmetric=True),  # eq. 1, clipped 0.2 / 0.2
}


def weight_range(algo, eps_low=None, eps_high=4.0):
    """The bounds (low, high) of rhat: (0, inf) where the algorithm has none. Refuses a cap below 1.

    eps_high is relative (eq. 5): the cap is 1 + eps_high. The report never gave its value; 4.0 makes the cap 5 (ours,
    after ScaleRL's report, which saw no difference between caps 4, 5 and 8).
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algo!r}; choose from {', '.join(ALGORITHMS)}")
    if eps_high is not None and not eps_high >= 0:
        raise ValueError(f"eps_high {eps_high:g} caps the ratio at {1 + eps_high:g}, below 1; give eps_high >= 0")
    if eps_low is not None and not eps_low >= 0:
        raise ValueError(f"eps_low {eps_low:g} bounds the ratio below at {1 - eps_low:g}, above 1; give eps_low >= 0")
    bounded = ALGORITHMS[algo].bounded
    low = max(1 - eps_low, 0.0) if bounded and eps_low is not None else 0.0
    high = 1 + eps_high if bounded and eps_high is not None else float("inf")
    return low, high


def policy_loss(
    logp, old_logp, advantages, weights, *, algo="cispo", eps_low=None, eps_high=4.0, clip_low=0.2, clip_high=0.28
):
    """The policy-gradient loss of one update and what to watch while it trains.

        loss = - sum weights * sg(rhat * M) * A * logp                      rhat and M from ALGORITHMS[algo]

    Its gradient is d J / d logp = weights * rhat * M * A per token; its value says nothing by itself. For "grpo" and
    "dapo" the gradient is that of PPO's min(r A, clip(r) A).

    logp       log-probs of the tokens under the model being trained, (N, T), or (T,) when packed
    old_logp   the same before the first update of this rollout, no gradient
    advantages (N,) for (N, T) tokens, or anything that broadcasts to logp's shape
    weights    from token_weights; where 0 (prompt, padding, tokens of an environment) the others may hold anything
    eps_low, eps_high    bounds of rhat, None = no bound;    clip_low, clip_high    trust region of the mask

    Returns (loss, stats): a scalar in logp's dtype and a dict of floats over the tokens with weight > 0:
        ratio_mean, ratio_min, ratio_max, weight_clip_frac_high, weight_clip_frac_low (tokens whose weight was bounded),
        ppo_would_drop_frac (tokens that eq. 7's mask removes, whether or not this algorithm uses it),
        kl_k1, kl_k3 (estimates of KL(old || new), nats per token), ess (effective sample size, 1 = all ratios equal).
    Raises ValueError naming the quantity that is not finite where a token counts.
    """
    low, high = weight_range(algo, eps_low, eps_high)
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"the trust region must hold 1: give clip_low, clip_high >= 0, found {clip_low}, {clip_high}")
    if not logp.shape == old_logp.shape == weights.shape:
        shapes = f"{tuple(logp.shape)}, {tuple(old_logp.shape)}, {tuple(weights.shape)}"
        raise ValueError(f"logp, old_logp and weights must share one shape, found {shapes}")
    if advantages.ndim == 1 and logp.ndim == 2:
        advantages = advantages[:, None]
    try:
        advantages = advantages.to(logp.dtype).expand_as(logp)
    except RuntimeError:
        found = f"{tuple(advantages.shape)} for {tuple(logp.shape)}"
        raise ValueError(f"advantages must be (N,) or broadcast to logp's shape, found {found}") from None
    if not (weights >= 0).all() or not weights.isfinite().all():
        raise ValueError("weights must be finite and not negative")
    trained = weights > 0
    if not trained.any():
        raise ValueError("no token has a positive weight: nothing to train on")
    logp, old_logp, advantages, weights = logp[trained], old_logp[trained], advantages[trained], weights[trained]
    for name, x in (("logp", logp), ("old_logp", old_logp), ("advantages", advantages)):
        if not x.isfinite().all():
            raise ValueError(f"{name} is not finite for {int((~x.isfinite()).sum())} of {x.numel()} trained tokens")

    recipe = ALGORITHMS[algo]
    log_ratio = logp.detach() - old_logp.detach().to(logp.dtype)
    ratio = log_ratio.exp()
    dropped = outside_trust_region(ratio, advantages, algo, clip_low, clip_high)
    factor = ratio.clamp(low, high).masked_fill(dropped & recipe.masked, 0.0)  # rhat * M
    if not factor.isfinite().all():
        raise ValueError(f"ratio overflows: log-probs moved by up to {log_ratio.max():.1f} nats, unbounded in {algo}")
    loss = -(weights.to(logp.dtype) * factor * advantages * logp).sum()

    r = ratio.double()
    share = (log_ratio - log_ratio.max()).double().exp()  # r up to a factor, which the effective sample size ignores
    measures = {
        "ratio_mean": r.mean(),
        "ratio_min": r.min(),
        "ratio_max": r.max(),
        "weight_clip_frac_high": (ratio > high).double().mean(),
        "weight_clip_frac_low": (ratio < low).double().mean(),
        "ppo_would_drop_frac": dropped.double().mean(),
        "kl_k1": -log_ratio.double().mean(),
        "kl_k3": (torch.expm1(log_ratio.double()) - log_ratio.double()).mean(),
        "ess": share.sum() ** 2 / (len(share) * (share * share).sum()),
    }
    return loss, dict(zip(measures, torch.stack(list(measures.values())).tolist()))


def outside_trust_region(ratio, advantages, algo="dapo", clip_low=0.2, clip_high=0.28):
    """Eq. 7: True where PPO's clip would remove the token's gradient (grpo: clip_low on both sides)."""
    high = clip_low if ALGORITHMS[algo].symmetric else clip_high
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - clip_low))


# ============================================================================
# 4. Training against rollout                                (report sec. 3.2)
# ============================================================================


def prob_correlation(train_logp, infer_logp, mask=None):
    """Pearson correlation of the probabilities that training mode and rollout give to the same tokens (report Fig. 3).

    train_logp, infer_logp: one shape; mask: bool of that shape, the tokens to compare (None = all). Returns a float,
    nan if either side is constant. The report's runs failed at 0.987 and worked at 0.997: an fp32 output head.
    """
    mask = torch.ones_like(train_logp, dtype=torch.bool) if mask is None else mask
    p, q = train_logp[mask].double().exp(), infer_logp[mask].double().exp()
    if len(p) == 0:
        raise ValueError("the mask selects no token to compare")
    p, q = p - p.mean(), q - q.mean()
    return float((p * q).sum() / (p.norm() * q.norm()))


# ============================================================================
# 5. See it run
# ============================================================================


def main(argv=None):
    """Print what every algorithm puts into the formula and the gradient that a token gets from it."""
    argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False).parse_args(argv)
    ratios, signs = torch.tensor([0.5, 1, 1.5, 8], dtype=torch.float64), (1, -1)
    clip_low, clip_high = (policy_loss.__kwdefaults__[name] for name in ("clip_low", "clip_high"))

    print("loss = - sum w * sg(rhat) * M * A * log pi         r = pi / pi_old\n")
    print(f"{'algorithm':12}{'rhat':18}M = 0, the token is dropped, where")
    for algo, recipe in ALGORITHMS.items():
        low, high = weight_range(algo)
        rhat = f"clip(r, {low:g}, {high:g})" if recipe.bounded else "r"
        top, bottom = 1 + (clip_low if recipe.symmetric else clip_high), 1 - clip_low
        print(f"{algo:12}{rhat:18}" + (f"A > 0, r > {top:g} or A < 0, r < {bottom:g}" if recipe.masked else "never"))

    print("\nGradient of J = -loss per token, d J / d log pi, by autograd (w = 1)\n")
    print(f"{'':12}" + "".join(f"{f'r = {r:g}':>16}" for r in ratios.tolist()))
    print(f"{'':12}" + "".join(f"{f'A = {A:+d}':>8}" for _ in ratios for A in signs))
    for algo in ALGORITHMS:
        columns = []
        for A in signs:
            logp = ratios.log().requires_grad_()  # pi_old = 1: only the ratio matters
            loss, _ = policy_loss(logp, 0 * ratios, torch.full_like(ratios, A), torch.ones_like(ratios), algo=algo)
            columns.append((-torch.autograd.grad(loss, logp)[0]).tolist())
        print(f"{algo:12}" + "".join(f"{round(g, 9) + 0.0:>8g}" for pair in zip(*columns) for g in pair))

    print("\nAt r = 1, the first update of a rollout, all agree: one update per rollout could not tell them apart.")
    print("At r = 8, A = +1 (a rare token, right, now 8 times as likely) unified, dapo and grpo learn nothing more;")
    print(f"cispo still learns, with the weight {weight_range('cispo')[1]:g} instead of reinforce's 8.")


if __name__ == "__main__":
    main()
