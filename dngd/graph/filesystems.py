"""Where files are: local paths, `s3://` and `gs://` addresses, and what goes wrong on the way to them.

An address may carry options after a question mark, as pyarrow's own do:
`s3://bucket/graph?region=eu-west-1&endpoint_override=localhost:9000&scheme=http`, or `anonymous=true` for a public
bucket. `AWS_ENDPOINT_URL_S3` and `AWS_ENDPOINT_URL` are honoured. Credentials come from where Amazon's and Google's own
tools look for them and are refused inside an address, so that none can reach a message, a manifest or a
configuration file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from dngd.errors import UserError
from dngd.paths import expanded, is_utf8, printable

_S3_OPTIONS = ("region", "scheme", "endpoint_override", "anonymous")
_GCS_OPTIONS = ("scheme", "endpoint_override", "anonymous")
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 30.0
_S3_ATTEMPTS = 3
_GCS_RETRY_SECONDS = 5
Doing = Literal["read", "written"]
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Location:
    """A file or folder on some file system."""

    filesystem: Any
    """a pyarrow.fs.FileSystem"""
    path: str
    """as that file system spells it: bucket/key, or an absolute local path"""
    shown: str
    """what messages print: without options"""
    remote: bool

    def child(self, path: str) -> Location:
        """Return the location of a path of the same file system that lies below this one."""
        prefix = self.shown.split("://")[0] + "://" if self.remote else ""
        return Location(self.filesystem, path, prefix + path, self.remote)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]


def is_remote(source: str | Path) -> bool:
    """Say whether a source is an address with a scheme other than file://, also after Path has eaten a slash of it."""
    return "://" in address_of(source) and not address_of(source).startswith("file://")


def address_of(source: str | Path) -> str:
    """Return a source as text, of an address with the scheme in small letters and with both slashes, of which Path
    leaves one."""
    found = re.match(r"(s3a?|gs|gcs|file):(/+)", str(source), re.IGNORECASE)
    if found is None:
        return str(source)
    slashes = found[2] if len(found[2]) > 1 else "//"
    return f"{found[1].lower()}:{slashes}{str(source)[found.end() :]}"


def locate(source: str | Path) -> Location:
    """Return where a local path, or an `s3://`, `gs://` (`gcs://`) or `file://` address, leads. Reads nothing local.

    Raises UserError if the address is not UTF-8 or not understood, holds credentials, or its S3 region cannot be found
    out.
    """
    import pyarrow.fs

    text = address_of(source)
    if not is_utf8(text):
        raise UserError(
            f"{printable(text)} is no path or address in UTF-8, as Arrow reads them; rename it, or link to it"
        )
    if not is_remote(text):
        text = text.removeprefix("file://")
        return Location(pyarrow.fs.LocalFileSystem(), str(expanded(text).absolute()), text, remote=False)
    shown = shown_address(text)
    scheme, bucket, key, options = _parse(text, shown)
    path = f"{bucket}/{key}" if key else bucket
    with explained(shown):
        filesystem = _s3(bucket, options) if scheme == "s3" else _gcs(options)
    return Location(filesystem, path, shown, remote=True)


def shown_address(source: str) -> str:
    """Return an address without its options and without credentials, should it hold any; a local path as it is."""
    scheme, mark, rest = source.partition("://")
    if not mark:
        return source
    # Not urlsplit: keys may hold # and @.
    if _holds_credentials(rest):
        rest = rest.rpartition("@")[2] if ":" in rest.partition("/")[0] else rest.partition("@")[2]
    return f"{scheme}://{rest.partition('?')[0]}"


def list_files(source: str | Path) -> list[Location]:
    """Return the files that a path, an address, a pattern (`*`, `?`, `[...]`) or a folder stands for.

    A folder stands for all files below it but those whose name, or whose folder's name, starts with `.` or `_`
    (what Spark and others leave beside the data). In the order of their names, numbers by size: part.2 before
    part.10. Raises UserError if nothing is there.
    """
    text = address_of(source)
    # A question mark of an address begins its options, so that only local patterns can use it as a wildcard.
    bare, mark, options = text.partition("?") if is_remote(source) else (text, "", "")
    if not _WILD.search(bare) or (not is_remote(source) and expanded(text).exists()):
        return _files_of(locate(source))
    return _matching(bare, mark + options)


def read_small(location: Location, limit_bytes: int = 1 << 26) -> bytes:
    """Return the content of a small file; raises UserError if it is missing, unreadable or above the limit."""
    with explained(location.shown), location.filesystem.open_input_stream(location.path) as file:
        content = bytes(file.read(limit_bytes + 1))
    if len(content) > limit_bytes:
        raise UserError(f"{location.shown} has more than {limit_bytes} bytes, which it cannot have; check the address")
    return content


