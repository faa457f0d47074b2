"""The errors a user of kbitc can meet. Each is one line: what is wrong, where, what was found, what to do."""

from __future__ import annotations


class KbitcError(Exception):
    """Base of every error that kbitc raises on purpose.

    Args:
        message: what is wrong, in one sentence without a final full stop.
        where: the node, tensor, file or option concerned.
        got: the offending value.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, where: str | None = None, got: object = None, remedy: str | None = None
    ) -> None:
        self.message = message
        self.where = where
        self.got = got
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.message
        if self.where is not None:
            text += f" [at {self.where}]"
        if self.got is not None:
            text += f" (got {self.got})"
        if self.remedy is not None:
            text += f"; {self.remedy}"
        return " ".join(text.split())


class InternalError(KbitcError):
    """A defect of kbitc itself; the command line saves a reproducer beside the working folder."""

    exit_code = 1


class UsageError(KbitcError):
    """Options that contradict each other, or that name nothing."""

    exit_code = 2


class ModelError(KbitcError):
    """The model file is missing, broken, or not what it claims to be."""

    exit_code = 3


class UnsupportedError(KbitcError):
    """The model is valid, but an operator, type or scheme in it cannot be compiled for the target."""

    exit_code = 4


class CalibrationError(KbitcError):
    """Calibration or input data do not fit the model."""

    exit_code = 5


class AccuracyError(KbitcError):
    """The compiled model is further from the original than was asked for."""

    exit_code = 6


class ResourceError(KbitcError):
    """Input/output failed, or a tool, library or amount of memory is missing."""

    exit_code = 7


class BundleError(KbitcError):
    """A bundle is damaged, was changed, or belongs to another machine."""

    exit_code = 8
