"""What comes from outside, flags and files: a frozen dataclass is its flags, a mistake is one line.

    flags = parse(Flags, argv, text)    fields are flags, the strings under them their help
    check(self, steps=(0, 10**6))       in __post_init__: what cannot work is refused
    fits(value, list[float] | None)     whether a value from a file is of that type
    read_text, read_json, write_file    files, whole or not at all; errors name them
    @command_line                       on main(argv=None): an error is one line, exit code 2

torch and numpy take seconds to load. Rooms whose settings are flags import them from here, so that
they load when they are first used: after the command line has been read.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import os
import re
import signal
import sys
import threading
import types
import typing
from pathlib import Path

import tyro


class Late:
    """A module that is imported when something in it is first asked for."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)


torch, numpy = Late("torch"), Late("numpy")
model, checkpoint = Late("model"), Late("checkpoint")  # which begin with torch


def parse(flags, argv, description, default=None):
    """argv -> an instance of the dataclass `flags`; nested dataclasses are groups of flags.

    default: an instance that stands for what argv leaves out. Bad input: one line on stderr, exit
    code 2. Fields marked tyro.conf.Fixed are no flags: Python code (a study, a test) sets them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    marks = (tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed, tyro.conf.FlagCreatePairsOff)
    read = functools.partial(
        tyro.cli,
        flags,
        args=argv,
        description=description,
        default=default or flags(),
        config=marks,
    )
    if {"-h", "--help"} & set(argv):
        return read()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide_terminal():
            return read()
    except SystemExit:
        text = re.sub(r"[─╭╮╰╯]+|-{5,}", " ", said.getvalue()).partition("For full helptext")[0]
        text = re.sub(
            r"Error parsing (\w+: |[\w -]+: (?=--))", "", text.partition("Argument helptext")[0]
        )
        lines = [line.strip(" │") for line in text.splitlines()]
        message = " ".join(" ".join(line.split()) for line in lines[1:] if line)
        told = f"{Path(sys.argv[0]).name}: {message[:2000]}; --help lists what is allowed"
        if _process() == 0:  # all processes have these flags
            print(told, file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _wide_terminal():
    """A terminal on which no message is broken into lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def short(value, most=200):
    """repr(value), cut to `most` characters."""
    try:
        text = repr(value)
    except Exception:
        text = "a number of thousands of digits, or the like"
    return text if len(text) <= most else f"{text[:most]}..."


def fits(value, kind):
    """Whether a value is of a type written as in annotations: int (no bool), float (or int; not
    nan), str, list[X], tuple[X, Y], dict[str, X], Literal["a"], X | None.
    """
    form, parts = typing.get_origin(kind), typing.get_args(kind)
    if form in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if form is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if form is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(fits(k, parts[0]) and fits(x, parts[1]) for k, x in pairs)
    if form is tuple:
        same = isinstance(value, (tuple, list)) and len(value) == len(parts)
        return same and all(map(fits, value, parts))
    if form is list and parts[0] is int:  # long ones: prompts
        return isinstance(value, list) and all(type(x) is int for x in value)
    if form is list:
        return isinstance(value, list) and all(fits(x, parts[0]) for x in value)
    if kind is float:
        return fits(value, int) or (isinstance(value, float) and value == value)
    return isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool))


_types = functools.cache(typing.get_type_hints)


def check(settings, dashes=True, **bounds):
    """ValueError unless all fields of a dataclass have their types and each named number lies in
    its (least, most), or is None. dashes: whether the fields are called flags.
    """
    for name, kind in _types(type(settings)).items():
        value, right = getattr(settings, name), fits(getattr(settings, name), kind)
        needed = f"of type {kind.__name__ if isinstance(kind, type) else kind}"
        if name in bounds:
            least, most = bounds[name]
            needed = f"a number from {least:,} to {most:,}"
            if isinstance(value, float) and not fits(0.5, kind):
                needed += " without a fraction"
            right = right and (value is None or least <= value <= most)
        if not right:
            shown = f"--{name.replace('_', '-')}" if dashes else name
            raise ValueError(f"{shown} must be {needed}, found {short(value)}")


def flat(settings):
    """A settings dataclass as one dict, nested ones included: what run.json holds."""
    named = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    nested = [flat(named.pop(k)) for k, x in list(named.items()) if dataclasses.is_dataclass(x)]
    return named | {k: x for part in nested for k, x in part.items()}


def unflat(settings, values):
    """The settings dataclass (a class) that `flat` gave; what is missing keeps its default."""
    kw = {}
    for f in dataclasses.fields(settings):
        if dataclasses.is_dataclass(f.default_factory):
            kw[f.name] = unflat(f.default_factory, values)
        elif f.name in values:
            kw[f.name] = values[f.name]
    return settings(**kw)


def pick_device(name):
    """The device that --device names; ValueError for one that this machine does not have."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; choose from auto, cpu, cuda")
    if name != "cpu" and torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return "cpu"


def read_text(path, most=2**28):
    """The content of a text file of at most `most` bytes; ValueError says why there is none."""
    path = Path(path)
    if not path.exists():
        known = "give a run such as runs/tiny-cispo-001 or a model's folder"
        raise ValueError(f"{path} does not exist; {known}")
    if not path.is_file():  # a pipe would wait for ever
        raise ValueError(f"{path} is no file")
    if path.stat().st_size > most:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {most:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from None


def read_json(path, kind=dict):
    """The content of a JSON file, of a type as in `fits`; ValueError says why there is none."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not fits(content, kind):
        needed = {dict: "object", list: "list"}.get(kind, kind)
        raise ValueError(f"{path} must hold a JSON {needed}, found {short(content)}")
    return content


@contextlib.contextmanager
def writing(path, *kinds):
    """An OSError inside, a full disk above all, names the file; so do other kinds of error."""
    try:
        yield
    except (OSError, *kinds) as error:
        while error.__context__:  # torch hides the system's error behind one of its own
            error = error.__context__
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', 0) or error}") from None


def write_file(path, text):
    """Write a text file so that at any moment the old or the new content is there, whole."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.writing-{os.getpid()}")
    with writing(path):
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)


def _process():
    """The number of this process among several, see parallel.py, which begins with this room."""
    return int(os.environ.get("RANK", 0))


def _tell(message):
    """A line on stderr; of several processes, those but the first say which they are."""
    name = Path(sys.argv[0]).name + (f", process {_process()}" if _process() else "")
    print(f"{name}: {' '.join(message[:5000].split())[:2000]}", file=sys.stderr, flush=True)


def command_line(main):
    """Decorator of main(argv=None): a ValueError or OSError becomes one line on stderr and exit
    code 2, a KeyboardInterrupt one line and 130.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            with _terminable():
                result = main(argv)
                sys.stdout.flush()
                return result
        except BrokenPipeError:  # nobody reads on, as in `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except (ValueError, OSError) as error:
            code, message = 2, str(error)
        except RuntimeError as error:
            if not re.search("gloo|NCCL", str(error)):  # of PyTorch, when a process has ended
                raise
            _tell(f"lost the other processes: {error}")
            os._exit(2)  # what is left of their group would abort
        except KeyboardInterrupt as stop:
            code, message = 130, str(stop) or "stopped"
        if code == 2 or _process() == 0:  # a wish to stop reaches all processes
            _tell(message)
        raise SystemExit(code)

    return wrapped


@contextlib.contextmanager
def _terminable():
    """SIGTERM is a KeyboardInterrupt, as Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
