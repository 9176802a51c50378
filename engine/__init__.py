"""engine - what carries a run: nothing of the method is in here. See README.md in this folder."""
