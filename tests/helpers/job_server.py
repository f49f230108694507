"""A stand-in for a cluster's job server: Ray's HTTP interface, with the answers and failures that a test asks for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from aiohttp import web


@dataclass
class JobServer:
    """What the server answers, and what it was asked.

    refuse: HTTP status and text of every answer. packages: working directories, as zip files. log: pieces that a
    follower gets. break_after: how many pieces each connection in turn gives before it breaks. ends: whether the job
    has ended once its log has; else it runs on until it is stopped, and even then if stops is off.
    """

    ray_version: str = ray.__version__
    refuse: tuple[int, str] | None = None
    refuse_submission: tuple[int, str] | None = None
    hang: bool = False
    status: str = "SUCCEEDED"
    exit_code: int | None = 0
    message: str = ""
    error_type: str | None = None
    log: list[str] = field(default_factory=list)
    break_after: list[int] = field(default_factory=list)
    ends: bool = True
    log_stays_open: bool = False
    stops: bool = True
    nodes: list[dict[str, Any]] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    connections: int = 0
    address: str = ""
    log_sent: bool = False

    @web.middleware
    async def _first(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.hang:
            await asyncio.sleep(3600)
        if self.refuse is not None:
            return web.Response(status=self.refuse[0], text=self.refuse[1])
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.ray_version, "ray_commit": "x"})

    async def _nodes(self, request: web.Request) -> web.Response:
        return web.json_response({"result": True, "data": {"result": {"result": self.nodes}}})

    async def _submit(self, request: web.Request) -> web.Response:
        self.submitted.append(json.loads(await request.text()))
        if self.refuse_submission is not None:
            return web.Response(status=self.refuse_submission[0], text=self.refuse_submission[1])
        job_id = self.submitted[-1].get("submission_id") or "raysubmit_1"
        return web.json_response({"job_id": job_id, "submission_id": job_id})

    async def _has_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _take_package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _info(self, request: web.Request) -> web.Response:
        stopped = bool(self.stopped) and self.stops
        ended = stopped or (self.log_sent and self.ends)
        status = "STOPPED" if stopped else self.status if ended else "RUNNING"
        return web.json_response(
            {
                "type": "SUBMISSION",
                "submission_id": request.match_info["job"],
                "status": status,
                "entrypoint": "dngd",
                "message": self.message,
                "error_type": self.error_type,
                "driver_exit_code": self.exit_code if ended and not stopped else None,
            }
        )

    async def _stop(self, request: web.Request) -> web.Response:
        self.stopped.append(request.match_info["job"])
        return web.json_response({"stopped": True})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        pieces = self.break_after[self.connections] if self.connections < len(self.break_after) else None
        self.connections += 1
        for piece in self.log[:pieces]:
            await socket.send_str(piece)
        if pieces is not None:
            assert request.transport is not None
            await asyncio.sleep(0.05)
            request.transport.abort()
            return socket
        self.log_sent = True
        while self.log_stays_open or not (self.ends or (self.stopped and self.stops)):
            await asyncio.sleep(0.02)
        await socket.close()
        return socket

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._first], client_max_size=2**26)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/v0/nodes", self._nodes)
        app.router.add_get("/api/packages/{protocol}/{name}", self._has_package)
        app.router.add_put("/api/packages/{protocol}/{name}", self._take_package)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{job}", self._info)
        app.router.add_post("/api/jobs/{job}/stop", self._stop)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tail)
        return app


@contextmanager
def job_server() -> Iterator[JobServer]:
    """Serve on a free port of this machine while the block runs."""
    server = JobServer()
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start() -> None:
        runner = web.AppRunner(server.application(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(timeout=20)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
