"""engine - what carries a run: nothing of the method is in here. See README.md in this folder."""

import sys


def any_console() -> None:
    """Print "?" for a character that the terminal does not have, instead of ending the run: an answer with an emoji on a
    Windows console (cp1252), or a server without a locale (ASCII). Every entry point calls it first.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none, and needs none
            stream.reconfigure(errors="replace")
