"""Sending a dngd command to a Ray cluster as a job: `dngd submit`.

Owns what is checked before anything is sent, and the sentence that each refusal becomes; following a job is
`follow.py`'s. Ray's JobSubmissionClient does the talking. Its requests have no limit of their own, so each one runs
in a thread that is waited for with one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from dngd.errors import UserError
from dngd.launch.head import TOKEN_FIX, token_sentence
from dngd.paths import expanded

CONNECT_SECONDS = 15.0
REQUEST_SECONDS = 20.0
UPLOAD_SECONDS = 300.0
AGENT_SECONDS = 45.0
"""For a cluster that has just started: its agent, which starts jobs, comes up after its dashboard."""
AGENT_RETRY_SECONDS = 0.5

OLDEST_RAY = (2, 55)
"""Of pyproject.toml: dngd does not run on a cluster below it."""

STOP_ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
"""How Ray stops the job: as Ctrl-C would, with time to end well, where its own default is SIGTERM and 3 s."""

# The SDK lets these win over the address that it is given.
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_NO_AGENT = "No available agent"
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
T = TypeVar("T")


@dataclass(frozen=True)
class JobRequest:
    """A dngd command and what its process on the cluster gets.

    arguments: what follows `dngd`. working_dir: a folder or zip file to send, or the address of a zip file, where the
    command then runs. environment: may hold secrets, so it is in no message. pip: requirements, or one .txt file.
    """

    arguments: tuple[str, ...]
    working_dir: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    pip: tuple[str, ...] = ()
    submission_id: str | None = None

    def entrypoint(self) -> str:
        """Return the shell command of the job."""
        # With packages of its own the job has a Python of its own, which the dngd script does not know.
        program = ["python", "-m", "dngd.cli"] if self.pip else ["dngd"]
        return shlex.join([*program, *self.arguments])

    def runtime_env(self) -> dict[str, Any]:
        """Return Ray's runtime environment of the job."""
        made: dict[str, Any] = {"env_vars": STOP_ENVIRONMENT | dict(self.environment)}
        if self.working_dir is not None:
            made["working_dir"] = self.working_dir
        if self.pip:
            made["pip"] = self.pip[0] if _is_requirements_file(self.pip[0]) else list(self.pip)
        return made


def make_request(
    arguments: Sequence[str],
    commands: Collection[str],
    *,
    working_dir: str | None = None,
    environment: Sequence[str] = (),
    pip: Sequence[str] = (),
    submission_id: str | None = None,
) -> JobRequest:
    """Return the request, checked as far as this machine can.

    commands: dngd's. environment: KEY=VALUE, or KEY alone for this process's value. Raises UserError.
    """
    words = tuple(arguments[1:] if list(arguments[:1]) == ["dngd"] else arguments)
    known = ", ".join(sorted(commands))
    if not words:
        raise UserError(
            f"nothing to submit; put one of dngd's commands ({known}) after --, e.g. -- train --dataset cora"
        )
    if words[0] not in commands:
        raise UserError(
            f"{words[0]!r} after -- is none of dngd's commands ({known}); for anything else use ray job submit"
        )
    if working_dir is not None and "://" not in working_dir:
        path = expanded(working_dir)
        if not (path.is_dir() or (path.is_file() and path.suffix == ".zip")):
            there = "is neither a folder nor a zip file" if path.exists() else "does not exist"
            raise UserError(f"--working-dir {working_dir} {there}; give the folder that the job needs, or leave it out")
        working_dir = str(path)
    if any(_is_requirements_file(item) for item in pip):
        if len(pip) > 1:
            raise UserError(
                f"--pip was given {len(pip)} times, one of them a file; give one file, or requirements only"
            )
        if not expanded(pip[0]).is_file():
            raise UserError(
                f"--pip {pip[0]} does not exist; give a requirements file, or a requirement such as ogb>=1.3.6"
            )
        pip = [str(expanded(pip[0]))]
    if submission_id is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", submission_id):
        raise UserError(f"--submission-id {submission_id!r} must be letters, digits, '.', '_' and '-' only")
    return JobRequest(words, working_dir, _environment(environment), tuple(pip), submission_id)


def _is_requirements_file(item: str) -> bool:
    return item.endswith(".txt") and "://" not in item


def _environment(assignments: Sequence[str]) -> dict[str, str]:
    made: dict[str, str] = {}
    for assignment in assignments:
        name, given, value = assignment.partition("=")
        if not _VARIABLE_NAME.fullmatch(name):
            # Not repeated: what was meant as a value may be a secret.
            raise UserError(
                "--env wants KEY=VALUE, or KEY alone to take its value from here; KEY is letters, digits and _"
            )
        if not given and name not in os.environ:
            raise UserError(
                f"--env {name} takes its value from here but {name} is not set; export it, or give {name}=VALUE"
            )
        made[name] = value if given else os.environ[name]
    return made


