"""The one exception the command line turns into a line and exit code 2."""


class CommandError(Exception):
    """Something the user can put right: a path, an option, a damaged file.  One clear sentence."""
