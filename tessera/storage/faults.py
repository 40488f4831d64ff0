"""Which faults pass by themselves, and the sentence for each that does not.

The libraries below raise a hundred kinds of exceptions. An answer of the store is judged by its
HTTP status and code, everything else by its type. Types are compared by name so that a root in a
folder never loads the S3 libraries.
"""

from __future__ import annotations

import errno

from tessera.errors import NotFoundError, StoreError, TesseraError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FINAL_ERRNO = _FULL | {
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
}  # fmt: skip
_FULL_CODES = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "StorageFull"}
_NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_PASSING_STATUS = {408, 409, 425, 429}
_PASSING_CODES = {
    # throttling
    "SlowDown", "TooManyRequests", "TooManyRequestsException", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "BandwidthLimitExceeded",
    # the store's own trouble, also inside an answer with status 200
    "InternalError", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict",
    # the request was cut off or changed on its way
    "RequestTimeout", "IncompleteBody", "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
}  # fmt: skip
_PASSING_TYPES = {
    "HTTPClientError",  # botocore: read time-outs, closed connections, streams that break off
    "ConnectionError",  # botocore: connections that were never made
    "IncompleteReadError",
    "FlexibleChecksumError",
    "ResponseParserError",  # XML that is broken
    "ClientError",  # aiohttp: everything on the wire (botocore's own is judged by its answer)
    "IncompleteRead",
    "FSTimeoutError",
}


class MismatchError(Exception):
    """Bytes that are not what they should be; another try may get them right.

    ``final`` is what is raised when no try did.
    """

    def __init__(self, final: TesseraError) -> None:
        super().__init__(str(final))
        self.final = final


class BrokenAnswerError(Exception):
    """The store answered with success and nonsense."""


class UnusableRootError(StoreError):
    """The root cannot be used as it is named or set up, on this machine or on any other.

    Final (2): only a person can give another one, its keys or its permissions.
    """

    exit_code = 2


def answer_of(error: BaseException) -> tuple[int, str]:
    """HTTP status and code of the S3 answer behind ``error``; (0, "") if there was none."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(response.get("Error", {}).get("Code", ""))
        cause = cause.__cause__
    return 0, ""


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    if isinstance(error, MismatchError | BrokenAnswerError):
        return True
    if isinstance(error, TesseraError):
        return False  # a request inside this call was tried again already
    status, code = answer_of(error)
    if status or code:
        if status == 507 or code in _FULL_CODES:
            return False
        if code in _PASSING_CODES or status in _PASSING_STATUS:
            return True
        return status >= 500 and status != 501
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError):
        return False
    if isinstance(error, OSError):
        return error.errno not in _FINAL_ERRNO
    return bool(_PASSING_TYPES & {kind.__name__ for kind in type(error).__mro__})


def is_no_bucket(error: BaseException) -> bool:
    """Whether the bucket itself is missing: not the same as an object that is not in it."""
    return answer_of(error)[1] == "NoSuchBucket"


def is_taken(error: BaseException | None) -> bool:
    """Whether an exclusive create failed because the object exists."""
    return error is not None and (isinstance(error, FileExistsError) or answer_of(error)[0] == 412)


def _is_of_the_store(error: BaseException) -> bool:
    """Whether the libraries below raised it (no keys, a bucket's name that cannot be)."""
    return type(error).__module__.split(".")[0] in {"botocore", "aiobotocore", "aiohttp"}


def sentence(
    error: Exception, path: str, url: str, written_to: str | None = None
) -> TesseraError | None:
    """What a person is told about ``error``; None for a bug of our own, which is no fault.

    ``written_to`` is where bytes go if not to the root.
    """
    where = f"{path} in {url}" if path else url
    status, code = answer_of(error)
    if isinstance(error, TesseraError):
        return error
    if isinstance(error, MismatchError):
        return error.final
    if is_no_bucket(error):
        return StoreError(
            f"There is no bucket for {where}; create it, or correct --root or TESSERA_ROOT."
        )
    if isinstance(error, FileNotFoundError):
        return NotFoundError(
            f"{path} is not in {url}; expected it there: check --root or TESSERA_ROOT."
        )
    if status == 507 or code in _FULL_CODES or getattr(error, "errno", None) in _FULL:
        return StoreError(
            f"No space is left for {path} in {written_to or url}; free some space and start again."
        )
    if unusable := _unusable(error, path, url, written_to):
        return unusable
    if isinstance(error, PermissionError):
        return StoreError(
            f"{url} refused access to {path} ({_line(error)}); check the keys and the bucket's "
            "permissions."
        )
    known = is_passing(error) or _is_of_the_store(error) or isinstance(error, OSError)
    if not known:
        return None
    if is_passing(error):
        advice = "try again later"
    elif status or not isinstance(error, OSError):
        advice = "check the keys, the bucket and the endpoint"
    else:
        advice = "use another folder or path"
    return StoreError(f"{url} failed on {path}: {_line(error)}; {advice}.")


def _unusable(
    error: Exception, path: str, url: str, written_to: str | None
) -> UnusableRootError | None:
    """The sentence for a root that nothing but a person can put right."""
    name = type(error).__name__
    if name in _NO_KEYS:
        return UnusableRootError(
            f"There are no credentials for {url} ({_line(error)}); looked for AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, then for the profile AWS_PROFILE in ~/.aws: set one of "
            "them (the keys of `tessera configure` count for its own root alone)."
        )
    if name == "ParamValidationError" and "Invalid bucket name" in str(error):
        return UnusableRootError(
            f"{url} names no possible bucket; give s3://bucket/prefix in --root or TESSERA_ROOT."
        )
    is_folder = "://" not in url and not written_to
    if is_folder and isinstance(error, OSError) and error.errno in _FINAL_ERRNO:
        return UnusableRootError(
            f"{url} cannot be used for {path} ({_line(error)}); give a folder that can be read and "
            "written in --root or TESSERA_ROOT, or correct its permissions."
        )
    return None


def _line(error: Exception) -> str:
    """The text of ``error`` on one line, its type if it has none."""
    if isinstance(error, TimeoutError) or type(error).__name__ == "FSTimeoutError":
        return "no answer in time"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
