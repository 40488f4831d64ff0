"""Everything that Tessera raises on purpose, and the exit code that each becomes.

    TesseraError                 one sentence: what was wrong, what was expected, what to do
    ├── InputError          2    a file, option or setting that cannot be used
    │   └── ConflictError   2    it contradicts what the root already holds
    ├── DivergedError       3    the loss is no longer a number worth paying for
    └── RetryElsewhereError 75   another machine or another moment may help
        ├── ProviderError   75   the cloud provider did not answer as it should
        └── StoreError      75   the object store did not answer as it should
            ├── NotFoundError 75 the store answered: there is no such object
            └── DamagedError  2  the store answered with bytes that contradict their digest or form
    SupersededError         2    a newer attempt of the same run took over

The command line prints the sentence alone and leaves with the code; a traceback is a bug.
Codes follow the contract of ``tessera train``: 0 done, 2 bad input, 3 diverged, 75 (EX_TEMPFAIL of
``sysexits.h``) is the only one on which a managed job is started again.
"""

from __future__ import annotations


class TesseraError(Exception):
    """Base of every deliberate error; its text is one sentence for a person."""

    exit_code = 1
    told_elsewhere = False
    """Whether another worker of the same training prints the sentence."""


class InputError(TesseraError):
    """A file, option or setting that cannot be used as it is."""

    exit_code = 2


class ConflictError(InputError):
    """A request that contradicts what the root already holds."""


class DivergedError(TesseraError):
    """Training produced a loss that is not a number; going on would only cost money."""

    exit_code = 3


class SupersededError(TesseraError):
    """Another attempt of the same run took over, so this one stops without publishing.

    Final (2), not retryable: started again it would supersede the attempt that is working.
    """

    exit_code = 2


class RetryElsewhereError(TesseraError):
    """Another machine or another moment may help."""

    exit_code = 75


class ProviderError(RetryElsewhereError):
    """The provider of the machine (its API) failed after every try, or answered nonsense."""


class StoreError(RetryElsewhereError):
    """The store behind the root failed after every retry."""


class DamagedError(StoreError):
    """The store answered, but the bytes contradict their digest or their format.

    Another machine would read the same bytes, so this is final until a person restores them.
    """

    exit_code = 2


class NotFoundError(StoreError):
    """The store answered, and there is no such object."""
