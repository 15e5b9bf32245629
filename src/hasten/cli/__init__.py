"""The `hasten` command: which verbs there are, and how one is run.

A verb is one file here with a function `command`: its typer annotations are the flags, its docstring is the
help. `KEPT` (optional) is the line printed when Ctrl-C stops it: what is kept and how to go on. Only the verb
that is run gets imported; `hasten --help` imports none of them, nor typer: it answers at once.

Exit codes: 0 done, 1 failed, 2 usage, 3 budget not met, 130 stopped by Ctrl-C, 141 stdout's reader went away.
"""

from __future__ import annotations

import sys  # and nothing else: until `main` runs, Ctrl-C ends in a traceback

VERBS = {  # verb -> its line in `hasten --help`: the first line of the docstring of its `command`
    "probe": "Measure this machine: cores, caches, memory bandwidth, compute ceilings.",
    "estimate": "Predict speed and memory of a model from its configuration alone.",
    "optimize": "Find the best recipe within a quality budget and write an artifact.",
    "compress": "Quantise, prune and distil a model by a recipe, and write an artifact.",
    "show": "Show what a model is: architecture, formats, memory, tokenizer, what is unusual.",
    "pull": "Download a model from the hub, and check every file's digest.",
    "generate": "Continue one prompt and print the continuation.",
    "chat": "Talk with a model in the terminal.",
    "serve": "Serve models with the OpenAI API, chat page included.",
    "eval": "Measure what a recipe costs in quality against the source model.",
    "bench": "Measure speed, alone or side by side with other engines.",
    "compare": "Compare two results, and fail where a figure crosses a limit.",
    "report": "Write the report of a search or a benchmark as one HTML file.",
    "convert": "Write a model in another engine's format, quantised if asked.",
    "cache": "See, check and empty what is kept on disk.",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code. Never raises.

    Args:
        argv: the arguments; None: the process's own, which ends with it. Ctrl-C is then without effect once
            this returns.
    """
    try:
        from hasten.cli.frame import guarded, with_standard_streams

        if argv is not None:
            return guarded(lambda: _dispatch(argv), verb=argv[0] if argv else "")
        import gc

        from hasten.stopping import listen_for_sigterm, listening

        gc.set_threshold(
            10_000
        )  # imports make many objects that stay: looking through them often costs time at start
        with_standard_streams()
        arguments = sys.argv[1:]
        verb = arguments[0] if arguments else ""
        if verb == "serve":
            listen_for_sigterm()
        with listening():
            return guarded(lambda: _to_the_end(arguments), verb=verb, last=True)
    except KeyboardInterrupt as stop:  # while the lines above are imported, or while the first one is said
        from hasten.stopping import exit_code

        sys.stderr.write("\nstopped.\n")
        return exit_code(stop)


def _to_the_end(arguments: list[str]) -> int:
    """Run the verb, then what it put off (`hasten.cache.store`), which Ctrl-C gives up."""
    from hasten.stopping import insist

    try:
        code = _dispatch(arguments)
    finally:
        put_off = sys.modules.get("hasten.cache.store")
        if put_off is not None:
            put_off.flush()
    insist()
    return code


def overview() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "Usage: hasten VERB [OPTIONS] [ARGS]...",
            "",
            "Make a language model fast on your hardware, within the quality you can accept, and prove both.",
            "",
            "Verbs:",
            *(f"  {name:<{width}}  {line}" for name, line in VERBS.items()),
            "",
            "Options:",
            "  -h, --help  Show this text; `hasten VERB --help` describes a verb.",
            "  --version   Show the version.",
            "",
            "Start here:",
            "  hasten optimize demo",
            '  hasten generate demo.hasten -p "What is a mutex?"',
            "",
        ]
    )


def _dispatch(arguments: list[str]) -> int:
    from hasten.cli.frame import OLDER_NAMES, check_text, unknown_verb

    check_text(arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0
    if arguments[0] == "--version":
        from hasten import __version__

        sys.stdout.write(f"hasten {__version__}\n")
        return 0
    if arguments[0] not in VERBS and arguments[0] not in OLDER_NAMES:
        raise unknown_verb(arguments[0], list(VERBS))
    from hasten.cli.frame import run

    return run(arguments[0], arguments[1:])
