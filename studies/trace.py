"""One token's way through MiniMax-M1: what every operation reads, gives and costs, beside M1's.

    python -m studies.trace --preset base --context 7168

Shows, for the first block of each kind, operation, shape read, shape of the result, bytes read and
FLOPs of the last of --context tokens; then the sums over all blocks. FLOPs: 2 per weight (chosen
experts only), 4 per number of a state, 2 per number of a key or value and query head that meets it.
"""

import torch

from cli import command_line, parse
from model import Flags, M1Config, MiniMaxM1, rounded

# Blocks (L lightning, S softmax), operation, what it reads (a parameter of the block or the memory
# of the sequence), shape of the result (the dimension key of model.py; n tokens, k experts a token)
PATH = (
    ("LS", "n1 = norm(x)", "input_layernorm.weight", "D"),
    ("L", "q, k, v = silu(Wqkv n1)", "self_attn.qkv_proj.weight", "H 3 K"),
    ("L", "S = lam S + k v^T;  o = q S", "state", "H K"),
    ("L", "g = sigmoid(Wgate n1)", "self_attn.output_gate.weight", "H K"),
    ("L", "o = g * norm(o)", "self_attn.norm.weight", "H K"),
    ("L", "y = alpha n1 + beta Wout o", "self_attn.out_proj.weight", "D"),
    ("S", "q = rope(Wq n1)", "self_attn.q_proj.weight", "H K"),
    ("S", "k = rope(Wk n1)", "self_attn.k_proj.weight", "J K"),
    ("S", "v = Wv n1", "self_attn.v_proj.weight", "J K"),
    ("S", "p = softmax(q keys / sqrt K)", "keys", "H n"),
    ("S", "o = p values", "values", "H K"),
    ("S", "y = alpha n1 + beta Wo o", "self_attn.o_proj.weight", "D"),
    ("LS", "n2 = norm(y)", "post_attention_layernorm.weight", "D"),
    ("LS", "w = top k of softmax(Wg n2)", "block_sparse_moe.gate.weight", "E"),
    ("LS", "h = silu(w1 n2)", "block_sparse_moe.w1", "k F"),
    ("LS", "h = h * (w3 n2)", "block_sparse_moe.w3", "k F"),
    ("LS", "x = alpha n2 + beta w (w2 h)", "block_sparse_moe.w2", "D"),
)


def trace(model, context):
    """{title: [(operation or part, source, shape read, shape of result, bytes read, FLOPs)]}."""
    c, cache, tables = model.config, model.new_cache(1, context), {}
    H, J, k = c.num_attention_heads, c.num_key_value_heads, c.num_experts_per_tok
    sizes = dict(D=c.hidden_size, H=H, J=J, K=c.head_dim, F=c.intermediate_size)
    sizes |= dict(n=context, E=c.num_local_experts, k=k)
    pair = ("keys and values", 2 * H // J)
    memory = {"state": ("states", 4), "keys": pair, "values": pair}
    for kind, title in enumerate(("lightning block", "softmax block")):
        l, tables[title] = c.attn_type_list.index(kind), []
        read, cached = dict(model.layers[l].named_parameters()), cache.layers[l]
        read |= dict(keys=cached[0][0], values=cached[1][0]) if kind else dict(state=cached[0])
        for what, name, result in (row[1:] for row in PATH if "LS"[kind] in row[0]):
            source, flops = memory.get(name, ("weights", 2))
            t = read[name][:k] if name.startswith("block_sparse_moe.w") else read[name]
            result = [sizes.get(s) or int(s) for s in result.split()]
            shapes = ("x".join(map(str, shape)) for shape in (t.shape, result))
            tables[title].append((what, source, *shapes, t.nbytes, flops * t.numel()))
    steps = [step for kind in c.attn_type_list for step in list(tables.values())[kind]]
    for t in (model.norm.weight, model.lm_head.weight):
        steps.append(("", "norm and head", "", "", t.nbytes, 2 * t.numel()))
    parts = dict.fromkeys(step[1] for step in steps)
    costs = {part: [step[4:] for step in steps if step[1] == part] for part in parts}
    costs["one token"] = [step[4:] for step in steps]
    rows = [(part, "", "", "", *map(sum, zip(*cost))) for part, cost in costs.items()]
    return tables | {"all blocks": rows}


def show_trace(models, context):
    """Print the traces of {name: model} side by side."""
    note = "bf16, states fp32; * memory of the sequence, all else weights"
    print(f"One token at n = {context:,}; {note}")
    tables = [trace(model, context) for model in models.values()]
    for title in tables[0]:
        print(f"\n{title:30}", end="")
        print(*(f"  {name + ' reads':>15}     result     bytes  FLOPs" for name in models), sep="")
        for rows in zip(*(table[title] for table in tables)):
            print(f"{rows[0][0]:30}", end="")
            for _, source, shape, result, n_bytes, flops in rows:
                shape += "*" if source in ("states", "keys and values") else ""
                print(f"  {shape:>15} {result:>10} {rounded(n_bytes, 1024):>9}", end="")
                print(f" {rounded(flops):>6}", end="")
            print()


@command_line
def main(argv=None):
    """Follow one token through a block of each kind, beside m1. No weights are allocated."""
    flags = parse(Flags, argv, main.__doc__)
    with torch.device("meta"):
        names = dict.fromkeys((flags.preset, "m1"))
        models = {name: MiniMaxM1(M1Config.preset(name)).bfloat16() for name in names}
        show_trace(models, flags.context)


if __name__ == "__main__":
    main()
