"""The command line: what a person types, turned into settings, answers and tables.

Owns the subcommands of `smg` and the composition root. Importing this package costs nothing; a command loads what it needs
when it runs, so that `smg --version` answers at once (CLI-3).
"""