def check_bucket(location: Location) -> None:
    """Raise UserError if the bucket of a missing path is missing too, or may not be listed."""
    from pyarrow.fs import FileSelector

    if location.remote:
        with suppress(FileNotFoundError), explained(location.shown, missing_ok=True):
            location.filesystem.get_file_info(FileSelector(location.path))


@contextmanager
def explained(shown: str, *, missing_ok: bool = False, doing: Doing = "read") -> Iterator[None]:
    """Turn a file system's failure inside the block into one sentence with the fix.

    missing_ok: let FileNotFoundError through. doing: what is done there.
    """
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        if missing_ok:
            raise
        raise UserError(f"{shown} does not exist; check the spelling of the path or address") from error
    except OSError as error:
        raise UserError(_sentence(shown, str(error), error, doing)) from error
    except pa.ArrowInvalid:
        # Its text repeats what it was given, which need not be fit to print.
        raise UserError(f"{shown} is not understood by the file system; check the spelling of the address") from None


def _parse(source: str, shown: str) -> tuple[str, str, str, dict[str, str]]:
    scheme, _, rest = source.partition("://")
    scheme = {"gcs": "gs", "s3a": "s3"}.get(scheme, scheme)
    if scheme not in ("s3", "gs"):
        raise UserError(f"{shown} has the scheme {scheme}://; give a local path, or an s3:// or gs:// address")
    # Not urlsplit for the path: keys may hold # and %.
    bare, _, query = rest.partition("?")
    if _holds_credentials(rest):
        raise UserError(
            f"{shown} was given with credentials before an @, where they would end up in logs; leave them out and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws), for gs:// GOOGLE_APPLICATION_CREDENTIALS"
        )
    allowed = _S3_OPTIONS if scheme == "s3" else _GCS_OPTIONS
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UserError(f"{shown} has the option {unknown[0]!r} after its ?; known are {', '.join(allowed)}")
    bucket, _, key = bare.partition("/")
    if not bucket:
        raise UserError(f"{shown} names no bucket; write {scheme}://BUCKET/PATH")
    return scheme, bucket, key.strip("/"), options


def _holds_credentials(rest: str) -> bool:
    """Whether what follows :// begins with ID:SECRET@, of which the secret may hold slashes, or ID@."""
    first = rest.partition("?")[0].partition("/")[0]
    return "@" in first or (":" in first and "@" in rest)


def _s3(bucket: str, options: dict[str, str]) -> Any:
    import pyarrow.fs

    endpoint, scheme = _s3_endpoint(options)
    region = options.get("region")
    if region is None and endpoint is None:
        region = pyarrow.fs.resolve_s3_region(bucket)
    arguments: dict[str, Any] = {"region": region} if region else {}
    if endpoint is not None:
        arguments |= {"endpoint_override": endpoint, "scheme": scheme}
    return pyarrow.fs.S3FileSystem(
        anonymous=_flag(options),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
        **arguments,
    )


def _s3_endpoint(options: dict[str, str]) -> tuple[str | None, str]:
    """Return (host and port, http or https). pyarrow itself reads no variable for it in its constructor."""
    given = options.get("endpoint_override")
    if given is None:
        given = next((os.environ[name] for name in _ENDPOINT_VARIABLES if os.environ.get(name)), None)
    if not given:
        return None, "https"
    if "://" in given:
        try:
            parts = urlsplit(given)
        except ValueError:  # a [ without its ], say; not repeated, since it may hold credentials
            where = "?endpoint_override=" if "endpoint_override" in options else "AWS_ENDPOINT_URL"
            raise UserError(f"the endpoint in {where} is no address; write http://HOST:PORT, or leave it out") from None
        return parts.netloc, options.get("scheme", parts.scheme)
    return given, options.get("scheme", "https")


def _gcs(options: dict[str, str]) -> Any:
    import pyarrow.fs

    arguments = {name: options[name] for name in ("scheme", "endpoint_override") if name in options}
    return pyarrow.fs.GcsFileSystem(
        anonymous=_flag(options), retry_time_limit=timedelta(seconds=_GCS_RETRY_SECONDS), **arguments
    )


def _flag(options: dict[str, str]) -> bool:
    return options.get("anonymous", "false").lower() in ("1", "true", "yes")


