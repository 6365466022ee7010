"""Command lines of all scripts: a frozen dataclass is its flags, and a mistake is one line.

    flags = parse(Flags, argv, text)    fields are flags, the strings under them their help
    ranges(self, steps=(0, 10**6))      in __post_init__: numbers that cannot work are refused
    @command_line                       on main(argv=None): an error is one line, exit code 2

torch and numpy take seconds to load. Rooms whose settings are flags import them from here, so that
they load when they are first used: after the command line has been read.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import os
import re
import sys
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
        text = re.sub(r"Error parsing [\w -]+: (?=--)", "", text.partition("Argument helptext")[0])
        lines = [line.strip(" │") for line in text.splitlines()]
        message = " ".join(" ".join(line.split()) for line in lines[1:] if line)
        print(f"{Path(sys.argv[0]).name}: {message}; --help lists what is allowed", file=sys.stderr)
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


def ranges(settings, **bounds):
    """ValueError unless each named number of a settings dataclass lies in its (least, most), or is
    None.
    """
    for name, (least, most) in bounds.items():
        value = getattr(settings, name)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be a number from {least:,} to {most:,}, found {value!r}")


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


def command_line(main):
    """Decorator of main(argv=None): a ValueError or OSError becomes one line on stderr and exit
    code 2, a KeyboardInterrupt one line and 130.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            code, message = 2, str(error)
        except KeyboardInterrupt as stop:
            code, message = 130, str(stop) or "stopped"
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(code)

    return wrapped
