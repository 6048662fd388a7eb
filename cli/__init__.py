"""The command line of every script, and how a mistake ends: one sentence, exit code 2, no traceback.

It imports no torch and knows no settings: which ones there are is an argument.
"""

import argparse
import difflib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import NoReturn

# A stream that the shell has closed (2>&-) would be None, and its number go to the next file that is opened.
for _number in range(3):
    try:
        os.fstat(_number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)
sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115

os.environ["MPLBACKEND"] = "agg"  # figures are written to files; a notebook's own backend may be missing here

# Control characters: a file's name could use them to rewrite what a terminal shows.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

# How torch says that memory is full: on CUDA and MPS, and on a CPU.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")


class UserError(Exception):
    """A mistake that the user can mend, stated in one sentence: what is wrong, where, and what to do."""


def run_script(main: Callable[[], int | None]) -> int:
    """Run a script's `main` and return the exit code; a UserError is printed as one sentence and returns 2."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log file shows each line as it is printed; file names may hold characters that no encoding has.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        return main() or 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # whoever read the output, such as `| head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:
        message = (
            f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the disk"
        )
    except UnicodeEncodeError as error:  # of a file's name
        message = (
            f"{error.object!a:.60} has characters that the encoding of this system, {error.encoding}, lacks; set "
            "PYTHONUTF8=1"
        )
    except (RuntimeError, MemoryError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C in the midst of PyTorch's own bookkeeping
            print("interrupted", file=sys.stderr)
            return 130
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        message = "memory is full, a GPU's where one is used; lower train.batch_size, encoder.image_size or search.beam"
    except KeyboardInterrupt as stop:
        print(printable("; ".join(["interrupted", *map(str, stop.args)])), file=sys.stderr)
        return 130
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


def answer_early(read_options: Callable[[], object], loading: str = "") -> None:
    """End a script here for --help or a mistake in its command line: its other imports take seconds.

    Until `run_script` runs, Ctrl-C ends the process at once; Python would lose it in some of these imports.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun would start the processes again: see distributed.processes
        return

    def read() -> None:
        read_options()

    status = run_script(read)
    if status:
        raise SystemExit(status)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if loading and "--quiet" not in sys.argv:
        print(f"loading {loading} …", file=sys.stderr)


def printable(text: str) -> str:
    """Escape control characters, so that text from outside is safe to print: file names, captions, messages."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def say(*fields: str) -> None:
    """Print a line of a script's output, of one text or several with tabs between; nothing else here prints to it."""
    print("\t".join(map(printable, fields)))


def note(text: str) -> None:
    """Print what is no result: what a script does and where it has written, beside its output for other programs."""
    if "--quiet" not in sys.argv:
        print(printable(text), file=sys.stderr)


def hide_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print no traceback for a Ctrl-C while a script still imports its libraries, before `run_script` runs."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = hide_interrupt  # scripts import this module first


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse_options(
        self, settings: Collection[str] = (), rest: str = "", with_option: str = "--run"
    ) -> argparse.Namespace:
        """Parse the command line; settings such as `train.lr=1e-3` may stand anywhere in it and become `overrides`.

        Args:
            settings: the names of all settings, for a script that takes any. For an unknown option that is one of them,
                the message shows how to write it.
            rest: the attribute for words that are neither options nor settings, for a script that takes such.
            with_option: the option that these words may also stand behind.

        Raises UserError for an unknown option, and for other words where there is no `rest`.
        """
        words, overrides = list[str](), list[str]()
        given, behind = split_at("--", sys.argv[1:])  # which tells what begins with a dash from an option
        for before, word in itertools.pairwise(["", *join_blanks(given, settings)]):
            is_setting = settings and re.match(r"[A-Za-z_]+(\.\w+)*=", word) and not os.path.exists(word)
            option = self._option_string_actions.get(before)  # one that takes a value takes any
            (overrides if is_setting and not (option and option.nargs is None) else words).append(word)
        if settings:
            self.epilog = f"{self.epilog or ''} Settings, as in config.yaml, are written key.sub=value."
        if rest:
            self.add_argument(
                rest, nargs="*", metavar=rest.rstrip("s"), help=f"as with {with_option}, which may be left out"
            )
        args, unknown = self.parse_known_intermixed_args([expand_home(word) for word in words])
        if unknown and unknown[0].startswith("-"):
            if rest and os.path.exists(unknown[0]):
                raise UserError(f"{unknown[0]} begins as options do; write ./{unknown[0]}")
            raise UserError(self.explain_unknown(unknown, settings))
        if unknown:
            raise UserError(
                f"'{shorten(unknown[0])}' is neither an option nor a setting; write settings as key.sub=value"
            )
        args.overrides = overrides
        if rest:
            getattr(args, rest).extend(behind)
        return args

    def explain_unknown(self, words: list[str], settings: Collection[str]) -> str:
        """Say what is wrong with the first of these words: `--epochs 3` should be `train.epochs=3`."""
        option, _, value = words[0].partition("=")
        if not value:
            value = next((word for word in words[1:2] if not word.startswith("--")), "…")
        key = option.strip("-").replace("-", "_")
        meant = [name for name in settings if key in (name, name.split(".")[-1])]
        if meant:
            return f"there is no {option}; write {' or '.join(f'{name}={value}' for name in meant)}"
        known = re.findall(r"--[a-z-]+", self.format_usage())
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.75)
        if near:
            return f"there is no {shorten(option)}; did you mean {near[0]}?"
        known += ["and settings such as train.epochs=3"] * bool(settings)
        hint = f"there are {', '.join(known)}" if known else "see --help"
        return f"there is no {shorten(option)}; {hint}"


def split_at(mark: str, words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before the first `mark`, and those behind it."""
    place = words.index(mark) if mark in words else len(words)
    return words[:place], words[place + 1 :]


def join_blanks(words: Sequence[str], settings: Collection[str]) -> list[str]:
    """Return words with `train.lr = 1` and the like joined into one, `train.lr=1`."""
    joined = list[str]()
    for word in words:
        last = joined[-1] if joined else ""
        opens = last.removesuffix("=") in settings and (word.startswith("=") if last in settings else word[:1] != "-")
        if opens and word.partition("=")[0] not in settings:
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def expand_home(word: str) -> str:
    """Return a word with `~` for the home folder, which shells leave as it is behind an option's `=`."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{os.path.expanduser(value)}" if value.startswith("~") else word


def shorten(name: str, most: int = 60) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