def _files_of(location: Location) -> list[Location]:
    from pyarrow.fs import FileType

    with explained(location.shown):
        info = location.filesystem.get_file_info(location.path)
    if info.type == FileType.File:
        return [location]
    if info.type != FileType.Directory:
        check_bucket(location)
        raise UserError(f"{location.shown} does not exist; check the spelling of the path or address")
    files = _below(location, location.path)
    if not files:
        raise UserError(f"{location.shown} holds no files; give a folder with data files in it")
    return files


def _matching(pattern: str, options: str) -> list[Location]:
    parts = pattern.split("/")
    wild = next(k for k, part in enumerate(parts) if _WILD.search(part))
    base = "/".join(parts[:wild]) or ("/" if pattern.startswith("/") else ".")
    if base.endswith(":/") or not base:
        raise UserError(f"{shown_address(pattern)} has a pattern in place of the bucket's name; name the bucket")
    root = locate(base + options)
    wanted = parts[wild:]
    found = []
    for file in _below(root, root.path, hidden=True):
        names = file.path[len(root.path) :].strip("/").split("/")
        # A pattern may name folders, which stand for all below them.
        if len(names) >= len(wanted) and all(map(fnmatchcase, names, wanted)) and not _is_hidden(names[len(wanted) :]):
            found.append(file)
    if not found:
        check_bucket(root)
        raise UserError(f"no file matches {shown_address(pattern) if root.remote else pattern}; check the pattern")
    return found


def _below(location: Location, folder: str, *, hidden: bool = False) -> list[Location]:
    from pyarrow.fs import FileSelector, FileType

    with explained(location.shown):
        entries = location.filesystem.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    paths = [entry.path for entry in entries if entry.type == FileType.File]
    kept = [path for path in paths if hidden or not _is_hidden(path[len(folder) :].strip("/").split("/"))]
    return [location.child(path) for path in sorted(kept, key=natural_key)]


def _is_hidden(names: list[str]) -> bool:
    return any(name.startswith((".", "_")) for name in names)


def natural_key(path: str) -> list[tuple[int, int, str]]:
    """Return the sort key of names with numbers in them: part.2 before part.10."""
    parts = re.split(r"([0-9]+)", path)
    return [(1, int(part), part) if part.isdigit() else (0, 0, part) for part in parts]


def _sentence(shown: str, text: str, error: OSError, doing: Doing) -> str:
    """Return the sentence for an OSError; pyarrow tells those of a remote file system apart by words alone."""
    if "://" not in shown:
        if error.strerror:
            return f"{shown} cannot be {doing} ({error.strerror}); check its permissions"
        return f"{shown} cannot be read ({' '.join(text.split())[:300]}); it is damaged or incomplete: write it again"
    for words, reason in _REASONS:
        if any(word in text for word in words):
            return f"{shown} {reason}".replace("NETWORK_REASON", _network_reason(text)).replace("DOING", doing)
    said = " ".join(text.split())[:300]
    return f"{shown} cannot be {doing} ({said}); check the address, its region and the credentials"


def _network_reason(text: str) -> str:
    found = re.search(r"[Cc]ould not (resolve host|connect)|[Tt]imed? ?out|[Cc]onnection (refused|reset)", text)
    return found.group(0).lower() if found else "no answer"


_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NO_SUCH_BUCKET", "bucket does not exist", "NOT_FOUND"),
        "lies in a bucket that does not exist there; check the bucket's name, and AWS_ENDPOINT_URL if it is set",
    ),
    (
        (
            "ACCESS_DENIED",
            "HTTP status 403",
            "HTTP status 401",
            "PERMISSION_DENIED",
            "UNAUTHENTICATED",
            "INVALID_ACCESS_KEY_ID",
            "INVALID_CLIENT_TOKEN_ID",
            "SIGNATURE_DOES_NOT_MATCH",
            "OAuth2 access token",
        ),
        "may not be DOING with the credentials in use; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE "
        "(for gs:// GOOGLE_APPLICATION_CREDENTIALS), or append ?anonymous=true for a public bucket",
    ),
    (
        ("NETWORK_CONNECTION", "UNAVAILABLE", "REQUEST_TIMEOUT", "resolve host", "curlCode", "CURL error"),
        "could not be reached (NETWORK_REASON); check the network, and the endpoint in AWS_ENDPOINT_URL or "
        "?endpoint_override=HOST:PORT&scheme=http",
    ),
    (
        ("HTTP status 301", "PERMANENT_REDIRECT", "AUTHORIZATION_HEADER_MALFORMED"),
        "lies in another region than the one asked; leave ?region= out, or give the bucket's own",
    ),
)
"""What pyarrow's message holds -> what the sentence says after the address."""
