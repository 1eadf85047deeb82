"""The error tree: every failure that a user can cause or mend.

Each class is ours *and* the builtin a Python caller would expect. A message is one line: what is wrong, where,
expected and got, what to do. Bugs of ours are not in this tree; they stay ordinary exceptions with a traceback.
"""


class InfluentError(Exception):
    """Root of every error that influent raises on purpose."""


class SpecError(InfluentError, ValueError):
    """An option, a compressor text or a combination of them that has no meaning."""


class LayerError(InfluentError, TypeError):
    """A layer that cannot be attributed to, or a layer pattern that matches none."""


class DataError(InfluentError, ValueError):
    """A data file or record that cannot be used; names the file and line."""


class FormatError(InfluentError, ValueError):
    """A directory that is not an index, is unfinished, or was written by another format version."""


class CorruptError(InfluentError, OSError):
    """Bytes on disk that differ from what was committed; names the object. Also a write that could not be finished."""


class MismatchError(InfluentError, ValueError):
    """Two things that must belong together and do not (an index and a model, a directory and a spec)."""


class NumericsError(InfluentError, ArithmeticError):
    """A value that is not finite, or a factorisation that failed; names the block or row."""
