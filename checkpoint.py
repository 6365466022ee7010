"""Models on disk: the published layout of MiniMax-M1, with checksums and never half-written.

A directory holds config.json, shards (model-00000-of-00002.safetensors ...) and their index
(model.safetensors.index.json). Runs of train_rl write the same layout (plus trainer.pt), so
whatever reads one reads the other.

    1. Names                 published_name, published_tensors
    2. Reading               load_pretrained, load_trainer, checkpoint_dir, check_sums
    3. Writing               save_pretrained
"""

import functools
import json
import math
import os
import pickle
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import parallel
from cli import fits, read_json, read_text, short, writing
from model import M1Config, MiniMaxM1

# ============================================================================
# 1. Names
# ============================================================================


def published_name(name, expert=0):
    """The published name of a parameter of ours; our experts are stacked, one tensor for all."""
    stem, _, last = name.rpartition(".")
    if last in ("w1", "w2", "w3"):
        return f"model.{stem}.experts.{expert}.{last}.weight"
    return name if stem == "lm_head" else f"model.{name}"


def published_tensors(model):
    """{published name: view of our parameter}: copy into a view to load, read it to save."""
    return {published: w for published, w, _ in _held_tensors(model)}


def _held_tensors(model):
    """Of all that this process holds: published name, view of our parameter, which rows it is."""
    for name, p in model.named_parameters():
        names, rows = _published_parts(model, name, p), parallel.held(p)
        own = parallel.own(p).detach()
        if p.ndim < 3:
            yield names[0], own, rows
        else:  # experts, each of which is whole
            for published, w in zip(names[rows], own):
                yield published, w.T if name.endswith("w2") else w, slice(None)


def _published_parts(model, name, p):
    """The published names of a parameter: one, or one for each expert."""
    name = re.sub(r"(?<=^layers\.)\d+", lambda i: str(model.which[int(i[0])]), name)
    return [published_name(name, e) for e in range(len(p) if p.ndim == 3 else 1)]


# ============================================================================
# 2. Reading
# ============================================================================

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_dir(path):
    """A run folder's newest checkpoint (its file `latest` names it), or the directory itself."""
    path, pointer = Path(path), Path(path, "latest")
    if not pointer.exists():
        return path
    name = read_text(pointer, most=100).strip()
    if not re.fullmatch(r"step-\d{6}", name):
        raise ValueError(f"{pointer} must name a checkpoint such as step-000040, found {name!r}")
    return path / name


def saved_steps(folder):
    """The checkpoints of a run, oldest first; what only looks like one is not ours."""
    found = (x for x in Path(folder).iterdir() if re.fullmatch(r"step-\d{6}", x.name))
    return sorted(x for x in found if x.is_dir() and not x.is_symlink())


def load_pretrained(path, device="cpu", dtype=None, layers=None, parts=False):
    """Load a published MiniMax-M1 directory, or a run of train_rl, shard by shard.

    layers: the numbers of those to load, range(8) say, to study a part of a model that is too large
    as a whole; None = all. parts: of several processes each takes, and reads, what parallel.shard
    gives it.

    Peak memory: the model plus one tensor. Checkpoints of ours carry checksums, which are verified;
    published ones have none. dtype None keeps every tensor's stored dtype, which may differ from
    one to the next; a given one casts all but the router gates, which stay fp32 (fp64 in an fp64
    model). Raises ValueError if the directory, a shard, a name or a shape is not what the config
    promises.
    """
    path = checkpoint_dir(path)
    config, stored = M1Config.from_json(path), _stored_tensors(path)
    n = config.num_hidden_layers
    which = list(range(n) if layers is None else layers)
    if not which or len({*which}) < len(which) or not {*which} <= {*range(n)}:
        raise ValueError(
            f"layers must be different numbers from 0 to {n - 1}, found {short(layers)}"
        )
    others = {f"model.layers.{l}." for l in range(n) if l not in which}
    stored = {
        x: at for x, at in stored.items() if re.match(r"model\.layers\.\d+\.|", x)[0] not in others
    }
    least = 3 * len(which) * config.num_local_experts
    if len(stored) < least:  # said before so many are built
        said = f"config.json promises {least} tensors of experts, {len(stored)} tensors are there"
        raise ValueError(f"{path} does not fit: {said}")
    with torch.device("meta"):
        model = MiniMaxM1(config, which)
    expected = {name: tuple(t.shape) for name, t in published_tensors(model).items()}
    _check_names(path, expected, {name: shape for name, (_, shape, _) in stored.items()})
    files = sorted({file for file, _, _ in stored.values()})
    others = _index(path)[1].keys() - {"trainer.pt"}  # a tokenizer's
    check_sums(path, sorted({*(file.name for file in files), "config.json", *others}))

    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        names = _published_parts(model, name, p)
        cast = dtype or functools.reduce(torch.promote_types, (stored[x][2] for x in names))
        if dtype and ".gate." in name:
            cast = torch.promote_types(dtype, torch.float32)
        empty = nn.Parameter(torch.empty(p.shape, dtype=cast, device="meta"))
        setattr(model.get_submodule(owner), leaf, empty)
    if parts:
        model = parallel.shard(model, device)
    model.to_empty(device=device)
    held = {name: (view, rows) for name, view, rows in _held_tensors(model)}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in filter(held.__contains__, shard.keys()):
                view, rows = held[name]
                view.copy_(shard.get_slice(name)[rows])
    return model


