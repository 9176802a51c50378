"""engine - what carries a run: nothing of the method is in here. See README.md in this folder."""

import os
import sys


def any_console() -> None:
    """Print "?" for a character that the terminal does not have (an emoji on cp1252, "é" on ASCII): it must end no run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed (`>&-`), and a progress bar wants to write all the same
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a notebook's has none, and needs none
            stream.reconfigure(errors="replace")