def job_server_address(address: str | None) -> str:
    """Return the address of a job server as http(s)://HOST:PORT; None: what Ray's own variables name.

    Raises UserError for an address of another kind.
    """
    if address is None:
        address = next((os.environ[name] for name in _ADDRESS_VARIABLES if os.environ.get(name)), None)
    if not address:
        raise UserError("no cluster to submit to; give --address http://HOST:8265, the address of its Ray dashboard")
    other = f"{address!r} is no address of a job server; give that of the Ray dashboard, http://HOST:8265"
    credentials = f"the address holds credentials before an @; leave them out and {TOKEN_FIX}"
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
    except ValueError:  # a [ without its ], say
        raise UserError(credentials if "@" in address else other) from None
    if parts.username is not None or parts.password is not None:
        raise UserError(credentials)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UserError(other)
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


# At INFO they speak of packages and sockets in the middle of the job's log.
for _name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.WARNING)


class ClusterJobs:
    """The jobs of one cluster. Connects when made.

    address: as `job_server_address` returns it.
    Raises UserError, within CONNECT_SECONDS, if nothing answers there, the token is not the cluster's, or its Ray is
    one that dngd does not run on.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with _without_address_variables():
            try:
                self._client: Any = _within(CONNECT_SECONDS, lambda: JobSubmissionClient(address))
            except TimeoutError:
                raise UserError(f"{_no_answer(address)} within {CONNECT_SECONDS:.0f} s; {_REACH_FIX}") from None
            except AuthenticationError as error:
                raise UserError(token_sentence(address, str(error))) from None
            except ConnectionError:
                raise UserError(f"{_no_answer(address)}; {_REACH_FIX}") from None
            except Exception as error:  # whatever a server that is no Ray dashboard makes the SDK raise
                if old := re.search(r"Ray version (\S+) is running", str(error)):
                    raise UserError(_version_sentence(address, old.group(1))) from None
                raise UserError(
                    f"what answers at {address} is no Ray job server ({_first_line(error)}); give the address of the "
                    "Ray dashboard, http://HOST:8265"
                ) from None
        # Kept by the SDK since 2.44; there is no public name for it.
        self.ray_version: str | None = getattr(self._client, "_server_ray_version", None)
        self._check_version()

    def _check_version(self) -> None:
        if self.ray_version is None:
            return
        found = tuple(int(part) for part in re.findall(r"\d+", self.ray_version)[:2])
        if found < OLDEST_RAY or found >= (3,):
            raise UserError(_version_sentence(self.address, self.ray_version))

    @property
    def version_note(self) -> str | None:
        """Return a remark if the cluster runs another Ray than this process, else None."""
        if self.ray_version in (None, ray.__version__):
            return None
        here = ray.__version__
        return f"the cluster runs Ray {self.ray_version}, this is {here}; if the job fails to start, use one version"

    def submit(self, request: JobRequest, tell: Callable[[str], None] = lambda text: None) -> str:
        """Send a job, with its working directory, and return its id. Raises UserError if the cluster refuses it.

        tell: hears what is waited for.
        """

        def send() -> str:
            return str(
                self._client.submit_job(
                    entrypoint=request.entrypoint(),
                    runtime_env=request.runtime_env(),
                    submission_id=request.submission_id,
                    metadata={"submitted_by": "dngd submit"},
                )
            )

        deadline = time.monotonic() + AGENT_SECONDS
        tell_once: list[str] = [f"waiting up to {AGENT_SECONDS:.0f} s for a node of the cluster that starts jobs"]
        while True:
            try:
                return _within(UPLOAD_SECONDS, send)
            except TimeoutError:
                raise UserError(
                    f"{self.address} did not take the job within {UPLOAD_SECONDS:.0f} s; send a smaller --working-dir "
                    "(a .rayignore file leaves out what the job does not need), or see the cluster's dashboard"
                ) from None
            except Exception as error:
                text = redact(str(error), request.environment.values())
                if _NO_AGENT not in text or time.monotonic() >= deadline:
                    raise UserError(self._refusal(text, request.submission_id)) from None
                if tell_once:
                    tell(tell_once.pop())
                time.sleep(AGENT_RETRY_SECONDS)

    def _refusal(self, said: str, submission_id: str | None) -> str:
        at = f"the cluster at {self.address}"
        if "already exists" in said and submission_id is not None:
            return f"{at} has a job {submission_id} already; give another --submission-id, or none"
        if _NO_AGENT in said:
            return f"{at} has no node that starts jobs after {AGENT_SECONDS:.0f} s; see ray status, and submit again"
        return f"{at} refused the job ({last_line(said)}); mend that and submit again"

    def details(self, job_id: str) -> Any:
        """Return Ray's JobDetails of a job. Raises OSError or RuntimeError, in REQUEST_SECONDS, if there are none."""
        return _within(REQUEST_SECONDS, lambda: self._client.get_job_info(job_id))

    def tail(self, job_id: str) -> AsyncIterator[str]:
        """Return the job's log as pieces of text, from its beginning, until the job ends."""
        chunks: AsyncIterator[str] = self._client.tail_job_logs(job_id)
        return chunks

    def nodes(self, most: int) -> list[dict[str, Any]]:
        """Return what the dashboard knows of at most so many nodes. Raises UserError if it does not answer."""
        listed = self._get(f"/api/v0/nodes?limit={most}").json()
        nodes: list[dict[str, Any]] = listed["data"]["result"]["result"]
        return nodes

    def asks_for_token(self) -> bool:
        """Say whether the dashboard refuses those without the cluster's token."""
        try:
            answer = requests.get(f"{self.address}/api/version", timeout=REQUEST_SECONDS)
        except requests.RequestException as error:
            raise UserError(f"{_no_answer(self.address)} ({_first_line(error)}); {_REACH_FIX}") from None
        return answer.status_code in (401, 403)

    def _get(self, path: str) -> Any:
        try:
            answer = _within(REQUEST_SECONDS, lambda: self._client._do_request("GET", path))  # with its token
            answer.raise_for_status()
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the cluster at {self.address} did not answer ({_first_line(error)}); {_REACH_FIX}"
            ) from None
        return answer

    def stop(self, job_id: str) -> None:
        """Ask the cluster to stop a job; it ends some time later. Raises UserError if the cluster does not answer."""
        try:
            _within(REQUEST_SECONDS, lambda: self._client.stop_job(job_id))
        except Exception as error:
            raise UserError(
                f"job {job_id} could not be stopped ({_first_line(error)}); try ray job stop --address {self.address} "
                f"{job_id}"
            ) from None