def load_trainer(path, optimizer, curriculum, device):
    """Load trainer.pt of a checkpoint into an optimizer and a Curriculum: (step, seconds)."""
    file = path / "trainer.pt"
    check_sums(path, [file.name])
    how = "let the run's file `latest` name an older checkpoint"
    try:
        at = device if parallel.size() == 1 else "cpu"  # whole; this process takes its parts
        state = torch.load(file, map_location=at, weights_only=True)
        if not fits(state, dict) or state.keys() != {"step", "seconds", "optimizer", "curriculum"}:
            raise ValueError("it does not hold what a run saves")
        step, seconds = state["step"], state["seconds"]
        if not fits(step, int) or path.name != f"step-{step:06d}":
            raise ValueError(f"it says that its step is {short(step)}")
        if not fits(seconds, float) or not 0 <= seconds < 1e12:
            raise ValueError(f"it says that the run took {short(seconds)} seconds")
        _check_moments(state["optimizer"], optimizer)
        curriculum.load_state_dict(state["curriculum"])
    except (pickle.UnpicklingError, RuntimeError, LookupError, EOFError, AttributeError, TypeError):
        raise ValueError(f"{file} is damaged; {how}") from None
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; {how}") from None
    parameters = optimizer.param_groups[0]["params"]
    for number, moments in state["optimizer"]["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = parallel.part_like(moments[name], parameters[number])
    optimizer.load_state_dict(state["optimizer"])
    return step, seconds


def _check_moments(state, optimizer):
    """ValueError unless an AdamW state is one of this optimizer: fused kernels would trust it."""
    own, parameters = optimizer.state_dict()["param_groups"], optimizer.param_groups[0]["params"]
    rates, moments = [group["lr"] for group in state["param_groups"]], state["state"]
    if not fits(rates, list[float]) or not all(0 <= rate < math.inf for rate in rates):
        raise ValueError(f"its learning rate is {short(rates)}")
    if [group | {"lr": own[0]["lr"]} for group in state["param_groups"]] != own:
        raise ValueError("its optimizer has other settings")
    if moments and moments.keys() != set(own[0]["params"]):  # none before the first update
        raise ValueError("its optimizer has other parameters")
    for number, found in moments.items():
        p = parameters[number]
        for name, like in {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}.items():
            x = found[name]
            same = (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)
            right = x.isfinite().all() and (name == "exp_avg" or (x >= 0).all())
            if not same or not right or (name == "step" and x not in range(1, 2**24)):
                raise ValueError(f"{name} of parameter {number} is not as AdamW leaves it")


def _index(path):
    """model.safetensors.index.json of a directory: ({tensor: shard}, {file: CRC-32}), or None."""
    file = path / "model.safetensors.index.json"
    if not file.exists():
        return None, {}
    index = read_json(file)
    shards, metadata = index.get("weight_map"), index.get("metadata", {})
    sums = metadata.get("crc32", {}) if isinstance(metadata, dict) else None
    if not fits(shards, dict[str, str]) or not fits(sums, dict[str, int]):
        found = short(index if shards is None else metadata)
        raise ValueError(f"{file} is not a safetensors index: found {found}")
    if wrong := [name for name in shards.values() if Path(name).name != name or len(name) > 200]:
        raise ValueError(f"{file} names {short(wrong[0])}, which is no file of its directory")
    return shards, sums


def _stored_tensors(path):
    """{name: (file, shape, dtype)} from the headers of all shards of a directory."""
    shards, _ = _index(path)
    numbered = sorted(file.name for file in path.glob("model-*-of-*.safetensors"))
    if shards is None and numbered:
        missing = "model.safetensors.index.json"
        raise ValueError(f"{path} is incomplete: it has {numbered[0]}, but no {missing}; copy it")
    files = sorted({"model.safetensors"} if shards is None else set(shards.values()))
    stored = {}
    for file in (path / name for name in files):
        if not file.is_file():
            raise ValueError(
                f"{path} is incomplete: the shard {file.name} is missing; copy it again"
            )
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    if name in stored:
                        both = f"{stored[name][0].name} and {file.name}"
                        raise ValueError(f"{path}: {name} is stored twice, in {both}")
                    part = shard.get_slice(name)
                    stored[name] = file, tuple(part.get_shape()), DTYPES.get(part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file ({error})") from None
    for name, (file, _, dtype) in stored.items():
        if dtype is None:
            known = ", ".join(DTYPES)
            raise ValueError(f"{file}: {short(name)} has a dtype that is none of {known}")
        if shards is not None and shards.pop(name, "no file") != file.name:
            raise ValueError(f"{path}: {short(name)} is in {file.name}, but not by the index")
    if shards:
        raise ValueError(f"{path}: the index lists {short(min(shards))}, which its shard lacks")
    return stored


def _check_names(path, expected, found):
    """ValueError unless both hold the same names with the same shapes; says which differ."""

    def some(names):
        shown = ", ".join(name[:200] for name in sorted(names)[:3])
        return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"

    other = [n for n in expected.keys() & found.keys() if found[n] != expected[n]]
    problems = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": [f"{n} is {found[n]}, not {expected[n]}" for n in other],
    }
    report = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
    if report:
        raise ValueError(f"{path} does not hold the tensors its config.json promises. {report}")


def check_sums(path, names):
    """ValueError if a file is not what save_pretrained wrote. A directory with trainer.pt is ours
    and has a checksum of every file; published ones have none.
    """
    _, sums = _index(path)
    ours = (path / "trainer.pt").exists()
    for name in names:
        summed = name in sums or name == "config.json"  # older runs have none of that
        if not (path / name).is_file() or (ours and not summed):
            raise ValueError(f"{path / name} or its checksum is missing; copy the directory again")
        if name in sums and crc32(path / name) != sums[name]:
            wrong = f"{path / name} is damaged: its bytes are not those that were saved"
            raise ValueError(f"{wrong}; copy it again")


def crc32(file):
    """CRC-32 of a file's bytes."""
    value = 0
    with open(file, "rb") as content:
        while block := content.read(2**24):
            value = zlib.crc32(block, value)
    return value


# ============================================================================
# 3. Writing
# ============================================================================


def on_cpu(x):
    """A tensor, or dicts and lists of some, on the CPU; from a GPU through pinned memory, which is
    three times as fast.
    """
    if isinstance(x, dict):
        return {name: on_cpu(part) for name, part in x.items()}
    if isinstance(x, list):
        return [on_cpu(part) for part in x]
    if not (torch.is_tensor(x) and x.is_cuda):
        return x
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x).clone()


