"""Tests, in the order of the module. The real things are the default: a Jupyter server that a fixture
starts, and the installed command over stdio with the SDK's own client. `responses` answers for what a
real server does not do on demand, a socket proxy makes the faults of a network."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

COMMAND = [str(Path(sys.executable).with_name("jupyter-interpreter-mcp"))]
LOOPBACK = "127.0.0.1"


# --- Tools of the tests ------------------------------------------------------------------------------


def eventually(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """Wait for an event: the first true value of condition, looked at until a deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


class JupyterServer:
    """A real Jupyter server: free port, random token, temporary root. Can be stopped and started again."""

    module = "jupyter_server"

    def __init__(self, folder: Path, *options: str, token: str | None = None) -> None:
        self.root, self.log = folder / "root", folder / "server.log"
        self.root.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(16) if token is None else token
        self.port, self.options = free_port(), options
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.runtime = folder / "runtime"
        self.start()

    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "jupyter_server", f"--ServerApp.ip={LOOPBACK}", f"--port={self.port}",
            "--ServerApp.port_retries=0", "--no-browser", "--allow-root", f"--ServerApp.root_dir={self.root}",
            f"--IdentityProvider.token={self.token}", *self.options,
        ]

    def start(self) -> None:
        environment = {**os.environ, "JUPYTER_RUNTIME_DIR": str(self.runtime), "JUPYTER_CONFIG_DIR": str(self.runtime)}
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )

        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(requests.ConnectionError):
                return self.api("GET", "kernelspecs").ok
            return False

        eventually(answers, 60)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def api(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"token {self.token}"} if self.token else {}
        return requests.request(method, f"{self.url}/api/{path}", headers=headers, timeout=30, **options)

    def kernel_id(self, session_id: int) -> str:
        """The kernel of a session."""
        (kernel_id,) = [
            s["kernel"]["id"] for s in self.api("GET", "sessions").json() if s["path"].endswith(f"{session_id}.ipynb")
        ]
        return str(kernel_id)

    def notebook(self, session_id: int, folder: str = "notebooks") -> dict[str, Any]:
        """A session's file, as it is on the disk."""
        notebook: dict[str, Any] = json.loads((self.root / folder / f"{session_id}.ipynb").read_text())
        return notebook


class Client:
    """The installed command over stdio with the SDK's client, for tests that are not asynchronous.

    The client's event loop runs in a thread of its own; `start` begins a call and returns its future, `run`
    waits for the result's structure.
    """

    def __init__(self, server: JupyterServer | None, *flags: str, url: str = "", command: list[str] | None = None,
                 environment: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        arguments = list(flags)
        if server is not None:
            arguments += ["--jupyter-base-url", url or server.url, f"--jupyter-token={server.token}"]
        program, *rest = command or COMMAND
        self.parameters = StdioServerParameters(
            command=program, args=[*rest, *arguments], env={**os.environ, **(environment or {})}, cwd=cwd
        )
        self.progress: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self._children = set(_children())
        self._ready: Any = self._future()
        self._end: asyncio.Event | None = None
        self._task = asyncio.run_coroutine_threadsafe(self._live(), self.loop)
        self._ready.result(60)
        (self.pid,) = set(_children()) - self._children

    def _future(self) -> Any:
        from concurrent.futures import Future

        return Future()

    async def _live(self) -> None:
        self._end = asyncio.Event()
        try:
            async with stdio_client(self.parameters) as streams, ClientSession(*streams) as session:
                self.session = session
                self.initialized = await session.initialize()
                self._ready.set_result(None)
                await self._end.wait()
        except BaseException as err:
            if not self._ready.done():
                self._ready.set_exception(err)
            raise

    async def _note(self, progress: float, total: float | None, message: str | None) -> None:
        self.progress.append(message or "")

    def start(self, code: str, session_id: int = 0, *, tool: str = "execute_code", **arguments: Any) -> Any:
        """Begin a call; a future of the SDK's CallToolResult. Cancelling it sends notifications/cancelled."""
        given = {"code": code, **arguments} if tool == "execute_code" else arguments
        given = {**given, "session_id": session_id} if session_id else given
        call = self.session.call_tool(tool, given, progress_callback=self._note)
        return asyncio.run_coroutine_threadsafe(call, self.loop)

    def call(self, code: str, session_id: int = 0, **arguments: Any) -> Any:
        """The SDK's CallToolResult, as a dictionary with the names of the wire."""
        return self.start(code, session_id, **arguments).result(120).model_dump(by_alias=True, mode="json")

    def run(self, code: str, session_id: int = 0, **arguments: Any) -> dict[str, Any]:
        """The structure of a result."""
        result = self.call(code, session_id, **arguments)
        structure: dict[str, Any] = result["structuredContent"]
        assert structure == json.loads(result["content"][0]["text"])
        return structure

    def interrupt(self, session_id: int, **arguments: Any) -> dict[str, Any]:
        return self.run("", session_id, tool="interrupt_execution", **arguments)

    def list_tools(self) -> Any:
        return asyncio.run_coroutine_threadsafe(self.session.list_tools(), self.loop).result(30)

    def close(self) -> None:
        """As a client does: close stdin, wait for the process."""
        if self._end is not None and not self._task.done():
            self.loop.call_soon_threadsafe(self._end.set)
        with contextlib.suppress(BaseException):
            self._task.result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)

    def kill(self) -> None:
        """kill -9, as a crash."""
        os.kill(self.pid, signal.SIGKILL)
        self.close()


def _children() -> list[int]:
    """Process ids of this process's children."""
    import psutil

    return [child.pid for child in psutil.Process().children()]


class Proxy:
    """A TCP proxy between client and server that can cut, stall, delay and refuse.

    mode: "pass", "stall" (accepts and swallows), "refuse" (closes at once). delay_s: each way.
    on_client(data) is asked before data of the client is passed on: False cuts the connection instead.
    """

    def __init__(self, port: int) -> None:
        self.target, self.mode, self.delay_s = port, "pass", 0.0
        self.on_client: Callable[[bytes], bool] = lambda data: True
        self.listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self.listener.getsockname()[1])
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.mode == "refuse":
                    client.close()
                    continue
                server = socket.create_connection((LOOPBACK, self.target))
                self.pairs.append((client, server))
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if from_client and not self.on_client(data):
                    break
                while self.mode == "stall":
                    time.sleep(0.02)
                if self.delay_s:
                    time.sleep(self.delay_s)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break every connection, as a router does that forgets them: at once, with a reset."""
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self.pairs.clear()

    def close(self) -> None:
        self.listener.close()
        self.cut()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """The Jupyter server that most tests share."""
    server = JupyterServer(tmp_path_factory.mktemp("jupyter"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(server: JupyterServer) -> Iterator[Client]:
    """The installed command that most tests share; each test opens a session of its own."""
    client = Client(server)
    yield client
    client.close()


@pytest.fixture
def clients(server: JupyterServer) -> Iterator[Callable[..., Client]]:
    """Makes further commands, and closes them."""
    made: list[Client] = []

    def make(*flags: str, **options: Any) -> Client:
        made.append(Client(options.pop("server", server), *flags, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[JupyterServer]:
    """A Jupyter server that a test may stop, start and break."""
    server = JupyterServer(tmp_path / "jupyter")
    yield server
    server.stop()


@pytest.fixture
def proxy(server: JupyterServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def test_smoke(client: Client) -> None:
    assert client.run("21 * 2")["result"] == ["42"]
