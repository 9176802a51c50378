"""tasks - questions, and how answers are judged. See README.md in this folder."""