def _save_state(state, file):
    """torch.save without its own checksum: ours covers the file."""
    own = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with open(file, "wb") as content:
            torch.save(state, content)
    finally:
        torch.serialization.set_crc32_options(own)


def whole(model):
    """A model whose parameters lie in parts, whole on the CPU of the first process and empty in
    others; any other model as it is.
    """
    if not parallel.in_parts(model.embed_tokens.weight):
        return model
    tensors = parallel.on_first(dict(model.named_parameters()))
    with torch.device("meta"):
        copied = MiniMaxM1(model.config, model.which)
    if parallel.first():
        copied.load_state_dict(tensors, assign=True)
    return copied


def save_pretrained(model, path, max_shard_bytes=2 * 10**9, trainer_state=None, files=None):
    """Write a model as config.json, numbered *.safetensors shards and their index.

    Everything is written beside `path` first and moved there when complete. Refuses to overwrite. A
    trainer_state (dicts, lists, numbers, tensors) goes into trainer.pt. files: others, such as a
    tokenizer's, {name: bytes}.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; remove it or choose another name")
    if len(model.which) < model.config.num_hidden_layers:
        raise ValueError(f"{path}: a model of some layers cannot be saved as a whole one")
    shards, room = [], 0
    for name, tensor in published_tensors(model).items():
        if tensor.nbytes > room:
            shards.append({})
            room = max(max_shard_bytes, tensor.nbytes)
        shards[-1][name] = tensor
        room -= tensor.nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.writing-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with writing(path, SafetensorError, RuntimeError), ThreadPoolExecutor() as pool:
            draft.mkdir()
            model.config.to_json(draft / "config.json")
            sums = {"config.json": pool.submit(crc32, draft / "config.json")}
            for file, shard in zip(names, shards):
                plain, tensors = torch.contiguous_format, on_cpu(shard)
                tensors = {name: t.clone(memory_format=plain) for name, t in tensors.items()}
                save_file(tensors, draft / file, metadata={"format": "pt"})
                sums[file] = pool.submit(crc32, draft / file)
            total = sum(t.nbytes for shard in shards for t in shard.values())
            weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
            for file, content in (files or {}).items():
                (draft / file).write_bytes(content)
                sums[file] = pool.submit(crc32, draft / file)
            if trainer_state is not None:
                _save_state(on_cpu(trainer_state), draft / "trainer.pt")
                sums["trainer.pt"] = pool.submit(crc32, draft / "trainer.pt")
            sums = {name: future.result() for name, future in sorted(sums.items())}
            index = {"metadata": {"total_size": total, "crc32": sums}, "weight_map": weight_map}
            (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
            draft.rename(path)  # atomic: before it there is no checkpoint, after it a whole one
    finally:
        shutil.rmtree(draft, ignore_errors=True)
