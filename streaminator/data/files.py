# SPDX-License-Identifier: Apache-2.0
"""Files of a run, on a local disk or an object store (`s3://`, `gs://`, `file://`).

Invariants
- `write_whole` makes a file appear whole or not at all. A local file has a temporary name until
  then, which starts with "." so that DuckDB and pyarrow skip it; on object stores a closed output
  stream is atomic.
- A part is staged under STAGING first; `publish` is what makes it visible, in one step.
- A folder or URI given by the user stays a string until `resolve`, so that it can travel between
  processes.

Used by: `streaminator.data.parquet`, `streaminator.run_record`, `streaminator.summary`.
"""

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pyarrow as pa
from pyarrow import fs as pafs

from streaminator.errors import ConfigError, OutputError, RunBusyError

STAGING = ".staging"
"""Folder of a run that no reader looks into: a folder per worker, of parts not published yet."""

STORAGE_SECONDS = 120.0
"""How long failing storage is put up with; a stream goes on meanwhile."""
_GS_SECONDS, _GS_PROBE_SECONDS = 60, 5
"""How long pyarrow tries again on `gs://` within one call (a few times as long in all), later and at
first: its own default is 15 minutes, also where credentials are missing."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0
"""Seconds between two tries while storage fails."""


def reason(error: BaseException) -> str:
    """What an exception says, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.splitlines()[0]
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def join_uri(uri: str, *names: str) -> str:
    """A path below a folder or URI; a URI keeps its query (`?region=...`)."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([base.rstrip("/"), *names]) + mark + query


def resolve(uri: str, gs_seconds: int = _GS_SECONDS) -> tuple[pafs.FileSystem, str]:
    """(file system, path) of a local path or a URI, without touching it.

    Raises: OutputError for a URI that pyarrow cannot use.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={gs_seconds}"
    try:
        return pafs.FileSystem.from_uri(uri)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OutputError(f"{uri}: {reason(error)}") from error


def open_output(uri: str) -> tuple[pafs.FileSystem, str]:
    """(file system, path) of the output folder, created if needed and found writable.

    Raises: ConfigError when the folder cannot be created or written.
    """
    try:
        filesystem, path = resolve(uri, _GS_PROBE_SECONDS)
        filesystem.create_dir(path, recursive=True)
        probe = f"{path}/.probe-{uuid.uuid4().hex}"
        write_whole(filesystem, probe, b"")
        filesystem.delete_file(probe)
    except OutputError as error:
        raise ConfigError(f"--output {error}") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        why = reason(error)
        raise ConfigError(f"--output {uri}: cannot be written: {why}{_remedy(why)}") from error
    return resolve(uri)


def _remedy(why: str) -> str:
    """What to do about what storage says."""
    if any(word in why for word in ("ACCESS_DENIED", "ACCESS_KEY", "SIGNATURE", "status 403")):
        return "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of a user who may write there"
    if "OAuth2" in why or "PERMISSION_DENIED" in why:
        return "; set GOOGLE_APPLICATION_CREDENTIALS to the key of a user who may write there"
    if "status 301" in why:
        return "; add ?region=REGION of the bucket"
    return "; choose another folder or URI"


def write_whole(filesystem: pafs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    """Write a file that appears whole or not at all, replacing one of the same name.

    Raises: OSError.
    """
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    folder, name = os.path.split(path)
    temp = os.path.join(folder, f".{name}.tmp")
    try:
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temp)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Patience:
    """Decides how long failing storage is put up with: tries with growing pauses, then an error."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._wait = _FIRST_WAIT
        self._last = ""
        self.next_try = 0.0
        """When to try again, by the monotonic clock."""

    def failed(self, what: str, error: OSError) -> None:
        """A try failed. Raises: OutputError with `what` once the time is over."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        self._last = reason(error)
        if now - self._since >= self._seconds:
            lasted = f" for {now - self._since:.0f} s" if self._seconds else ""
            raise OutputError(
                f"{what} cannot be written{lasted}: {self._last}; mend that, and the same command "
                "resumes"
            ) from error
        self.next_try = now + self._wait
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def succeeded(self) -> str | None:
        """A try succeeded; tells of the failures before it, if there were any."""
        if self._since is None:
            return None
        text = f"storage failed for {time.monotonic() - self._since:.0f} s: {self._last}"
        self._since, self._wait, self.next_try = None, _FIRST_WAIT, 0.0
        return text

    def pause(self) -> None:
        """Sleep until the next try."""
        time.sleep(max(0.0, self.next_try - time.monotonic()))


def publish(filesystem: pafs.FileSystem, source: str, target: str) -> None:
    """Move a whole file to where readers look: one rename, or one server-side copy. Repeatable.

    Raises: OSError.
    """
    try:
        filesystem.move(source, target)
    except FileNotFoundError:
        # An earlier try may have failed after the move.
        if not filesystem.get_file_info(target).is_file:
            raise
    if isinstance(filesystem, pafs.LocalFileSystem):
        _sync_folder(os.path.dirname(target))


def remove_folder(filesystem: pafs.FileSystem, path: str) -> None:
    """Remove a folder with what is in it, if it is there. Raises: OutputError."""
    try:
        if filesystem.get_file_info(path).type != pafs.FileType.NotFound:
            filesystem.delete_dir(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be removed: {reason(error)}") from error


@contextmanager
def hold(output: str, run_id: str) -> Iterator[None]:
    """Keep a second driver out of a run's folder for the `with` block.

    On a local disk only; the operating system lets go when the process ends, however it ends.

    Raises: RunBusyError when another process holds the run; OutputError.
    """
    filesystem, base = open_output(output)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        yield
        return
    run = f"{base}/{run_id}"
    with ExitStack() as stack:
        try:
            filesystem.create_dir(run)
            file = stack.enter_context(open(f"{run}/.lock", "w", encoding="ascii"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunBusyError(
                f"{run}: another process is writing this run; wait for it, or choose another --run_id"
            ) from error
        except OSError as error:
            raise OutputError(
                f"{run}: cannot be written ({reason(error)}); choose another --output or --run_id"
            ) from error
        yield


def list_parts(filesystem: pafs.FileSystem, folder: str) -> list[str]:
    """Paths of the parts in a folder by name; none if there is no folder.

    Raises: OutputError.
    """
    try:
        files = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be listed: {reason(error)}") from error
    return sorted(
        file.path
        for file in files
        if file.base_name.endswith(".parquet") and not file.base_name.startswith(".")
    )


def clean_temp_files(run: str) -> int:
    """Remove what dead writers left behind in a run's folders; return the number of files.

    To be called while no writer of the run is open. Raises: OutputError.
    """
    filesystem, path = resolve(run)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        return 0
    num_removed = 0
    try:
        for folder in (path, f"{path}/completions", f"{path}/steps"):
            for file in filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
                if file.base_name.startswith(".") and file.base_name.endswith(".tmp"):
                    # A worker of a killed driver may be ending just now.
                    with suppress(FileNotFoundError):
                        filesystem.delete_file(file.path)
                        num_removed += 1
    except OSError as error:
        raise OutputError(f"{path}: cannot be cleaned: {reason(error)}") from error
    return num_removed
