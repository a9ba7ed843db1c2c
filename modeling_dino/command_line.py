"""How our commands answer a user's mistake: one line on stderr and exit code 2; a traceback with --debug."""

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError


CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class OneLineErrors:
    """Makes an `ArgumentParser` answer in one line, and name the nearest flag to one that it does not know."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        if self._subparsers is None:  # else the flags are a sub-command's
            for flag in (arg.split("=")[0] for arg in args or [] if arg.startswith("--")):
                if flag not in self._option_string_actions:
                    self.error(f"there is no option {flag}" + nearest(flag, self._option_string_actions))
        return super().parse_known_args(args, namespace)


class Parser(OneLineErrors, argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(**{"allow_abbrev": False} | kwargs)


def nearest(given: str, allowed) -> str:
    """ ", did you mean X?" for the entry of `allowed` nearest to `given`, or all of them if none is near."""
    found = difflib.get_close_matches(given, allowed, n=1)
    return f", did you mean {found[0]}?" if found else f"; there are {', '.join(sorted(allowed))}"


def find_config(name: str, folder: Path, suffix: str) -> Path:
    """A file by its path, or by its name among those that come with the package."""
    candidates = [Path(name).expanduser(), folder / name, folder / f"{name}{suffix}"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    available = sorted(path.stem for path in folder.glob(f"*{suffix}"))
    raise ValueError(f"there is no file {name}; those that come with the package are {', '.join(available)}")


def run(prog: str, main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Runs a command's `main`. Users' errors end in exit code 2 and one line; --debug shows where they came from."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        main([arg for arg in argv if arg != "--debug"])
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:  # ImportError: an extra that is missing
        if debug:
            raise
        # in one piece, where `print` writes two and another process may come between
        sys.stderr.write(f"{prog}: error: {one_line(error)}\n")
        sys.exit(2)


def one_line(error: Exception) -> str:
    """What an error says, without line breaks and, of one from a loader's worker, without the traceback in it."""
    if isinstance(error, StrictDataclassError) and error.__cause__:
        error = error.__cause__
    message = str(error)
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(message.split()) or type(error).__name__
