"""How our commands answer a user's mistake: one line on stderr and exit code 2; a traceback with --debug."""

import argparse
import contextlib
import difflib
import multiprocessing
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from huggingface_hub.errors import StrictDataclassError


CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MISTAKES = (ValueError, OSError, ImportError, StrictDataclassError)  # a user's; ImportError: an extra that is missing
LARGEST = 2**63  # integers from here on overflow in libraries, each in its own way


class OneLineErrors:
    """Makes an `ArgumentParser` answer in one line, name the flag meant by one that it does not know, and refuse
    integers that no library takes."""

    synonyms: dict[str, str] = {}  # see `meant`

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

    def parse_known_args(self, args=None, namespace=None):
        if self._subparsers is None:  # else the flags are a sub-command's
            for flag in (arg.split("=")[0] for arg in args or [] if arg.startswith("--")):
                if flag not in self._option_string_actions:
                    self.error(f"there is no option {flag}" + meant(flag, self._option_string_actions, self.synonyms))
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and abs(number) >= LARGEST:
                    self.error(f"argument --{name}: must be below 2**63, got {number}")
        return namespace, rest


class Parser(OneLineErrors, argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(**{"allow_abbrev": False} | kwargs)


def nearest(given: str, allowed, all_of_them: str = "there are") -> str:
    """ ", did you mean X?" for the entry of `allowed` nearest to `given`, or all of them if none is near.

    Entries that begin with `given` are nearer than those of similar letters, and the shortest of them is the nearest.
    """
    longer = [name for name in allowed if name.startswith(given)] if len(given.strip("-")) > 2 else []
    found = sorted(longer, key=len) or difflib.get_close_matches(given, allowed, n=1)
    return f", did you mean {found[0]}?" if found else f"; {all_of_them} {', '.join(sorted(allowed))}"


def meant(given: str, allowed, synonyms: dict[str, str]) -> str:
    """Answer a name that is not in `allowed` by what it means elsewhere, or else by its letters, as `nearest` does.

    Args:
        given: A setting or, with dashes, a flag.
        allowed: Names that there are.
        synonyms: Names elsewhere -> ours: the first of them, separated by `|`, that is in `allowed`. An entry with
            spaces is a sentence that says what to do.
    """
    dashes = "--" * given.startswith("--")
    for answer in synonyms.get(given.lstrip("-").replace("-", "_").lower(), "").split("|"):
        if " " in answer:
            return f". {answer}"
        if dashes + answer in allowed:
            return f", did you mean {dashes}{answer}?"
    return nearest(given, allowed)


def find_config(name: str, folder: Path, suffix: str) -> Path:
    """A file by its path, or by its name among those that come with the package."""
    candidates = [Path(name).expanduser(), folder / name, folder / f"{name}{suffix}"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    available = [path.stem for path in folder.glob(f"*{suffix}")]
    raise ValueError(f"there is no file {name}{nearest(name, available, 'those that come with the package are')}")


def check_files(path: Path) -> None:
    """Check that a path, and what lies in it if it is a folder, can be read to an end.

    Raises:
        ValueError: a pipe, socket or device, which a reader may wait for forever.
    """
    for file in (path, *(path.iterdir() if path.is_dir() else ())):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ValueError(f"{file} must be a file, got a pipe or device. Replace or remove it.")


def run(prog: str, main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a command's `main`; an error becomes one line on stderr and an exit code, or a traceback with --debug.

    Raises:
        SystemExit: with code 2 after a mistake of the user's; 1 after an error that nobody has foreseen, whose type
            the line names; 130 after Ctrl-C, or the `exit_code` of the KeyboardInterrupt.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        main([arg for arg in argv if arg != "--debug"])
    except KeyboardInterrupt as end:
        if not hasattr(end, "exit_code"):  # a run that ends in order has said so
            _write_line(f"{prog}: stopped by SIGINT")
        sys.exit(getattr(end, "exit_code", 130))
    except MISTAKES as error:
        if debug:
            raise
        _write_line(f"{prog}: error: {one_line(error)}")
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        name = type(error).__name__
        what = one_line(error)
        if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", what):
            _write_line(f"{prog}: error: out of memory ({what}). Lower the batch size or the size of images.")
            sys.exit(2)
        _write_line(f"{prog}: error: {name}" + f": {what}" * (what != name) + " (--debug shows where)")
        sys.exit(1)


def is_notebook() -> bool:
    """Return whether what this process prints appears in a notebook."""
    return type(sys.stdout).__module__.startswith("ipykernel.")


def as_arguments(text: str) -> str:
    """Return a message with its settings as arguments of Python, without the dashes of a command line."""
    return re.sub(r"(?<![\w-])--(?=[a-z])", "", text)


@contextlib.contextmanager
def short_in_notebooks():
    """Context manager, or decorator, within which a user's mistake is one line in a notebook, and else as usual.

    IPython asks an exception for `_render_traceback_`. `%debug` still finds the traceback.
    """
    try:
        yield
    except MISTAKES as error:
        line = f"{type(error).__name__}: {as_arguments(one_line(error))}"
        error._render_traceback_ = lambda: [line]
        raise


def run_process(prog: str, main: Callable[[list[str]], None]) -> None:
    """`run` as all that this process does. Its end waits for no worker, thread or library, and so cannot hang."""
    # either may have been closed by who started this
    sys.stdout, sys.stderr = (_Unbreakable(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr))
    warnings.formatwarning = lambda message, *_, **__: f"{prog}: warning: {printable(str(message))}\n"  # no code
    code = 0
    try:
        run(prog, main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # with --debug
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(code)


class _Unbreakable:
    """A text stream that nobody may read any more: from then on, what is written to it goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._broken_is_closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._broken_is_closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _broken_is_closed(self):
        try:
            yield
        except OSError:  # a pipe whose reader has gone, a terminal that was closed, a disk that is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _write_line(text: str) -> None:
    """In one piece, where `print` writes two and another process may come between."""
    sys.stderr.write(f"{text}\n")


def printable(text: str) -> str:
    """The text with all that a terminal would obey, or cannot show, written as escapes; `\\n` for a line break.

    Words that are longer than any name, 1000 characters and more, are abbreviated.
    """
    text = re.sub(r"\S{1000,}", lambda word: f"{word[0][:200]}...{word[0][-200:]}", text)  # no name, but a mistake
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(error: Exception) -> str:
    """What an error says, without line breaks and, of one from a loader's worker, without the traceback in it."""
    if isinstance(error, StrictDataclassError) and error.__cause__:
        error = error.__cause__
    message = str(error)
    if isinstance(error, UnicodeEncodeError) and error.encoding == "utf-8":  # a name in a tar or on a disk
        message = f"the name {error.object} is not UTF-8. Rename it."
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return printable(" ".join(message.split())) or type(error).__name__
