"""A local web page that generates an image from a prompt: `python -m t2i_lm.demo --checkpoint RUN` (extra `demo`)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from t2i_lm.runtime.command_line import command_parser, exit_code

EXAMPLE = "example: python -m t2i_lm.demo --checkpoint runs/t2i_pretrained"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = command_parser("demo", "Serve a web page on this machine that generates images from prompts.", EXAMPLE)
    add = arguments.add_argument
    add("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder, or folder of runs")
    add("--port", type=int, default=7860, help="default: %(default)s")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Serves the page until it is stopped; returns the exit code."""
    options = parser().parse_args(argv)

    def serve_page() -> int:
        from t2i_lm.generation.web_page import serve

        return serve(options.checkpoint, options.port)

    return exit_code(serve_page)


if __name__ == "__main__":
    sys.exit(main())
