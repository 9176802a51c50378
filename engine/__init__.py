"""engine - what carries a run: nothing of the method is in here. See README.md in this folder."""

import sys


def any_console() -> None:
    """Print "?" for a character that the terminal does not have (an emoji on cp1252, "é" on ASCII): it must end no run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none, and needs none
            stream.reconfigure(errors="replace")
