"""Options: a flat dataclass becomes a script's command line.

Each script declares one dataclass. It is the only place where a default is written, the text of
`--help`, and the record that goes into the checkpoint. No presets, no nesting, no config files.
Next: tokenizer.py.
"""

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path


class UserError(Exception):
    """Something the person at the keyboard can mend: printed as one line, exit code 2."""


def option(default, help, low=None, high=None, choices=None):
    """A dataclass field with its meaning and its limits (both ends allowed; None: no limit)."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def number(kind, low, high):
    """A reader for argparse that refuses what is not a `kind` (int, float) between low and high."""
    largest = 2**63 - 1 if kind is int else sys.float_info.max
    low = -largest if low is None else low
    wanted = f"at least {low}" if high is None else f"between {low} and {high}"

    def read(text):
        value = kind(text)
        if not low <= value <= (largest if high is None else high):  # also catches nan and inf
            raise argparse.ArgumentTypeError(f"{text} is not allowed, it must be {wanted}")
        return value

    read.__name__ = kind.__name__  # argparse names it: "invalid int value: 'x'"
    return read


def parse(config_class, description, argv=None, saved_config=None):
    """Read a command line into `config_class`: typed options > those of the checkpoint > defaults.

    argv: list of strings, None for the process's own. saved_config: function from a run folder to
    the dict of options saved in its checkpoint; asked only when `--resume` is typed.
    """
    parser = OneLineParser(description=description, allow_abbrev=False,
                           argument_default=argparse.SUPPRESS,  # so that only typed options show up in `typed`
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        default, meta = field.default, field.metadata
        help = meta["help"].replace("%", "%%")
        if isinstance(default, bool):
            kind = dict(action="store_true" if field.name in ("resume", "explain") else argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            kind = dict(action="append", metavar="TEXT" if field.name == "prompt" else "FILE")
            help += " (repeatable)"
        elif meta["choices"]:
            kind = dict(choices=meta["choices"])
        elif isinstance(default, (int, float)):
            kind = dict(type=number(type(default), meta["low"], meta["high"]), metavar=type(default).__name__.upper())
        else:
            kind = dict(metavar="TEXT")
        if default not in ("", ()) and not isinstance(default, bool):
            help += f" [{default}]"
        parser.add_argument(f"--{field.name}", help=help, **kind)
    typed = vars(parser.parse_args(argv))
    saved = {}
    if typed.get("resume"):
        out_dir = typed.get("out_dir", config_class.out_dir)
        saved = saved_config(out_dir) | {"out_dir": out_dir}  # the folder may have been renamed since
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: tuple(value) if isinstance(value, list) else value
                           for name, value in (saved | typed).items() if name in names})


def command(main):
    """Run a script's main(): a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not re.search("out of memory|allocate", str(error)):
            raise
        print(f"{Path(sys.argv[0]).name}: error: out of memory ({str(error).splitlines()[0][:100]}); lower --batch_size or "
              "the lengths of texts (train_ppo.py: --microbatch_size); what was saved is unharmed", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
