"""The command ``lazycache``: ``eval``, ``explain``, ``info`` and ``check``.

Results go to stdout, everything else to stderr. The exit status is 0; 1 for what goes wrong with
the data (a file, a shape, the memory), for problems that ``check`` finds, and for what doesn't
fit the budget in ``explain``; 2 for what is wrong
with the command (the formula, the budget, the outputs), said before anything is read; 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from lazycache import memory
from lazycache.errors import FormulaError, SizeError

from .terminal import UsageError, complain, one_line

__all__ = ["main"]

log = logging.getLogger("lazycache")

_EVAL = """\
FORMULA is an expression over the images: I1, I2 ... are the images in the order given, images is
the list of them, names are the named inputs. Examples:

  lazycache eval "(I1 * 2 + I2 * I3) / 1.2" a.nii b.nii c.nii -o out.nii.gz
  lazycache eval "where(mask > 0, t1 / (t2 + 1), 0)" t1=t1.nii t2=t2.nii mask=m.nii -o ratio.nii
  lazycache eval sub-*.nii.gz -o mean.nii.gz="mean(images)" -o sd.nii.gz="std(images, ddof=1)"
  lazycache eval "np.mean(I1)" a.nii        a number is printed

lazycache explain, with the same arguments, prints what that would read and how much memory it
would take.

What follows -o is OUT=FORMULA where it is a file name, an = and more; a text that ends as an image
does (.nii.gz, .npy ...) is a file name, whatever = it holds. A formula that begins with - goes
after --, or in brackets. Floating results are written as float32 unless --dtype says otherwise."""

_IMAGES = (
    "an image; @list.txt stands for the files that list.txt names, one a line, relative to the "
    "folder of list.txt (blank lines and lines that begin with # are skipped)"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("lazycache-volumes")
        except metadata.PackageNotFoundError:
            version = "(run from its source, not installed)"
        print(f"lazycache {version}")
        parser.exit()


_NEGATED = re.compile(r"-+\s*(I\d|images?\b|np\.|\(|\d)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (those of the process by default): its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except SystemExit as end:  # --help, --version
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("lazycache: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left. Python would complain when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, FormulaError, SizeError) as error:
        complain(error)
        return 2
    except Exception as error:
        complain(error)
        return 1


def _run(arguments: list[str]) -> int:
    parser = _Parser(prog="lazycache", description="Work on more images than fit in memory.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    parser.add_argument("command", choices=sorted(_COMMANDS), help=_NAMES)
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="see COMMAND --help")
    if not arguments:
        raise UsageError(f"no command is given: {_NAMES} (see lazycache --help)")
    chosen = parser.parse_args(arguments)
    add_arguments, run = _COMMANDS[chosen.command]
    inner = _Parser(
        prog=f"lazycache {chosen.command}",
        description=inspect.cleandoc(run.__doc__ or ""),
        epilog=_EVAL if chosen.command in ("eval", "explain") else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(inner)
    # Intermixed: images may stand before, between and after the options. argparse takes what has
    # a space for no option: a formula may begin with a minus.
    rest = [f" {text}" if _NEGATED.match(text) else text for text in chosen.rest]
    options = inner.parse_intermixed_args(rest)
    with _logging(getattr(options, "verbose", 0)), _one_line_warnings(), _threads(options):
        try:
            status = run(options)
        except Exception:
            log.debug("this is where it went wrong:", exc_info=True)
            raise
    sys.stdout.flush()
    return status


@contextmanager
def _logging(verbose: int) -> Iterator[None]:
    """Send what `lazycache` logs to stderr: with -v each file, with -vv everything.

    Its warnings are logged too, so without -v only errors are taken from the log.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("lazycache: %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel((logging.ERROR, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        # An interrupt may leave a file to its finalizer: nothing that the user could mend.
        warnings.simplefilter("ignore", ResourceWarning)
        # And what libraries have to say to those who write them.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.showwarning = _show_warning
        yield


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"lazycache: warning: {one_line(str(message))}", file=sys.stderr)


@contextmanager
def _threads(options: argparse.Namespace) -> Iterator[None]:
    """Hand ``--threads`` on as the environment variable that decides, and take it back."""
    name, wanted = "LAZYCACHE_THREADS", getattr(options, "threads", None)
    if not wanted:
        memory.usable_cpus()  # a bad number in the environment is told now
        yield
        return
    before = os.environ.get(name)
    os.environ[name] = str(wanted)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        help='memory for data: "4GiB", "512MiB", "50%%" (default: LAZYCACHE_BUDGET, or half of '
        "what this process may use)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no closing line")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="tell each file; -vv: more"
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_explain(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="compute nothing, print the plan: the same as lazycache explain",
    )


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("given", nargs="*", metavar="FORMULA IMAGE|NAME=IMAGE", help=_IMAGES)
    parser.add_argument(
        "-o",
        "--output",
        action="append",
        default=[],
        metavar="OUT or OUT=FORMULA",
        help="a file to write; as OUT=FORMULA, several can be given. Without -o, and where OUT is "
        "left out (=FORMULA), the result must be a number and is printed",
    )
    parser.add_argument("--dtype", help="the type of the values in the files that are written")
    parser.add_argument(
        "--grid",
        choices=("error", "warn", "ignore"),
        default="error",
        help="what to do about images that don't lie on one grid (default: error)",
    )
    parser.add_argument(
        "-t",
        "--threads",
        type=_count,
        metavar="N",
        help="threads that read ahead (default: 0, as many as there are processors for)",
    )
    parser.add_argument(
        "-z", "--zero", action="store_true", help="count images from 0: I0, image[0]"
    )
    _add_common(parser)
    others = parser.add_argument_group("as cartoLinearComb has them")
    others.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="IMAGE",
        help="an image; those given so come before those given without it",
    )
    others.add_argument("-f", "--formula", help="the formula; all else are images then")
    others.add_argument(
        "-l", "--lazy", action="store_true", help="changes nothing: files are always read lazily"
    )


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=_IMAGES)
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=_IMAGES)
    _add_common(parser)


def _eval(options: argparse.Namespace) -> int:
    """Compute formulas over images and write the results."""
    from .evaluating import run

    return run(options)


def _explain(options: argparse.Namespace) -> int:
    """Print what eval with the same arguments would do: reads, memory, the budget that it needs.

    Only headers are read, and nothing is written. The status is 1 if it doesn't fit the budget.
    """
    options.dry_run = True
    return _eval(options)


def _info(options: argparse.Namespace) -> int:
    """Print what the headers of images tell: format, shape, type, memory, orientation."""
    from .inspecting import info

    return info(options)


def _check(options: argparse.Namespace) -> int:
    """Read images one by one and say what would go wrong later: shapes, grids, damage, NaN."""
    from .inspecting import check

    return check(options)


_Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
_COMMANDS: dict[str, _Command] = {
    "eval": (_add_eval, _eval),
    "info": (_add_info, _info),
    "check": (_add_check, _check),
    "explain": (_add_explain, _explain),
}
_NAMES = "eval, explain, info or check"
