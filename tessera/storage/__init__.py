"""Every read and write of the root: retried, atomic, exclusive where asked, checked by digest.

The root is a folder or any fsspec URL. Four choices carry the rest of the project:

* A write is *published*: readers see the old bytes or all of the new ones. Object stores do that
  for a single PUT or a finished upload; a folder gets a temporary file in the same directory,
  ``fsync`` and ``os.replace``.
* Nothing that went over a network counts before it is verified (``tessera.storage.s3``).
* ``create`` is exclusive where the store honours it (a hard link on a folder, ``If-None-Match`` on
  S3). Some stores ignore the condition and let two writers both win, so nothing that must be safe
  rests on it: every attempt writes under keys of its own (see ``tessera.runs``).
* Listings are never cached: another machine may have written a second ago.

Only passing faults are retried (time-outs, resets, throttling, 5xx, damage on the way), in one
place and for a bounded time (``tessera.storage.retry``). A missing object, a refused key or a full
disk is said at once.
"""

from tessera.storage.digests import CHUNK, canonical_json, sha256_bytes, sha256_file
from tessera.storage.local import cache_folder, publish_local, require_writable
from tessera.storage.retry import TIMEOUT_VARIABLE
from tessera.storage.root import DEFAULT_ROOT, ROOT_VARIABLE, Root, open_root

__all__ = [
    "CHUNK",
    "DEFAULT_ROOT",
    "ROOT_VARIABLE",
    "TIMEOUT_VARIABLE",
    "Root",
    "cache_folder",
    "canonical_json",
    "open_root",
    "publish_local",
    "require_writable",
    "sha256_bytes",
    "sha256_file",
]
