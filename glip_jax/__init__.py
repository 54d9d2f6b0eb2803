"""GLIP (arXiv 2112.03857) in JAX: training, evaluation and transfer of text-prompted detectors."""

__all__ = ["UserError"]


class UserError(Exception):
    """An error that the user can mend: its text names the thing, what was found, what was expected and what to do.

    Every kind of the package derives from it. A job ends with `exit_code` and the text in one line, without a traceback.
    """

    exit_code: int = 2
