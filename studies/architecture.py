"""A picture of MiniMax-M1 from its configuration: figures/architecture.png.

python -m studies.architecture (2 seconds)
"""

import runlog
from cli import model as m1
from studies.common import script

COLORS = {"lightning": "#f2b134", "softmax": "#4f86c6", "moe": "#8fb996", "norm": "#e6e6e6"}
INK = "#333333"


def box(axis, x, y, width, height, text, color, size=9):
    """A labelled box; its lower left corner is (x, y)."""
    style = {"boxstyle": "round,pad=0.02,rounding_size=0.08", "ec": INK, "lw": 0.8}
    import matplotlib.patches as patches

    axis.add_patch(patches.FancyBboxPatch((x, y), width, height, fc=color, **style))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color=INK)


def arrow(axis, start, end, bend=0.0):
    """An arrow; bend > 0 curves it."""
    how = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=how | {"connectionstyle": f"arc3,rad={bend}"})


def study(flags):
    """Left all layers, in the middle one block, right its two kinds of attention."""
    c, plt = m1.M1Config.preset("m1"), runlog.pyplot()
    n, k, E = c.num_hidden_layers, c.num_experts_per_tok, c.num_local_experts
    total = m1.count_parameters(c)
    figure, axis = plt.subplots(figsize=(11, 5.2), layout="constrained")
    axis.set(xlim=(-0.2, 22), ylim=(-0.4, 10.6))
    axis.axis("off")

    for l, kind in enumerate(c.attn_type_list):  # eight layers to a row, from the bottom
        x, y = 0.55 * (l % 8), 1.1 + 0.78 * (l // 8)
        box(axis, x, y, 0.42, 0.5, "", COLORS["softmax" if kind else "lightning"])
    every = c.attn_type_list.index(1) + 1
    axis.text(0, 9.9, f"{n} layers", size=12, weight="bold", color=INK)
    axis.text(0, 9.3, f"{every - 1} lightning : 1 softmax, {every} to a row", size=9, color=INK)
    box(axis, 0, 0.1, 4.3, 0.6, f"embedding, {c.vocab_size:,} tokens", COLORS["norm"])
    sizes = (
        f"{total['total'] / 1e9:.0f} B parameters, {total['active'] / 1e9:.1f} B active per token"
    )
    axis.text(0, -0.3, sizes, size=9, color=INK)

    axis.text(6, 9.9, "one block, post-norm", size=12, weight="bold", color=INK)
    rows = [
        (0.3, "x", "white"),
        (1.6, "n1 = RMSNorm(x)", COLORS["norm"]),
        (3.2, "attention(n1): lightning or softmax", COLORS["lightning"]),
        (4.6, "y = α n1 + β attention(n1)", "white"),
        (5.8, "n2 = RMSNorm(y)", COLORS["norm"]),
        (7.3, f"mixture of {E} experts, top {k}", COLORS["moe"]),
        (8.7, "x' = α n2 + β experts(n2)", "white"),
    ]
    for y, text, color in rows:
        box(axis, 7.6, y, 5, 0.75, text, color)
    for (low, *_), (high, *_) in zip(rows, rows[1:]):
        arrow(axis, (10.1, low + 0.75), (10.1, high))
    for start, end in ((1.98, 4.98), (6.18, 9.08)):  # past attention, past the experts
        arrow(axis, (7.6, start), (7.6, end), -0.45)
        label = dict(size=8, color=INK, rotation=90, va="center")
        axis.text(6.3, (start + end) / 2, "the normed tensor", **label)
    alpha = f"α = (2·{n})^¼ = {c.layernorm_mlp_alpha:.2f}, β = {c.layernorm_mlp_beta:g}"
    axis.text(6, -0.3, f"{alpha}; after the last block: RMSNorm, fp32 head", size=9, color=INK)

    axis.text(14, 9.9, "two kinds of attention", size=12, weight="bold", color=INK)
    H, J, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    texts = {
        "lightning": f"lightning, {H} heads of {K}\n\nS ← λ S + kᵀv        o = q S\n"
        "λ fixed, one per head and layer\no ← sigmoid(gate) · RMSNorm(o)\n\n"
        f"memory: one {K} x {K} state a head,\nat any length",
        "softmax": f"softmax, {H} heads of {K}\n\no = softmax(q kᵀ / √{K}) v\n"
        f"{J} key/value heads\nrope on {c.rotary_dim} of {K} dims, base 10⁷\n\n"
        "memory: keys and values\nof every token",
    }
    box(axis, 14, 5.1, 7.4, 4.4, texts["lightning"], COLORS["lightning"], 9.5)
    box(axis, 14, 0.3, 7.4, 4.4, texts["softmax"], COLORS["softmax"], 9.5)
    figure.savefig(f"{flags.out}/architecture.png", dpi=110)
    plt.close(figure)
    print(f"see {flags.out}/architecture.png")


main = script(study, __doc__)

if __name__ == "__main__":
    main()
