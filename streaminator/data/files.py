# SPDX-License-Identifier: Apache-2.0
"""Files of a run, on a local disk or an object store (`s3://`, `gs://`, `file://`).

Invariants
- `write_whole` makes a file appear whole or not at all. A local file has a temporary name until
  then, which starts with "." so that DuckDB and pyarrow skip it; on object stores a closed output
  stream is atomic.
- A folder or URI given by the user stays a string until `resolve`, so that it can travel between
  processes.

Used by: `streaminator.data.parquet`, `streaminator.run_record`, `streaminator.summary`.
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa
from pyarrow import fs as pafs

from streaminator.errors import ConfigError, OutputError, RunBusyError


def reason(error: BaseException) -> str:
    """What an exception says, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.splitlines()[0]
    return (str(error).splitlines() or [type(error).__name__])[0]


def join_uri(uri: str, *names: str) -> str:
    """A path below a folder or URI; a URI keeps its query (`?region=...`)."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([base.rstrip("/"), *names]) + mark + query


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """(file system, path) of a local path or a URI, without touching it.

    Raises: OutputError for a URI that pyarrow cannot use.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return pafs.FileSystem.from_uri(uri)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise OutputError(f"{uri}: {reason(error)}") from error


def open_output(uri: str) -> tuple[pafs.FileSystem, str]:
    """(file system, path) of the output folder, created if needed and found writable.

    Raises: ConfigError when the folder cannot be created or written.
    """
    try:
        filesystem, path = resolve(uri)
        filesystem.create_dir(path, recursive=True)
        probe = f"{path}/.probe-{uuid.uuid4().hex}"
        write_whole(filesystem, probe, b"")
        filesystem.delete_file(probe)
    except OutputError as error:
        raise ConfigError(f"--output {error}") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"--output {uri}: cannot be written: {reason(error)}") from error
    return filesystem, path


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
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    try:
        filesystem.create_dir(run)
        with open(f"{run}/.lock", "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError as error:
        raise RunBusyError(
            f"{run}: another process is writing this run; wait for it, or choose another --run_id"
        ) from error


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
                    filesystem.delete_file(file.path)
                    num_removed += 1
    except OSError as error:
        raise OutputError(f"{path}: cannot be cleaned: {reason(error)}") from error
    return num_removed
