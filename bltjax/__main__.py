"""python -m bltjax VERB: the verbs and their help; a program is imported only when it is run."""

import argparse
import logging
import os
import sys
import traceback
import typing

from bltjax.system.environment import check_flags, keep_buffers, prepare_process, refused_platform

# Help of each verb; its program has add_arguments(parser) and main(args, overrides).
VERBS = {
    "train": "train a BLT, a byte LM or a rival; the same command resumes it",
    "entropies": "score a corpus with a byte LM and write records to train a BLT on",
    "corpus": "report on folders of records: sizes, patch lengths, rates",
    "tokenizer": "train a BPE tokenizer, and measure its bytes per token",
    "calibrate": "find the threshold that gives a mean patch length",
    "evaluate": "bits per byte of a model on any text, beside gzip and xz",
    "generate": "continue a text",
    "patches": "show the patches of a text: terminal, HTML, PNG",
    "convert": "convert released weights to an export, or a model to other layouts",
    "plan": "compile a training step for absent TPUs: whether it fits, bounds on speed",
    "page": "write a run's page: curves, config, samples and patches in one HTML file",
    "inspect": "identify a folder (run, export, records, weights) and check it",
    "benchmark": "measure steps, attention, input, generation, beside other implementations",
}
# Verbs that compute little or once: they return freed memory as soon as they can.
FRUGAL = ("convert", "inspect", "plan")


def program_of(verb: str):
    """The module of a verb, imported on demand, since most import jax."""
    match verb:
        case "train":
            from bltjax.training import train as program
        case "entropies":
            from bltjax.inference import entropies as program
        case "corpus":
            from bltjax.inference import corpus as program
        case "tokenizer":
            from bltjax.data import tokenizer as program
        case "calibrate":
            from bltjax.data import calibrate as program
        case "evaluate":
            from bltjax.evaluation import evaluate as program
        case "generate":
            from bltjax.inference import generate as program
        case "patches":
            from bltjax.viz import patches as program
        case "convert":
            from bltjax.convert import convert as program
        case "plan":
            from bltjax.planning import plan as program
        case "page":
            from bltjax.viz import samples as program
        case "inspect":
            from bltjax.convert import inspect as program
        case "benchmark":
            from bltjax.benchmark import command as program
    return program


def main(argv: list[str] | None = None) -> int:
    prepare_process()
    parser = argparse.ArgumentParser(
        prog="python -m bltjax",
        description="The Byte Latent Transformer in JAX.",
        epilog="python -m bltjax VERB --help lists a verb's options. Settings of a config are"
        " overridden as --config.optimizer.lr=1e-3.",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    parser.add_argument(
        "--no_cache",
        action="store_true",
        help="neither read nor write the cache of compiled programs, which lies"
        " under $BLTJAX_CACHE (default: ~/.cache/bltjax)",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    argv = sys.argv[1:] if argv is None else argv
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for verb, purpose in VERBS.items():
        # No abbreviations: --config.x must never be read as some longer option's beginning.
        sub = verbs.add_parser(verb, help=purpose, description=purpose, allow_abbrev=False)
        if verb == chosen:
            try:
                program = program_of(verb)
            except (ValueError, ImportError) as error:  # of a variable that jax reads, usually
                if "--debug" in argv:
                    raise
                print(f"bltjax {verb}: {error}", file=sys.stderr)
                return 1
            program.add_arguments(sub)
    args, rest = parser.parse_known_args(argv)
    # Imported here, because they import jax, which --help needn't wait for.
    from bltjax.distributed.coordinator import process_index
    from bltjax.distributed.processes import CTRL_C, RESTART, Restart, describe, lost_another
    from bltjax.system.compiling import keep_programs, skip_cache
    from bltjax.system.versions import warn_outside_bounds

    overrides = [word.removeprefix("--config.") for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown:
        if unknown[0] in ("--debug", "--no_cache"):
            parser.error(f"{unknown[0]} goes before the verb: {unknown[0]} {args.verb} ...")
        parser.error(f"{args.verb} has no option {unknown[0]!r}; see {args.verb} --help")
    logger = logging.getLogger("bltjax")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    warn_outside_bounds()
    try:
        check_flags()
        if args.verb not in FRUGAL:
            keep_buffers()
        if args.no_cache:
            skip_cache()
        elif reason := keep_programs():
            logger.warning("compiled programs are not cached: %s", reason)
        program.main(args, overrides)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output, such as `head`, closed it; the rest is discarded.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell has it: ended by SIGPIPE
    except Restart as error:
        print(f"bltjax {args.verb}: {error}", file=sys.stderr)
        return RESTART
    except (
        ValueError, OSError, FloatingPointError, ImportError, RuntimeError, AssertionError,
    ) as error:  # fmt: skip
        lost, platform = lost_another(error), refused_platform(error)
        unforeseen = isinstance(error, RuntimeError | AssertionError) and not (lost or platform)
        if args.debug or unforeseen:
            raise
        cause = platform or describe(error)
        if lost:
            cause = (
                f"process {process_index()} can't continue, most likely because another one ended:"
                f" {cause}"
            )
        print(f"bltjax {args.verb}: {cause}", file=sys.stderr)
        return RESTART if lost else 1
    except KeyboardInterrupt as error:
        print(f"bltjax {args.verb}: interrupted{f': {error}' * bool(error.args)}", file=sys.stderr)
        return CTRL_C
    return 0


def run() -> typing.NoReturn:
    """`main`, then exit: after an error also without jax's wait for the other processes."""
    try:
        code = main()
    except KeyboardInterrupt:  # before the program was imported
        print("bltjax: interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    except Exception:
        traceback.print_exc()
        code = 1
    processes = sys.modules.get("bltjax.distributed.processes")  # not before jax could be imported
    # A second Ctrl-C waits for no thread either.
    if code and processes and (code == processes.CTRL_C or processes.joined()):
        processes.exit_now(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
