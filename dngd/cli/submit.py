"""dngd submit: one of dngd's commands as a job of a Ray cluster."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dngd.launch.follow import LogFollower
    from dngd.launch.submit import ClusterJobs

SETTINGS = {"allow_interspersed_args": False}
"""The first word that is no option begins the job's command, whether or not a -- stands before it."""

STOP_SECONDS = 90.0
"""Limit for a job that was told to stop; Ray kills it after 60."""


def submit(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND ...", help="The command, e.g. train --dataset ...")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Job server, http://HOST:8265 (default: $RAY_API_SERVER_ADDRESS, else $RAY_ADDRESS)"),
    ] = None,
    working_dir: Annotated[
        str | None, typer.Option(help="Folder or zip file to send, in which the command runs (default: none)")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=VALUE]", help="Environment variable of the job; KEY alone: its value here; may be repeated"
        ),
    ] = None,
    pip: Annotated[
        list[str] | None,
        typer.Option(metavar="REQUIREMENT|FILE.txt", help="Package to install for the job; may be repeated"),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the job's id and return at once")] = False,
    submission_id: Annotated[str | None, typer.Option(help="The job's id (default: Ray makes one)")] = None,
) -> None:
    """Run a dngd command on a Ray cluster, show its log, and exit with its exit code.

    Ctrl-C asks whether to stop the job; without a terminal to ask on it only stops following.
    """
    from dngd.launch.submit import ClusterJobs, job_server_address, make_request  # importing Ray takes seconds

    request = make_request(
        arguments or [],
        _commands(context),
        working_dir=working_dir,
        environment=env or (),
        pip=pip or (),
        submission_id=submission_id,
    )
    jobs = ClusterJobs(job_server_address(address))
    for note in (jobs.version_note, _run_dir_note(request.arguments)):
        if note:
            _tell(f"note: {note}")
    job_id = jobs.submit(request, _tell)
    if no_wait:
        sys.stdout.write(f"{job_id}\n")
        _tell(_how_to(jobs, job_id))
        return
    _tell(f"job {job_id} at {jobs.address}")
    from dngd.launch.follow import LogFollower

    follower = LogFollower(jobs, job_id, _write_log, _tell, tuple(request.environment.values()))
    # Not typer.Exit: 130 would be taken for a Ctrl-C of this machine's own training.
    sys.exit(_follow(jobs, job_id, follower))


def _commands(context: typer.Context) -> set[str]:
    """Return dngd's commands but this one."""
    root = context.find_root().command
    return set(getattr(root, "commands", {})) - {"submit"}


def _run_dir_note(arguments: tuple[str, ...]) -> str | None:
    """Return a remark if a training's run folder would lie in a place of the job's own."""
    if arguments[0] != "train" or "--dry-run" in arguments or "--help" in arguments:
        return None
    if any(word.startswith(("--run-dir", "run_dir=", "--config", "--set=run_dir=")) for word in arguments):
        return None
    return "without --run-dir the run folder lies in the job's own folder on the head node; give one on shared storage, or at an s3:// address"


def _follow(jobs: ClusterJobs, job_id: str, follower: LogFollower) -> int:
    """Return the exit code of the job, or 130 if it goes on without being followed."""
    limit = None
    while True:
        try:
            outcome = follower.follow(limit)
        except KeyboardInterrupt:
            choice = _ask()
            if choice == "leave":
                _tell(f"job {job_id} goes on; {_how_to(jobs, job_id)}")
                return 130
            if choice == "stop" and limit is None:
                jobs.stop(job_id)
                _tell(f"stopping job {job_id}: waiting up to {STOP_SECONDS:.0f} s for it to end")
                limit = STOP_SECONDS
            continue
        _tell(f"job {job_id} {outcome.reason or 'succeeded'}")
        return outcome.exit_code


def _ask() -> str:
    """Return stop, leave or continue; leave if there is no one to ask, or at a second Ctrl-C."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return "leave"
    while True:
        try:
            sys.stderr.write("\n[s]top the job, [l]eave it running, or [c]ontinue to follow it? ")
            sys.stderr.flush()
            answer = sys.stdin.readline()
        except KeyboardInterrupt:
            answer = ""
        if not answer:  # the end of the input, or Ctrl-C again
            return "leave"
        for choice in ("stop", "leave", "continue"):
            if answer.strip() and choice.startswith(answer.strip().lower()):
                return choice


def _how_to(jobs: ClusterJobs, job_id: str) -> str:
    at = f"--address {jobs.address}"
    return f"follow it with ray job logs {at} --follow {job_id}, stop it with ray job stop {at} {job_id}"


def _write_log(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    sys.stderr.write(f"dngd: {text}\n")
    sys.stderr.flush()