def redact(text: str, secrets: Collection[str]) -> str:
    """Return the text without the values of environment variables, which Ray repeats in some of its messages.

    Also as Python, JSON or a URL writes them, or one of these within another. A secret of several lines goes line by
    line too, since a message may be cut at one.
    """
    shapes: set[str] = set()
    for secret in secrets:
        for part in (secret, *secret.splitlines()):
            if len(part.strip()) > 3:  # shorter ones (1, yes) are no secrets, and would tear words apart
                once = {part} | {write(part) for write in _SPELLINGS}
                shapes |= once | {write(spelling) for spelling in once for write in _SPELLINGS}
    for shape in sorted(shapes, key=len, reverse=True):
        text = text.replace(shape, "***")
    return text


def _with_small_digits(url: str) -> str:
    return re.sub(r"%[0-9A-F]{2}", lambda found: found.group().lower(), url)


_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda text: repr(text)[1:-1],
    lambda text: repr(text + '"')[1:-2],  # in single quotes, as a dictionary with a double quote in it
    lambda text: json.dumps(text)[1:-1],
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    quote,
    lambda text: quote(text, safe=""),
    quote_plus,
    lambda text: _with_small_digits(quote(text)),
    lambda text: _with_small_digits(quote(text, safe="")),
    lambda text: _with_small_digits(quote_plus(text)),
)
"""Ways in which a text is written inside another."""


_REACH_FIX = (
    "check the address and that the cluster is up, and reach it through a tunnel (ssh -L 8265:localhost:8265 HEAD)"
)


def _no_answer(address: str) -> str:
    return f"no Ray job server answers at {address}"


def _version_sentence(address: str, version: str) -> str:
    oldest = ".".join(map(str, OLDEST_RAY))
    return (
        f"the cluster at {address} runs Ray {version} but dngd needs {oldest} or newer, below 3; start it with "
        f"ray=={ray.__version__}, as here"
    )


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return call()'s result; raise what it raises, or TimeoutError after `seconds`, leaving its thread behind."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="dngd-job-request", daemon=True)
    thread.start()
    thread.join(timeout=seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


@contextmanager
def _without_address_variables() -> Iterator[None]:
    """Hide Ray's address variables while a client is made: the address given is the one that counts."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def last_line(text: str) -> str:
    """Return what a traceback in the text ends with: the cause."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no reason given"
