"""experiments - tables and costs. See README.md in this folder."""
