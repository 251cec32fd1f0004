"""Tests, in the order of the module; what they share comes first.

The real things are the default: a Jupyter server that a fixture starts, and the
installed command over stdio with the SDK's own client. `responses` answers for what a
real server does not do on demand, a socket proxy makes the faults of a network.

`pytest -m pure` runs what needs neither server nor kernel; `pytest -k notebook` the
room of that name.
"""

# ruff: noqa: E501
# Rows of tables read better on one line; `ruff format` sees to the others.

import ast
import asyncio
import base64
import builtins
import contextlib
import http.server
import itertools
import json
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import nbclient
import nbformat
import psutil
import pytest
import requests
import responses
import trustme
import websocket
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from mcp import ClientSession, StdioServerParameters, types
from mcp.client.stdio import stdio_client

import jupyter_interpreter_mcp as jim

COMMAND = [str(Path(sys.executable).with_name("jupyter-interpreter-mcp"))]
LOOPBACK = "127.0.0.1"
PIPE = subprocess.PIPE
HERE = Path(__file__).parent
MODULE = Path(jim.__file__)

MAX_OUTPUT = 20_000  # The default of --max-output, counted as encoded JSON.


# --- Tools: waiting -------------------------------------------------------------------


def eventually(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """Wait for an event; return the first true value of condition."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {condition}"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if what is done here takes longer."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took <= seconds, f"took {took:.1f} s, not {seconds:g} s"


# --- Tools: Jupyter servers -----------------------------------------------------------


def free_port() -> int:
    """Return a port that nothing uses.

    It is of a range of this test process's own, below those that the system gives.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 10
    while True:
        with suppress(OSError), socket.socket() as probe:
            port = 10_000 + 2_000 * worker + secrets.randbelow(2_000)
            probe.bind((LOOPBACK, port))
            return port


class JupyterServer:
    """A real Jupyter server: free port, random token, temporary root.

    It can be stopped and started again.

    transport: between the server and its kernels. A port that was chosen for a kernel
    can be taken before the kernel is there, which then hangs: one of some hundred
    kernels beside as many connections of other tests. Sockets with a path have no such
    race.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        token: str | None = None,
        transport: str = "ipc",
        scheme: str = "http",
        path: str = "",
        authority: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.root = folder / "root"
        self.log = folder / "server.log"
        self.root.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(16) if token is None else token
        self.port = free_port()
        self.options = [f"--KernelManager.transport={transport}", *options]
        self.url = f"{scheme}://{LOOPBACK}:{self.port}{path}"
        self.environment = dict(environment or {})
        # The file of certificates that the tests trust; only a server with TLS has one.
        self.authority = authority
        self._runtime = tempfile.TemporaryDirectory(
            prefix="jupyter"
        )  # short: has sockets
        self.runtime = Path(self._runtime.name)

    def command(self) -> list[str]:
        return [
            sys.executable,
            "-m",
            "jupyter_server",
            f"--ServerApp.ip={LOOPBACK}",
            f"--port={self.port}",
            "--ServerApp.port_retries=0",
            "--no-browser",
            "--allow-root",
            f"--ServerApp.root_dir={self.root}",
            f"--IdentityProvider.token={self.token}",
            *self.options,
        ]

    def start(self) -> None:
        environment = {
            **os.environ,
            **self.environment,
            "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "JUPYTER_CONFIG_DIR": str(self.runtime),
        }
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )

        def answers() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with suppress(requests.ConnectionError):
                return self.api("GET", "kernelspecs").ok
            return False

        eventually(answers, 60)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def api(self, method: str, path: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"token {self.token}"} if self.token else {}
        url = f"{self.url}/api/{path}"
        verify: Any = self.authority or True
        return requests.request(
            method, url, headers=headers, verify=verify, timeout=30, **options
        )

    def kernel_id(self, session_id: int) -> str:
        """Return the kernel of a session."""
        sessions = self.api("GET", "sessions").json()
        name = f"{session_id}.ipynb"
        (kernel_id,) = [s["kernel"]["id"] for s in sessions if s["path"].endswith(name)]
        return str(kernel_id)

    def kernel(self, session_id: int) -> dict[str, Any]:
        """Return what the server says of a session's kernel."""
        model: dict[str, Any] = self.api(
            "GET", f"kernels/{self.kernel_id(session_id)}"
        ).json()
        return model

    def delete_kernel(self, session_id: int) -> None:
        kernel = f"kernels/{self.kernel_id(session_id)}"
        self.api("DELETE", kernel).raise_for_status()

    def restart_kernel(self, session_id: int) -> None:
        kernel = f"kernels/{self.kernel_id(session_id)}"
        self.api("POST", f"{kernel}/restart").raise_for_status()

    def kernels(self) -> set[str]:
        return {kernel["id"] for kernel in self.api("GET", "kernels").json()}

    def path(self, session_id: int, folder: str = "notebooks") -> Path:
        """Return where a session's file is on the disk."""
        return self.root / folder / f"{session_id}.ipynb"

    def notebook(self, session_id: int, folder: str = "notebooks") -> dict[str, Any]:
        """Return a session's file, as it is on the disk."""
        text = self.path(session_id, folder).read_text()
        notebook: dict[str, Any] = json.loads(text)
        return notebook

    def last_cell(self, session_id: int) -> dict[str, Any]:
        cell: dict[str, Any] = self.notebook(session_id)["cells"][-1]
        return cell

    def until_noticed(self, session_id: int, left: int = 0) -> None:
        """Wait until the server knows that a connection is gone.

        From then on it keeps the output.
        """
        eventually(lambda: self.kernel(session_id)["connections"] == left)

    def connect_as_person(self, kernel_id: str) -> websocket.WebSocket:
        """Open a websocket as JupyterLab does."""
        url = f"ws{self.url.removeprefix('http')}/api/kernels/{kernel_id}/channels"
        header = [f"Authorization: token {self.token}"]
        return websocket.create_connection(f"{url}?session_id=lab", header=header)

    def run_as_person(self, kernel_id: str, code: str) -> str:
        """Run a cell without our module; return its stream text and value."""
        ws = self.connect_as_person(kernel_id)
        msg_id = secrets.token_hex(8)
        header = {"msg_id": msg_id, "msg_type": "execute_request", "session": "lab"}
        content = {"code": code, "silent": False, "allow_stdin": False}
        parts = {"header": header, "parent_header": {}, "metadata": {}}
        ws.send(json.dumps({"channel": "shell", **parts, "content": content}))

        text = ""
        while True:
            message = json.loads(ws.recv())
            if message["parent_header"].get("msg_id") != msg_id:
                continue

            content = message["content"]
            if content.get("execution_state") == "idle":
                ws.close()
                return text
            if message["channel"] == "iopub":
                text += content.get("text", "")
                text += content.get("data", {}).get("text/plain", "")


class KernelGateway(JupyterServer):
    """A bare gateway: kernels, and neither files nor a list of sessions."""

    def command(self) -> list[str]:
        app = "--KernelGatewayApp"
        return [
            sys.executable,
            "-m",
            "kernel_gateway",
            f"{app}.ip={LOOPBACK}",
            f"{app}.port={self.port}",
            f"{app}.port_retries=0",
            f"{app}.auth_token={self.token}",
            *self.options,
        ]


def add_kernel(share: Path, name: str, language: str, *argv: str) -> None:
    """Write a kernel specification, for a server whose JUPYTER_PATH is `share`."""
    spec = {
        "argv": [*argv, "-f", "{connection_file}"],
        "display_name": name,
        "language": language,
    }
    folder = share / "kernels" / name
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))


def sources(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"]]


@pytest.fixture(scope="session", autouse=True)
def history_in_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep IPython's history of cells out of its database, which many kernels lock."""
    folder = tmp_path_factory.mktemp("ipython")
    (folder / "profile_default").mkdir()
    config = folder / "profile_default" / "ipython_kernel_config.py"
    config.write_text("c.HistoryManager.hist_file = ':memory:'\n")
    os.environ["IPYTHONDIR"] = str(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """Start the Jupyter server that most tests share."""
    server = JupyterServer(tmp_path_factory.mktemp("jupyter"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., JupyterServer]]:
    """Make Jupyter servers that a test may stop, start and break."""
    made: list[JupyterServer] = []

    def make(*options: str, **how: Any) -> JupyterServer:
        made.append(JupyterServer(tmp_path / f"jupyter{len(made)}", *options, **how))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def own_server(servers: Callable[..., JupyterServer]) -> JupyterServer:
    return servers()


@pytest.fixture(scope="session")
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """Start a server with four more kernels.

    `broken` cannot start, `ends` ends at once, `slow` starts slowly, and `bash` is not
    IPython.
    """
    folder = tmp_path_factory.mktemp("other")
    share = folder / "share"
    add_kernel(share, "broken", "broken", "/no/such/python")
    add_kernel(share, "ends", "python", sys.executable, "-c", "import no_such_module")
    launch = f'sleep 3; exec {sys.executable} -m ipykernel_launcher "$@"'
    add_kernel(share, "slow", "python", "bash", "-c", launch, "slow")
    add_kernel(share, "bash", "bash", sys.executable, "-m", "bash_kernel")
    # These kernels do not end when they are asked to.
    # Or never do, which the server tries several times.
    soon = [
        "--KernelManager.shutdown_wait_time=0.5",
        "--KernelRestarter.time_to_dead=0.3",
    ]
    server = JupyterServer(folder, *soon, environment={"JUPYTER_PATH": str(share)})
    server.start()
    yield server
    server.kill()  # it waits long for such kernels when it is asked to end


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelGateway]:
    gateway = KernelGateway(tmp_path_factory.mktemp("gateway"))
    gateway.start()
    yield gateway
    gateway.stop()


# --- Tools: the installed command -----------------------------------------------------


def wire(result: Any) -> dict[str, Any]:
    """Return the SDK's CallToolResult as a dictionary with the names of the wire."""
    answer: dict[str, Any] = result.model_dump(by_alias=True, mode="json")
    return answer


def result_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the object in the first text block: {"session_id", "error", "result"}.

    The one place where results are read: never from structured content, which a server
    need not send.
    """
    first = answer["content"][0]
    assert first["type"] == "text"
    result: dict[str, Any] = json.loads(first["text"])
    assert set(result) == {"session_id", "error", "result"}
    return result


def text_of(result: dict[str, Any]) -> str:
    return "\n".join(result["result"] + result["error"])


def outcome(call: Any, timeout_s: float = 120) -> dict[str, Any]:
    """Wait for a call that was begun; return its result."""
    return result_of(wire(call.result(timeout_s)))


def shown(result: dict[str, Any]) -> list[str]:
    """Assert that nothing went wrong; return what is shown."""
    assert result["error"] == [], result
    texts: list[str] = result["result"]
    return texts


def images_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [block for block in answer["content"] if block["type"] == "image"]


# What begins the result of a restored session: how many cells ran again, how long.
REPORT = re.compile(
    r".*restored.*: (\d+|no) cells?\b.* ran again in [\d.]+ s\..*", re.S
)


def assert_restored(
    result: dict[str, Any], expected: list[str], cells: int | None = None
) -> None:
    """Assert that a result begins with the report of a restore.

    expected: what it shows after that. cells: how many ran again.
    """
    assert result["error"] == [], result
    report, *rest = result["result"]
    found = REPORT.fullmatch(report)
    assert found, result
    assert cells is None or found[1] == str(cells or "no"), result
    assert rest == expected, result


def encoded_size(result: dict[str, Any]) -> int:
    """Return how many characters a result has as it is sent."""
    return len(json.dumps(result, ensure_ascii=False))


# What begins the first result of a session that another process opened.
CONTINUING = re.compile(
    r"Continuing session (\d+): (\d+) cells?, last used 20[\d-]{8} \d\d:\d\d UTC\."
)


def assert_continued(
    result: dict[str, Any], expected: list[str], cells: int | None = None
) -> None:
    """Assert that a result begins with the line of a session of another process.

    expected: what it shows after that. cells: how many the notebook has.
    """
    line, *rest = shown(result)
    found = CONTINUING.fullmatch(line)
    assert found, result
    assert int(found[1]) == result["session_id"]
    assert cells is None or int(found[2]) == cells, result
    assert rest == expected, result


LEFT_OUT = re.compile(r"([\d,]+) characters left out")


def assert_cut(result: dict[str, Any], size: int) -> None:
    """Assert that a text of `size` characters is cut to the limit, and says so."""
    room = MAX_OUTPUT
    if not result["result"]:
        room //= 2  # An error has half of it.
    assert room * 9 // 10 < encoded_size(result) <= MAX_OUTPUT
    text = text_of(result)
    found = LEFT_OUT.search(text)
    assert found is not None
    left_out = int(found[1].replace(",", ""))
    assert abs(len(text) + left_out - size) < 1_000


def path_of_full_text(result: dict[str, Any]) -> str:
    """Return where the full text lies, from the server's root."""
    (path,) = set(re.findall(r"[\w./-]+\.txt", text_of(result)))
    return str(path)


def flags_for(server: JupyterServer, url: str = "") -> list[str]:
    return [
        f"--jupyter-base-url={url or server.url}",
        f"--jupyter-token={server.token}",
    ]


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment without settings of our own."""
    ours = ("JUPYTER_", "NOTEBOOKS_FOLDER")
    kept = {k: value for k, value in os.environ.items() if not k.startswith(ours)}
    return {**kept, **(more or {})}


def command(
    *flags: str,
    stdin: str = "",
    cwd: Path | None = None,
    program: list[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end, in an environment without our settings."""
    return subprocess.run(
        [*(program or COMMAND), *flags],
        input=stdin,
        cwd=cwd,
        env=clean_environment(environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def execute(*flags: str, **how: Any) -> dict[str, Any]:
    """Run one cell with --execute; return the result that it prints."""
    ended = command(*flags, **how)
    assert ended.stdout, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def patched(**constants: float) -> list[str]:
    """Return a command like the installed one, with less patience.

    So a test need not wait; a constant that the module has not fails at once.
    """
    names = ", ".join(constants)
    values = ", ".join(map(str, constants.values()))
    code = (
        "import jupyter_interpreter_mcp as m\n"
        f"for name, value in zip({names.split(', ')}, [{values}]):\n"
        "    getattr(m, name)\n"
        "    setattr(m, name, value)\n"
        "raise SystemExit(m.main())"
    )
    return [sys.executable, "-c", code]


class Client:
    """The installed command over stdio with the SDK's client, for synchronous tests.

    The client's event loop runs in a thread of its own; `start` begins a call and
    returns its future, `run` waits for the result.
    """

    def __init__(
        self,
        server: JupyterServer | None,
        *flags: str,
        url: str = "",
        command: list[str] | None = None,
        environment: Mapping[str, str] | None = None,
        log: TextIO = sys.stderr,
    ) -> None:
        program, *rest = command or COMMAND
        target = flags_for(server, url) if server is not None else []
        self.parameters = StdioServerParameters(
            command=program,
            args=[*rest, *flags, *target],
            env={**os.environ, **(environment or {})},
        )
        self.log = log
        self.progress: list[str] = []
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        before = children()
        self._ready: Future[None] = Future()
        self._end = asyncio.Event()
        self._task = asyncio.run_coroutine_threadsafe(self._live(), self.loop)
        self._ready.result(60)
        (self.pid,) = children() - before

    async def _live(self) -> None:
        try:
            async with (
                stdio_client(self.parameters, self.log) as streams,
                ClientSession(*streams) as session,
            ):
                self.session = session
                self.initialized = await session.initialize()
                self._ready.set_result(None)
                await self._end.wait()
        except BaseException as err:
            if not self._ready.done():
                self._ready.set_exception(err)
            raise

    async def _note(
        self,
        progress: float,  # noqa: ARG002  # Named as the SDK names them.
        total: float | None,  # noqa: ARG002
        message: str | None,
    ) -> None:
        self.progress.append(message or "")

    def on_loop(self, what: Any) -> Any:
        """Begin a coroutine on the client's loop; return its future."""
        return asyncio.run_coroutine_threadsafe(what, self.loop)

    def start_tool(self, tool: str, arguments: dict[str, Any]) -> Any:
        """Begin a call, with arguments as they are; return the future of its result."""
        call = self.session.call_tool(tool, arguments, progress_callback=self._note)
        return self.on_loop(call)

    def start(self, code: str, session_id: int = 0, **arguments: Any) -> Any:
        """Begin a call of execute_code."""
        given = {"code": code, **arguments}
        if session_id:
            given["session_id"] = session_id
        return self.start_tool("execute_code", given)

    def call(self, code: str, session_id: int = 0, **arguments: Any) -> dict[str, Any]:
        """Return the whole answer, with the names of the wire."""
        return wire(self.start(code, session_id, **arguments).result(120))

    def run(self, code: str, session_id: int = 0, **arguments: Any) -> dict[str, Any]:
        """Return the result: {"session_id", "error", "result"}."""
        return outcome(self.start(code, session_id, **arguments))

    def open(self, code: str = "0") -> int:
        """Open a session with a cell that ends well; return its number."""
        opened = self.run(code)
        assert opened["error"] == []
        return int(opened["session_id"])

    def interrupt(self, session_id: int, **arguments: Any) -> dict[str, Any]:
        given = {"session_id": session_id, **arguments}
        return outcome(self.start_tool("interrupt_execution", given))

    def timed(self, code: str, session_id: int = 0) -> tuple[float, dict[str, Any]]:
        """Return the seconds of one call, on the client's own loop, and its result."""

        async def call() -> tuple[float, Any]:
            given = {"code": code, "session_id": session_id}
            started = time.perf_counter()
            result = await self.session.call_tool("execute_code", given)
            return time.perf_counter() - started, result

        took, answer = self.on_loop(call()).result(180)
        result = result_of(wire(answer))
        assert result["error"] == [], result
        return took, result

    def cancel(self, call: Any) -> None:
        """Press stop for the newest call.

        2.x of the SDK tells the server, for 1.x it is done here.
        """
        pending = getattr(self.session, "_response_streams", None)
        if pending is not None:
            sdk: Any = types
            params = sdk.CancelledNotificationParams(
                requestId=max(pending), reason="stop"
            )
            note = sdk.CancelledNotification(
                method="notifications/cancelled", params=params
            )
            said = self.session.send_notification(sdk.ClientNotification(note))
            self.on_loop(said).result(10)
        call.cancel()

    def tools(self) -> dict[str, dict[str, Any]]:
        """Return the tools that the server offers, by name."""
        offered = self.on_loop(self.session.list_tools()).result(30).tools
        return {tool.name: tool.model_dump(by_alias=True) for tool in offered}

    def memory(self) -> int:
        """Return the command's bytes, as the operating system counts them."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def close(self) -> None:
        """Close stdin and wait for the process, as a client does."""
        if not self._task.done():
            self.loop.call_soon_threadsafe(self._end.set)
        with suppress(BaseException):
            self._task.result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)

    def kill(self) -> None:
        """End the command as a crash does."""
        os.kill(self.pid, signal.SIGKILL)
        self.close()


def children() -> set[int]:
    """Return the process ids of this process's children."""
    return {child.pid for child in psutil.Process().children()}


class RawClient:
    """A command over stdio without the SDK: each line as it is on the wire."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True
        )
        self.lines: list[str] = []
        self.asked = 0

    def send(self, method: str, **message: Any) -> None:
        text = json.dumps({"jsonrpc": "2.0", "method": method, **message})
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Send a request; return the answer to it."""
        self.asked += 1
        self.send(method, id=self.asked, params=params)
        assert self.process.stdout is not None
        while True:
            self.lines.append(self.process.stdout.readline())
            answer: dict[str, Any] = json.loads(self.lines[-1])
            if answer.get("id") == self.asked:
                return answer

    def initialize(self) -> dict[str, Any]:
        params = {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "raw", "version": "1"},
        }
        answer = self.ask("initialize", params)
        self.send("notifications/initialized")
        return answer

    def close(self) -> str:
        """Close stdin and wait for the end; return what stderr has."""
        rest, log = self.process.communicate(timeout=60)
        self.lines += rest.splitlines()
        return log


@pytest.fixture(scope="session")
def client(server: JupyterServer) -> Iterator[Client]:
    """Start the command that most tests share; each test opens a session of its own."""
    client = Client(server)
    yield client
    client.close()


@pytest.fixture
def clients(server: JupyterServer) -> Iterator[Callable[..., Client]]:
    """Make further commands, and close them."""
    made: list[Client] = []

    def make(*flags: str, **options: Any) -> Client:
        made.append(Client(options.pop("server", server), *flags, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Hasty(Client):
    """A command that takes a cell for confirmed soon after it was saved."""

    def __init__(self, server: JupyterServer, log: Path) -> None:
        self.requests = log
        command = patched(CONFIRM_S=0.05, SETTLED_S=0.05)
        super().__init__(server, "--verbose", command=command, log=log.open("w"))

    def await_confirmed(self, session_id: int) -> None:
        """Wait until what was saved is not put back any more.

        That is so when the file was looked at once more after the last save.
        """
        name = f"{session_id}.ipynb"

        def was_looked_at() -> bool:
            requests = self.requests.read_text().splitlines()
            last = [line for line in requests if name in line][-1]
            return "GET" in last

        eventually(was_looked_at)


@pytest.fixture(scope="session")
def hasty(
    server: JupyterServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Hasty]:
    hasty = Hasty(server, tmp_path_factory.mktemp("hasty") / "log")
    yield hasty
    hasty.close()
    hasty.log.close()


class SharedSession:
    """A session that several tests share."""

    def __init__(self, client: Client, code: str = "0") -> None:
        self.client = client
        self.session_id = client.open(code)

    def run(self, code: str, **arguments: Any) -> dict[str, Any]:
        return self.client.run(code, self.session_id, **arguments)

    def call(self, code: str) -> dict[str, Any]:
        return self.client.call(code, self.session_id)


@pytest.fixture(scope="session")
def scratch(client: Client) -> SharedSession:
    """Open the session of the tests that leave nothing behind."""
    return SharedSession(client)


@pytest.fixture(scope="session")
def run(scratch: SharedSession) -> Callable[..., dict[str, Any]]:
    """Run code in the scratch session."""
    return scratch.run


@pytest.fixture(scope="session")
def shell(client: Client) -> SharedSession:
    """Open the session of the tests of bash, in a folder of its own."""
    return SharedSession(client, "mkdir -p shell && cd shell")


@pytest.fixture(scope="session")
def local_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="session")
def local(local_folder: Path) -> Iterator[Client]:
    """Start the command with a server of its own, which has no rate limits."""
    local = Client(None, "--local", str(local_folder))
    yield local
    local.close()


Run = Callable[..., dict[str, Any]]
Clients = Callable[..., Client]
Servers = Callable[..., JupyterServer]


# --- Tools: networks ------------------------------------------------------------------


class Network:
    """A TCP proxy between client and server that makes the faults of a network.

    mode: "pass", "stall" (accepts and swallows), "refuse" (closes at once).
    delay_s: each way; one chunk does not wait for another.
    on_client(data) is asked before data of the client is passed on: False cuts the
    connection instead; so is on_answer(data) before data of the server is.
    on_server(data) is told what was passed on to the client.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.mode = "pass"
        self.delay_s = 0.0
        self.on_client: Callable[[bytes], bool] = lambda _: True
        self.on_answer: Callable[[bytes], bool] = lambda _: True
        self.on_server: Callable[[bytes], object] = lambda _: None
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        # The ends of connections that are half open.
        self.frozen: set[socket.socket] = set()
        self.listener = socket.create_server((LOOPBACK, 0))
        self.url = f"http://{LOOPBACK}:{self.listener.getsockname()[1]}"
        self.in_thread(self._accept)

    def in_thread(self, what: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=what, args=arguments, daemon=True).start()

    def cut(self) -> None:
        """Break every connection at once, as a router does that forgets them."""
        for pair in self.pairs:
            for end in pair:
                shut(end)
        self.pairs.clear()

    def freeze(self) -> None:
        """Leave present connections open and silent; new ones work."""
        for pair in self.pairs:
            self.frozen.update(pair)
        self.pairs.clear()

    def heard(self, text: bytes) -> Callable[[], bool]:
        """Return a question: was this passed on to the client?

        It is to be made before it can be said.
        """
        so_far = bytearray()
        self.on_server = so_far.extend
        return lambda: text in so_far

    def reset(self) -> None:
        self.mode = "pass"
        self.on_client = lambda _: True
        self.on_answer = lambda _: True
        self.on_server = lambda _: None

    def close(self) -> None:
        self.listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.mode == "refuse":
                    client.close()
                else:
                    self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        self.join(client, socket.create_connection((LOOPBACK, self.target)))

    def join(self, client: socket.socket, server: socket.socket) -> None:
        self.pairs.append((client, server))
        self.in_thread(self._pump, client, server, True)
        self.in_thread(self._pump, server, client, False)

    def _pump(self, source: socket.socket, target: socket.socket, is_up: bool) -> None:
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(10_000)
        self.in_thread(self._deliver, waiting, source, target, is_up)
        with suppress(OSError):
            while data := source.recv(65536):
                if is_up and not self.on_client(data):
                    break
                waiting.put((time.monotonic() + self.delay_s, data))
        waiting.put((time.monotonic() + self.delay_s, b""))

    def _deliver(
        self, waiting: Any, source: socket.socket, target: socket.socket, is_up: bool
    ) -> None:
        with suppress(OSError):
            while (item := waiting.get())[1]:
                time.sleep(max(0.0, item[0] - time.monotonic()))
                while self.mode == "stall" or target in self.frozen:
                    time.sleep(0.02)
                if not is_up and not self.on_answer(item[1]):
                    break
                target.sendall(item[1])
                if not is_up:
                    self.on_server(item[1])
        if source in self.frozen:
            return  # the other side is not told
        shut(source)
        shut(target)


def shut(end: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        end.shutdown(socket.SHUT_RDWR)


class ConnectProxy(Network):
    """An HTTP proxy: CONNECT, and whole URLs for plain HTTP.

    seen: the first line of each request.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__(0)

    def _serve(self, client: socket.socket) -> None:
        self.in_thread(self._forward, client)

    def _forward(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(65536)
        line, _, rest = head.partition(b"\r\n")
        rest = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", b"\r\n" + rest)[2:]
        method, url, _ = line.split(b" ")
        self.seen.append(f"{method.decode()} {url.decode()}")
        host = re.search(r"([\d.]+):(\d+)", url.decode())
        assert host is not None
        server = socket.create_connection((host[1], int(host[2])))
        if method == b"CONNECT":
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            path = b"/" + url.split(b"/", 3)[3]
            first = b"%s %s HTTP/1.1\r\nConnection: close\r\n" % (method, path)
            server.sendall(first + rest)
        self.join(client, server)


class Web:
    """An HTTP server that answers as told, keeps what it was asked, and may pass on.

    answers: the beginning of a path -> (status, headers, body), for every method.
    behind: the server that answers all else.
    """

    def __init__(
        self,
        answers: Mapping[str, tuple[int, dict[str, str], bytes]],
        behind: str = "",
    ) -> None:
        self.answers = answers
        self.behind = behind
        self.asked: list[tuple[str, dict[str, str]]] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                given = web.answer(self.command, self.path, dict(self.headers), body)
                status, headers, text = given
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self.httpd = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()

    def answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        self.asked.append((path, headers))
        for start, answer in self.answers.items():
            if re.match(start, path):
                return answer

        url = self.behind + path
        reply = requests.request(method, url, data=body, headers=headers, timeout=60)
        kept = {"Content-Type": reply.headers.get("Content-Type", "text/plain")}
        return reply.status_code, kept, reply.content

    def close(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


@pytest.fixture
def web() -> Iterator[Callable[..., Web]]:
    """Make HTTP servers that answer as told, and stop them."""
    made: list[Web] = []

    def make(*arguments: Any) -> Web:
        made.append(Web(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


Webs = Callable[..., Web]


@pytest.fixture(scope="session")
def far_side(server: JupyterServer) -> Iterator[tuple[Network, Client, int]]:
    """Start a network, a command behind it, and a session that must not notice."""
    network = Network(server.port)
    client = Client(server, url=network.url)
    yield network, client, client.open("beside = 42")
    client.close()
    network.close()


@pytest.fixture
def network(far_side: tuple[Network, Client, int]) -> Iterator[Network]:
    yield far_side[0]
    far_side[0].reset()


@pytest.fixture
def own_network(server: JupyterServer) -> Iterator[Network]:
    """Start a network for what would hurt the sessions of others behind theirs."""
    network = Network(server.port)
    yield network
    network.close()


# --- Tools: trials --------------------------------------------------------------------


class Trial:
    """A session that is hurt and one beside it that must not notice.

    Both are on one MCP server. Cells write to files: how often they ran, and that they
    saw something; and wait for a file.
    """

    def __init__(
        self, client: Client, folder: Path, beside: int = 0, session_id: int = 0
    ) -> None:
        self.client = client
        self.folder = folder
        self.session_id = session_id or client.open("kept = 5")
        self.beside = beside or client.open("beside = 42")

    def code(self, body: str) -> str:
        """Return a cell that counts its runs.

        In it, wait() waits for `open_gate`; tell(name) writes.
        """
        return f"""import os, pathlib, time
folder = pathlib.Path({str(self.folder)!r})
with open(folder / 'runs', 'a') as file:
    file.write('x')
def wait(name='gate'):
    while not (folder / name).exists():
        time.sleep(0.01)
def tell(name):
    (folder / name).touch()
{body}"""

    def run(self, code: str, **arguments: Any) -> dict[str, Any]:
        """Run a cell that is not counted."""
        return self.client.run(code, self.session_id, **arguments)

    def run_counted(self, body: str = "", **arguments: Any) -> dict[str, Any]:
        return self.run(self.code(body), **arguments)

    def start(self, code: str, **arguments: Any) -> Any:
        return self.client.start(code, self.session_id, **arguments)

    def begin(self, body: str, *, until: str = "", timeout: float = 50) -> Any:
        """Begin a counted call; return when its code runs (and has told `until`)."""
        call = self.start(self.code(body), timeout=timeout)
        eventually(self.runs)
        if until:
            self.await_told(until)
        return call

    def begin_alone(self, body: str, *, until: str = "") -> None:
        """Begin code that no call waits for."""
        self.begin(body, until=until, timeout=0).result(20)

    def rest(self, **arguments: Any) -> dict[str, Any]:
        """Wait for the rest of what runs."""
        return self.run("", **arguments)

    def interrupt(self, **arguments: Any) -> dict[str, Any]:
        return self.client.interrupt(self.session_id, **arguments)

    def runs(self) -> int:
        path = self.folder / "runs"
        return len(path.read_text()) if path.exists() else 0

    def told(self, name: str) -> bool:
        return (self.folder / name).exists()

    def await_told(self, name: str, timeout_s: float = 30.0) -> None:
        eventually(lambda: self.told(name), timeout_s)

    def open_gate(self, name: str = "gate") -> None:
        (self.folder / name).touch()

    def kernel_process(self) -> psutil.Process:
        return psutil.Process(int(self.run("import os\nos.getpid()")["result"][0]))

    def survived(self) -> None:
        """Assert that the code ran once, and that both sessions work.

        This one has its variables; the other did not notice.
        """
        assert self.runs() == 1
        after = self.run("print('works', kept)")
        assert shown(after)[-1:] == ["works 5"], after
        assert self.runs() == 1
        beside = self.client.run("beside", self.beside)
        assert shown(beside)[-1:] == ["42"], beside
        assert "restored" not in text_of(beside)


@pytest.fixture(scope="session")
def beside(client: Client) -> int:
    """Open a session on the shared command that never notices anything."""
    return client.open("beside = 42")


@pytest.fixture(scope="session")
def kept_sessions() -> dict[int, int]:
    """Return a session for each command, for the tests that leave the kernel alive."""
    return {}


def shared_trial(
    client: Client, folder: Path, beside: int, sessions: dict[int, int]
) -> Trial:
    """Return a trial on the command's shared session, as long as that one works."""
    session_id = sessions.get(client.pid, 0)
    if session_id and client.run("kept", session_id, timeout=10)["result"] != ["5"]:
        session_id = 0
    trial = Trial(client, folder, beside, session_id)
    sessions[client.pid] = trial.session_id
    return trial


@pytest.fixture
def trial(
    client: Client, tmp_path: Path, beside: int, kept_sessions: dict[int, int]
) -> Trial:
    """Return a trial that the kernel survives."""
    return shared_trial(client, tmp_path, beside, kept_sessions)


@pytest.fixture
def mortal(client: Client, tmp_path: Path, beside: int) -> Trial:
    """Return a trial that the kernel does not survive: a session of its own."""
    return Trial(client, tmp_path, beside)


@pytest.fixture
def far(
    network: Network,
    far_side: tuple[Network, Client, int],
    tmp_path: Path,
    kept_sessions: dict[int, int],
) -> Trial:
    """Return a trial whose server is behind a network, which the kernel survives."""
    return shared_trial(far_side[1], tmp_path, far_side[2], kept_sessions)


@pytest.fixture
def local_trial(
    local: Client, tmp_path: Path, kept_sessions: dict[int, int], local_beside: int
) -> Trial:
    """Return a trial on a server without rate limits, which the kernel survives."""
    return shared_trial(local, tmp_path, local_beside, kept_sessions)


@pytest.fixture(scope="session")
def local_beside(local: Client) -> int:
    return local.open("beside = 42")


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, also if nobody has asked how."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == "zombie")
    return True


def running(mark: str) -> list[psutil.Process]:
    """Return the processes, other than zombies, with a mark on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        is_marked = mark in (process.info["cmdline"] or [])
        if is_marked and process.info["status"] != "zombie":
            found.append(process)
    return found


# A picture of one pixel.
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)
SHOW_PIXEL = (
    "import base64, IPython.display as d\n"
    f"d.display(d.Image(base64.b64decode('{PIXEL}')))"
)
COUNT = "with open({!r}, 'a') as f: f.write('.');"


# --- Tools: checks that several tests share -------------------------------------------


def make_session(client: Client, name: str) -> int:
    """Make a session of four cells.

    One counts in the file `name`, one ends in an error and one is bash.
    """
    session_id = client.open(f"{COUNT.format(name)} x = 40")
    client.run(f"{COUNT.format(name + '-failed')} x = 99; 1 / 0", session_id)
    client.run("export RESTORED=yes", session_id)
    client.run("x += 2", session_id)
    return session_id


def assert_session_restored(
    client: Client, server: JupyterServer, session_id: int, name: str
) -> None:
    """Assert that the next call of what `make_session` made restores it, once.

    The cell that failed does not run again.
    """
    result = client.run("x, __import__('os').environ['RESTORED']", session_id)
    assert_restored(result, ["(42, 'yes')"], cells=3)
    folder = server.root / "notebooks"
    assert (folder / name).read_text() == ".."
    assert (folder / f"{name}-failed").read_text() == "."
    assert client.run("x", session_id)["result"] == ["42"]


def assert_restarts(trial: Trial) -> None:
    """Assert that a restart stops what runs and restores the session."""
    with within(15.5):
        restarted = text_of(trial.interrupt(restart=True))
    if (
        "Still" in restarted
    ):  # a busy machine: its time was over before the kernel was up
        restarted += text_of(trial.rest())
        restarted += text_of(trial.run("1"))
    assert "ran again" in restarted, restarted
    assert "Not run:" not in restarted, restarted


def assert_goes_on(trial: Trial, client: Client) -> None:
    """Assert that the code went on without its MCP server.

    The next one, of `client`, finds what it left.
    """
    trial.open_gate()
    trial.await_told("done")
    trial.client = client
    assert shown(trial.run("found"))[-1] == "'by then'"
    trial.survived()


AWAY = """
print('fir' + 'st')
wait()
for n in range(100):
    print('line', n)
print('la' + 'st', flush=True)
tell('said')
wait('end')
'value'
"""
AWAY_LINES = ["first", *(f"line {n}" for n in range(100)), "last", "'value'"]


def cut_while_it_runs(
    far: Trial, network: Network, server: JupyterServer, *, ends: bool, left: int = 0
) -> dict[str, Any]:
    """Break the connection after "first"; everything else is said while it is away.

    The end, too, if the code `ends`.
    """
    first = network.heard(b"first")
    call = far.begin(AWAY, timeout=30)
    eventually(first)
    network.mode = "refuse"
    network.cut()
    server.until_noticed(far.session_id, left)
    far.open_gate()
    far.await_told("said")
    if ends:
        far.open_gate("end")
        eventually(lambda: server.kernel(far.session_id)["execution_state"] == "idle")
    network.mode = "pass"
    far.open_gate("end")
    return outcome(call)


def is_execute_request(data: bytes) -> bool:
    """Return whether this is what a websocket client sends for a cell.

    Its frames are masked, but a first byte of 0x8N is no HTTP, and a Pong or a Close
    is short.
    """
    return data[0] >= 0x80 and len(data) > 300


def await_silence(connection_file: Path) -> None:
    """Wait until a kernel has sent all that it has to say.

    Its Jupyter server is not asked.
    """
    listener = BlockingKernelClient(connection_file=str(connection_file))
    listener.load_connection_file()
    listener.start_channels()

    def is_idle() -> bool:
        sent = listener.kernel_info()
        with suppress(queue.Empty):
            while True:
                message = listener.get_iopub_msg(timeout=1)
                is_ours = message["parent_header"].get("msg_id") == sent
                if is_ours and message["content"].get("execution_state") == "idle":
                    return True
        return False

    eventually(is_idle, 30)
    listener.stop_channels()


PYTHON = "python"
BASH = "bash"


def language_of(cell: str) -> str:
    """Return the language of a saved cell."""
    return BASH if cell.startswith("%%bash") else PYTHON


def matches(text: str, pattern: str) -> bool:
    """Return whether a text is as the pattern, in which * stands for anything."""
    expression = ".*".join(map(re.escape, pattern.split("*")))
    return re.fullmatch(expression, text, re.S) is not None


def parse_notebook(text: str) -> Any:
    reader: Any = nbformat
    return reader.reads(text, as_version=nbformat.NO_CONVERT)


def read_notebook(path: Path) -> Any:
    return parse_notebook(path.read_text())


def texts_of(notebook: Any) -> list[list[str]]:
    """Return the texts that stand below each cell."""
    texts = []
    for cell in notebook.cells:
        outputs = cell.outputs
        texts.append([o.get("text") or o["data"]["text/plain"] for o in outputs])
    return texts


def help_flags(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the flags that --help lists."""
    with pytest.raises(SystemExit):
        jim.main(["--help"])
    text = capsys.readouterr().out
    return set(re.findall(r"(?m)^  (?:-h, )?(--[a-z-]+)", text))


def flag_table() -> str:
    """Return the table of README's section on flags."""
    readme = (HERE / "README.md").read_text()
    section = readme.partition("## Flags")[2].partition("\n## ")[0]
    return "\n".join(line for line in section.splitlines() if line.startswith("|"))


@pytest.fixture
def no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the environment and the working directory without settings of ours."""
    monkeypatch.chdir(tmp_path)
    for name in set(os.environ) - set(clean_environment()):
        monkeypatch.delenv(name)


# --- Tools: JupyterHub ----------------------------------------------------------------

HUB = """
c = get_config()
c.JupyterHub.bind_url = 'http://127.0.0.1:{ports[0]}'
c.JupyterHub.hub_bind_url = 'http://127.0.0.1:{ports[1]}'
c.ConfigurableHTTPProxy.api_url = 'http://127.0.0.1:{ports[2]}'
c.JupyterHub.authenticator_class = 'dummy'
c.DummyAuthenticator.password = '{admin}'
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = 'simple'
c.SimpleLocalProcessSpawner.home_dir_template = '{folder}/home/{{username}}'
c.Spawner.cmd = ['{bin}/jupyterhub-singleuser']
c.Spawner.args = ['--allow-root']
c.JupyterHub.db_url = 'sqlite:///{folder}/hub.sqlite'
c.JupyterHub.cookie_secret_file = '{folder}/cookie_secret'
c.JupyterHub.services = [{{'name': 'tests', 'api_token': '{admin}'}}]
c.JupyterHub.load_roles = [{{'name': 'tests', 'services': ['tests'],
    'scopes': ['admin:users', 'admin:servers', 'tokens', 'access:servers',
        'list:users']}}]
"""


class Hub:
    """JupyterHub with a proxy, whose user is alice."""

    def __init__(self, folder: Path) -> None:
        self.admin = secrets.token_hex(16)
        ports = [free_port() for _ in range(3)]
        self.url = f"http://{LOOPBACK}:{ports[0]}"
        self.programs = Path(sys.executable).parent
        names = {"ports": ports, "admin": self.admin}
        text = HUB.format(**names, folder=folder, bin=self.programs)
        self.config = folder / "config.py"
        self.config.write_text(text)
        (folder / "home").mkdir()

    def start(self) -> None:
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        with open(self.config.with_name("hub.log"), "wb") as output:
            self.process = subprocess.Popen(
                [self.programs / "jupyterhub", "-f", self.config],
                cwd=self.config.parent,
                stdout=output,
                stderr=output,
                env={**os.environ, "PATH": path},
            )
        eventually(lambda: self.api("GET", ""), 60)

    def stop(self) -> None:
        with suppress(Exception):
            self.api("DELETE", "users/alice/server")
        self.process.terminate()
        self.process.wait(30)

    def api(self, method: str, what: str) -> Any:
        headers = {"Authorization": f"token {self.admin}"}
        url = f"{self.url}/hub/api/{what}"
        with suppress(requests.ConnectionError):
            answer = requests.request(method, url, headers=headers, timeout=60)
            if "json" in answer.headers.get("Content-Type", ""):
                return answer.json()
        return None

    def has_started(self) -> bool:
        """Return whether alice's server runs."""
        servers = self.api("GET", "users/alice")["servers"]
        return bool(servers.get("", {}).get("ready"))

    def flags(self, name: str, token: str) -> list[str]:
        url = f"--jupyter-base-url={self.url}/user/{name}/"
        return [url, f"--jupyter-token={token}"]

    def execute(self, name: str, token: str) -> subprocess.CompletedProcess[str]:
        return command(*self.flags(name, token), "--execute", "6 * 7")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    hub.start()
    yield hub
    hub.stop()


# --- Tools: figures -------------------------------------------------------------------

NO_LIMITS = [
    "--ZMQChannelsWebsocketConnection.iopub_data_rate_limit=0",
    "--ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=0",
]


def row(
    name: str, figure: str, ratio: float | None = None, bar: float | None = None
) -> None:
    """Print one line of the table."""
    shown = f"{ratio:8.2f}" if ratio is not None else " " * 8
    met = ""
    if bar is not None and ratio is not None:
        met = f"  bar {bar:g}: {'met' if ratio <= bar else 'MISSED'}"
    print(f"\n{name:52} {figure:38} {shown}{met}", end="", flush=True)


def compare(name: str, ours: list[float], theirs: list[float], bar: float) -> None:
    """Print a line that compares the medians of seconds."""
    our_ms = 1000 * statistics.median(ours)
    their_ms = 1000 * statistics.median(theirs)
    row(name, f"{our_ms:.1f} / {their_ms:.1f} ms", our_ms / their_ms, bar)


def seconds_to_initialize(command: list[str]) -> float:
    """Return the time from the start of a process to its answer to `initialize`."""
    started = time.perf_counter()
    raw = RawClient(command)
    answer = raw.initialize()
    took = time.perf_counter() - started
    raw.close()
    assert "serverInfo" in answer["result"]
    return took


class ZeroMQ:
    """A kernel of this machine through jupyter_client, to compare with."""

    def __init__(self) -> None:
        self.manager = KernelManager()
        self.manager.start_kernel(stderr=subprocess.DEVNULL)
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def timed(self, code: str) -> float:
        """Return the seconds until the reply and the idle status of a cell are here."""
        started = time.perf_counter()
        sent = self.client.execute(code)
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") == sent:
                assert message["msg_type"] != "error", message["content"]
                if message["content"].get("execution_state") == "idle":
                    break
        while self.client.get_shell_msg(timeout=60)["parent_header"]["msg_id"] != sent:
            pass
        return time.perf_counter() - started

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def fast_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """Start a server without rate limits.

    It speaks with its kernels as `ZeroMQ` does.
    """
    folder = tmp_path_factory.mktemp("bench")
    server = JupyterServer(folder, *NO_LIMITS, transport="tcp")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fast(fast_server: JupyterServer) -> Iterator[Client]:
    client = Client(fast_server)
    yield client
    client.close()


@pytest.fixture(scope="module")
def zeromq() -> Iterator[ZeroMQ]:
    zeromq = ZeroMQ()
    yield zeromq
    zeromq.close()


# --- Wire -----------------------------------------------------------------------------


@pytest.mark.pure
@pytest.mark.parametrize("is_binary", [True, False])
def test_a_frame_that_was_encoded_is_decoded_to_the_same_message(
    is_binary: bool,
) -> None:
    content = {"code": "é\U0001f600", "silent": False}
    frame = jim.encode("execute_request", "m1", "s1", content, is_binary=is_binary)
    message = jim.decode(frame, is_binary=is_binary)
    assert (message.channel, message.msg_type) == ("shell", "execute_request")
    assert message.msg_id == "m1"
    assert (message.parent_msg_id, message.parent_session) == ("", "")
    assert message.content == content


def binary_frame(*parts: bytes) -> bytes:
    offset = 8 * (len(parts) + 2)
    numbers = [len(parts) + 1, offset]
    for part in parts:
        offset += len(part)
        numbers.append(offset)
    return b"".join(number.to_bytes(8, "little") for number in numbers) + b"".join(
        parts
    )


HEADER = b'{"msg_id": "m", "msg_type": "stream"}'


NO_MESSAGES = [
    b"",
    b"\x00" * 40,
    b"\xff" * 200,
    binary_frame(b"iopub", b"not JSON", b"{}", b"{}", b"{}"),
    binary_frame(b"iopub", b"[]", b"{}", b"{}", b"{}"),
    binary_frame(b"iopub", HEADER, b"{}", b"{}", b"null"),
    binary_frame(b"iopub", HEADER, b"[1]", b"{}", b"{}"),
    binary_frame(b"iopub", b'{"msg_id": 3, "msg_type": "stream"}', b"{}", b"{}", b"{}"),
    binary_frame(b"iopub", HEADER, b'{"session": {}}', b"{}", b"{}"),
    binary_frame(b"iopub", HEADER, b"{}", b"{}", b"[" * 100_000),
]


@pytest.mark.pure
@pytest.mark.parametrize("frame", NO_MESSAGES)
def test_a_frame_that_is_no_message_raises_one_error(frame: bytes) -> None:
    with pytest.raises(jim.ProtocolError):
        jim.decode(frame, is_binary=True)


@pytest.mark.pure
@pytest.mark.parametrize("frame", [b"", b"[]", b"{}", b'{"channel": 1}', b"{" * 9])
def test_a_text_frame_that_is_no_message_raises_one_error(frame: bytes) -> None:
    with pytest.raises(jim.ProtocolError):
        jim.decode(frame, is_binary=False)


@pytest.mark.pure
def test_bytes_that_are_no_utf8_are_read_all_the_same() -> None:
    content = b'{"name": "stdout", "text": "caf\xe9"}'
    frame = binary_frame(b"iopub", HEADER, b"{}", b"{}", content)
    assert jim.decode(frame, is_binary=True).content["text"] == "caf\ufffd"


REPLIES: list[tuple[dict[str, Any], str, Any]] = [
    ({"status": "ok", "execution_count": 3}, "execution_count", 3),
    ({"status": "ok", "execution_count": "3"}, "execution_count", None),
    ({"status": "ok", "payload": None}, "answer", {}),
    ({"status": "ok", "payload": [3, None, {}]}, "answer", {}),
    (
        {"payload": [{"source": jim.HELPER_NAME, "folder": "/x"}]},
        "answer",
        {"source": jim.HELPER_NAME, "folder": "/x"},
    ),
    ({"payload": [{"source": "ask_exit"}]}, "ends_kernel", True),
    ({"payload": [{"source": "ask_exit", "keepkernel": True}]}, "ends_kernel", False),
    ({"payload": [{"source": "page", "data": {"a": "b"}}]}, "pages", ({"a": "b"},)),
    ({"payload": [{"source": "page", "data": None}]}, "pages", ()),
    ({"language_info": None}, "language_info", {}),
    ({"implementation": "ipython"}, "implementation", "ipython"),
    ({"status": "aborted"}, "status", "aborted"),
    ({"payload": [{"source": jim.HELPER_NAME, "error": "e"}]}, "status", "error"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("content", "name", "value"), REPLIES)
def test_a_reply_says_what_it_says_and_nothing_malformed(
    content: dict[str, Any], name: str, value: Any
) -> None:
    assert getattr(jim.parse_reply(content), name) == value


# --- Output ---------------------------------------------------------------------------

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"0" * 60).decode()


JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + b"0" * 60).decode()


WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def fed(*messages: tuple[str, dict[str, Any]]) -> jim.Outputs:
    """The output of a cell with these IOPub messages."""
    outputs = jim.Outputs()
    for msg_type, content in messages:
        event = jim.parse_output(msg_type, content)
        if event is not None:
            outputs.add(event)
    return outputs


def stream(text: str, name: str = "stdout") -> tuple[str, dict[str, Any]]:
    return "stream", {"name": name, "text": text}


def display(display_id: str = "", /, **forms: Any) -> tuple[str, dict[str, Any]]:
    """A display message; `text_plain` stands for text/plain."""
    data = {name.replace("_", "/", 1): value for name, value in forms.items()}
    return "display_data", {
        "data": data,
        "metadata": {},
        "transient": {"display_id": display_id or None},
    }


def rich(**data: Any) -> tuple[str, dict[str, Any]]:
    return "display_data", {"data": data, "metadata": {}}


def comm(comm_id: str, **state: Any) -> tuple[str, dict[str, Any]]:
    return "comm_msg", {
        "comm_id": comm_id,
        "data": {"method": "update", "state": state},
    }


def failed(outputs: jim.Outputs, **content: Any) -> jim.Outputs:
    event = jim.parse_output("error", content)
    assert event is not None
    outputs.fail(event)
    return outputs


def seen(outputs: jim.Outputs, *, has_ended: bool = True) -> list[str]:
    """The texts of a result, clean."""
    shown = jim.Shown()
    shown.add(outputs.take_new(has_ended=has_ended))
    return [jim.clean(text) for text in shown.texts]


def in_notebook(outputs: jim.Outputs, limit: int = 20_000) -> list[dict[str, Any]]:
    """The outputs as the file keeps them, valid as nbformat 4.5."""
    kept = jim.notebook_outputs(outputs.items(), limit, jim.Note("; see 1.txt"))
    cell: dict[str, Any] = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "source": "",
        "execution_count": None,
        "outputs": kept,
    }
    nbformat.validate(
        {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
    )
    return kept


MALFORMED_MESSAGES: list[tuple[str, Any]] = [
    ("stream", {"text": "no name"}),
    ("stream", {"name": "stdlog", "text": "x"}),
    ("stream", None),
    ("stream", []),
    ("stream", {"name": "stdout", "text": 1}),
    ("stream", {"name": "stdout", "text": ["x"]}),
    ("display_data", {"data": ["x"]}),
    ("display_data", {"data": {}, "metadata": "x"}),
    ("display_data", {"data": {}, "transient": 1}),
    ("display_data", {"data": {}, "transient": {"display_id": ["x"]}}),
    ("execute_result", {"data": {}, "execution_count": "1"}),
    ("update_display_data", {"data": 1}),
    ("error", {"ename": 1}),
    ("error", {"traceback": "x"}),
    ("clear_output", {"wait": "yes"}),
    ("comm_msg", {"comm_id": 1}),
    ("comm_msg", {"data": "x"}),
]


@pytest.mark.pure
@pytest.mark.parametrize(("msg_type", "content"), MALFORMED_MESSAGES)
def test_a_malformed_message_is_a_protocol_error(msg_type: str, content: Any) -> None:
    with pytest.raises(jim.ProtocolError):
        jim.parse_output(msg_type, content)


ODD_MESSAGES: list[tuple[str, Any]] = [
    ("display_data", {"data": {"text/plain": None}}),
    ("display_data", {"data": {"image/png": 5}}),
    ("display_data", {"data": {"text/html": ["x", 1]}}),
    ("display_data", {"data": None, "metadata": None}),
    ("error", {"traceback": [None]}),
]


@pytest.mark.pure
@pytest.mark.parametrize(("msg_type", "content"), ODD_MESSAGES)
def test_what_is_odd_in_a_message_becomes_text(msg_type: str, content: Any) -> None:
    outputs = fed((msg_type, content))
    assert len(in_notebook(outputs)) == 1
    seen(outputs)


@pytest.mark.pure
@pytest.mark.parametrize(
    "msg_type", ["status", "execute_input", "comm_open", "comm_close", "debug_event"]
)
def test_other_messages_show_nothing(msg_type: str) -> None:
    assert jim.parse_output(msg_type, {"anything": None}) is None


TERMINAL_TEXTS = [
    ("a\rb", "b"),
    ("abc\rx", "x"),
    ("  0%\r 50%\r100%\n", "100%\n"),
    ("a\r\nb\r\r\nc", "a\nb\nc"),
    ("x\b\by", "y"),
    ("abc\b\bX", "aX"),
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07shown", "shown"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bPq#0;2;0;0;0\x1b\\after", "after"),
    ("\x1b(Bascii\x1b=", "ascii"),
    ("\x1b[?25lhidden\x1b[?25h", "hidden"),
    ("old text\r\x1b[Knew", "new"),
    ("old text\x1b[2K\rnew", "new"),
    ("outer 1\n\rinner 1\x1b[A\router 2\n\rinner 2", "outer 1\nouter 2\ninner 2"),
    ("one\ntwo\n\x1b[2AONE\n", "one\ntwo\nONE\n"),
    ("a\x1b[3Db", "ab"),
    ("bell\a and nul\0", "bell\a and nul\0"),
    ("cut off \x1b[3", "cut off "),
    ("tab\tand form\x0cfeed", "tab\tand form\x0cfeed"),
    ("caf\udce9 \ud83d", "caf\ufffd \ufffd"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("text", "shown"), TERMINAL_TEXTS)
def test_text_is_clean_and_each_line_in_its_last_state(text: str, shown: str) -> None:
    assert jim.clean(text) == shown


@pytest.mark.pure
@pytest.mark.parametrize(("text", "shown"), TERMINAL_TEXTS)
def test_text_in_single_characters_ends_the_same(text: str, shown: str) -> None:
    outputs = fed(*(stream(character) for character in text))
    assert "".join(seen(outputs)).rstrip("\n") == shown.rstrip("\n")


HARD_TO_CLEAN = [
    "\a\x1b]",
    "\x1bP",
    "\x1b[",
    "\x1b[1",
    "\r",
    "\r\r\r\n",
    "\b\\",
    "\x1b[99A\n",
    "\x1b[9999D",
    "\x1b(",
]


@pytest.mark.pure
@pytest.mark.parametrize("text", HARD_TO_CLEAN)
def test_cleaning_takes_linear_time(text: str) -> None:
    began = time.monotonic()
    jim.clean(text * 50_000)
    assert time.monotonic() - began < 3


@pytest.mark.pure
def test_an_endless_progress_bar_stays_small() -> None:
    outputs = fed(*(stream(f"\r{i} %") for i in range(5_000)))
    kept = "".join(outputs.items()[0]["text"])
    assert len(kept) < 100
    assert jim.clean(kept) == "4999 %"


@pytest.mark.pure
def test_a_bar_over_two_calls_ends_once_in_the_notebook() -> None:
    outputs = fed(stream("  0%"))
    assert seen(outputs, has_ended=False) == ["  0%"]

    outputs.add(jim.OutputEvent("stream", {"name": "stdout", "text": "\r 50%\r100%\n"}))
    assert seen(outputs) == ["100%"]
    assert [jim.clean(each["text"]) for each in in_notebook(outputs)] == ["100%\n"]


@pytest.mark.pure
def test_each_text_is_handed_over_once() -> None:
    outputs = fed(stream("a\n"), stream("e\n", "stderr"), stream("b"))
    assert seen(outputs, has_ended=False) == ["a\ne\nb"]
    assert seen(outputs, has_ended=False) == []
    outputs.add(jim.OutputEvent("stream", {"name": "stdout", "text": "c"}))
    assert seen(outputs) == ["c"]
    assert [each["text"] for each in in_notebook(outputs)] == ["a\n", "e\n", "bc"]


@pytest.mark.pure
def test_what_was_taken_stays_as_it_was() -> None:
    outputs = fed(stream("a"), display("d", text_plain="old"))
    taken = outputs.take_new(has_ended=False)
    before = json.dumps(taken)
    for event in (
        stream("b"),
        ("update_display_data", display("d", text_plain="new")[1]),
    ):
        parsed = jim.parse_output(*event)
        assert parsed is not None
        outputs.add(parsed)
    assert json.dumps(taken) == before


@pytest.mark.pure
def test_endless_text_is_bounded_and_marked_where_it_is_cut() -> None:
    outputs = jim.Outputs()
    said = []
    not_kept = []
    for number in range(100):
        outputs.add(
            jim.OutputEvent(
                "stream", {"name": "stdout", "text": f"line {number}\n" * 40_000}
            )
        )
        if number in (45, 49, 99):
            said.append("".join(seen(outputs, has_ended=False)))
            not_kept.append(outputs.not_kept)
    kept = "".join("".join(each["text"]) for each in outputs.items())
    assert len(kept) < jim.TEXT_KEPT + 2 * jim.TAIL_KEPT
    assert kept.count("characters were not kept") == 1
    assert kept.startswith("line 0\n")
    assert kept.endswith("line 99\n")
    assert said[1].startswith("line 46\n")
    assert said[2].endswith("line 99")
    assert not_kept[:2] == [0, 0]
    assert 10_000_000 < not_kept[2] < 49 * 400_000


@pytest.mark.pure
def test_many_pieces_and_much_data_are_bounded() -> None:
    outputs = jim.Outputs()
    for _ in range(100):
        outputs.add(
            jim.OutputEvent(
                "display_data", {"data": {"image/png": "x"}, "metadata": {}}, size=10**6
            )
        )
    assert 60 < sum("data" in each for each in outputs.items()) < 70

    for number in range(20_000):
        name = ("stdout", "stderr")[number % 2]
        outputs.add(jim.OutputEvent("stream", {"name": name, "text": "x"}))
    items = outputs.items()
    assert len(items) < 16_000
    assert any(
        "characters were not kept" in "".join(each.get("text", "")) for each in items
    )


@pytest.mark.pure
def test_a_display_that_is_updated_shows_its_last_state() -> None:
    first = display("d", text_plain="one")
    outputs = fed(
        first, stream("x\n"), ("update_display_data", display("d", text_plain="two")[1])
    )
    assert seen(outputs, has_ended=False) == ["two", "x"]

    update = jim.parse_output(
        "update_display_data", display("d", text_plain="three")[1]
    )
    assert update is not None
    outputs.add(update)
    assert seen(outputs) == ["three"]
    assert [
        each["data"]["text/plain"] for each in in_notebook(outputs) if "data" in each
    ] == ["three"]


@pytest.mark.pure
def test_an_update_changes_each_display_of_its_id() -> None:
    update = ("update_display_data", display("d", text_plain="new")[1])
    outputs = fed(
        display("d", text_plain="1"),
        display(text_plain="2"),
        display("d", text_plain="3"),
        update,
    )
    assert seen(outputs) == ["new", "2", "new"]


@pytest.mark.pure
def test_updates_beyond_the_room_for_data_still_count() -> None:
    outputs = fed(display("d", text_plain="0"))
    for number in range(100):
        update = {"data": {"text/plain": str(number)}, "metadata": {}}
        outputs.add(jim.OutputEvent("update_display_data", update, "d", size=5_000_000))
    assert seen(outputs) == ["99"]


CLEARED = [
    ([stream("a"), ("clear_output", {"wait": False}), stream("b")], ["b"]),
    ([stream("a"), ("clear_output", {}), stream("b")], ["b"]),
    ([stream("a"), ("clear_output", {"wait": True})], ["a"]),
    ([stream("a"), ("clear_output", {"wait": True}), stream("b")], ["b"]),
    (
        [stream("a\n"), comm("w", msg_id="m"), stream("b"), ("clear_output", {}), stream("c"), comm("w", msg_id="")],
        ["a\nc"],
    ),
    (  # interact: clear_output(wait=True) inside its Output
        [stream("a\n"), comm("w", msg_id="m"), ("clear_output", {"wait": True}), stream("b"), comm("w", msg_id="")],
        ["a\nb"],
    ),
    (  # it waits for something new of the widget, not of the cell
        [comm("w", msg_id="m"), stream("a\n"), ("clear_output", {"wait": True}), comm("w", msg_id=""), stream("b")],
        ["a\nb"],
    ),
]  # fmt: skip


@pytest.mark.pure
@pytest.mark.parametrize(("messages", "shown"), CLEARED)
def test_clear_output_clears_what_its_owner_showed(
    messages: list[Any], shown: list[str]
) -> None:
    assert seen(fed(*messages)) == shown


RICH_DISPLAYS = [
    ({"text/plain": "42"}, "42"),
    ({"text/plain": ["4", "2"]}, "42"),
    ({"text/plain": "<object at 0x7f24001f7880>"}, "<object at 0x7f24001f7880>"),
    ({"text/plain": "<IPython.core.display.Markdown object>", "text/markdown": "**hi**"}, "**hi**"),
    ({"text/plain": "<IPython.core.display.Latex object>", "text/latex": "$x^2$"}, "$x^2$"),
    ({"text/plain": "<IPython.core.display.JSON object>", "application/json": {"é": [1]}}, '{"é": [1]}'),
    ({"text/plain": "<x.Styler at 0x7f>", "text/html": "<style>a{}</style><tr><th>&nbsp;</th><th>a</th></tr>"
      "<tr><th>0</th><td>1</td></tr>"}, "a\n0 1"),
    ({"text/html": "<p>one &amp; two</p><script>var a = '<p>'</script><!-- no -->three"}, "one & two\nthree"),
    ({"text/html": "<script>alone</script>"}, ""),
    ({"text/plain": "   a\n0  1", "text/html": "<table><td>1</td></table>"}, "   a\n0  1"),
    ({"text/plain": "vega-embed in a table", "text/html": "<td>vega-embed</td>"}, "vega-embed in a table"),
    ({"application/vnd.plotly.v1+json": {}}, 'fig.show("png")'),
    ({"application/vnd.plotly.v1+json": {}, "text/html": "<script>" + "x" * 5_000_000 + "</script>"}, "interactive"),
    ({"text/html": "<script>" + "x" * 5_000_000 + '</script><div class="plotly-graph-div">'}, "interactive"),
    ({"text/plain": "alt.Chart(...)", "text/html": "<div class='vega-embed'></div><script>1</script>"}, "alt.Chart(...) [an interactive"),
    ({"application/javascript": "1"}, ""),
    ({"application/javascript": "1", "application/vnd.bokehjs_exec.v0+json": ""}, "interactive"),
    ({"text/plain": "<Figure size 640x480 with 1 Axes>", "image/svg+xml": "<svg/>"}, "SVG or PDF figure"),
    ({"application/pdf": "JVBERi0="}, "SVG or PDF figure"),
    ({"application/geo+json": {}}, "in the notebook"),
    ({"text/plain": "<Figure size 640x480 with 1 Axes>", "image/png": PNG}, "<Figure size 640x480 with 1 Axes>"),
    ({"text/plain": "<IPython.core.display.Image object>", "image/png": PNG}, ""),
    ({"text/plain": "IntSlider(value=3)", WIDGET_VIEW: {"model_id": "m"}}, "as it was when it was made"),
]  # fmt: skip


@pytest.mark.pure
@pytest.mark.parametrize(("data", "shown"), RICH_DISPLAYS)
def test_a_display_is_shown_by_its_content(data: dict[str, Any], shown: str) -> None:
    texts = seen(fed(rich(**data)))
    assert shown in "".join(texts)
    assert len("".join(texts)) < 300
    assert len(texts) == bool(shown)


@pytest.mark.pure
def test_a_notebook_keeps_each_bundle_whole() -> None:
    data = {
        "text/plain": "x" * 50_000,
        "text/html": "<p>" * 50_000,
        "application/vnd.plotly.v1+json": {"a": 1},
    }
    kept = in_notebook(fed(rich(**data)))[0]["data"]
    assert kept["text/html"] == data["text/html"]
    assert kept["application/vnd.plotly.v1+json"] == {"a": 1}
    assert "characters left out" in kept["text/plain"]


PICTURES = [
    (PNG, "image/png"),
    (PNG[:40] + "\n" + PNG[40:], "image/png"),
    (JPEG, "image/jpeg"),
    (base64.b64encode(b"GIF89a....").decode(), "image/gif"),
    (base64.b64encode(b"RIFF\n\n\n\nWEBP").decode(), "image/webp"),
    ("not base64 at all!", None),
    ("iVBORw0KGgo", None),  # cut off
    (base64.b64encode(b"<html>404</html>").decode(), None),
    (base64.b64encode(b"BM" + b"0" * 50).decode(), None),
    ("", None),
]


@pytest.mark.pure
@pytest.mark.parametrize(("encoded", "mime"), PICTURES)
def test_the_first_bytes_say_what_a_picture_is(encoded: str, mime: str | None) -> None:
    shown = jim.Shown()
    shown.add(fed(rich(**{"image/png": encoded})).take_new(has_ended=True))
    assert [kind for kind, _ in shown.images] == [mime] * (mime is not None)
    assert ["is no PNG" in text for text in shown.texts] == [True] * (mime is None)


@pytest.mark.pure
def test_pictures_beyond_the_limits_are_named() -> None:
    large = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"0" * 600_000).decode()
    shown = jim.Shown()
    shown.add(
        fed(
            *(rich(**{"image/png": each}) for each in [large, large, *[PNG] * 10])
        ).items()
    )
    assert [len(data) for _, data in shown.images] == [len(large), *[len(PNG)] * 9]
    assert len(shown.texts) == 2
    assert "image/png of 600,009 bytes" in shown.texts[0]
    assert "figsize" in shown.texts[1]


# What IPython 9 sends for df["zz"], without colours and shortened.
LIB = "/venv/lib/python3.11/site-packages/pandas"


MISTAKE = [
    "-" * 75,
    "KeyError                                  Traceback (most recent call last)",
    f"File {LIB}/core/indexes/base.py:3816, in Index.get_loc(self, key)\n   3815 try:\n-> 3816     return self._engine",
    "File pandas/_libs/index.pyx:172, in pandas._libs.index.IndexEngine.get_loc()\n--> 172 'Could not get source'\n",
    "File pandas/_libs/index.pyx:201, in pandas._libs.index.IndexEngine.get_loc()\n--> 201 'Could not get source'\n",
    "File pandas/_libs/hashtable.pxi:7734, in pandas._libs.PyObjectHashTable.get_item()\n",
    "\x1b[31mKeyError\x1b[39m: 'zz'",
    "\nThe above exception was the direct cause of the following exception:\n",
    "-" * 75,
    "KeyError                                  Traceback (most recent call last)",
    "\x1b[36mCell\x1b[39m\x1b[36m \x1b[39m\x1b[32mIn[3]\x1b[39m\x1b[32m, line 1\x1b[39m\n----> 1 df['zz']\n",
    f"File {LIB}/core/frame.py:4330, in DataFrame.__getitem__(self, key)\n   4329     return 1\n-> 4330 indexer = 2",
    "KeyError: 'zz'",
]


MISTAKE_TOLD = """\
File pandas/core/indexes/base.py:3816, in Index.get_loc
File pandas/_libs/index.pyx:172, in pandas._libs.index.IndexEngine.get_loc
File pandas/_libs/index.pyx:201, in pandas._libs.index.IndexEngine.get_loc
File pandas/_libs/hashtable.pxi:7734, in pandas._libs.PyObjectHashTable.get_item
KeyError: 'zz'
The above exception was the direct cause of the following exception:
Cell In[3], line 1
----> 1 df['zz']
File pandas/core/frame.py:4330, in DataFrame.__getitem__
KeyError: 'zz'"""


LIBRARY_FRAMES = [
    ("/usr/lib/python3/dist-packages/apt/a.py", "apt/a.py"),
    ("~/miniconda3/lib/python3.9/json/decoder.py", "json/decoder.py"),
    (r"C:\Python311\Lib\json\decoder.py", r"json\decoder.py"),
    (r"C:\venv\Lib\site-packages\numpy\a.py", r"numpy\a.py"),
]


@pytest.mark.pure
def test_one_mistake_with_a_library_costs_few_characters() -> None:
    assert jim.short_traceback(MISTAKE) == MISTAKE_TOLD
    assert len(MISTAKE_TOLD) < 600


@pytest.mark.pure
@pytest.mark.parametrize(("path", "told"), LIBRARY_FRAMES)
def test_a_frame_of_a_library_is_one_line(path: str, told: str) -> None:
    frame = f"File {path}:12, in f(x, y)\n     11 x = 1\n---> 12 y = 2"
    assert jim.short_traceback([frame]) == f"File {told}:12, in f"


@pytest.mark.pure
@pytest.mark.parametrize(
    "path",
    ["/home/u/lib/tools.py", "~/project/python3/a.py", "a.py", "/tmp/usermod.py"],
)
def test_a_frame_of_the_users_file_is_whole(path: str) -> None:
    frame = f"File {path}:12, in f(x, y)\n     11 x = 1\n---> 12 y = 2"
    assert jim.short_traceback([frame]) == frame


@pytest.mark.pure
def test_of_a_recursion_the_first_and_last_frames_stay() -> None:
    frames = [
        f"Cell In[8], line {number}, in f(n)\n----> 1 return f(n+1)\n"
        for number in range(3_000)
    ]
    began = time.monotonic()
    told = jim.short_traceback([*frames, "RecursionError: too deep"])
    assert time.monotonic() - began < 1
    assert "line 0, in f" in told
    assert "[... 2,994 frames ...]" in told
    assert "line 2999, in f" in told
    assert told.endswith("RecursionError: too deep")
    assert len(told) < 600


@pytest.mark.pure
def test_tracebacks_of_other_kernels_stay_whole() -> None:
    lines = ["Error in f(): object 'x' not found\nTraceback:\n", "1. f()"]
    assert (
        jim.short_traceback(lines)
        == "Error in f(): object 'x' not found\nTraceback:\n1. f()"
    )


ERROR = {
    "ename": "ZeroDivisionError",
    "evalue": "division by zero",
    "traceback": ["ZeroDivisionError: division by zero"],
}


ERRORS_OF_CELLS: list[tuple[list[Any], dict[str, Any], list[str], str]] = [
    ([("error", ERROR)], ERROR, [], "ZeroDivisionError: division by zero"),
    ([], ERROR, [], "ZeroDivisionError: division by zero"),  # dropped by the rate limit
    ([stream("a"), ("error", ERROR), stream("b")], ERROR, ["ab"], "ZeroDivisionError: division by zero"),
    ([("error", ERROR), ("error", ERROR)], {**ERROR, "ename": "NoneType"}, [], "ZeroDivisionError: division by zero"),
    ([("error", {**ERROR, "traceback": ["another"]})], ERROR, ["another"], "ZeroDivisionError: division by zero"),
    ([], {"status": "aborted"}, [], "Aborted: by an interrupt or another's error"),
    ([], {"ename": "E\udce9", "evalue": "caf\udce9", "traceback": []}, [], "E\ufffd: caf\ufffd"),
]  # fmt: skip


@pytest.mark.pure
@pytest.mark.parametrize(("messages", "reply", "shown", "told"), ERRORS_OF_CELLS)
def test_an_error_is_told_once(
    messages: list[Any], reply: dict[str, Any], shown: list[str], told: str
) -> None:
    outputs = failed(fed(*messages), **reply)
    assert outputs.error is not None
    assert seen(outputs) == shown
    assert jim.error_text(outputs.error) == told
    errors = [each for each in in_notebook(outputs) if each["output_type"] == "error"]
    assert len(errors) == 1 + (shown == ["another"])


@pytest.mark.pure
def test_the_picture_of_a_failed_cell_comes_without_its_error() -> None:
    outputs = failed(
        fed(("error", ERROR), rich(**{"text/plain": "<Figure 1>", "image/png": PNG})),
        **ERROR,
    )
    assert seen(outputs) == ["<Figure 1>"]
    assert len(in_notebook(outputs)) == 2


@pytest.mark.pure
def test_an_error_waits_until_the_cell_has_ended() -> None:
    outputs = fed(stream("a"), ("error", ERROR))
    assert seen(outputs, has_ended=False) == ["a"]
    assert seen(outputs) == ["ZeroDivisionError: division by zero"]


NOTICE = "IOPub data rate exceeded.\nThe Jupyter server will temporarily stop sending output\n"


@pytest.mark.pure
@pytest.mark.parametrize("is_from_server", [True, False])
def test_only_the_server_says_that_it_dropped_output(is_from_server: bool) -> None:
    content = {"name": "stderr", "text": NOTICE}
    outputs = jim.Outputs()
    event = jim.parse_output("stream", content, is_from_server=is_from_server)
    assert event is not None
    outputs.add(event)
    assert ("iopub_data_rate_limit" in outputs.lost) == is_from_server
    assert seen(outputs) == ([] if is_from_server else [NOTICE.rstrip("\n")])


@pytest.mark.pure
def test_lone_surrogates_end_as_replacement_characters() -> None:
    outputs = fed(
        stream("caf\udce9"),
        rich(**{"text/plain": "\ud83d", "application/json": {"k\udc00": ["\udfff"]}}),
    )
    text = json.dumps(in_notebook(outputs), ensure_ascii=False)
    assert text.encode().decode() == text
    assert text.count("\ufffd") == 4
    assert jim.compose(1, ["\ud800"], ["\udfff"], 1_000, jim.Note()).encode()


AWKWARD = [
    '"',
    "\n",
    "\\",
    "\x01",
    "\x00",
    "\x1e",
    "漢",
    "🎉",
    "\ud800",
    "\x1b[31mx",
    "ab \r",
    "\t",
]


@pytest.mark.pure
@pytest.mark.parametrize("limit", [1_000, 20_000])
@pytest.mark.parametrize("awkward", AWKWARD)
def test_a_result_never_exceeds_its_limit(awkward: str, limit: int) -> None:
    long = [awkward * 9_000, "x", awkward * 9_000]
    for error, result in [
        (long, long),
        ([], long),
        (long, []),
        (["e"], long),
        ([], [awkward] * 3_000),
    ]:
        text = jim.compose(
            2**53 - 1,
            error,
            result,
            limit,
            jim.Note("; the full text is in a/1.txt on the server"),
        )
        assert len(text) <= limit
        assert text.encode()
        assert bool(json.loads(text)["error"]) == bool(error)

        plain = jim.compose_plain(
            2**53 - 1, error, result, limit, jim.Note("; see a/1.txt")
        )
        assert len(plain) <= limit
        assert plain.count("\n") < jim.PLAIN_LINES


@pytest.mark.pure
def test_a_result_is_as_long_as_its_limit_lets_it_be() -> None:
    text = jim.compose(1, [], ["a" * 10_000, "b" * 30_000], 20_000, jim.Note())
    assert len(text) > 19_900
    assert (
        jim.compose(1, ["e"], ["r"], 1_000, jim.Note())
        == '{"session_id": 1, "error": ["e"], "result": ["r"]}'
    )


@pytest.mark.pure
def test_the_cut_names_its_size_and_the_place_of_the_rest() -> None:
    texts = json.loads(
        jim.compose(
            1, [], ["start" + "a" * 50_000 + "end"], 2_000, jim.Note("; see 1.txt", 7)
        )
    )["result"]
    assert len(texts) == 1
    head, note, tail = texts[0].split("\n")
    left_out = int(note.split()[1].replace(",", ""))
    assert head.startswith("start")
    assert tail.endswith("end")
    assert "; see 1.txt" in note
    assert left_out + len(head) + len(tail) == 50_008 + 7


@pytest.mark.pure
def test_texts_of_the_middle_are_left_out() -> None:
    texts = json.loads(
        jim.compose(
            1, [], ["first", "m" * 9_000, "m" * 9_000, "last"], 1_000, jim.Note()
        )
    )["result"]
    assert texts[0] == "first"
    assert texts[-1] == "last"
    assert "".join(texts).count("characters left out") == 1


@pytest.mark.pure
def test_a_long_result_leaves_half_of_the_room_to_the_error() -> None:
    shown = json.loads(
        jim.compose(1, ["e" * 50_000], ["r" * 50_000], 20_000, jim.Note())
    )
    assert 9_000 < len(shown["error"][0]) < 11_000
    assert 9_000 < len(shown["result"][0]) < 11_000
    shown = json.loads(jim.compose(1, ["short"], ["r" * 50_000], 20_000, jim.Note()))
    assert len(shown["result"][0]) > 19_000


@pytest.mark.pure
def test_plain_text_begins_with_session_and_error() -> None:
    assert (
        jim.compose_plain(7, [], ["a", "b"], 1_000, jim.Note())
        == "[session_id 7]\na\nb"
    )
    text = jim.compose_plain(
        7, ["Cell In[1]\nValueError: no\n"], ["a"], 1_000, jim.Note()
    )
    assert (
        text
        == "[session_id 7] [error: ValueError: no]\na\nCell In[1]\nValueError: no\n"
    )


@pytest.mark.pure
def test_much_coloured_text_is_cut_quickly() -> None:
    line = '\x1b[31mhello\x1b[0m world "q"\n'
    outputs = fed(*[stream(line * 20_000)] * 30)
    began = time.monotonic()
    taken = outputs.take_new(has_ended=True)
    assert time.monotonic() - began < 0.1

    shown = jim.Shown()
    shown.add(taken)
    text = jim.compose(1, [], shown.texts, 20_000, jim.Note())
    assert time.monotonic() - began < 1
    assert "\\u001b" not in text
    assert len(text) > 19_900


@pytest.mark.pure
def test_a_notebook_cuts_long_text_and_keeps_colours_of_short() -> None:
    short = in_notebook(fed(stream("\x1b[31mred\x1b[0m\n")))
    assert short[0]["text"] == "\x1b[31mred\x1b[0m\n"
    long = in_notebook(
        fed(stream("a\n" * 50_000), rich(**{"image/png": PNG}), stream("b\n" * 50_000))
    )
    assert [each["output_type"] for each in long] == [
        "stream",
        "display_data",
        "stream",
    ]
    assert sum(len(each.get("text", "")) for each in long) <= 2 * jim.NOTEBOOK_TEXT
    assert long[1]["data"]["image/png"] == PNG


@pytest.mark.pure
def test_a_traceback_is_whole_in_the_notebook() -> None:
    frames = [
        f"File /lib/python3.11/a.py:{number}, in f()\n" + "x" * 300
        for number in range(200)
    ]
    outputs = failed(fed(), ename="E", evalue="v" * 90_000, traceback=frames)
    kept = in_notebook(outputs)[0]
    assert kept["traceback"] == frames
    assert len(kept["evalue"]) <= jim.NOTEBOOK_TEXT


@pytest.mark.pure
def test_the_text_file_has_all_text_clean() -> None:
    outputs = fed(
        stream("\x1b[31ma\x1b[0m\n" * 100_000), rich(**{"text/plain": "value"})
    )
    text = "".join(jim.full_text(failed(outputs, **ERROR).items()))
    assert text == "a\n" * 100_000 + "value\nZeroDivisionError: division by zero\n"
    assert outputs.is_long(20_000)


@pytest.mark.pure
def test_progress_tells_the_newest_line() -> None:
    assert fed().last_line() == ""
    assert fed(stream("a\nb\n\n")).last_line() == "b"
    assert fed(stream("  0%\r 50%")).last_line() == "50%"


# fmt: off
RICH_CELLS: dict[str, tuple[str, list[str]]] = {
    "Markdown": ("d.Markdown('**hi**')", ["**hi**"]),
    "HTML": ("d.HTML('<p>one &amp; two<script>1</script>')", ["one & two"]),
    "LaTeX": ("d.Latex('$x$')", ["$x$"]),
    "JSON": ("d.display(d.JSON({'a': [1]}))", ['{"a": [1]}']),
    "SVG": ("d.SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')", ["[an interactive, SVG or PDF figure, in the notebook"]),
    "plotly 7": ("d.display({'application/vnd.plotly.v1+json': {}}, raw=True)", ["[an interactive, SVG or PDF figure, in"]),
    "plotly 6": ("d.HTML('<div class=\"plotly-graph-div\"><script>' + 'x' * 5_000_000 + '</script>')", ["[an interactive, SVG or PDF figure"]),
    "no picture": ("d.display({'image/png': 'PGh0bWw+'}, raw=True)", ["[this image/png is no PNG"]),
    "odd bytes": ("print('caf\\udce9')\n'\\udce9'", ["caf\ufffd", "'\\udce9'"]),
    "an odd repr": ("class A:\n    def __repr__(self): return 'a\\udce9'\nA()", ["a\ufffd"]),
    "the server's words": ("print('IOPub data rate exceeded.\\nThe')", ["IOPub data rate exceeded.\nThe"]),
    "DCS and charset": ("print('\\x1bPq1\\x1b\\\\a\\x1b(Bb')", ["ab"]),
}
# fmt: on


@pytest.mark.sdk
@pytest.mark.parametrize("kind", RICH_CELLS)
def test_a_cell_shows_what_is_in_its_displays(run: Run, kind: str) -> None:
    code, expected = RICH_CELLS[kind]
    texts = shown(run("import IPython.display as d\n" + code))
    for text, begins in zip(texts, expected, strict=True):
        assert text.startswith(begins)
    assert len("".join(texts)) < 300


# fmt: off
TOLD_ONCE: dict[str, tuple[str, list[str], str]] = {
    "a figure is open": ("%matplotlib inline\nimport matplotlib.pyplot as p\np.plot([1])\n1 / 0", ["<Figure"], "ZeroDivisionError: division by zero"),
    "an exit": ("import sys\nsys.exit(3)", [], "SystemExit: 3"),
    "an unknown magic": ("%nosuchmagic", [], "UsageError: Line magic function `%nosuchmagic` not found."),
    "a missing picture": ("import IPython.display as d\nd.Image('missing.png')", [], "FileNotFoundError: No such file"),
    "odd bytes": ("raise ValueError('caf\\udce9')", [], "ValueError: caf\ufffd"),
    "a recursion": ("def f(n): return f(n + 1)\nf(0)", [], "frames"),
    "a library": ("import json\njson.loads('{')", [], "JSONDecodeError"),
}
# fmt: on


@pytest.mark.sdk
@pytest.mark.parametrize("kind", TOLD_ONCE)
def test_a_cells_error_is_told_in_error_only(
    scratch: SharedSession, server: JupyterServer, kind: str
) -> None:
    code, expected, told = TOLD_ONCE[kind]
    answer = scratch.run(code)
    (error,) = answer["error"]
    assert told in error
    assert len(error) < 900
    assert told not in "".join(answer["result"])
    for text, begins in zip(answer["result"], expected, strict=False):
        assert text.startswith(begins)
    outputs = server.last_cell(scratch.session_id)["outputs"]
    assert [each["output_type"] for each in outputs].count("error") == 1


LONG_RESULTS = ["'\"' * 99_999", "'\\n' * 99_999", "'\\x01' * 99_999", "'漢' * 99_999"]


@pytest.mark.sdk
@pytest.mark.parametrize("text", LONG_RESULTS)
def test_what_is_sent_never_exceeds_the_limit(
    scratch: SharedSession, text: str
) -> None:
    answer = scratch.call(f"print({text}); raise ValueError({text})")
    (block,) = answer["content"]
    assert 15_000 < len(block["text"]) <= jim.Settings().max_output
    assert json.loads(block["text"])["error"] != []


@pytest.mark.sdk
def test_plain_results_begin_with_session_and_error(clients: Clients) -> None:
    client = clients("--plain")
    (block,) = client.call("print('a'); 1 / 0", 61)["content"]
    first, *lines = block["text"].splitlines()
    assert first == "[session_id 61] [error: ZeroDivisionError: division by zero]"
    assert "a" in lines


@pytest.mark.faults
def test_output_between_two_calls_is_marked_and_kept(
    trial: Trial, server: JupyterServer
) -> None:
    trial.run_counted(PRINTS_LATER)
    trial.open_gate()
    trial.await_told("said")
    results: list[str] = []

    def came() -> bool:
        results.extend(shown(trial.run("21 * 2")))
        return "from the thread" in str(results)

    eventually(came, 5)
    (told,) = [text for text in results if "from the thread" in text]
    assert told.startswith("[from earlier code] ")
    assert results[-1] == "42"
    path = server.path(trial.session_id)
    eventually(lambda: "from the thread" in path.read_text(), 15)


# fmt: off
RESULTS: list[tuple[str, list[str]]] = [
    ("print(42)", ["42"]),
    ("21 * 2", ["42"]),
    ("result_x = 1", []),
    ("None", []),
    ("", []),
    ("# a comment", []),
    ("21 * 2;", []),
    ("print('a', end='')", ["a"]),
    ("print('a\\n\\n')", ["a\n\n"]),
    ("print('a'); print('b')\n'c'", ["a\nb", "'c'"]),
    ("print(1)\ndisplay(2)\nprint(3)\n4", ["1", "2", "3", "4"]),
    ("display('a\\n', 'b')\n", ["'a\\n'", "'b'"]),
    ("import sys\nprint('a', flush=True); print('b', file=sys.stderr, flush=True)\nprint('c')", ["a\nb\nc"]),
    ("print('\\x1b[1;31mred\\x1b[0m \\x1b]8;;http://x\\x1b\\\\link\\x1b]8;;\\x1b\\\\')", ["red link"]),
    ("print('\\r' * 300_000 + 'x')", ["x"]),  # quickly
    ("print('é 漢 🎉 \\u2028 \\0 .')", ["é 漢 🎉 \u2028 \0 ."]),
    ("import asyncio\nawait asyncio.sleep(0, 42)", ["42"]),
    ("class Shown:\n    def _repr_markdown_(self): return '**bold**'\n    def __repr__(self): return 'plain'\nShown()", ["plain"]),
    ("def f():\n    '''Docs'''\n    return 42\n\nf()", ["42"]),
]
# fmt: on


@pytest.mark.sdk
@pytest.mark.parametrize(("code", "result"), RESULTS)
def test_a_result_is_what_a_person_sees(run: Run, code: str, result: list[str]) -> None:
    """Below the cell."""
    assert shown(run(code)) == result


def test_a_warning_is_shown(run: Run) -> None:
    (text,) = shown(run("import warnings\nwarnings.warn('careful')"))
    assert "UserWarning: careful" in text


def test_help_of_ipython_is_shown(run: Run) -> None:
    assert "Return the number of items" in shown(run("len?"))[0]


# fmt: off
ERRORS: list[tuple[str, list[str], str]] = [
    ("print(1)\n1 / 0", ["1"], "ZeroDivisionError: division by zero"),
    ("def f():\n    return missing\nf()", [], "NameError: name 'missing' is not defined"),
    ("x = )", [], "SyntaxError"),
    ("raise KeyError('a\\x1b[31mb')", [], "KeyError"),
    ("raise SystemExit(3)", [], "SystemExit: 3"),
    ("raise KeyboardInterrupt", [], "KeyboardInterrupt"),
    ("class Odd(Exception):\n    def __str__(self): raise ValueError('no text')\nraise Odd", [], "Odd"),
    ("import json\njson.loads('{')", [], "JSONDecodeError"),
]
# fmt: on


@pytest.mark.sdk
@pytest.mark.parametrize(("code", "result", "text"), ERRORS)
def test_an_exception_gives_its_traceback_in_error(
    run: Run, code: str, result: list[str], text: str
) -> None:
    answer = run(code)
    assert answer["result"][: len(result)] == result
    (error,) = answer["error"]
    assert text in error
    assert "\x1b" not in str(answer)
    assert run("21 * 2")["result"] == ["42"]


# fmt: off
FINAL = {
    "display update": ("h = display('one', display_id=True)\nh.update('two')", ["'two'"]),
    "clear_output": ("print('a')\nclear_output()\nprint('b')", ["b"]),
    "clear_output(wait)": ("print('a')\nclear_output(wait=True)\nprint('b')", ["b"]),
    "clear_output(wait) and nothing": ("print('a')\nclear_output(wait=True)", ["a"]),
    "progress bar": ("for n in range(101):\n    print(f'\\r{n}%', end='', flush=True)", ["100%"]),
    "bar of a line": ("print('old\\rnew')\nprint('windows\\r\\nlines')", ["new\nwindows\nlines"]),
    "bar on stderr": ("import sys\nfor n in range(9):\n    print(n, end='\\r', file=sys.stderr)", ["8"]),
}
# fmt: on


@pytest.mark.faults
@pytest.mark.parametrize("kind", FINAL)
def test_only_the_final_state_of_what_changes_is_shown(
    trial: Trial, server: JupyterServer, kind: str
) -> None:
    code, final = FINAL[kind]
    body = "from IPython.display import clear_output\n" + code
    assert shown(trial.run_counted(body)) == final
    outputs = server.last_cell(trial.session_id)["outputs"]
    assert len(outputs) == 1
    assert "one" not in json.dumps(outputs)
    trial.survived()


@pytest.mark.faults
def test_a_progress_bar_is_not_repeated_by_the_next_call(trial: Trial) -> None:
    body = "print('\\r10%', end='', flush=True)\nwait()\nprint('\\r100%', end='')"
    early = outcome(trial.begin(body, timeout=0.5))
    trial.open_gate()
    assert early["result"] == ["10%"]
    assert trial.rest()["result"] == ["100%"]
    trial.survived()


PRINTS_LATER = """import threading
def later():
    wait()
    print('from the thread', flush=True)
    tell('said')
threading.Thread(target=later).start()
print('cell')"""


@pytest.mark.faults
def test_output_of_a_background_thread_comes_with_later_calls(trial: Trial) -> None:
    """With the next, or the one after it; and once."""
    assert shown(trial.run_counted(PRINTS_LATER)) == ["cell"]
    trial.open_gate()
    trial.await_told("said")
    collected: list[str] = []

    def came() -> bool:
        collected.append(text_of(trial.run("print('next')")))
        return "from the thread" in collected[-1]

    eventually(came, 5)
    assert len(collected) <= 2
    assert "[from earlier code] from the thread" in collected[-1]
    assert "next" in collected[-1]
    assert "from the thread" not in text_of(trial.run("1"))
    trial.survived()


@pytest.mark.faults
def test_output_on_an_unused_connection_is_not_lost(
    clients: Clients, server: JupyterServer, tmp_path: Path
) -> None:
    """It comes while the connection is open, which then is closed.

    After 0.5 s, not 30.
    """
    command = patched(IDLE_S=0.5)
    trial = Trial(clients(command=command), tmp_path)
    assert shown(trial.run_counted(PRINTS_LATER)) == ["cell"]
    trial.open_gate()
    server.until_noticed(trial.session_id)
    thread, value = shown(trial.run("6 * 7"))

    assert thread == "[from earlier code] from the thread"
    assert value == "42"
    trial.survived()


# xeus kernels send messages with null in place of the parent's header.
LONELY = """kernel = get_ipython().kernel
lonely = kernel.session.msg("stream", {"name": "stdout", "text": "lonely"})
kernel.session.send(kernel.iopub_socket, {**lonely, "parent_header": None})
print("after")"""


def test_a_message_without_a_parent_belongs_to_nobody(run: Run) -> None:
    assert shown(run(LONELY)) == ["after"]
    assert shown(run("1")) == ["1"]


@pytest.mark.faults
@pytest.mark.parametrize("code", ["input()", "import getpass\ngetpass.getpass()"])
def test_input_is_an_immediate_error_that_says_so(trial: Trial, code: str) -> None:
    with within(5):
        asked = trial.run_counted(code)
    (error,) = asked["error"]
    assert "input" in error
    trial.survived()


@pytest.mark.sdk
def test_pictures_follow_as_image_blocks(
    scratch: SharedSession, server: JupyterServer
) -> None:
    show_two = f"{SHOW_PIXEL}\nd.Image(base64.b64decode('{PIXEL}'))"
    answer = scratch.call(f"print('two')\n{show_two}")
    types = [block["type"] for block in answer["content"]]
    assert types == ["text", "image", "image"]
    images = images_of(answer)
    assert {image["mimeType"] for image in images} == {"image/png"}
    assert {image["data"] for image in images} == {PIXEL}
    assert shown(result_of(answer)) == ["two"], "a picture needs no default repr"
    outputs = server.last_cell(scratch.session_id)["outputs"]
    assert [o["data"]["image/png"].strip() for o in outputs[1:]] == [PIXEL] * 2


@pytest.mark.sdk
def test_a_plot_comes_back_as_a_picture(scratch: SharedSession) -> None:
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    answer = scratch.call(plot)
    assert result_of(answer)["error"] == []
    (picture,) = images_of(answer)
    assert base64.b64decode(picture["data"]).startswith(b"\x89PNG")


PICTURE = "from IPython.display import Image\nPNG = b'\\x89PNG\\r\\n\\x1a\\n'\n"
SHOW = "display(Image(PNG + bytes([n]), format='png'))"


@pytest.mark.faults
def test_a_picture_that_is_too_large_is_named(local_trial: Trial) -> None:
    trial = local_trial
    draw = "display(Image(PNG + os.urandom(700_000), format='png'))"
    body = PICTURE + draw
    answer = trial.client.call(trial.code(body), trial.session_id)
    assert [block["type"] for block in answer["content"]] == ["text"]
    (named,) = shown(result_of(answer))
    assert "image/png" in named
    assert "figsize" in named
    trial.survived()


@pytest.mark.faults
def test_pictures_have_900000_characters_together(local_trial: Trial) -> None:
    trial = local_trial
    draw = "for n in range(4):\n"
    draw += "    display(Image(PNG + os.urandom(200_000), format='png'))"
    answer = trial.client.call(trial.code(PICTURE + draw), trial.session_id)
    images = images_of(answer)
    assert len(images) == 3
    assert sum(len(image["data"]) for image in images) <= 900_000
    assert text_of(result_of(answer)).count("image/png") == 1
    trial.survived()


@pytest.mark.faults
def test_pictures_beyond_the_tenth_are_named(local_trial: Trial) -> None:
    trial = local_trial
    body = f"{PICTURE}for n in range(12):\n    {SHOW}"
    answer = trial.client.call(trial.code(body), trial.session_id)
    images = images_of(answer)

    assert len(images) == 10
    assert {image["mimeType"] for image in images} == {"image/png"}
    assert len({image["data"] for image in images}) == 10
    assert text_of(result_of(answer)).count("image/png") == 2
    trial.survived()


@pytest.mark.faults
def test_pictures_of_earlier_code_count_too(local_trial: Trial) -> None:
    """And none is left unsaid."""
    trial = local_trial
    body = f"for n in range(8):\n    {SHOW}"
    trial.begin_alone(f"{PICTURE}wait()\n{body}")
    trial.open_gate()
    answer = trial.client.call(body, trial.session_id)
    assert len(images_of(answer)) == 10
    assert text_of(result_of(answer)).count("image/png") == 6
    trial.survived()


LONG = {
    "printed": ("print('h' * 50_000 + 'é' * 50_000)", "h" * 50_000 + "é" * 50_000),
    "value": ("'v' * 100_000", repr("v" * 100_000)),
    "traceback": ("raise ValueError('t' * 100_000)", "t" * 100_000),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", LONG)
def test_output_beyond_the_limit_lies_in_full_beside_the_notebook(
    trial: Trial, server: JupyterServer, kind: str
) -> None:
    code, full = LONG[kind]
    cut = trial.run_counted(code)
    assert_cut(cut, 100_000)
    path = server.root / path_of_full_text(cut)
    assert path.parent == server.root / "notebooks"
    assert full in path.read_text()
    cell = json.dumps(server.last_cell(trial.session_id), ensure_ascii=False)

    assert len(cell) < 30_000, "the notebook stays small too"
    trial.survived()


@pytest.mark.faults
def test_the_limit_counts_for_the_call_and_spares_errors(trial: Trial) -> None:
    """Errors come last, and whole if they are short."""
    body = "print('a' * 40_000)\ndisplay('b' * 40_000)\nraise ValueError('the reason')"
    cut = trial.run_counted(body)
    assert_cut(cut, 80_000)
    assert cut["result"][0].startswith("aaa")
    assert "the reason" in "".join(cut["error"])
    trial.survived()


MANY_LINES = "\n".join(map(str, range(1, 200_001)))


def test_200000_lines_arrive_whole(clients: Clients) -> None:
    client = clients("--max-output", "2000000")
    assert shown(client.run("seq 200000")) == [MANY_LINES]


def test_many_lines_are_cut_and_whole_in_a_file(
    shell: SharedSession, server: JupyterServer
) -> None:
    cut = shell.run("seq 200000")
    assert_cut(cut, len(MANY_LINES))
    (text,) = shown(cut)
    part = MAX_OUTPUT // 3
    assert text.startswith(MANY_LINES[:part])
    assert text.endswith(MANY_LINES[-part:])
    path = server.root / path_of_full_text(cut)
    assert path.read_text() == MANY_LINES + "\n"


@pytest.mark.faults
def test_up_to_16_mb_of_the_full_text_are_kept(
    local: Client, local_folder: Path
) -> None:
    cut = local.run("for n in range(20_000):\n    print('%07d' % n + '.' * 992)")
    assert cut["error"] == []
    assert_cut(cut, 20_000_000)
    assert cut["result"][0].startswith("0000000...")
    assert "0019999" in cut["result"][-1]
    text = (local_folder / path_of_full_text(cut)).read_text()

    assert 15_000_000 < len(text) < 18_000_000
    assert text.startswith("0000000...")
    assert "0019999" in text[-2000:]


@pytest.mark.faults
def test_endless_output_is_held_in_bounded_memory(
    local: Client, local_trial: Trial
) -> None:
    """And each call is back in time."""
    trial = local_trial
    before = local.memory()
    with within(7):
        first = outcome(
            trial.begin("while True:\n    print('endless ' * 20)", timeout=2)
        )
    grown = local.memory()
    with within(7):
        second = trial.rest(timeout=2)
    for each in (first, second):
        assert "still running" in each["error"][-1].lower(), each["error"]
        assert encoded_size(each) <= MAX_OUTPUT
    assert local.memory() - grown < 60e6, "it grows with the output"
    assert local.memory() - before < 300e6

    with within(15):
        stopped = trial.interrupt()
    assert "KeyboardInterrupt" in text_of(stopped) + text_of(trial.rest())
    trial.survived()


@pytest.mark.faults
@pytest.mark.load
def test_endless_displays_are_held_in_bounded_memory(
    local: Client, local_trial: Trial
) -> None:
    trial = local_trial
    before = local.memory()
    body = "from IPython.display import HTML\n"
    body += "for n in range(400):\n    display(HTML('d' * 1_000_000))"
    displayed = trial.run_counted(body, timeout=60)
    assert encoded_size(displayed) <= MAX_OUTPUT
    assert local.memory() - before < 350e6, "400 MB were displayed"
    trial.survived()


@pytest.mark.load
def test_five_prints_of_100_mb_do_not_add_up(clients: Clients, tmp_path: Path) -> None:
    local = clients("--local", str(tmp_path), server=None)
    trial = Trial(local, tmp_path)
    used = []
    for _ in range(5):
        printed = trial.run("print('x' * 100_000_000)", timeout=60)
        assert printed["error"] == []
        assert encoded_size(printed) <= MAX_OUTPUT
        used.append(local.memory())
    assert used[-1] - used[0] < 30e6, [round(n / 1e6) for n in used]
    trial.run_counted()
    trial.survived()


FLOODS = {
    "iopub_data_rate_limit": "print('x' * 8_000_000)",
    "iopub_msg_rate_limit": "for n in range(2000):\n    print(n, flush=True)",
}


@pytest.mark.faults
def test_output_that_the_server_drops_is_told(
    servers: Servers, clients: Clients, tmp_path: Path
) -> None:
    """With the name of the limit. The server counts over 3 s, here over 1 s."""
    window = "--ZMQChannelsWebsocketConnection.rate_limit_window=1"
    low = "--ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=100"
    server = servers(low, window)
    trial = Trial(clients(server=server), tmp_path)
    for limit, code in FLOODS.items():
        (error,) = trial.run(code)["error"]
        assert limit in error
        assert "missing" in error
        eventually(lambda: trial.run("print('again')")["result"] == ["again"])
    trial.run_counted()
    trial.survived()


PRINTS_5000 = "wait()\nfor n in range(5_000):\n    print(n, flush=True)\n"


@pytest.mark.faults
def test_output_that_a_stalled_server_lost_is_told(
    own_server: JupyterServer, clients: Clients, tmp_path: Path
) -> None:
    """ZeroMQ drops what is beyond its queues, the end of the cell with it.

    Not the reply: how the code ended is known.
    """
    trial = Trial(clients(server=own_server), tmp_path)
    kernel_id = own_server.kernel_id(trial.session_id)
    call = trial.begin(f"{PRINTS_5000}raise ValueError('the reason')")
    own_server.process.send_signal(signal.SIGSTOP)
    trial.open_gate()
    await_silence(own_server.runtime / f"kernel-{kernel_id}.json")
    own_server.process.send_signal(signal.SIGCONT)
    flooded = outcome(call)
    assert flooded["result"][0].startswith("0\n1\n2\n")

    failed, missing = flooded["error"]
    assert "the reason" in failed
    assert missing.startswith("Output is missing")
    trial.survived()


PRINTS_ON = """tell('printed')
while not (folder / 'noticed').exists():
    time.sleep(0.05)
    print('end', flush=True)"""


@pytest.mark.faults
def test_output_dropped_from_the_middle_is_told(
    own_server: JupyterServer, clients: Clients, tmp_path: Path
) -> None:
    """The beginning and the end are there, and nothing else says that it lacks."""
    command = patched(PROGRESS_S=1)
    trial = Trial(clients(server=own_server, command=command), tmp_path)
    call = trial.begin(PRINTS_5000 + PRINTS_ON)
    own_server.process.send_signal(signal.SIGSTOP)
    trial.open_gate()
    trial.await_told("printed")
    own_server.process.send_signal(signal.SIGCONT)
    eventually(lambda: "end" in trial.client.progress, 30)
    trial.open_gate("noticed")
    dropped = outcome(call)
    text = dropped["result"][0]
    assert text.startswith("0\n1\n2\n")
    assert text.endswith("end")
    assert "\n4999\n" not in text

    (missing,) = dropped["error"]
    assert missing.startswith("Output is missing")
    trial.survived()


# --- Language -------------------------------------------------------------------------


class FakeEvents:
    """IPython's events, as far as the helper uses them."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Any]] = {"pre_run_cell": [], "post_run_cell": []}

    def register(self, event: str, function: Any) -> None:
        self.callbacks[event].append(function)

    def unregister(self, event: str, function: Any) -> None:
        self.callbacks[event].remove(function)


class FakeShell:
    """IPython, as far as the helper asks it when it decides."""

    def __init__(self, variables: dict[str, Any]) -> None:
        self.user_ns = {"exit": exit, **variables}
        self.user_ns_hidden = {"exit": exit}
        self.events = FakeEvents()
        self.execution_count = 1
        self.user_ns.setdefault("In", [])
        self.user_ns_hidden["In"] = self.user_ns["In"]

    def run_line_magic(self, name: str, line: str) -> list[str]:
        assert (name, line) == ("who_ls", "")
        hidden = self.user_ns_hidden
        own = [
            each for each in self.user_ns if self.user_ns[each] is not hidden.get(each)
        ]
        return sorted(own)


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Callable[..., jim.KernelHelper]:
    """Make helpers that need no kernel, with variables of a user."""
    monkeypatch.setenv("PATH", os.environ["PATH"])

    def make(**variables: Any) -> jim.KernelHelper:
        return jim.KernelHelper("helper_of_a_test", 1, FakeShell(variables), None)

    return make


def decide(helper: jim.KernelHelper, code: str) -> tuple[str, str, str]:
    """Return the language of a cell, its text and its hint, as a session finds them."""
    settled = jim.settle(code)
    if settled.language is not jim.Language.UNKNOWN:
        return settled.language.value, settled.text, ""
    cell = helper.python_cell(settled.text)
    if cell is None:
        return BASH, settled.text, ""
    return PYTHON, cell["cell"], cell["hint"]


# Each row: the cell, its language, its text without what surrounded it.
SURROUNDED = [
    ("\ufeffecho hi", BASH, "echo hi"),
    ("\ufeffprint(1)", PYTHON, "print(1)"),
    ("```python\nprint(1)\n```", PYTHON, "print(1)"),
    ("```py\nls -d /tmp\n```\n", BASH, "ls -d /tmp"),
    ("```\nls -d /tmp\n```", BASH, "ls -d /tmp"),
    ("```bash\nx=1\necho $x\n```", BASH, "x=1\necho $x"),
    ("```sh\r\nprint\r\n```", BASH, "print"),
    ("```json\n{}\n```", PYTHON, "```json\n{}\n```"),
    ("$ ls", BASH, "ls"),
    ("$ cd /tmp\n$ ls", BASH, "cd /tmp\nls"),
    ("# why\n%%bash\necho hi", BASH, "# why\necho hi"),
    ("# why\n\n%%time\n1 + 1", PYTHON, "%%time\n1 + 1"),
    ("%%bash\necho hi", BASH, "echo hi"),
    ("# why\n%pwd", PYTHON, "# why\n%pwd"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("code", "language", "text"), SURROUNDED)
def test_what_surrounds_a_cell_does_not_change_its_meaning(
    helper: Callable[..., jim.KernelHelper], code: str, language: str, text: str
) -> None:
    assert decide(helper(), code)[:2] == (language, text)


# Each row: the cell, its language. `df`, `tee`, `x` are variables, `git` is a module.
WITH_VARIABLES = [
    ("df > 3 and", PYTHON),
    ("tee += 1 0", PYTHON),
    ("df", PYTHON),
    ("df -h", PYTHON),
    ("x = tee 1", PYTHON),
    ("git status", BASH),
    ("git -1", PYTHON),
    ("ls -la", BASH),
]


# No variables: each would create files if bash ran it.
ASSIGNMENTS = [
    ("tee += 1 0", PYTHON),
    ("tee -= 1 0", PYTHON),
    ("tee //= 1 0", PYTHON),
    ("tee **= 1 0", PYTHON),
    ("tee >>= 1 0", PYTHON),
    ("tee := 1 0", PYTHON),
    ("echo === title ===", BASH),
    ("tee == 1 0", PYTHON),
    ("tee = touch harm", PYTHON),
    ("tee : int = 1 0", PYTHON),
    ("tee , x = 1 0", PYTHON),
    ("x=5 tee", BASH),
    ("test x = x", BASH),
    ("[ x = x ] && true", BASH),
]


COMMANDS_AND_BUILTINS = [
    ("df", PYTHON),
    ("  # disks\ndf  # all\n", PYTHON),
    ("df -h", BASH),
    ("ls", BASH),
    ("env", BASH),
    ("date", BASH),
    ("exit", PYTHON),
    ("exit 3", BASH),
    ("set -e", PYTHON),
    ("set -euo pipefail\ntrue | true", BASH),
    ("type ls", BASH),
    ("eval 'echo hi'", BASH),
    ("exec 2>&1; echo hi", BASH),
    ("id", PYTHON),
    ("ls-la", PYTHON),
    ("nvidia-smi-of-nobody", PYTHON),
]


@pytest.mark.pure
@pytest.mark.parametrize(("code", "language"), WITH_VARIABLES)
def test_a_variable_of_the_user_is_never_a_command(
    helper: Callable[..., jim.KernelHelper], code: str, language: str
) -> None:
    variables = {"df": 1, "tee": 2, "x": 3, "git": json}
    assert decide(helper(**variables), code)[0] == language


@pytest.mark.pure
@pytest.mark.parametrize(("code", "language"), ASSIGNMENTS + COMMANDS_AND_BUILTINS)
def test_assignments_are_python_and_builtins_of_bash_are_bash(
    helper: Callable[..., jim.KernelHelper], code: str, language: str
) -> None:
    assert decide(helper(), code)[0] == language


# Each row: the cell, what the hint holds ("": there is none).
HINTS = [
    ("nvidia-smi-x", "bash: nvidia-smi-x: command not found"),
    ("ffmpegx -i in.mp4 out.gif", "bash: ffmpegx: command not found"),
    ("for i in 1 2; do echo $i", "syntax error"),
    ("if true; then echo", "syntax error"),
    ("echo 'open", "unexpected EOF"),
    ("df", "%%bash"),
    ("for i in range(3)\n  print(i)", ""),
    ("import x y", ""),
    ("x = [1, 2", ""),
    ("foo(1 2)", ""),
    ("Hello there", ""),
    ("a_b and c", ""),
]


@pytest.mark.pure
@pytest.mark.parametrize(("code", "said"), HINTS)
def test_what_looks_like_a_command_gets_a_hint(
    helper: Callable[..., jim.KernelHelper], code: str, said: str
) -> None:
    language, _, hint = decide(helper(), code)
    assert language == PYTHON
    assert said in hint
    assert bool(hint) is bool(said)
    assert ("%%bash" in hint) is bool(said)


INSTALLERS = [
    ("pip --version", BASH, None),
    ("pip install x\n# and\nuv run y", BASH, None),
    ("pip install x && python -c 'import x'", BASH, None),
    ("pip install x\nls -la", BASH, "pip install x\nls -la"),
    ("pip install x\necho hi | cat", BASH, None),
    ("pip install x\nimport x", PYTHON, "!python3 -m pip install x\nimport x"),
    (
        "pip install \\\n  x\nimport x",
        PYTHON,
        "!python3 -m pip install \\\n  x\nimport x",
    ),
    (
        "import os\npip install x\n!ls",
        PYTHON,
        "import os\n!python3 -m pip install x\n!ls",
    ),
    ("x = '''\npip install x\n'''", PYTHON, "x = '''\npip install x\n'''"),
    ("cat > f <<EOF\npip install x\nEOF", BASH, None),
    ("uvx-of-nobody run x", PYTHON, None),
    ("x = 1\nconda install y", PYTHON, "x = 1\n!conda install y"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("code", "language", "text"), INSTALLERS)
def test_installers_are_turned_towards_the_environment_of_python(
    helper: Callable[..., jim.KernelHelper],
    code: str,
    language: str,
    text: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's own is first on the PATH; a `uv` stands there, if none does."""
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    made = helper()
    monkeypatch.setenv("PATH", os.environ["PATH"] + os.pathsep + str(tmp_path))
    found = decide(made, code)
    assert found[0] == language
    assert text is None or found[1] == text


HERE_LINES = [
    "plain {}",
    "% percent {}",
    "!bang {}",
    "what {}?",
    "pip install x{}",
    "'\"{}",
]


@pytest.mark.pure
@pytest.mark.parametrize("line", HERE_LINES)
@pytest.mark.parametrize("magic", ["", "%%bash\n"])
def test_a_here_document_of_5000_lines_is_decided_on_at_once(
    helper: Callable[..., jim.KernelHelper], line: str, magic: str
) -> None:
    """No timing: what is quadratic in the lines would take minutes."""
    text = "\n".join(line.format(number) for number in range(5000))
    assert decide(helper(), f"{magic}cat > f <<'EOF'\n{text}\nEOF\n")[0] == BASH


@pytest.mark.pure
def test_a_huge_cell_is_not_parsed_in_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def parse(*_: Any) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(ast, "parse", parse)
    rows = "x.append([1, 2, 3])\n" * 200_000
    assert jim.settle(rows).language is jim.Language.UNKNOWN
    assert jim.settle("x = 1\nprint()\n" + rows).language is jim.Language.PYTHON


@pytest.mark.pure
@pytest.mark.parametrize("code", ["(" * 64_000 + ")" * 64_000, "-" * 128_000 + "1"])
def test_deep_python_without_a_blank_is_python(
    helper: Callable[..., jim.KernelHelper], code: str
) -> None:
    assert decide(helper(), code)[0] == PYTHON


TERMINALS = [
    ("vim x.txt", True),
    ("cd src && nano y", True),
    ("echo hi\nwatch -n1 date", True),
    ("sudo vi /etc/hosts", True),
    ("vim -es -c 'wq' x", False),
    ("emacs --batch -l x.el", False),
    ("ls vim", False),
    ("vimdiff a b", False),
    ("./vim", False),
    ("cat > f <<EOF\nvim\nEOF", False),
]


@pytest.mark.pure
@pytest.mark.parametrize(("script", "waits"), TERMINALS)
def test_programs_that_wait_for_a_terminal_are_known(script: str, waits: bool) -> None:
    assert jim.BashCommand.waits(script) is waits


def helper_source() -> str:
    """Return what is sent to the kernel."""
    compiled = r"builtins\.compile\((.*), '_jupyter\w+', \"exec\"\)"
    (source,) = re.findall(compiled, jim.install_code())
    return str(ast.literal_eval(source))


@pytest.mark.pure
def test_the_helper_is_python_3_8_and_complete() -> None:
    tree = ast.parse(helper_source(), feature_version=(3, 8))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    loaded = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    nodes = list(ast.walk(tree))
    defined = {node.arg for node in nodes if isinstance(node, ast.arg)}
    defined |= {
        node.name
        for node in nodes
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler))
        and node.name
    }
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(name.asname or name.name).split(".")[0] for name in node.names}
    annotations = {"Any", "Callable", "Iterator"}
    assert loaded - stored - defined - set(dir(builtins)) <= annotations


@pytest.mark.pure
def test_a_newer_helper_takes_the_state_of_an_older_one(
    helper: Callable[..., jim.KernelHelper],
) -> None:
    older = helper()
    older.state = "restoring"
    older.last = "a message"
    newer = jim.KernelHelper(older.__name__, 2, older.shell, older)
    assert (newer.state, newer.last) == ("restoring", "a message")
    callbacks = newer.shell.events.callbacks
    assert callbacks["pre_run_cell"] == [newer.begin_cell]
    assert callbacks["post_run_cell"] == [newer.end_cell]


SILENT_FAILURES = [
    ("!ls /no/such", "status 2"),
    ("!ls /no/such\nprint('on')", "status 2"),
    ("!false\n!true", "status 1"),
    ("%run ../failing.py", "ValueError: five"),
    ("%run ../leaving.py", "SystemExit: 1"),
    ("pip install --no-index no-such-package-of-nobody", "status 1"),
    ("vim x", "terminal"),
    ("!vim x", "status 1"),
]


@pytest.mark.parametrize(("code", "error"), SILENT_FAILURES)
def test_a_failure_that_raises_nothing_is_told_once(
    shell: SharedSession, code: str, error: str
) -> None:
    shell.run("%%bash\necho 'raise ValueError(\"five\")' > ../failing.py")
    shell.run("%%bash\necho 'import sys; sys.exit(1)' > ../leaving.py")
    assert error in "".join(shell.run(code)["error"])
    assert shell.run("21 * 2")["error"] == []


def test_a_status_before_the_cell_is_not_told(shell: SharedSession) -> None:
    shell.run("!false")
    assert shell.run("_exit_code")["result"] == ["1"]
    assert shell.run("_exit_code")["error"] == []
    assert shell.run("!true")["error"] == []


# A cell that is Python and fails -> the line more, and that %%bash forces bash.
HINTED = [
    ("nvidia-smi-of-nobody", "bash: nvidia-smi-of-nobody: command not found"),
    ("ffmpegx -i in.mp4 out.gif", "bash: ffmpegx: command not found"),
    ("for i in 1 2; do echo $i", "syntax error: unexpected end of file"),
]


@pytest.mark.parametrize(("code", "said"), HINTED)
def test_an_error_says_what_bash_said_of_it(
    shell: SharedSession, code: str, said: str
) -> None:
    (error,) = shell.run(code)["error"]
    assert re.search("NameError|SyntaxError", error)
    assert said in error
    assert "%%bash" in error


def test_broken_python_on_variables_makes_no_files(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("mkdir -p variables && cd variables")
    client.run("df = tee = 1", session_id)
    for code in ("df > 3 and", "tee += 1 0"):
        assert "SyntaxError" in client.run(code, session_id)["error"][0]
    assert os.listdir(server.root / "notebooks" / "variables") == []


def test_one_session_has_one_python(client: Client) -> None:
    expected = [str(Path(sys.executable).with_name("python"))]
    session_id = client.open()
    assert client.run("which python", session_id)["result"] == expected
    assert client.run("!which python", session_id)["result"] == expected
    code = "import subprocess; print(subprocess.getoutput('which python'))"
    assert client.run(code, session_id)["result"] == expected


def test_in_a_virtual_environment_pip_goes_where_python_is(client: Client) -> None:
    session_id = client.open("python -m venv --without-pip appenv")
    client.run("source appenv/bin/activate", session_id)
    for code in ("pip --version", "x = 1\npip --version", "%%bash\npip --version"):
        told = text_of(client.run(code, session_id))
        assert re.search("appenv/bin/python3?: No module named pip", told)


def test_the_kernels_matplotlib_backend_does_not_reach_bash(client: Client) -> None:
    session_id = client.open("import os")
    assert client.run("'MPLBACKEND' in os.environ", session_id)["result"] == ["True"]
    assert client.run("echo ${MPLBACKEND-none}", session_id)["result"] == ["none"]
    client.run("export MPLBACKEND=agg", session_id)
    assert client.run("echo $MPLBACKEND", session_id)["result"] == ["agg"]


@pytest.mark.parametrize("line", HERE_LINES)
def test_here_documents_are_written_whole(
    shell: SharedSession, server: JupyterServer, line: str
) -> None:
    text = "\n".join(line.format(number) for number in range(5000))
    with within(5):
        assert shown(shell.run(f"cat > ../long.txt <<'EOF'\n{text}\nEOF")) == []
    written = server.root / "notebooks" / "shell" / "../long.txt"
    assert written.read_text() == text + "\n"


def test_bash_names_the_lines_of_the_script(shell: SharedSession) -> None:
    result = shell.run("true\nnosuchcommand\ntrue\necho $LINENO")
    assert result["result"] == ["bash: line 2: nosuchcommand: command not found\n4"]


@pytest.mark.faults
def test_quick_interrupts_end_a_command_and_leave_no_file(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("export SECRET_OF_THE_TEST=1")
    mark = f"{1000 + secrets.randbelow(10**6)}.5"
    before = set(os.listdir("/tmp"))
    call = client.start(f"trap '' INT TERM; echo begun; sleep {mark}", session_id)
    eventually(lambda: running(mark))
    for _ in range(4):
        server.api("POST", f"kernels/{server.kernel_id(session_id)}/interrupt")
    assert "KeyboardInterrupt" in text_of(outcome(call, 20))
    assert not running(mark)
    for name in set(os.listdir("/tmp")) - before:
        path = Path("/tmp", name)
        assert not path.is_file() or b"SECRET_OF_THE_TEST" not in path.read_bytes()
    assert client.run("echo $SECRET_OF_THE_TEST", session_id)["result"] == ["1"]


@pytest.mark.faults
def test_a_command_ends_when_its_kernel_is_killed(mortal: Trial) -> None:
    kernel = mortal.kernel_process()
    mark = f"{1000 + secrets.randbelow(10**6)}.5"
    call = mortal.start(f"sleep {mark} & sleep {mark} | cat")
    eventually(lambda: len(running(mark)) == 2)
    kernel.kill()
    eventually(lambda: not running(mark), 5)
    assert outcome(call)["error"] != []


def test_an_environment_too_large_for_bash_is_told(client: Client) -> None:
    session_id = client.open("import os; os.environ['BIG'] = 'x' * 300_000")
    (error,) = client.run("echo hi", session_id)["error"]
    assert error.startswith("bash could not be started")
    client.run("del os.environ['BIG']", session_id)
    assert client.run("echo hi", session_id)["result"] == ["hi"]


def test_cells_of_a_person_are_not_touched_by_the_helper(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("echo hi")
    kernel_id = server.kernel_id(session_id)
    assert server.run_as_person(kernel_id, "!false\n1") == "1"
    assert client.run("21 * 2", session_id)["error"] == []


# Each row: the cell, whose it is. Rule 1: magics and explicit IPython syntax.
RULE_1 = [
    ("%%bash\necho hi", BASH),
    ("%%bash\nprint(1)", BASH),
    ("%%bash\nx = 1", BASH),
    ("%%bash", BASH),
    ("%%time\n1 + 1", PYTHON),
    ("%%capture\nls", PYTHON),
    ("%%sh\nls", PYTHON),
    ("%pwd", PYTHON),
    ("%time 1 + 1", PYTHON),
    ("!echo hi", PYTHON),
    ("!ls | wc -l", PYTHON),
    ("! true && false", PYTHON),
    ("len?", PYTHON),
    ("?len", PYTHON),
    ("y = !echo hi", PYTHON),
    ("y = %pwd", PYTHON),
    ("pip --version", BASH),
    ("import os\npip --version", PYTHON),
    ("# first\n%pwd", PYTHON),
    ("ls", BASH),
    ("pwd", BASH),
    ("cd . && true", BASH),
    ("cat /dev/null", BASH),
    ("mkdir -p d", BASH),
    ("man --version || true", BASH),
    ("history 1 | cat", BASH),
    ("alias", BASH),
    ("env", BASH),
]
# Rule 2: what compiles is Python, unless it begins with a name that only bash knows.
RULE_2 = [
    ("cd .\npip --version", BASH),
    ("date # and then\npip --version", BASH),
    ("x = 1", PYTHON),
    ("print(1)", PYTHON),
    ("21 * 2", PYTHON),
    ("'ls'", PYTHON),
    ("[1]", PYTHON),
    ("await __import__('asyncio').sleep(0)", PYTHON),
    ("async def f(): pass\nawait f()", PYTHON),
    ("ls -la", BASH),
    ("df -h > /dev/null", BASH),
    ("ps -ef | head -5", BASH),
    ("ls; pwd", BASH),
    ("date", BASH),
    ("cat << EOF\nhello\nEOF", BASH),
    ("ls /tmp", BASH),
    ("true & wait", BASH),
    ("wc -l < /dev/null", BASH),
    ("python --version", BASH),
    ("ls -la # all", BASH),
    ("# list\nls", BASH),
    ("\n\n  \nls -la\n\n", BASH),
    ("echo", BASH),
    ("ls\npwd\ndate", BASH),
    ("test -d /tmp", BASH),
    ("nosuchcommand -v", PYTHON),
    ("undefined", PYTHON),
    ("undefined.attribute", PYTHON),
    ("df.head()", PYTHON),
    ("df[0]", PYTHON),
    ("date.today()", PYTHON),
    ("ls(1)", PYTHON),
    ("id", PYTHON),
    ("dir", PYTHON),
    ("help", PYTHON),
    ("set -e", PYTHON),
    ("id -u", PYTHON),
    ("time.sleep(1)", PYTHON),
    ("x = 1\nls", PYTHON),
    ("import os\nls", PYTHON),
    ("a_b and c", PYTHON),
    ("ls = 5", PYTHON),
    ("ls", PYTHON),
    ("ls -la", PYTHON),
    ("del ls", PYTHON),
    ("ls", BASH),
    ("def date(): return 1", PYTHON),
    ("date", PYTHON),
    ("del date", PYTHON),
    ("(ls -la)", PYTHON),
    ("-ls", PYTHON),
    ("not ls", PYTHON),
    ("lambda: 0", PYTHON),
    ("...", PYTHON),
    ("class ls: pass", PYTHON),
    ("del ls", PYTHON),
    ("", None),
    ("# only a comment", PYTHON),
]
# Rule 3: what does not compile is bash if bash can parse it and run its first word.
RULE_3 = [
    ("./no-such-script.sh --flag", BASH),  # bash says why it cannot run it
    ("~/no-such-script.sh a b", BASH),
    ("ls\0 -d .", BASH),
    ("echo hi", BASH),
    ("echo 'it''s'", BASH),
    ("git --version", BASH),
    ("export A=1", BASH),
    ("A=1 env", BASH),
    ("A=1 B='two words' C=$(echo x) env", BASH),
    ("FOO=bar\necho $FOO", BASH),
    ("# why\n# and how\n\necho hi", BASH),
    ("#!/bin/bash\nset -euo pipefail\necho hi", BASH),
    ("set -e\necho hi", BASH),
    ("for i in 1 2 3; do echo $i; done", BASH),
    ("cd ..; cd -", BASH),
    ("while true; do break; done", BASH),
    ("if [ -d /tmp ]; then echo yes; fi", BASH),
    ("if true\nthen\n  echo yes\nfi", BASH),
    ("case a in a) echo yes;; esac", BASH),
    ("until true; do :; done", BASH),
    ("[ -d /tmp ] && echo yes", BASH),
    ("[[ a == b ]] || echo no", BASH),
    ("f() { echo hi; }\nf", BASH),
    ("function g { echo hi; }; g", BASH),
    ("{ echo a; echo b; }", BASH),
    ("( cd /tmp; pwd )", BASH),
    ("(cd /tmp && pwd)", BASH),
    ("cat <<'EOF' | wc -l\nprint(1)\nEOF", BASH),
    ("cat > f.txt <<EOF\nimport x y\nEOF", BASH),
    ("/bin/ls /tmp > /dev/null", BASH),
    (". /dev/null", BASH),
    ("source /dev/null", BASH),
    ("time sleep 0", BASH),
    ("ls *.nothing || true", BASH),
    ("find . -name '*.x'", BASH),
    ("echo $((1 + 2))", BASH),
    ("python -c 'print(1)'", BASH),
    ("exec 2>&1; echo hi", BASH),
    ("ls \\\n  -la", BASH),
    ("command -v ls", BASH),
    ("type ls", BASH),
    ("printf '%s\\n' a b", BASH),
    ("sudo_or_not=1; echo $sudo_or_not", BASH),
    ("exit 0", BASH),
    ("$SHELL --version || echo", BASH),
    ("select_me=1 :", BASH),
    ("echo 'a\nb'", BASH),
    ("nosuchcommand --long option", PYTHON),
    ("Hello there, what is this?", PYTHON),
    ("foo bar baz", PYTHON),
    ("echo 'unclosed", PYTHON),
    ("if true; then echo", PYTHON),
    ("for i in 1 2", PYTHON),
    ("ls | | wc", PYTHON),
]


@pytest.mark.parametrize("rows", [RULE_1, RULE_2, RULE_3], ids=["1", "2", "3"])
def test_whose_language_a_cell_is_in(
    client: Client, server: JupyterServer, rows: list[tuple[str, str | None]]
) -> None:
    """`pip` is kept as the command that it stands for."""
    session_id = client.open()
    wrong = []
    for code, expected in rows:
        result = client.run(code, session_id)
        if expected is None:
            continue
        saved = sources(server.notebook(session_id))[-1]
        if language_of(saved) != expected:
            wrong.append((code, "is not", expected, result))
        if code.removeprefix("%%bash\n").strip() not in saved.replace(
            "!python3 -m pip", "pip"
        ):
            wrong.append((code, "is shown as", saved, result))
    assert wrong == []


# Each would create the file `harm` if bash ran it, as far as it can.
BROKEN_PYTHON = [
    "import x y",
    'print "a"',
    "print 'a'; touch harm",
    "print a > harm",
    "def f(:",
    "x = [1,2",
    "x = = 1",
    "x =touch harm",
    "test = touch harm",
    "echo = (touch harm",
    "cat = [1,\ntouch harm",
    "true = 1 2",
    "ls =1 2",
    "touch\t= harm x",
    "import os; touch harm",
    "from os import\ntouch harm",
    "return touch harm",
    "del touch harm",
    "assert touch harm",
    "class A\ntouch harm",
    "with x\n touch harm",
    "try\ntouch harm",
    "lambda touch harm",
    "async touch harm",
    "await touch harm",
    "yield touch harm",
    "raise touch harm",
    "pass touch harm",
    "global touch harm",
    "not touch harm",
    "None touch harm",
    "True touch harm",
    "finally touch harm",
    "if x == 1\n  touch harm",
    "for i in [1, 2]\n  touch harm",
    "while x < 3\n  touch harm",
    "else touch harm",
    "elif touch harm",
    "is touch harm",
    "or touch harm",
    "  x = 1\n y = 2; touch harm",
    "print(1",
    "print(1))\ntouch harm",
    "x = 'a\ntouch harm",
    "f(1 2)",
    "'touch harm",
    "1touch harm",
    "x.y z",
    "x += touch harm",
    "x: int = touch harm",
    "break touch harm",
    "continue touch harm",
    "nonlocal touch harm",
    "except touch harm",
    "in touch harm",
    "@touch harm",
    "except Exception as e:\n  touch harm",
    "match x\n  touch harm",
    "echo == touch harm",
]


def test_a_broken_python_cell_is_never_run_as_bash(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("import os; os.makedirs('broken'); os.chdir('broken')")
    errors = [str(client.run(code, session_id)["error"]) for code in BROKEN_PYTHON]
    its_own = re.compile("SyntaxError|IndentationError")
    assert [error for error in errors if not its_own.search(error)] == []
    saved = sources(server.notebook(session_id))
    assert [cell for cell in saved if language_of(cell) == BASH] == []
    assert os.listdir(server.root / "notebooks" / "broken") == []
    assert client.run("21 * 2", session_id)["result"] == ["42"]


INSTALLS = ["pip {}", "%pip {}", "x = 5\npip {}"]


def test_package_installers_serve_the_kernels_environment(
    client: Client, server: JupyterServer
) -> None:
    """A package `pip` in the working directory stands for the real one."""
    folder = server.root / "notebooks" / "installers" / "pip"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    told = "import sys; print('pip of', sys.executable, sys.argv[1:])"
    (folder / "__main__.py").write_text(told)
    session_id = client.open("cd installers")
    for install in INSTALLS:
        cell = install.format("install 'a b>=1' -q")
        result = client.run(cell, session_id)["result"]
        assert f"pip of {Path(sys.executable).parent}" in result[0]
        assert "['install', 'a b>=1', '-q']" in result[0]
    assert client.run("x", session_id)["result"] == ["5"]
    client.run("pip = 5", session_id)
    assert client.run("pip", session_id)["result"] == ["5"]


OWN_UV = """mkdir -p own/bin && cd own
printf '#!/bin/sh\\necho mine "$@"\\n' > bin/uv && chmod +x bin/uv
export PATH=$PWD/bin:$PATH"""


def test_a_program_named_uv_on_the_path_runs(client: Client) -> None:
    """It need not be in the kernel's environment."""
    session_id = client.open(OWN_UV)
    assert shown(client.run("uv run x.py", session_id)) == ["mine run x.py"]


# A cell in bash -> the pattern of what it shows. URL is the server's.
# fmt: off
COMMANDS: list[tuple[str, str]] = [
    ("pwd", r".*/shell"),
    ("mkdir -p src/deep && cd src && pwd", r".*/shell/src"),
    ("cd ..", ""),
    ("basename $PWD", "shell"),
    ("echo hello world", "hello world"),
    ("touch a.txt 'b c.txt'; ls", r"a\.txt\nb c\.txt\nsrc"),
    ("ls -la | head -2", r"total .*\ndrwx.* \."),
    ("ls -l a.txt", r"-rw\S* +1 .* a\.txt"),
    ("printf 'one\\ntwo\\nthree\\n' > lines.txt", ""),
    ("cat lines.txt", "one\ntwo\nthree"),
    ("head -n 1 lines.txt", "one"),
    ("tail -1 lines.txt", "three"),
    ("wc -l lines.txt", r" *3 lines\.txt"),
    ("wc -l < lines.txt", " *3"),
    ("grep -n tw lines.txt", "2:two"),
    ("grep -rn three . | sort", r"\./lines\.txt:3:three"),
    ("sed -i 's/two/2/' lines.txt && sed -n 2p lines.txt", "2"),
    ("awk '{print NR\": \"$1}' lines.txt", "1: one\n2: 2\n3: three"),
    ("sort -r lines.txt | uniq -c | awk '{print $2}'", "three\none\n2"),
    ("tr a-z A-Z < lines.txt | cut -c1-2", "ON\n2\nTH"),
    ("find . -name '*.txt' | sort", r"\./a\.txt\n\./b c\.txt\n\./lines\.txt"),
    ("find . -type f -print0 | xargs -0 ls -1 | wc -l", " *3"),
    ("tar czf x.tgz lines.txt && tar tzf x.tgz", r"lines\.txt"),
    ("du -sh .", r"[\d.]+K\t\."),
    ("df -h", r"Filesystem .*(\n.*)+"),
    ("ps aux | head -3", r"USER .*(\n.*)+"),
    ("ps -ef | grep -c '[p]s -ef'", r"[1-9]\d*"),
    ("env | grep ^HOME=", "HOME=.+"),
    ("export GREETING='hi there' && echo $GREETING", "hi there"),
    ('echo "$GREETING" | tee -a lines.txt', "hi there"),
    ("date +%Y", r"20\d\d"),
    ("whoami", r"\w+"),
    ("uname -a", r"\w+ .*"),
    ("which python", ".*/python"),
    ("python --version", rf"Python {sys.version_info[0]}\.{sys.version_info[1]}\..*"),
    ('python -c "import sys; print(sys.prefix)"', re.escape(sys.prefix)),
    ("python -m json.tool <<< '{\"a\": 1}'", r'\{\n    "a": 1\n\}'),
    ("cat > hi.py <<'EOF'\nimport sys\nprint('hi', *sys.argv[1:])\nEOF\npython hi.py there", "hi there"),
    ("printf '#!/bin/bash\\necho run $1\\n' > run.sh && chmod +x run.sh && ./run.sh now", "run now"),
    ("git init -q . && git config user.email a@b && git config user.name A", ""),
    ("git add -A && git commit -qm 'first' && git log --oneline", r"[0-9a-f]{7,} first"),
    ("git log", r"commit [0-9a-f]{40}\nAuthor: A <a@b>\nDate: .*\n\n    first"),
    ("echo more >> a.txt; git status --short", r" M a\.txt"),
    ("git diff", r"diff --git a/a\.txt b/a\.txt\n(.*\n)*\+more"),
    ("git diff --stat | cat", r" a\.txt \| 1 \+\n.*"),
    ("curl -s URL/api", r'\{"version": ".*"\}'),
    ("curl -sS -o /dev/null -w '%{http_code}' URL/api/kernelspecs", "403"),
    ("printf 'all:\\n\\t@echo made $(X)\\n' > Makefile && make", "made"),
    ("make X=it", "made it"),
    ("make -n", "echo made ?"),
    ("diff <(echo a) <(echo a) && echo same", "same"),
    ('for f in *.txt; do echo "$f"; done', r"a\.txt\nb c\.txt\nlines\.txt"),
    ("i=0; while [ $i -lt 3 ]; do i=$((i+1)); done; echo $i", "3"),
    ("if [ -f a.txt ]; then echo there; else echo not; fi", "there"),
    ("seq 3 | paste -sd+ | sed 's/$/\\n/' | head -1", r"1\+2\+3"),
    ("[[ lines.txt =~ ^l.*t$ ]] && echo match", "match"),
    ("a=(x y z); echo ${#a[@]} ${a[1]}", "3 y"),
    ("nproc", r"\d+"),
    ("ln -s a.txt link && readlink link", r"a\.txt"),
    ("rm -rf src x.tgz link && ls", r"Makefile\na\.txt\nb c\.txt\nhi\.py\nlines\.txt\nrun\.sh"),
]
# fmt: on


def test_commands_do_what_they_do_in_a_terminal(
    shell: SharedSession, server: JupyterServer
) -> None:
    wrong = []
    for code, pattern in COMMANDS:
        result = shell.run(code.replace("URL", server.url))
        if result["error"] or not re.fullmatch(pattern, "\n".join(result["result"])):
            wrong.append((code, result))
    assert wrong == []


# A cell in bash -> texts and error; * stands for anything, None for any result.
# fmt: off
STATUSES: list[tuple[str, list[str] | None, str]] = [
    ("exit 3", [], "Command exited with status 3"),
    ("false", [], "Command exited with status 1"),
    ("grep -c zzz /dev/null", ["0"], "Command exited with status 1"),
    ("ls /no/such/thing", ["ls: cannot access '/no/such/thing': No such file or directory"], "Command exited with status 2"),
    ("echo a; nosuchcommand; echo b", ["a\n*nosuchcommand: command not found\nb"], ""),
    ("echo a; nosuchcommand", ["a\n*nosuchcommand: command not found"], "Command exited with status 127"),
    ("set -e\nfalse\necho never", [], "Command exited with status 1"),
    ("set -euo pipefail\nfalse | cat\necho never", [], "Command exited with status 1"),
    ("set -u\necho $NO_SUCH_VARIABLE\necho never", ["*unbound variable"], "Command exited with status *"),
    ("%%bash\nset -x\ntrue", ["+* true"], ""),
    ("f() { return 7; }\nf", [], "Command exited with status 7"),
    ("(exit 4)", [], "Command exited with status 4"),
    ("kill -9 $$", [], "*SIGKILL*"),
    ("kill -TERM $$", [], "*SIGTERM*"),
    ("bash -c 'kill -SEGV $$'", None, "*SIGSEGV*"),
    ("echo a; echo b >&2; echo c", ["a\nb\nc"], ""),
    ("printf abc", ["abc"], ""),
    ("printf 'a\\n\\n'", ["a\n"], ""),
    ("true", [], ""),
    ("# nothing\n:", [], ""),
    ("printf 'a\\xff\\xfeb\\n'", ["a\ufffd\ufffdb"], ""),
    ("printf 'é漢🎉'", ["é漢🎉"], ""),
    ("printf '\\303'; sleep 0.2; printf '\\251\\n'", ["é"], ""),
    ("printf '\\e[31mred\\e[0m\\n'", ["red"], ""),
    ("cat", [], ""),
    ('read line || echo "end of input"', ["end of input"], ""),
    ("python -c 'print(input())' 2>&1 | tail -1", ["EOFError: EOF when reading a line"], ""),
    ("[ -t 0 ] || [ -t 1 ] || echo no terminal", ["no terminal"], ""),
    ("echo $TERM; echo ${FORCE_COLOR-none}", ["dumb\nnone"], ""),
    ("ls --color=auto -d /tmp", ["/tmp"], ""),
    ("cat <<A; cat <<'B'\n$((1 + 1))\nA\n$((1 + 1))\nB", ["2\n$((1 + 1))"], ""),
    ("echo $0 $#", ["bash 0"], ""),
    ("head -c 300000 /dev/urandom | wc -c", ["300000"], ""),
    ("yes | head -1", ["y"], ""),
    ('x=$(cat <<\'EOF\'\nit\'s "quoted" \\ `here`\nEOF\n)\necho "$x"', ['it\'s "quoted" \\ `here`'], ""),
    ("echo a\r\necho b\r\n", ["a\nb"], ""),
]
# fmt: on


@pytest.mark.parametrize(("code", "result", "error"), STATUSES)
def test_output_and_exit_status_of_commands(
    shell: SharedSession, code: str, result: list[str] | None, error: str
) -> None:
    answer = shell.run(code)
    if result is not None:
        assert len(answer["result"]) == len(result), answer
        assert matches("\n".join(answer["result"]), "\n".join(result)), answer
    assert len(answer["error"]) == bool(error), answer
    assert matches("".join(answer["error"]), error), answer
    assert shell.run("%%bash\necho on")["result"] == ["on"]


def test_random_bytes_are_shown_somehow(shell: SharedSession) -> None:
    (text,) = shown(shell.run("head -c 20000 /dev/urandom"))
    assert "\ufffd" in text
    assert shell.run("21 * 2")["result"] == ["42"]


# A sequence of cells in one session and what each prints: what carries over, both ways.
# fmt: off
SHARED_CELLS: list[tuple[str, str]] = [
    ("mkdir -p shared/inner 'shared/with space' && cd shared && pwd", "SHARED"),
    ("pwd", "SHARED"),
    ("import os; print(os.getcwd())", "SHARED"),
    ("os.chdir('inner')", ""),
    ("pwd", "SHARED/inner"),
    ("cd '../with space'; (cd /tmp; export INNER=1; pwd)", "/tmp"),
    ("pwd; echo ${INNER-unset}", "SHARED/with space\nunset"),
    ("cd .. && cd - > /dev/null && pwd && cd ..", "SHARED/with space"),
    ("export A=1 B='two words' C=$'a\\nb=c' D= E=é; F=not-exported", ""),
    ('echo "$A|$B|$C|$D|$E|${F-unset}"', "1|two words|a\nb=c||é|unset"),
    ("print([os.environ.get(n) for n in 'ABCDEF'])", "['1', 'two words', 'a\\nb=c', '', 'é', None]"),
    ("os.environ['A'] = 'from python'; del os.environ['B']", ""),
    ('echo "$A ${B-unset}"', "from python unset"),
    ("unset A", ""),
    ("print('A' in os.environ)", "False"),
    ("echo ${A-unset}", "unset"),
    ('export -n C; echo "$C"', "a\nb=c"),
    ("print('C' in os.environ)", "False"),
    ("export PATH=$PATH:$PWD/bin; mkdir -p bin; printf '#!/bin/sh\\necho mine' > bin/mytool; chmod +x bin/mytool", ""),
    ("mytool", "mine"),
    ("mytool --flag x", "mine"),
    ("A=1 true; echo ${A-unset}", "unset"),
    ("cd inner; export LAST=yes; exit 0", ""),
    ("echo $PWD $LAST", "SHARED/inner yes"),
    ("set -e; cd ..; export LAST=failed; false; echo never", ""),
    ("echo $PWD $LAST", "SHARED failed"),
    ("cd inner; exit 3", ""),
    ("pwd", "SHARED/inner"),
    ("trap 'echo bye' EXIT; cd ..; export LAST=trapped", "bye"),
    ("echo $PWD $LAST", "SHARED trapped"),
    ("cd inner; exec 1>/dev/null; echo unseen", ""),
    ("pwd", "SHARED/inner"),
    ("ln -s inner ../link && cd ../link && true", ""),
    ("import os; os.path.realpath(os.getcwd()) == os.path.realpath('SHARED/inner')", "True"),
    ('for i in 1 2; do cd ..; break; done; echo "${PS4}" > /dev/null', ""),
    ("f() { export FROM_FUNCTION=yes; cd /tmp; }; f", ""),
    ("echo $FROM_FUNCTION $PWD", "yes /tmp"),
    ("printf -v BIG '%0100000d' 7; export BIG; echo ${#BIG}", "100000"),
    ("print(len(os.environ.pop('BIG')))", "100000"),
    ("readonly FIXED=1; export FIXED; cd SHARED", ""),
    ("echo $FIXED $PWD", "1 SHARED"),
    ("echo $SHLVL $_ > /dev/null; export PS1=x IFS=:; printf '%s\\n' \"a b\"", "a b"),
    ("for x in a b; do printf $x; done; pwd", "abSHARED"),
    ("os.environ['BASH_FUNC_greet%%'] = '() {  echo hello\\n}'; os.environ['a.b'] = 'c'", ""),
    ("greet", "hello"),
    ("greet; env | grep ^a.b", "hello\na.b=c"),
]
# fmt: on


def test_directory_and_exports_are_shared_with_python(
    client: Client, server: JupyterServer
) -> None:
    """They carry over from cell to cell."""
    folder = str(server.root / "notebooks" / "shared")
    session_id = client.open()
    wrong = []
    for code, expected in SHARED_CELLS:
        result = client.run(code.replace("SHARED", folder), session_id)
        if "\n".join(result["result"]) != expected.replace("SHARED", folder):
            wrong.append((code, result, expected))
    assert wrong == []


def test_a_deleted_working_directory_does_not_wedge_the_session(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("mkdir doomed && cd doomed && pwd")
    (server.root / "notebooks" / "doomed").rmdir()
    result = client.run("echo on", session_id)
    assert shown(result)[-1].splitlines()[-1] == "on"
    assert client.run("cd /tmp && pwd", session_id)["result"] == ["/tmp"]
    client.run("mkdir -p doomed && cd doomed && rmdir ../doomed", session_id)
    assert client.run("21 * 2", session_id)["result"] == ["42"]
    result = client.run("cd /tmp; pwd", session_id)
    assert result["result"][-1].splitlines()[-1] == "/tmp"


def test_directory_and_exports_come_back_with_a_restore(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("mkdir -p restored")
    client.run("export A=5; cd restored", session_id)
    client.run("echo broken; exit 3", session_id)
    server.delete_kernel(session_id)
    result = client.run("echo $A; basename $PWD", session_id)
    assert_restored(result, ["5\nrestored"], cells=1)


def test_a_restore_ends_in_the_last_directory(
    client: Client, server: JupyterServer
) -> None:
    """Also if the cell that went there works on files, so it does not run again."""
    session_id = client.open("mkdir -p made && cd made && echo x >> appended")
    server.delete_kernel(session_id)
    result = client.run("basename $PWD; cat appended", session_id)
    assert_restored(result, ["made\nx"], cells=0)


# Python cells with bash between them: the kernel must look as if only these had run.
TRACES = [
    "x = 1",
    "x + 1",
    "1 / 0",
    "get_ipython().execution_count",
    "sorted(globals())",
    "sorted(dir())",
    "In",
    "Out",
    "_, __, ___, _i, _ii",
    "sorted(vars(__import__('builtins')))",
    "get_ipython().history_manager.input_hist_raw",
    "len(get_ipython().ev('__builtins__').__dict__)",
    "'_oh' in globals(), _ih is In",
    "__name__, __doc__",
    "import sys; sys.path",
    "x",
]


def test_nothing_of_the_helper_shows_in_the_users_kernel(
    client: Client, server: JupyterServer
) -> None:
    path = "notebooks/plain.ipynb"
    body = {"path": path, "name": "", "type": "notebook", "kernel": {}}
    plain = server.api("POST", "sessions", json=body).json()["kernel"]["id"]
    expected = [server.run_as_person(plain, code) for code in TRACES]
    server.api("DELETE", f"kernels/{plain}").raise_for_status()
    session_id = client.open("echo hi")
    seen = []
    for code in TRACES:
        client.run("ls -la > /dev/null; export TRACE=1", session_id)
        client.run("%%bash\necho hi; exit 3", session_id)
        client.run("df -h | head -1", session_id)
        seen.append("".join(client.run(code, session_id)["result"]))
    assert seen == [text.removesuffix("\n") for text in expected]

    cells = server.notebook(session_id)["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["execution_count"]]
    assert counts == list(range(1, len(TRACES) + 1))


PRINTS_A_STACK = """import traceback
try: 1 / 0
except Exception: traceback.print_exc()
traceback.print_stack()
foo bar"""


def test_nothing_of_the_helper_shows_in_a_traceback(shell: SharedSession) -> None:
    shell.run("echo hi")
    failing = ["def f():\n    1 / 0\nf()", "ls undefined", "raise KeyError"]
    codes = [*failing, PRINTS_A_STACK]
    text = "\n".join(str(shell.run(code)) for code in codes)
    assert text.count("Error") > 3
    assert "interpreter_mcp" not in text


SHADOWS = [
    "print = open = exec = compile = str = len = type = hasattr = dict = bytes = 5",
    "__import__ = getattr = isinstance = next = __name__ = __builtin__ = None",
    "get_ipython = None",
    "os = subprocess = sys = re = shutil = ast = 1",
    "import sys, os; sys.stdout = open(os.devnull, 'w')",
    "import sys, io; sys.stdout = sys.stderr = io.StringIO()",
    "import sys; sys.stdin.close()",
    "import sys; sys.stdout.write = None",
    "import sys; sys.path[:] = []",
    "import os; os.environ.clear(); os.environ['PATH'] = '/usr/bin:/bin'",
    "import builtins; builtins.print = None",
    "import sys; sys.displayhook = sys.excepthook = None",
    "import sys; sys.settrace(None)",
    "import warnings; warnings.simplefilter('error')",
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "import sys; sys.setrecursionlimit(150)",
    "import gc; gc.disable()",
    "import threading; threading.Thread = None",
    "import locale; locale.setlocale(locale.LC_ALL, 'C')",
]


def test_bash_works_whatever_the_user_has_shadowed(client: Client) -> None:
    """So does Python, unless the user has shadowed its own way out."""
    session_id = client.open("import sys; out, err = sys.stdout, sys.stderr; x = 6")
    for code in SHADOWS:
        client.run(code, session_id)
        for cell, expected in (("echo hi", ["hi"]), ("ls -d /tmp", ["/tmp"])):
            result = client.run(cell, session_id, timeout=10)
            assert shown(result) == expected, code
        if "sys." not in code:
            assert shown(client.run("x * 7", session_id)) == ["42"], code
        client.run("import sys; sys.stdout, sys.stderr = out, err", session_id)


# fmt: off
FAMILIES = {
    "a command": "sleep {0}",
    "child and grandchild": "bash -c 'sleep {0} & sleep {0}; true'; true",
    "in the background": "sleep {0} & sleep {0} & wait",
    "ignoring signals": "trap '' INT TERM; bash -c 'trap \"\" INT; sleep {0}; sleep {0}'; sleep {0}",
    "python": 'python -c \'import subprocess, sys; subprocess.call(["sleep", "{0}"])\'',
    "a pipe": "sleep {0} | cat | cat",
}
# fmt: on


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupt_takes_children_and_grandchildren(
    client: Client, shell: SharedSession, family: str
) -> None:
    mark = f"{1000 + secrets.randbelow(10**6)}.5"
    code = f"echo begun\n{FAMILIES[family].format(mark)}"
    call = client.start(code, shell.session_id)
    eventually(lambda: running(mark))
    client.interrupt(shell.session_id)
    result = outcome(call, 10)
    assert result["result"][0].startswith("begun")
    assert result["error"]
    eventually(lambda: not running(mark), 5)
    assert shell.run("echo on")["result"][-1:] == ["on"]


def test_output_streams_while_the_command_runs(
    shell: SharedSession, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    wait = f"until [ -e {gate} ]; do sleep 0.05; done"
    result = shell.run(f"echo first; {wait}; echo second", timeout=0.5)
    assert result["result"] == ["first"]
    assert "running" in result["error"][0]
    gate.touch()
    assert shell.run("")["result"] == ["second"]


def test_a_server_in_the_background_outlives_its_call(shell: SharedSession) -> None:
    """And does not hold it."""
    port = free_port()
    start = f"python -u -m http.server {port} --bind {LOOPBACK} & echo started $!"
    with within(10):
        started = re.search(r"started (\d+)", shown(shell.run(start))[0])
    assert started is not None
    retry = "--retry 50 --retry-connrefused --retry-delay 0"
    fetch = f"curl -s {retry} http://{LOOPBACK}:{port}/ | grep -o '<title>.*</title>'"
    for _ in range(2):
        assert "Directory listing" in str(shown(shell.run(f"{fetch}; true")))
    shell.run(f"kill {started[1]}")
    eventually(lambda: is_gone(int(started[1])))


def test_what_a_background_child_prints_comes_later(
    shell: SharedSession, tmp_path: Path
) -> None:
    """With a later call."""
    gate = tmp_path / "gate"
    wait = f"until [ -e {gate} ]; do sleep 0.02; done"
    shell.run(f"({wait}; echo late) & true")
    gate.touch()
    eventually(lambda: "late" in str(shell.run("1")["result"]), 10)


def test_no_bash_gives_one_clear_error(client: Client) -> None:
    """And Python goes on."""
    hide = "import os; path = os.environ['PATH']; os.environ['PATH'] = '/no/such'"
    session_id = client.open(hide)
    result = client.run("%%bash\necho hi", session_id)
    assert result["result"] == []
    (error,) = result["error"]
    assert "bash" in error
    assert "Traceback" not in error
    assert "NameError" in client.run("df -h", session_id)["error"][0]
    assert "SyntaxError" in client.run("echo hi", session_id)["error"][0]
    again = client.run("os.environ['PATH'] = path; 21 * 2", session_id)

    assert again["result"] == ["42"]
    assert client.run("echo hi", session_id)["result"] == ["hi"]


def test_the_notebook_shows_bash_cells_as_percent_bash(
    shell: SharedSession, server: JupyterServer
) -> None:
    code = "# why\necho \"it's\" 'é\\n'"
    shell.run(code)
    shell.run("%%bash\necho hi; exit 3")
    first, second = server.notebook(shell.session_id)["cells"][-2:]
    assert "".join(first["source"]).rstrip() == f"%%bash\n{code}"
    assert "".join(first["outputs"][0]["text"]) == "it's é\\n\n"
    assert "".join(second["source"]) == "%%bash\necho hi; exit 3"
    assert second["outputs"][-1]["output_type"] == "error"


def test_a_newer_helper_replaces_an_older_one(
    client: Client, clients: Clients, tmp_path: Path
) -> None:
    """In a living kernel; an older one does not replace a newer."""
    version = re.compile(r"(?m)^(HELPER_VERSION = )\d+")
    newer, count = version.subn(r"\g<1>10_000", MODULE.read_text())
    assert count == 1
    assert "exited with status" in newer
    copy = tmp_path / "newer.py"
    copy.write_text(newer.replace("exited with status", "finished with status"))
    session_id = client.open("x = 42\n%cd -q /tmp")
    older = client.run("exit 3", session_id)
    assert older["error"] == ["Command exited with status 3"]

    new = clients(command=[sys.executable, str(copy)])
    for each in (new, client, clients()):
        ended = each.run("exit 3", session_id)
        assert ended["error"] == ["Command finished with status 3"]
    assert new.run("x", session_id)["result"] == ["42"]


# --- Server ---------------------------------------------------------------------------


@pytest.mark.pure
@pytest.mark.parametrize("body", [b"3", b'"text"', b"[1]", b"null", b"{" * 99_999])
@responses.activate
def test_an_answer_of_the_wrong_shape_is_one_sentence(body: bytes) -> None:
    url = "https://jupyter.test/api/kernelspecs"
    responses.add("GET", url, body=body, content_type="application/json")
    client = jim.RemoteJupyterClient("https://jupyter.test", "")
    with pytest.raises(jim.ServerError, match="Jupyter server"):
        client.kernelspecs()


def repeating_server(first: bytes, piece: bytes, pause_s: float) -> str:
    """Answer one connection without end; return the URL."""
    listener = socket.create_server((LOOPBACK, 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with suppress(OSError), connection:
            connection.sendall(first)
            while True:
                connection.sendall(piece)
                time.sleep(pause_s)

    threading.Thread(target=answer, daemon=True).start()
    return f"http://{LOOPBACK}:{listener.getsockname()[1]}"


ENDLESS = [
    (b"HTTP/1.1 200 OK\r\n\r\n[", b" " * 65_536, 0.0),
    (b"HTTP/1.1 200 OK\r\n\r\n[", b" ", 0.05),
    (b"HTTP/1.1 200 OK\r\nX-Header: ", b"x", 0.05),
]


@pytest.mark.pure
@pytest.mark.parametrize(("first", "piece", "pause_s"), ENDLESS)
def test_an_answer_without_end_is_given_up(
    first: bytes, piece: bytes, pause_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fast as it goes, or a byte now and then, in the body or in the header."""
    monkeypatch.setattr(jim, "CONNECT_TIMEOUT_S", 0.1)
    client = jim.RemoteJupyterClient(repeating_server(first, piece, pause_s), "")
    with within(1), pytest.raises(jim.ServerError):
        client.request("GET", "kernelspecs", max_s=0.3)


SPECS = {"default": "python3", "kernelspecs": {"python3": {"name": "python3"}}}


HTML = {"body": "<html>Sign in", "content_type": "text/html"}


# fmt: off
HTTP_FAILURES: list[tuple[dict[str, Any], list[str]]] = [
    ({"status": 401}, ["token", "401"]),
    ({"status": 403, "json": {"message": "Forbidden"}}, ["token", "403"]),
    ({"status": 404, "json": {"message": "nothing here"}}, ["https://jupyter.test/lab", "--jupyter-base-url"]),
    ({"status": 409, "body": "no JSON"}, ["409", "Conflict"]),
    ({"status": 500, "json": {"message": "disk full"}}, ["500", "disk full"]),
    ({"status": 500, "json": []}, ["500"]),
    ({"status": 500, "body": b"[" * 100_000}, ["500"]),
    ({"status": 502, **HTML}, ["502"]),
    ({"status": 302, "headers": {"Location": "https://hub.example/hub/login?next=x"}}, ["https://hub.example/hub/login"]),
    ({"status": 301, "headers": {"Location": "https://jupyter.example/"}}, ["https://jupyter.example/"]),
    ({"status": 200, **HTML}, ["not a Jupyter server"]),
    ({"status": 200, "json": ["something else"]}, ["Jupyter server", "--jupyter-base-url"]),
    ({"status": 200, "json": {"kernels": 3}}, ["Jupyter server", "--jupyter-base-url"]),
    ({"status": 200, "body": b"\xff\xfe", "content_type": "application/json"}, ["not a Jupyter"]),
    ({"body": requests.ConnectionError("Connection refused")}, ["refused"]),
    ({"body": requests.ConnectTimeout("slow")}, ["https://jupyter.test/lab", " s"]),
    ({"body": requests.ReadTimeout("slow")}, ["No answer", " s"]),
    ({"body": requests.exceptions.SSLError("self-signed certificate")}, ["TLS", "--ca-bundle"]),
    ({"body": requests.exceptions.ProxyError("no route")}, ["proxy", "PROXY"]),
    ({"body": requests.exceptions.ChunkedEncodingError("cut")}, ["https://jupyter.test"]),
    ({"body": requests.exceptions.InvalidHeader("odd")}, ["https://jupyter.test"]),
]
# fmt: on


@pytest.mark.pure
@pytest.mark.parametrize(("answer", "words"), HTTP_FAILURES)
@responses.activate
def test_each_http_failure_is_one_sentence_with_its_cause(
    answer: dict[str, Any], words: list[str]
) -> None:
    url = "https://jupyter.test/lab/api/kernelspecs"
    responses.add("GET", url, **answer)
    client = jim.RemoteJupyterClient("https://jupyter.test/lab/", "s3cret")
    with pytest.raises(jim.InterpreterError) as caught:
        client.kernelspecs()
    text = str(caught.value)
    assert [word for word in words if word.lower() not in text.lower()] == []
    assert "s3cret" not in text + repr(caught.value)
    assert "\n" not in text
    responses.replace("GET", url, json=SPECS)
    assert client.kernelspecs() == SPECS["kernelspecs"]


@pytest.mark.pure
@pytest.mark.parametrize("token", ["two words", "line\n", "line\r\nX-Header: 1", "ä"])
def test_what_cannot_be_a_token_is_refused_unshown(token: str) -> None:
    with pytest.raises(jim.InterpreterError) as caught:
        jim.RemoteJupyterClient("http://localhost", token)
    assert token not in str(caught.value)


def test_the_token_travels_in_the_header_only(
    server: JupyterServer, own_network: Network
) -> None:
    seen = bytearray()

    def keep(data: bytes) -> bool:
        seen.extend(data)
        return True

    own_network.on_client = keep
    flags = flags_for(server, own_network.url)
    assert execute(*flags, "--execute", "21 * 2")["result"] == ["42"]
    token = server.token.encode()
    asked = re.findall(rb"(?:GET|POST|PUT|PATCH) (/\S*) HTTP/1.1\r\n", bytes(seen))
    assert [path for path in asked if b"/channels" in path]
    assert [path for path in asked if b"token=" in path or token in path] == []
    assert seen.count(b"Authorization: token " + token) == len(asked)
    assert seen.count(token) == len(asked)


def test_the_token_does_not_follow_a_redirect(web: Webs) -> None:
    is_json = {"Content-Type": "application/json"}
    thief = web({"": (200, is_json, json.dumps(SPECS).encode())})
    decoy = web({"": (302, {"Location": f"{thief.url}/api/kernelspecs?x=1"}, b"")})
    flags = ["--jupyter-base-url", decoy.url, "--jupyter-token", "s3cret"]
    ended = command(*flags, "--execute", "1")

    assert ended.returncode == 1
    assert thief.url in ended.stderr
    assert decoy.asked
    assert thief.asked == []


def test_the_token_does_not_follow_a_websockets_redirect(
    server: JupyterServer, web: Webs
) -> None:
    thief = web({"": (403, {}, b"")})
    away = (302, {"Location": f"{thief.url}/channels"}, b"")
    decoy = web({"/api/kernels/[^/]+/channels": away}, server.url)
    ended = command(*flags_for(server, decoy.url), "--execute", "1")
    assert ended.returncode == 1
    assert thief.asked == []
    assert "websocket" in json.loads(ended.stdout)["error"][0]


def test_a_password_file_does_not_replace_the_token(
    server: JupyterServer, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine {LOOPBACK} login me password wrong\n")
    netrc.chmod(0o600)
    home = {"HOME": str(tmp_path)}
    ended = command(*flags_for(server), "--execute", "1", environment=home)
    assert ended.returncode == 0
    assert ended.stderr == ""


def test_a_base_url_with_a_path_works(servers: Servers) -> None:
    server = servers("--ServerApp.base_url=/user/me/", path="/user/me")
    for url in (server.url, f"{server.url}/"):
        flags = flags_for(server, url)
        result = execute(*flags, "--execute", "21 * 2", "--session-id", "7")
        assert result["result"][-1] == "42"
    assert sources(server.notebook(7)) == ["21 * 2"] * 2


def test_a_server_without_a_token_works(servers: Servers) -> None:
    server = servers(token="")
    result = execute("--jupyter-base-url", server.url, "--execute", "21 * 2")
    assert shown(result) == ["42"]
    assert sources(server.notebook(result["session_id"])) == ["21 * 2"]


def test_a_private_authority_is_trusted_with_ca_bundle_only(
    servers: Servers, tmp_path: Path
) -> None:
    right = str(tmp_path / "right.pem")
    wrong = str(tmp_path / "wrong.pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(right)
    trustme.CA().cert_pem.write_to_path(wrong)
    both = str(tmp_path / "both.pem")
    certificate = authority.issue_cert(LOOPBACK)
    certificate.private_key_and_cert_chain_pem.write_to_path(both)
    files = [f"--ServerApp.certfile={both}", f"--ServerApp.keyfile={both}"]
    server = servers(*files, scheme="https", authority=right)

    flags = [*flags_for(server), "--execute", "21 * 2"]
    for refused in (command(*flags), command(*flags, "--ca-bundle", wrong)):
        assert refused.returncode == 1
        assert refused.stdout == ""
        assert refused.stderr.count("\n") == 1
        assert "--ca-bundle" in refused.stderr
        assert server.token not in refused.stderr
    first = execute(*flags, "--ca-bundle", right)
    assert first["result"] == ["42"]
    again = [*flags, "--session-id", str(first["session_id"])]
    trusted = {"REQUESTS_CA_BUNDLE": right}
    assert execute(*again, environment=trusted)["result"][-1] == "42"


def test_proxy_variables_count_for_rest_and_websocket(server: JupyterServer) -> None:
    proxy = ConnectProxy()
    through = {"HTTP_PROXY": proxy.url, "http_proxy": proxy.url}
    through |= {"NO_PROXY": "", "no_proxy": ""}
    direct = {**through, "NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK}
    flags = [*flags_for(server), "--execute", "42"]
    first = execute(*flags, environment=through)
    assert first["result"] == ["42"]
    assert any(line.startswith("GET http://") for line in proxy.seen)
    assert f"CONNECT {LOOPBACK}:{server.port}" in proxy.seen

    before = len(proxy.seen)
    again = [*flags, "--session-id", str(first["session_id"])]
    assert execute(*again, environment=direct)["result"][-1] == "42"
    assert len(proxy.seen) == before
    proxy.close()


# --- Channel --------------------------------------------------------------------------


def test_a_websocket_that_opened_when_nobody_wanted_it_any_more_is_closed() -> None:
    closed = threading.Event()

    class Opened:
        def shutdown(self) -> None:
            closed.set()

    class Opener:
        def open_websocket(self, *_: Any) -> Opened:
            time.sleep(0.05)
            return Opened()

    def stop() -> None:
        time.sleep(0.2)  # It is open by now.
        raise jim.Withdrawn

    opener: Any = Opener()
    with pytest.raises(jim.Withdrawn):
        jim.Channel(opener, "kernel").connect(stop, 5)
    assert closed.is_set()


@pytest.mark.faults
@pytest.mark.parametrize("ends", [False, True], ids=["runs on", "ends meanwhile"])
def test_what_is_said_during_a_break_joins_up(
    far: Trial, network: Network, server: JupyterServer, ends: bool
) -> None:
    whole = cut_while_it_runs(far, network, server, ends=ends)
    assert "\n".join(shown(whole)).splitlines() == AWAY_LINES
    far.survived()


@pytest.mark.faults
@pytest.mark.parametrize("ends", [False, True], ids=["runs on", "ends meanwhile"])
def test_output_lost_because_a_person_is_connected_is_told(
    far: Trial, network: Network, server: JupyterServer, ends: bool
) -> None:
    """The server keeps nothing for a client that is away if another one is there."""
    lab = server.connect_as_person(server.kernel_id(far.session_id))
    with contextlib.closing(lab), within(25):
        whole = cut_while_it_runs(far, network, server, ends=ends, left=1)
    is_complete = "\n".join(whole["result"]).splitlines() == AWAY_LINES
    assert is_complete or "missing" in text_of(whole), whole
    assert whole["result"][0].startswith("first")
    far.survived()


@pytest.mark.faults
def test_three_breaks_in_one_run_join_up(
    far: Trial, network: Network, server: JupyterServer
) -> None:
    seen = [network.heard(b"step 0")]
    body = "for n in range(3):\n    print('step', n)\n    wait(f'go{n}')"
    call = far.begin(body, timeout=40)
    for n in range(3):
        eventually(seen[n])
        seen.append(network.heard(b"step %d" % (n + 1)))
        network.mode = "refuse"
        network.cut()
        server.until_noticed(far.session_id)
        far.open_gate(f"go{n}")
        network.mode = "pass"

    assert "\n".join(shown(outcome(call))) == "step 0\nstep 1\nstep 2"
    far.survived()


@pytest.mark.faults
def test_code_that_a_break_kept_back_is_told(far: Trial, network: Network) -> None:
    """The connection is lost before the kernel took the code."""

    def cut_at_code(data: bytes) -> bool:
        if not is_execute_request(data):
            return True
        network.reset()
        return False

    network.on_client = cut_at_code
    with within(20):
        lost = far.client.call(far.code("print('ran')"), far.session_id)
    assert lost["isError"]
    assert "not run" in text_of(result_of(lost)).lower()
    assert far.runs() == 0
    assert shown(far.run_counted("print('ran')")) == ["ran"]
    far.survived()


@pytest.mark.faults
def test_a_break_between_two_cells_is_not_noticed(far: Trial, network: Network) -> None:
    network.cut()
    assert shown(far.run_counted("print('ran')")) == ["ran"]
    far.survived()


@pytest.mark.faults
@pytest.mark.parametrize("server_noticed", [True, False])
def test_a_half_open_connection_does_not_hold_a_call(
    own_network: Network,
    clients: Clients,
    server: JupyterServer,
    tmp_path: Path,
    server_noticed: bool,
) -> None:
    """A router forgot the connection: nothing comes, and nobody is told.

    The server has noticed, then it kept the output, or it has not, then the output went
    nowhere. With 2 s of patience instead of 10.
    """
    command = patched(LOST_S=2)
    far = Trial(clients(url=own_network.url, command=command), tmp_path)
    call = far.begin("wait()\nprint('out' + 'put')", timeout=30)
    pairs = list(own_network.pairs)
    own_network.freeze()
    if server_noticed:
        for _, to_server in pairs:
            shut(to_server)
        server.until_noticed(far.session_id)
    far.open_gate()
    with within(20):
        ended = outcome(call)
    if server_noticed:
        assert shown(ended) == ["output"]
    else:
        assert ended["result"] == ["output"] or "missing" in text_of(ended)

    # The other session's connection is silent, too: what is lost of its next cell is
    # told.
    other = far.client.run("beside", far.beside)
    assert other["result"] == ["42"] or "not run" in text_of(other).lower()
    far.survived()


@pytest.mark.faults
def test_two_breaks_in_5_s_leave_no_session_deaf(
    own_network: Network, clients: Clients, server: JupyterServer, tmp_path: Path
) -> None:
    """The first connection is half open.

    The server closes it 5 s after the second came, and keeps its channels, which are
    dead, for the third, the fourth, ... With 2 s of patience instead of 10.
    """
    command = patched(LOST_S=2, FRESH_S=0)
    far = Trial(clients(url=own_network.url, command=command), tmp_path)
    kept = f"Starting buffering for {server.kernel_id(far.session_id)}"
    so_far = server.log.read_text().count(kept)
    own_network.freeze()
    assert shown(far.run("kept")) == ["5"]
    own_network.cut()
    eventually(lambda: server.log.read_text().count(kept) > so_far, 20)

    assert shown(far.run_counted("kept")) == ["5"]
    far.survived()


@pytest.mark.faults
def test_a_connection_that_stays_away_is_given_up(
    own_network: Network, clients: Clients, tmp_path: Path
) -> None:
    """With 2 s of trying instead of 60."""
    command = patched(KERNEL_TIMEOUT_S=2)
    far = Trial(clients(url=own_network.url, command=command), tmp_path)
    first = own_network.heard(b"first")
    call = far.begin("print('fir' + 'st')\nwait()", timeout=40)
    eventually(first)
    own_network.mode = "refuse"
    own_network.cut()
    with within(15):
        given_up = outcome(call)
    assert given_up["result"] == ["first"]
    assert re.search("may (still run|go on)", text_of(given_up)), given_up
    assert "Traceback" not in text_of(given_up)
    assert "ended" not in text_of(given_up)

    own_network.mode = "pass"
    far.open_gate()
    far.survived()


@pytest.mark.faults
@pytest.mark.load
def test_a_large_message_on_a_slow_network_is_no_silence(
    servers: Servers, clients: Clients, tmp_path: Path
) -> None:
    """After each megabyte of the server nothing comes for a while."""
    passed = [0]

    def pause(data: bytes) -> None:
        passed[0] += len(data)
        if passed[0] > 1_000_000:
            time.sleep(0.8)
            passed[0] = 0

    server = servers(*NO_LIMITS)
    network = Network(server.port)
    network.on_server = pause
    trial = Trial(clients(server=server, url=network.url), tmp_path)
    printed = trial.run_counted("print('x' * 8_000_000)")
    assert printed["error"] == []
    assert "characters left out" in text_of(printed)
    trial.survived()
    network.close()


# --- Kernel ---------------------------------------------------------------------------

# has greeted, what the server says, of the request, was a probe sent -> seconds
PATIENCE: list[tuple[bool, str, bool, bool, float]] = [
    (False, "starting", False, False, jim.STARTS_S),
    (False, "idle", False, True, jim.STARTS_S),
    (True, "idle", False, False, jim.SILENCE_S),
    (True, "idle", True, True, jim.SILENCE_S),
    (True, "busy", False, False, jim.SILENCE_S),
    (True, "busy", True, False, jim.LOST_S),
    (True, "busy", False, True, jim.LOST_S),
    (True, "busy", True, True, float("inf")),
]


class NoServer:
    """Stands for the server in tests that ask it nothing."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


@pytest.mark.pure
@pytest.mark.parametrize(("greeted", "state", "heard", "probed", "seconds"), PATIENCE)
def test_silence_is_normal_for_as_long_as_the_table_says(
    greeted: bool, state: str, heard: bool, probed: bool, seconds: float
) -> None:
    kernel: Any = jim.Kernel(NoServer(), "k", lambda: None)  # type: ignore[arg-type]
    kernel.has_greeted = greeted
    kernel._server_state = state
    request = jim.Request()
    request.was_heard = heard
    assert kernel._patience_s(request, jim.Request() if probed else None) == seconds


# The request: heard, replied; the probe: state, count, last is the request
JUDGEMENTS: list[tuple[bool, bool, str, int, bool, type[Exception] | None]] = [
    (False, False, "ready", 5, False, jim.NotTaken),
    (False, False, "ready", 6, False, jim.ConnectionLost),
    (False, False, "ready", 5, True, jim.ConnectionLost),
    (True, False, "ready", 5, False, jim.ConnectionLost),
    (True, True, "ready", 6, False, None),
    (True, True, "fresh", 1, False, jim.KernelDied),
    (False, False, "used", 3, False, jim.KernelDied),
    (False, False, "restored", 5, False, jim.NotTaken),
    (False, False, "ready", 4, False, jim.KernelDied),
]


@pytest.mark.pure
@pytest.mark.parametrize(
    ("heard", "replied", "state", "count", "is_last", "error"), JUDGEMENTS
)
def test_the_answer_to_a_probe_judges_the_request_before_it(
    heard: bool,
    replied: bool,
    state: str,
    count: int,
    is_last: bool,
    error: type[Exception] | None,
) -> None:
    kernel: Any = jim.Kernel(NoServer(), "k", lambda: None)  # type: ignore[arg-type]
    kernel._execution_count = 5
    request = jim.Request()
    request.was_heard = heard
    if replied:
        request.reply = jim.Reply()
    probe = jim.Request()
    answer = {"state": state, "last": request.msg_id if is_last else "other"}
    probe.reply = jim.Reply(execution_count=count, answer=answer)
    if error is None:
        kernel._judge(request, probe)
        return
    with pytest.raises(error) as caught:
        kernel._judge(request, probe)
    assert type(caught.value) is error


@pytest.mark.pure
def test_the_count_of_a_probe_is_what_the_next_is_compared_with() -> None:
    """A person ran a cell between two of ours: that is not ours having ended."""
    kernel: Any = jim.Kernel(NoServer(), "k", lambda: None)  # type: ignore[arg-type]
    kernel._execution_count = 5
    checked = jim.Request()
    checked.reply = jim.Reply(execution_count=6)
    kernel._judge(checked, checked)
    probe = jim.Request()
    probe.reply = jim.Reply(execution_count=6, answer={"state": "ready"})
    with pytest.raises(jim.NotTaken):
        kernel._judge(jim.Request(), probe)


def kernel_says(**fields: Any) -> jim.Message:
    """Return a message of a kernel, a status by default."""
    names = {"channel": "iopub", "msg_type": "status", "msg_id": "m", "content": {}}
    parent = {"parent_msg_id": "", "parent_session": jim.PROGRAM}
    return jim.Message(**{**names, **parent, **fields})


# the message; a caller asked for the end -> what is raised of it
ENDS: list[tuple[dict[str, Any], bool, str]] = [
    ({"content": {"execution_state": "restarting"}}, False, jim.DIED),
    ({"content": {"execution_state": "dead"}}, False, jim.DIED),
    ({"msg_type": "shutdown_reply"}, False, jim.ENDED_BY_SOMEBODY),
    ({"msg_type": "shutdown_reply", "parent_msg_id": "p"}, True, jim.ENDED_AS_ASKED),
    ({"content": {"execution_state": "dead"}, "parent_msg_id": "p"}, False, ""),
    ({"content": {"execution_state": "idle"}}, False, ""),
    ({"msg_type": "stream"}, True, ""),
]


@pytest.mark.pure
@pytest.mark.parametrize(("fields", "asked", "why"), ENDS)
def test_a_message_tells_that_the_kernel_ends(
    fields: dict[str, Any], asked: bool, why: str
) -> None:
    kernel: Any = jim.Kernel(NoServer(), "k", lambda: None)  # type: ignore[arg-type]
    kernel.was_asked_to_end = asked
    if not why:
        kernel._raise_if_it_ends(kernel_says(**fields))
        return
    with pytest.raises(jim.KernelDied, match=re.escape(why)):
        kernel._raise_if_it_ends(kernel_says(**fields))


class ServerThatSays:
    """Stands for the server: it says a state of each kernel, or raises."""

    def __init__(self, answer: str | jim.ServerError) -> None:
        self.answer = answer

    def kernel(self, kernel_id: str) -> jim.KernelModel:
        if isinstance(self.answer, jim.ServerError):
            raise self.answer
        return jim.KernelModel(kernel_id, "python3", self.answer)


@pytest.mark.pure
@pytest.mark.parametrize("answer", ["dead", jim.NotFound("404")])
@pytest.mark.parametrize("greeted", [True, False])
def test_a_server_tells_that_it_has_no_kernel(
    answer: str | jim.ServerError, greeted: bool
) -> None:
    server: Any = ServerThatSays(answer)
    kernel: Any = jim.Kernel(server, "k", lambda: None)
    kernel.has_greeted = greeted
    assert not kernel._ask_server(), "it spoke a moment ago"
    kernel.channel.heard_at -= jim.SILENCE_S
    with pytest.raises(jim.KernelDied) as caught:
        kernel._ask_server()
    assert isinstance(caught.value, jim.CannotStart) is not greeted


@pytest.mark.pure
@pytest.mark.parametrize(("greeted", "why"), [(True, "restarted"), (False, "hangs")])
def test_a_kernel_that_starts_for_too_long_hangs_or_was_restarted(
    greeted: bool, why: str
) -> None:
    server: Any = ServerThatSays("starting")
    kernel: Any = jim.Kernel(server, "k", lambda: None)
    kernel.has_greeted = greeted
    kernel.channel.heard_at -= jim.SILENCE_S
    kernel._made_at -= jim.STARTS_S
    with pytest.raises(jim.KernelDied, match=why):
        kernel._is_silent_too_long(jim.Request(), None)


@pytest.mark.pure
def test_a_connection_that_fails_names_its_cure_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise jim.ServerUnreachable("Refused")

    kernel: Any = jim.Kernel(NoServer(), "k", lambda: None)  # type: ignore[arg-type]
    monkeypatch.setattr(kernel.channel, "connect", refuse)
    with pytest.raises(jim.ServerUnreachable) as caught:
        kernel._open()
    cure = "; call again when the server is back"
    assert str(caught.value) == f"Refused{cure}; what ran may go on"


MALFORMED_IN_A_WAIT = [
    kernel_says(content={"execution_state": [1]}),
    kernel_says(msg_id="k_" + "9" * 5000),
    kernel_says(msg_type="stream", content={"name": "stdnull", "text": "x"}),
    kernel_says(msg_type="display_data", content={"data": 3}),
]


@pytest.mark.pure
@pytest.mark.parametrize("malformed", MALFORMED_IN_A_WAIT)
def test_a_malformed_message_breaks_no_wait(
    malformed: jim.Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel: Any = jim.Kernel(NoServer(), "k", lambda: None)  # type: ignore[arg-type]
    kernel.has_helper = True
    monkeypatch.setattr(kernel.channel, "read", lambda _: malformed)
    assert kernel._read(0.0, None, jim.ignore)


@pytest.mark.pure
def test_numbers_that_lack_are_counted_as_missing_messages() -> None:
    gaps = jim.Gaps()

    def note(number: int, state: str = "", *, is_ours: bool = True) -> None:
        content = {"execution_state": state}
        gaps.note(
            jim.Message("iopub", "status", f"k-1_{number}", "", "", content),
            is_ours=is_ours,
        )

    for number in (7, 8, 9):
        note(number)
    assert gaps.missing == 0
    note(11, "busy", is_ours=False)
    assert gaps.missing == 0
    note(14)
    assert gaps.missing == 2
    gaps.restart()
    note(100)
    assert gaps.missing == 2


@pytest.mark.faults
def test_a_kernel_that_ends_at_once_is_named_soon(
    clients: Clients, other_kernels: JupyterServer
) -> None:
    """Its Python has no ipykernel, say."""
    client = clients(server=other_kernels)
    with within(30):
        result = client.run("1", kernel_name="ends")
    (error,) = result["error"]
    assert "kernel" in error
    assert "Call again" in error
    assert "--jupyter-base-url" not in error


@pytest.mark.faults
def test_a_kernel_that_starts_slowly_says_so_meanwhile(
    clients: Clients, other_kernels: JupyterServer
) -> None:
    client = clients(server=other_kernels)
    early = client.run("21 * 2", kernel_name="slow", timeout=1)
    assert "starting" in early["error"][0]
    assert client.run("", early["session_id"])["result"] == ["42"]


@pytest.mark.faults
def test_an_interrupt_before_the_kernel_is_there_withdraws_the_code(
    clients: Clients, other_kernels: JupyterServer, tmp_path: Path
) -> None:
    client = clients(server=other_kernels)
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()"
    session_id = client.run(code, kernel_name="slow", timeout=0)["session_id"]
    assert "ithdrawn" in text_of(client.interrupt(session_id))
    assert client.run("21 * 2", session_id)["result"][-1:] == ["42"]
    assert not ran.exists()


@pytest.mark.faults
@pytest.mark.parametrize("lists", [True, pytest.param(False, marks=pytest.mark.load)])
def test_a_gateway_serves_another_mcp_server_the_same_session(
    tmp_path: Path, clients: Clients, lists: bool
) -> None:
    """It answers 500 to a path that it knows; its list of kernels may be forbidden."""
    option = f"--JupyterWebsocketPersonality.list_kernels={lists}"
    gateway = KernelGateway(tmp_path, option)
    gateway.start()
    first = clients(server=gateway)
    session_id = first.open("x = 41")
    first.close()
    again = clients(server=gateway).run("x = globals().get('x', 0) + 1; x", session_id)
    gateway.kill()
    assert again["error"] == []
    assert again["result"][-1] == ("42" if lists else "1")
    assert lists or "empty" in again["result"][0]


@pytest.mark.faults
def test_a_kernels_death_is_told_with_the_output_so_far(mortal: Trial) -> None:
    """And the code that killed it does not run again, though it is in the notebook."""
    body = "print('before', flush=True)\nwait()\nos._exit(1)"
    early = outcome(mortal.begin(body, timeout=0.5))
    mortal.open_gate()
    with within(6):
        dead = mortal.rest()

    assert early["result"] == ["before"]
    assert "kernel died" in text_of(dead).lower()
    assert_restored(mortal.run("kept"), ["5"], cells=1)
    mortal.survived()


@pytest.mark.faults
def test_a_kernel_that_dies_silently_is_not_called_unreached(
    mortal: Trial, server: JupyterServer
) -> None:
    """Its messages are lost if the first statement ends it.

    Another thread sends them: it is a matter of luck, so it is tried three times.
    """
    for death in ("os._exit(1)", "os.abort()", "os._exit(1)"):
        code = f"import os\n{death}"
        with within(6):
            dead = mortal.client.call(code, mortal.session_id)
        said = text_of(result_of(dead))
        assert not dead["isError"], said
        assert "kernel died" in said
        assert "Not run" not in said
        cell = server.last_cell(mortal.session_id)
        assert cell["source"] == code
        assert cell["outputs"][-1]["ename"] == "KernelDied"
        assert_restored(mortal.run("kept"), ["5"])
    mortal.run_counted()
    mortal.survived()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("code", "said"), [("exit()", []), ("print(1)\nquit()", ["1"])]
)
def test_exit_and_quit_say_so_and_never_repeat(
    mortal: Trial, code: str, said: list[str]
) -> None:
    ended = mortal.run_counted(code)
    assert ended["result"] == said
    assert "exit or quit" in ended["error"][0]
    assert "next call restores" in ended["error"][0]
    assert_restored(mortal.run("print(kept)"), ["5"], cells=1)
    mortal.survived()


@pytest.mark.faults
def test_exit_never_repeats_although_the_restart_fails(
    network: Network,
    far_side: tuple[Network, Client, int],
    tmp_path: Path,
    server: JupyterServer,
) -> None:
    trial = Trial(far_side[1], tmp_path, far_side[2])
    process = trial.kernel_process()
    network.on_client = lambda data: b"/restart " not in data
    ended = trial.run_counted("exit()")
    network.reset()
    assert "exit or quit" in ended["error"][0]
    assert "next call restores" in ended["error"][0]
    cell = server.last_cell(trial.session_id)
    assert cell["outputs"][-1]["ename"] == "KernelDied"
    eventually(lambda: not process.is_running(), 30)
    assert_restored(trial.run("print(kept)"), ["5"], cells=2)
    trial.survived()


@pytest.mark.faults
def test_a_kernel_killed_from_outside_is_told_soon(mortal: Trial) -> None:
    process = mortal.kernel_process()
    call = mortal.begin("print('before', flush=True)\nwait()", timeout=30)
    process.kill()
    with within(5.5):
        dead = outcome(call)
    assert "kernel died" in text_of(dead).lower()
    assert_restored(mortal.run("kept"), ["5"])
    mortal.survived()


@pytest.mark.faults
def test_a_death_between_two_cells_is_restored(
    mortal: Trial, server: JupyterServer
) -> None:
    kernel_id = server.kernel_id(mortal.session_id)
    process = mortal.kernel_process()
    process.kill()
    eventually(lambda: is_gone(process.pid))

    def started_anew() -> bool:
        with suppress(psutil.Error):
            processes = psutil.Process(server.process.pid).children(recursive=True)
            alive = [each for each in processes if each.status() != "zombie"]
            return any(kernel_id in " ".join(each.cmdline()) for each in alive)
        return False

    eventually(started_anew)
    restored = mortal.run("kept")
    if restored["error"]:  # the kernel had not come up
        restored = mortal.run("kept")
    assert_restored(restored, ["5"])
    mortal.run_counted()
    mortal.survived()


@pytest.mark.faults
def test_code_sent_to_a_dead_kernel_never_runs_twice(mortal: Trial) -> None:
    """And what is said of it is true.

    The server queues it for the kernel that it starts in the dead one's place.
    """
    process = mortal.kernel_process()
    process.kill()
    eventually(lambda: is_gone(process.pid))
    with within(10):
        sent = mortal.run_counted("print('ran')")
    for _ in range(2):
        restored = mortal.run("kept")
        assert shown(restored)[-1:] == ["5"]
        assert len(restored["result"]) <= 2
        assert "Traceback" not in text_of(restored)
    if "not run" in text_of(sent).lower():
        assert mortal.runs() == 0, "told that it was not run, but it was"
    if not mortal.runs():
        assert re.search("not run|not known", text_of(sent), re.I), sent
        mortal.run_counted("print('ran')")
    mortal.survived()


@pytest.mark.faults
@pytest.mark.parametrize("way", ["delete", "restart"])
def test_a_kernel_ended_over_rest_is_told_soon(
    mortal: Trial, server: JupyterServer, way: str
) -> None:
    call = mortal.begin("print('before', flush=True)\nwait()", timeout=30)
    if way == "delete":
        server.delete_kernel(mortal.session_id)
    else:
        server.restart_kernel(mortal.session_id)
    with within(5.5):
        ended = outcome(call)

    assert ended["error"]
    assert "kernel" in text_of(ended).lower()
    assert ended["result"] in (["before"], [])
    assert_restored(mortal.run("kept"), ["5"])
    mortal.survived()


@pytest.mark.faults
def test_a_hung_kernel_killed_by_a_restart_is_restored(
    mortal: Trial, server: JupyterServer
) -> None:
    """It cannot say that it is shut down, and is killed."""
    mortal.kernel_process().suspend()
    server.restart_kernel(mortal.session_id)
    assert_restored(mortal.run("kept"), ["5"], cells=2)
    mortal.run_counted()
    mortal.survived()


SLOW_KERNEL = """import pathlib, time
from ipykernel.kernelapp import main
seen = pathlib.Path({!r}, "seen")
if seen.exists():
    time.sleep(5)
seen.touch()
main()"""


@pytest.mark.faults
@pytest.mark.load
@pytest.mark.parametrize("by", ["a person", "a tool", "a crash"])
def test_a_kernel_that_starts_slowly_is_waited_for(
    servers: Servers, clients: Clients, tmp_path: Path, by: str
) -> None:
    """As on a busy machine or a network drive. The server calls it idle meanwhile."""
    program = [sys.executable, "-c", SLOW_KERNEL.format(str(tmp_path))]
    add_kernel(tmp_path / "share", "slow", "python", *program)
    server = servers(environment={"JUPYTER_PATH": str(tmp_path / "share")})
    client = clients("--kernel-name", "slow", server=server)
    session_id = client.open("kept = 5")
    if by == "a person":
        server.restart_kernel(session_id)
    elif by == "a crash":
        crashed = client.run("import os\nos._exit(1)", session_id)
        assert "kernel died" in text_of(crashed)
    else:
        ignore = "import signal\nsignal.signal(2, signal.SIG_IGN)"
        client.run(f"{ignore}\nwhile True:\n    pass", session_id, timeout=1)
        said = text_of(client.interrupt(session_id, restart=True))
        assert "restart" in said
        assert "Not run:" not in said

    assert shown(client.run("kept", session_id))[-1:] == ["5"]
    assert "".join(server.last_cell(session_id)["source"]) == "kept"
    assert shown(client.run("kept + 1", session_id)) == ["6"]


@pytest.mark.faults
def test_a_server_that_stops_and_returns_is_told(
    own_server: JupyterServer, clients: Clients, tmp_path: Path
) -> None:
    """And the session is restored."""
    trial = Trial(clients(server=own_server), tmp_path)
    call = trial.begin("print('before', flush=True)\nwait()", timeout=0.5)
    assert "before" in text_of(outcome(call))
    own_server.stop()
    with within(7):
        away = trial.rest(timeout=1)
    assert away["error"]
    assert "Traceback" not in text_of(away)
    with within(7):
        unknown = trial.client.call("1", timeout=1)
    assert unknown["isError"]
    assert own_server.url in text_of(result_of(unknown))

    own_server.start()
    with within(40):
        lost = trial.rest(timeout=30)
    assert "kernel" in text_of(lost), "that the running code was lost is told"
    back = trial.run("kept")
    assert shown(back)[-1] == "5"
    assert "ran again" in text_of(lost) + text_of(back)
    assert trial.client.run("beside", trial.beside)["result"][-1] == "42"
    trial.survived()


def test_cells_for_other_kernels_are_left_unchanged(
    other_kernels: JupyterServer, clients: Clients
) -> None:
    """And they are restored, however the kernel was lost."""
    server = other_kernels
    client = clients("--kernel-name", "bash", server=server)
    session_id = client.open("x=41; print() { echo printed; }")
    assert shown(client.run("echo $x; print", session_id)) == ["41\nprinted"]
    notebook = server.notebook(session_id)
    assert sources(notebook) == ["x=41; print() { echo printed; }", "echo $x; print"]
    assert notebook["metadata"]["kernelspec"]["name"] == "bash"
    assert client.run("(exit 3)", session_id)["error"]
    server.delete_kernel(session_id)
    assert_restored(client.run("echo $x", session_id), ["41"], cells=2)
    server.restart_kernel(session_id)
    assert_restored(client.run("echo $x", session_id), ["41"], cells=3)


@pytest.mark.load
def test_a_hung_kernel_of_another_language_is_restored(
    other_kernels: JupyterServer, clients: Clients
) -> None:
    """It has no helper that tells a restarted kernel, and the server waits for it."""
    server = other_kernels
    client = clients("--kernel-name", "bash", server=server)
    session_id = client.open("x=41")
    parent = shown(client.run("echo $PPID", session_id))[0]
    psutil.Process(int(parent)).suspend()
    server.restart_kernel(session_id)
    assert_restored(client.run("echo $x", session_id), ["41"])


def test_a_bare_gateway_has_sessions_and_a_warning(
    gateway: KernelGateway, clients: Clients
) -> None:
    """The warning is that no notebook is kept."""
    ended = command(*flags_for(gateway), "--execute", "6 * 7")
    assert json.loads(ended.stdout)["result"] == ["42"]
    assert ended.returncode == 0
    assert "no contents API" in ended.stderr
    assert ended.stderr.count("\n") == 1

    client = clients(server=gateway)
    session_id = client.open("x = 1")
    assert client.run("echo $((x + 2)); cd /tmp", session_id)["error"] == []
    both = client.run("import os; x, os.getcwd()", session_id)
    assert both["result"] == ["(1, '/tmp')"]

    died = client.run("os._exit(1)", session_id)
    assert "died" in died["error"][0]
    again = client.run("'x' in globals()", session_id)
    assert again["result"][-1:] == ["False"]
    assert "starts empty" in again["result"][0]


def test_a_server_before_a_gateway_keeps_notebooks(
    gateway: KernelGateway, servers: Servers, clients: Clients, tmp_path: Path
) -> None:
    """--gateway-url: the way to a cluster. Files are where the notebooks are."""
    token = f"--GatewayClient.auth_token={gateway.token}"
    front = servers(f"--gateway-url={gateway.url}", token)
    (tmp_path / "a.txt").write_text("a")
    client = clients("--files-dir", str(tmp_path), server=front)
    session_id = client.open("x = 41")
    paths = {"host_path": "a.txt", "remote_path": "a.txt"}
    answer = client.start_tool("upload_file", paths).result(30)
    (copied,) = shown(result_of(answer.model_dump(by_alias=True, mode="json")))
    assert "perhaps not where the kernel runs" in copied
    assert client.run("x + 1", session_id)["result"] == ["42"]
    assert sources(front.notebook(session_id)) == ["x = 41", "x + 1"]
    front.delete_kernel(session_id)
    assert_restored(client.run("x", session_id), ["41"])
    client.close()
    assert clients(server=front).run("x", session_id)["result"][-1:] == ["41"]


# --- Runs -----------------------------------------------------------------------------

# The error, was something sent, was it heard -> how the run ended
FAILED_RUNS: list[tuple[Exception, bool, bool, jim.Outcome]] = [
    (jim.KernelDied("x"), False, False, jim.Outcome.NEVER_RAN),
    (jim.ServerUnreachable("x"), False, False, jim.Outcome.NEVER_RAN),
    (ValueError("x"), False, False, jim.Outcome.NEVER_RAN),
    (jim.NotTaken("x"), True, False, jim.Outcome.NEVER_RAN),
    (jim.KernelDied("x"), True, True, jim.Outcome.KILLED),
    (jim.KernelDied("x"), True, False, jim.Outcome.UNKNOWN),
    (jim.ConnectionLost("x"), True, True, jim.Outcome.UNKNOWN),
    (jim.ConnectionLost("x"), True, False, jim.Outcome.UNKNOWN),
    (jim.ServerUnreachable("x"), True, True, jim.Outcome.UNKNOWN),
    (ValueError("x"), True, True, jim.Outcome.UNKNOWN),
]


@pytest.mark.pure
@pytest.mark.parametrize(("error", "sent", "heard", "outcome"), FAILED_RUNS)
def test_how_a_run_ended_follows_from_the_error_and_what_was_heard(
    error: Exception, sent: bool, heard: bool, outcome: jim.Outcome
) -> None:
    request = jim.Request() if sent else None
    if request is not None:
        request.was_heard = heard
    assert jim.outcome_of_failure(error, request) is outcome


def call_of(code: str, session_id: int) -> dict[str, Any]:
    """Return the parameters of a call, as they are on the wire."""
    arguments = {"code": code, "session_id": session_id}
    return {"name": "execute_code", "arguments": arguments}


SAYS_HOW_IT_ENDS = """import time
try:
    tell('begun')
    wait()
    tell('ran on')
except KeyboardInterrupt:
    tell('stopped')"""


def begin_raw(trial: Trial, raw: RawClient) -> None:
    """Begin a call, number 7, of code that says how it ends."""
    raw.initialize()
    code = trial.code(SAYS_HOW_IT_ENDS)
    raw.send("tools/call", id=7, params=call_of(code, trial.session_id))
    trial.await_told("begun")


@pytest.mark.sdk
@pytest.mark.faults
@pytest.mark.parametrize(
    ("end", "delay_s"), [("of stdin", 0.02), ("of stdin", 0.3), ("by SIGTERM", 0.05)]
)
def test_a_cancel_before_the_end_interrupts_all_the_same(
    trial: Trial, server: JupyterServer, end: str, delay_s: float
) -> None:
    """Claude Code, Codex and Qwen do both when a person presses Ctrl-C."""
    raw = RawClient([*COMMAND, *flags_for(server)])
    begin_raw(trial, raw)
    raw.send("notifications/cancelled", params={"requestId": 7, "reason": "stop"})
    time.sleep(delay_s)
    if end == "by SIGTERM":
        raw.process.terminate()
    raw.close()
    trial.await_told("stopped", 10)
    trial.open_gate()
    trial.survived()
    assert not trial.told("ran on")


@pytest.mark.sdk
@pytest.mark.faults
def test_a_cancel_for_a_time_out_lets_the_code_run_on(
    trial: Trial, server: JupyterServer
) -> None:
    raw = RawClient([*COMMAND, *flags_for(server)])
    begin_raw(trial, raw)
    reason = "McpError: MCP error -32001: Request timed out"
    raw.send("notifications/cancelled", params={"requestId": 7, "reason": reason})
    raw.ask("ping", {})
    trial.open_gate()
    trial.await_told("ran on")
    rest = raw.ask("tools/call", call_of("", trial.session_id))
    assert result_of(rest["result"])["error"] == []
    raw.close()
    assert not trial.told("stopped")
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_half_an_emoji_gets_an_answer(server: JupyterServer, trial: Trial) -> None:
    raw = RawClient([*COMMAND, *flags_for(server)])
    raw.initialize()
    called = call_of("print('\ud83d', '\ud83d\ude00')", trial.session_id)
    answer = raw.ask("tools/call", called)
    raw.close()
    assert result_of(answer["result"])["result"][-1] == "? \U0001f600"


@pytest.mark.faults
def test_an_interrupt_with_nothing_running_says_so(trial: Trial) -> None:
    trial.run("1")
    assert text_of(trial.interrupt()) == f"Nothing ran in session {trial.session_id}"


@pytest.mark.faults
def test_an_interrupt_of_a_culled_kernel_says_so(
    mortal: Trial, server: JupyterServer
) -> None:
    server.delete_kernel(mortal.session_id)
    told = text_of(mortal.interrupt())
    assert "has no kernel" in told
    assert "status 404" not in told


@pytest.mark.faults
def test_a_cell_too_large_for_servers_says_so(trial: Trial) -> None:
    result = trial.run(f"x = '''{'y' * 11_000_000}'''")
    (error,) = result["error"]
    assert "Not run" in error
    assert "11,000," in error


@pytest.mark.sdk
@pytest.mark.faults
def test_code_that_outlives_its_call_goes_on(trial: Trial) -> None:
    """And the rest comes once, in full."""
    with within(10):
        body = "print('first')\nwait()\nprint('second')\n3 * 7"
        early = outcome(trial.begin(body, timeout=1))
    assert early["result"] == ["first"]
    (error,) = early["error"]
    assert "still running" in error.lower()
    assert "nothing is lost" in error
    assert "execute_code" in error
    assert "interrupt_execution" in error
    assert str(trial.session_id) in error

    trial.open_gate()
    assert shown(trial.rest()) == ["second", "21"]
    assert shown(trial.rest()) == []
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_timeout_zero_starts_the_code_and_returns_at_once(trial: Trial) -> None:
    with within(3):
        code = trial.code("tell('started')\nwait()\nprint('end')")
        early = trial.run(code, timeout=0)
    assert len(early["error"]) == 1
    assert early["result"] == []
    trial.await_told("started")
    trial.open_gate()

    assert trial.rest()["result"] == ["end"]
    trial.survived()


@pytest.mark.faults
def test_a_time_too_short_still_starts_the_code(client: Client, tmp_path: Path) -> None:
    """It is over before the kernel is up."""
    marker = tmp_path / "ran"
    with within(5.1):
        early = client.run(f"open({str(marker)!r}, 'a').write('x')", timeout=0.01)
    assert len(early["error"]) == 1
    assert shown(client.run("", early["session_id"])) == ["1"]
    assert marker.read_text() == "x"


@pytest.mark.faults
def test_empty_code_waits_as_long_as_its_own_timeout(trial: Trial) -> None:
    trial.begin_alone("print('a')\nwait()\nprint('b')")
    with within(6):
        waited = trial.rest(timeout=0.5)
    assert "still running" in waited["error"][0].lower()
    trial.open_gate()
    rest = trial.rest()
    assert waited["result"] + rest["result"] in (["a", "b"], ["a\nb"])
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_new_code_is_not_run_after_its_time(trial: Trial) -> None:
    """It waits for a busy session, and its time is over first."""
    trial.begin_alone("wait()\nprint('end')")
    with within(6):
        late = trial.run_counted("tell('late')", timeout=0.5)
    assert "not run" in text_of(late).lower()
    assert str(trial.session_id) in text_of(late)
    trial.open_gate()

    assert trial.rest()["result"] == ["end"]
    trial.survived()
    assert not trial.told("late")


@pytest.mark.faults
def test_earlier_code_comes_first_and_is_marked(trial: Trial) -> None:
    """It ends while new code waits."""
    body = "wait()\nprint('rest')\nraise ValueError('of the first')"
    trial.begin_alone(body)
    call = trial.start("print('new')\n1 / 0")
    trial.open_gate()
    both = outcome(call)
    old, new = both["result"]
    assert old == "[from earlier code] rest"
    assert new == "new"

    old, new = both["error"]
    assert old.startswith("[from earlier code] ")
    assert "of the first" in old
    assert "ZeroDivisionError" in new
    assert "earlier" not in new
    trial.survived()


@pytest.mark.faults
def test_a_run_that_nobody_collects_is_saved_when_it_ends(
    mortal: Trial, server: JupyterServer
) -> None:
    mortal.begin_alone("wait()\nprint('uncollected')")
    mortal.open_gate()

    def saved() -> bool:
        with suppress(ValueError):  # it is just being written
            cell = server.last_cell(mortal.session_id)
            return "uncollected" in json.dumps(cell["outputs"])
        return False

    eventually(saved, 20)
    assert mortal.rest()["result"] == ["uncollected"]
    mortal.survived()


COUNTS = """n = 0
while not (folder / 'gate').exists():
    n += 1
    print('line', n)
    time.sleep(0.02)"""


@pytest.mark.sdk
@pytest.mark.faults
def test_progress_comes_regularly_with_the_newest_line(
    clients: Clients, tmp_path: Path
) -> None:
    """At least every 5 s; here every second."""
    assert jim.PROGRESS_S <= 5
    trial = Trial(clients(command=patched(PROGRESS_S=1)), tmp_path)
    call = trial.begin(COUNTS)

    def lines() -> list[str]:
        said = trial.client.progress
        return [line for line in said if re.fullmatch(r"line \d+", line)]

    eventually(lambda: len(lines()) >= 2, 4)
    first, second = (int(line.split()[1]) for line in lines()[:2])
    assert first > 5, "not the newest line"
    assert second > first + 5, "not the newest line"
    trial.open_gate()
    assert shown(outcome(call))
    trial.survived()


@pytest.mark.faults
def test_a_stall_in_mid_run_holds_no_call(far: Trial, network: Network) -> None:
    """Each is back within 5 s after its time."""
    call = far.begin("print('end')\ntell('done')", timeout=0.5)
    network.mode = "stall"
    with within(6):
        stalled = outcome(call)
    with within(6):
        waited = far.rest(timeout=0.5)
    network.mode = "pass"
    said = [stalled, waited, far.rest()]

    assert [line for each in said for line in each["result"]].count("end") == 1, said
    assert stalled["error"] or stalled["result"] == ["end"]
    far.survived()


@pytest.mark.faults
def test_a_server_that_never_answers_holds_no_call(
    far: Trial, network: Network
) -> None:
    """It accepts connections."""
    network.mode = "stall"
    with within(6):
        old = far.run_counted("print('later')", timeout=0.5)
    with within(6):
        new = far.client.run("1", timeout=0.5)
    assert old["error"]
    assert new["error"]

    network.mode = "pass"
    rest = far.rest()
    if "not run" in (text_of(old) + text_of(rest)).lower():
        assert far.runs() == 0
        far.run_counted()
    else:
        assert "later" in text_of(rest)
    far.survived()
    assert far.client.run("print('up')", new["session_id"])["result"][-1] == "up"


@pytest.mark.faults
def test_a_stalled_save_holds_no_call(
    far: Trial, network: Network, server: JupyterServer
) -> None:
    def stall_at_save(data: bytes) -> bool:
        if data.startswith(b"PUT /api/contents"):
            network.mode = "stall"
        return True

    network.on_client = stall_at_save
    with within(6.5):
        stalled = far.run_counted("print('output')  # saved late", timeout=1)
    assert stalled["result"] == ["output"]
    assert stalled["error"], "an unsaved cell is an error"
    network.reset()
    far.survived()
    saved = sources(server.notebook(far.session_id))
    assert sum("# saved late" in source for source in saved) == 1


@pytest.mark.faults
def test_a_stall_holds_no_interrupt(far: Trial, network: Network) -> None:
    far.begin_alone("wait()\nprint('end')")
    network.mode = "stall"
    with within(11):
        stalled = far.interrupt()
    assert stalled["error"]
    network.mode = "pass"
    far.open_gate()
    far.rest()
    far.survived()


SLEEPS = """
try:
    tell('sleeps')
    time.sleep(100)
finally:
    tell('stopped')
"""


@pytest.mark.sdk
@pytest.mark.faults
def test_a_cancelled_call_interrupts_the_kernel(trial: Trial) -> None:
    call = trial.begin("print('before')" + SLEEPS, until="sleeps")
    trial.client.cancel(call)
    trial.await_told("stopped", 6)
    rest = trial.rest()
    assert "before" in text_of(rest)
    assert "KeyboardInterrupt" in text_of(rest)
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_a_cancelled_bash_call_ends_with_its_children(trial: Trial) -> None:
    trial.run_counted()
    child = trial.folder / "child"
    bash = f"%%bash\nsleep 100 & echo $! > {child}; wait"
    call = trial.start(bash)
    pid = int(eventually(lambda: child.exists() and child.read_text().strip()))
    trial.client.cancel(call)
    eventually(lambda: is_gone(pid), 8)
    trial.rest()
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_a_cancelled_call_that_waits_stops_nothing(trial: Trial) -> None:
    """It is withdrawn."""
    call = trial.begin("wait()\nprint('end')")
    waiting = trial.start(trial.code("tell('late')"))
    trial.client.run("beside", trial.beside)  # so that it has arrived
    trial.client.cancel(waiting)
    trial.client.run("beside", trial.beside)
    trial.open_gate()

    assert shown(outcome(call)) == ["end"]
    trial.survived()
    assert not trial.told("late")


@pytest.mark.sdk
@pytest.mark.faults
def test_an_interrupt_returns_the_rest_and_keeps_variables(trial: Trial) -> None:
    body = "print('before', flush=True)" + SLEEPS
    early = outcome(trial.begin(body, until="sleeps", timeout=1))
    assert early["result"] == ["before"]
    with within(5):
        stopped = trial.interrupt()

    assert trial.told("stopped")
    assert "KeyboardInterrupt" in text_of(stopped)
    assert "before" not in text_of(stopped)
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_an_interrupt_while_a_call_waits_ends_that_call(trial: Trial) -> None:
    call = trial.begin("print('before')" + SLEEPS, until="sleeps")
    with within(5):
        stopped = trial.interrupt()
        ended = outcome(call)
    whole = text_of(stopped) + text_of(ended)

    assert ended["error"]
    assert whole.count("before\n") <= 1
    assert "before" in whole
    assert "KeyboardInterrupt" in whole
    trial.survived()


WAITS_BEHIND = "tell('next')\nwait()\nprint('next')"


@pytest.mark.faults
def test_an_interrupt_stops_what_runs_and_not_what_waits(trial: Trial) -> None:
    stopped = trial.begin("tell('runs')\ntime.sleep(100)", until="runs")
    call = trial.start(WAITS_BEHIND)
    with within(5):
        assert trial.interrupt()["error"] == []
    assert "KeyboardInterrupt" in outcome(stopped)["error"][0]
    trial.await_told("next")
    trial.open_gate()

    assert shown(outcome(call)) == ["next"]
    trial.survived()


@pytest.mark.faults
def test_a_restart_stops_what_runs_and_not_what_waits(mortal: Trial) -> None:
    """What waits runs in the new kernel, after the restore."""
    stopped = mortal.begin("tell('runs')\ntime.sleep(100)", until="runs")
    call = mortal.start(f"import time\n{mortal.code(WAITS_BEHIND)}\nkept")
    report = text_of(mortal.interrupt(restart=True))
    assert "KeyboardInterrupt" in outcome(stopped)["error"][0]
    mortal.await_told("next")
    mortal.open_gate()

    assert "ran again" in report
    assert shown(outcome(call)) == ["next", "5"]


@pytest.mark.faults
def test_a_restart_of_an_idle_session_restores_it(mortal: Trial) -> None:
    mortal.run("gone = 1 / 0")
    process = mortal.kernel_process()
    report = shown(mortal.interrupt(restart=True))
    assert "restarted" in report[0]
    assert "1 cell (2) (failed)" in report[-1]
    assert mortal.kernel_process().pid != process.pid
    mortal.run_counted()
    mortal.survived()


@pytest.mark.faults
def test_a_shutdown_ends_the_kernel_and_keeps_the_notebook(
    mortal: Trial, server: JupyterServer
) -> None:
    process = mortal.kernel_process()
    (said,) = shown(mortal.interrupt(shutdown=True))
    assert "shut down" in said
    eventually(lambda: is_gone(process.pid))
    assert sources(server.notebook(mortal.session_id))[0] == "kept = 5"
    assert_restored(mortal.run("kept"), ["5"])


@pytest.mark.faults
def test_an_interrupt_of_an_idle_session_changes_nothing(trial: Trial) -> None:
    trial.run_counted()
    with within(5):
        stopped = trial.interrupt()
    assert stopped["session_id"] == trial.session_id
    assert "KeyboardInterrupt" not in text_of(stopped)
    trial.survived()


@pytest.mark.faults
def test_restart_and_shutdown_together_do_nothing_and_say_so(trial: Trial) -> None:
    (said,) = trial.interrupt(restart=True, shutdown=True)["error"]
    assert "not both" in said
    trial.run_counted()
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_an_interrupt_of_an_unknown_session_says_so(client: Client) -> None:
    with within(5):
        stopped = client.interrupt(777_000_777)
    assert "777000777" in text_of(stopped).replace("_", "")


STUBBORN = """while True:
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        print('no')"""


@pytest.mark.faults
def test_a_cell_that_swallows_interrupts_needs_a_restart(mortal: Trial) -> None:
    """And it is told so."""
    mortal.begin_alone(STUBBORN)
    with within(7):
        ignored = mortal.interrupt()
    assert "restart=True" in text_of(ignored)
    assert_restarts(mortal)
    mortal.survived()


@pytest.mark.faults
def test_a_restart_stops_native_code(mortal: Trial) -> None:
    """It ignores the interrupt."""
    mortal.begin_alone("tell('native')\nsum(range(10 ** 13))", until="native")
    assert_restarts(mortal)
    mortal.survived()


@pytest.mark.faults
def test_native_code_that_says_nothing_is_not_restored(mortal: Trial) -> None:
    """It holds the GIL from its first moment.

    So the kernel cannot even say that it is busy.
    """
    early = mortal.run("sum(range(10 ** 13))", timeout=0.5)
    assert "running" in text_of(early)
    assert_restarts(mortal)
    mortal.run_counted()
    mortal.survived()


@pytest.mark.faults
def test_another_mcp_server_interrupts_what_runs(
    clients: Clients, tmp_path: Path
) -> None:
    trial = Trial(clients(), tmp_path)
    call = trial.begin(SLEEPS, until="sleeps")
    trial.client.kill()
    call.cancel()
    trial.client = clients()
    with within(10):
        stopped = trial.interrupt()
    trial.await_told("stopped", 3)

    assert stopped["session_id"] == trial.session_id
    trial.survived()


@pytest.fixture
def busy_elsewhere(client: Client, clients: Clients) -> tuple[Client, int]:
    """A client, and a session whose kernel is busy with another one's code."""
    session_id = client.open("import time")
    still = client.run("time.sleep(60)", session_id, timeout=0.5)
    assert "Still running" in text_of(still)
    return clients(command=patched(PROGRESS_S=1)), session_id


@pytest.mark.faults
@pytest.mark.parametrize("code", ["", "1"])
def test_an_interrupt_after_a_call_gave_up_stops_what_it_waited_for(
    code: str, busy_elsewhere: tuple[Client, int]
) -> None:
    client, session_id = busy_elsewhere
    waited = client.run(code, session_id, timeout=1)
    assert "interrupt_execution" in text_of(waited)
    with within(7):
        assert "KeyboardInterrupt" in text_of(client.interrupt(session_id))
    assert shown(client.run("6 * 7", session_id)) == ["42"]


@pytest.mark.faults
@pytest.mark.parametrize("how", ["restart", "shutdown"])
def test_the_end_of_a_kernel_is_told_to_a_call_that_waits_for_others(
    how: str, busy_elsewhere: tuple[Client, int]
) -> None:
    client, session_id = busy_elsewhere
    waiting = client.start("", session_id, timeout=50)
    eventually(lambda: any("other code" in said for said in client.progress))
    with within(20):
        said = client.interrupt(session_id, **{how: True})
    assert how.replace("down", " down") in text_of(said)

    with within(5):
        assert "ended as asked" in text_of(outcome(waiting))
    assert client.run("6 * 7", session_id)["result"][-1] == "42"


# --- Notebook -------------------------------------------------------------------------

MARK = "jupyter_interpreter_mcp"


TIMES = {
    "iopub.execute_input": "2026-11-26T01:00:00.000000Z",
    "shell.execute_reply": "2026-11-26T01:00:02.500000Z",
}


def code_cell(
    name: str, text: str = "", source: str = "", **mark: str
) -> dict[str, Any]:
    """A cell of ours, as the worker saves it."""
    output = {"output_type": "stream", "name": "stdout", "text": text or name}
    mark = {"folder": "/home", "outcome": "ended well", **mark}
    return {
        "cell_type": "code",
        "id": name,
        "source": source or f"print({name!r})",
        "metadata": {"execution": TIMES, MARK: mark},
        "execution_count": 1,
        "outputs": [output],
    }


def text_cell(name: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": name}


def notebook_text(*cells: Any, **fields: Any) -> str:
    """The text of a notebook."""
    notebook = {"metadata": {MARK: {}}, "nbformat": 4, "nbformat_minor": 5, **fields}
    return json.dumps({"cells": cells, **notebook})


class Disk:
    """A contents API with one file, a clock, and hooks between two requests."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.now = 100.0
        self.version = 0
        self.requests: list[str] = []
        # Called once when the next request of that kind comes, before it is served.
        self.hooks: dict[str, Callable[[], None]] = {}
        self.error: jim.ServerError | None = None
        # Called once between a write and its answer.
        self.after_write: Callable[[], None] | None = None

    def put(self, text: str | None) -> None:
        """What somebody else writes."""
        self.text = text
        self.version += 1

    def ids(self) -> list[str]:
        assert self.text is not None
        return [cell["id"] for cell in json.loads(self.text)["cells"]]

    def cell(self, name: str) -> dict[str, Any]:
        assert self.text is not None
        (cell,) = [c for c in json.loads(self.text)["cells"] if c["id"] == name]
        return dict(cell)

    def _serve(self, name: str) -> None:
        self.requests.append(name)
        self.now += 0.001
        hook = self.hooks.pop(name, None)
        if hook is not None:
            hook()
        if self.error is not None:
            raise self.error

    def modified(self, _path: str) -> str | None:
        self._serve("look")
        return None if self.text is None else str(self.version)

    def read(self, path: str) -> tuple[str, str]:
        self._serve("read")
        if self.text is None:
            raise jim.NotFound(path)
        return self.text, str(self.version)

    def write(self, _path: str, pieces: list[bytes]) -> tuple[str, int]:
        self._serve("write")
        self.put(json.loads(b'"' + b"".join(pieces) + b'"'))
        if self.after_write is not None:
            hook, self.after_write = self.after_write, None
            hook()
        return str(self.version), len((self.text or "").encode())

    def make_folder(self, _folder: str) -> None:
        self.requests.append("folder")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A disk whose clock goes on while this thread sleeps; others sleep as they do."""
    disk = Disk()
    really_sleep = time.sleep
    ours = threading.get_ident()

    def sleep(seconds: float) -> None:
        if threading.get_ident() == ours:
            disk.now += seconds
        else:
            really_sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    return disk


def notebook_on(disk: Disk) -> jim.Notebook:
    client: Any = disk
    return jim.Notebook(client, "notebooks/1.ipynb", lambda: disk.now)


def run_and_save(notebook: jim.Notebook, cell: dict[str, Any]) -> jim.Saved:
    """What the worker does for one short cell."""
    notebook.begin()
    return notebook.save(cell)


def confirm_later(notebook: jim.Notebook, disk: Disk) -> None:
    """Some seconds later, when the worker has confirmed what it saved."""
    disk.now += 3.1
    notebook.confirm()
    assert notebook.is_confirmed


@pytest.mark.pure
def test_a_new_notebook_is_valid_and_marked(disk: Disk) -> None:
    notebook = notebook_on(disk)
    assert notebook.load() is None
    notebook.defaults = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    assert (
        run_and_save(notebook, code_cell("a", "\ud83d and \x00\n\"'\\"))
        is jim.Saved.WELL
    )
    run_and_save(notebook, code_cell("b"))
    assert disk.text is not None
    read = parse_notebook(disk.text)
    nbformat.validate(read)
    assert (read.nbformat, read.nbformat_minor) == (4, 5)
    assert read.metadata.kernelspec.name == "python3"
    assert read.metadata[MARK] == {"adopted": False, "left": []}
    assert disk.cell("a")["outputs"][0]["text"] == "? and \x00\n\"'\\"


@pytest.mark.pure
def test_a_short_cell_costs_one_look_and_one_write(disk: Disk) -> None:
    notebook = notebook_on(disk)
    notebook.load()
    for number in range(5):
        run_and_save(notebook, code_cell(f"c{number}"))
    disk.requests.clear()
    run_and_save(notebook, code_cell("last"))
    assert disk.requests == ["look", "write"]
    assert len(disk.ids()) == 6


@pytest.mark.pure
def test_an_old_look_is_repeated_before_a_save(disk: Disk) -> None:
    notebook = notebook_on(disk)
    notebook.begin()
    disk.now += 0.06
    disk.requests.clear()
    notebook.save(code_cell("a"))
    assert disk.requests[0] == "look"


@pytest.mark.pure
def test_a_persons_edit_in_the_second_before_a_save_is_kept(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    notebook.begin()
    disk.now += 0.4
    disk.put(notebook_text({**code_cell("a"), "source": "edited"}, text_cell("m")))
    disk.now += 0.4
    assert notebook.save(code_cell("b")) is jim.Saved.WELL
    assert disk.ids() == ["a", "m", "b"]
    assert disk.cell("a")["source"] == "edited"


@pytest.mark.pure
def test_what_another_writer_overwrote_is_put_back_in_its_place(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    before = disk.text
    run_and_save(notebook, code_cell("b"))
    assert before is not None
    stale = json.loads(before)
    stale["cells"].append(code_cell("theirs"))
    disk.put(json.dumps(stale))
    run_and_save(notebook, code_cell("c"))
    assert disk.ids() == ["a", "b", "theirs", "c"]


@pytest.mark.pure
def test_the_last_cell_is_put_back_by_confirming(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    disk.put(notebook_text(code_cell("theirs")))
    notebook.confirm()
    assert disk.ids() == ["theirs"], "too early to look"
    disk.now += 1.1
    notebook.confirm()
    assert not notebook.is_confirmed
    assert disk.ids() == ["theirs", "a"]
    confirm_later(notebook, disk)


@pytest.mark.pure
def test_a_cell_that_was_seen_and_overwritten_late_is_put_back(disk: Disk) -> None:
    """A writer on a busy machine can hold its old version for more than a second."""
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    disk.now += 1.1
    notebook.confirm()
    assert not notebook.is_confirmed
    disk.put(notebook_text(code_cell("theirs")))
    disk.now += 1.1
    notebook.confirm()
    assert disk.ids() == ["theirs", "a"]


@pytest.mark.pure
def test_a_text_as_long_as_ours_of_the_same_moment_is_noticed(disk: Disk) -> None:
    """The server tells both writers the same time and size."""
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    disk.put(notebook_text(code_cell("a"), code_cell("x")))
    run_and_save(notebook, code_cell("b"))

    def overwrite() -> None:
        assert disk.text is not None
        theirs = disk.text.replace('"c"', '"d"').replace("'c'", "'d'")
        assert len(theirs) == len(disk.text)
        disk.text = theirs

    disk.after_write = overwrite
    run_and_save(notebook, code_cell("c"))
    assert disk.ids() == ["a", "x", "b", "d"]
    disk.now += 1.1
    notebook.confirm()
    assert disk.ids() == ["a", "x", "b", "c", "d"]


@pytest.mark.pure
def test_at_the_end_confirming_does_not_wait(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    assert not notebook.is_contended
    for _ in range(2):
        disk.put(notebook_text())
        notebook.confirm(is_last=True)
        assert disk.ids() == ["a"]
        assert notebook.is_contended, "so it is looked at once more"
    disk.now += 1.1
    assert not notebook.is_contended


@pytest.mark.pure
def test_what_a_person_deleted_after_confirming_stays_deleted(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    run_and_save(notebook, code_cell("b"))
    confirm_later(notebook, disk)
    disk.put(notebook_text(code_cell("b")))
    run_and_save(notebook, code_cell("c"))
    assert disk.ids() == ["b", "c"]


@pytest.mark.pure
def test_a_write_that_met_another_is_looked_at_at_once(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    disk.after_write = lambda: disk.put(
        notebook_text(code_cell("a"), code_cell("theirs"))
    )
    run_and_save(notebook, code_cell("b"))
    assert disk.ids() == ["a", "b", "theirs"]


MIXED: dict[str, Callable[[str], str]] = {
    "a mixture": lambda text: text + text[-40:],
    "the end of another": lambda text: text[-40:],
    "nothing": lambda _: "",
}


@pytest.mark.pure
@pytest.mark.parametrize("name", MIXED)
def test_a_mixture_of_our_making_is_written_anew(disk: Disk, name: str) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    disk.after_write = lambda: disk.put(MIXED[name](disk.text or ""))
    run_and_save(notebook, code_cell("b"))
    assert disk.ids() == ["a", "b"]


@pytest.mark.pure
def test_of_a_mixture_what_the_other_wrote_is_kept(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    disk.after_write = lambda: disk.put(notebook_text(text_cell("m")) + "}]}")
    run_and_save(notebook, code_cell("b"))
    assert disk.ids() == ["m", "a", "b"]


@pytest.mark.pure
@pytest.mark.parametrize("text", ["not JSON", "{}}", '{"cells": ['])
def test_garbage_of_others_is_left_as_it_is(disk: Disk, text: str) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    confirm_later(notebook, disk)
    disk.now += 5
    disk.put(text)
    for _ in range(3):
        with pytest.raises(jim.NotebookError, match=r"notebooks/1\.ipynb"):
            notebook.save(code_cell("b"))
        assert disk.text == text
    disk.put(notebook_text(code_cell("a")))
    run_and_save(notebook, code_cell("c"))
    assert disk.ids() == ["a", "b", "c"]


@pytest.mark.pure
def test_a_reader_in_mid_write_reads_again(disk: Disk) -> None:
    disk.put(notebook_text(code_cell("a"))[:50])

    def finish() -> None:
        disk.hooks["read"] = lambda: disk.put(notebook_text(code_cell("a")))

    disk.hooks["read"] = finish
    cells = notebook_on(disk).load()
    assert cells is not None
    assert [cell.cell_id for cell in cells] == ["a"]


@pytest.mark.pure
def test_an_empty_file_is_a_new_notebook(disk: Disk) -> None:
    disk.put("")
    notebook = notebook_on(disk)
    assert notebook.load() == []
    assert run_and_save(notebook, code_cell("a")) is jim.Saved.WELL
    assert disk.ids() == ["a"]
    assert not notebook.mark["adopted"]


@pytest.mark.pure
def test_a_cell_whose_save_failed_is_saved_with_the_next(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    disk.error = jim.ServerError("away")
    for name in ("b", "c"):
        with pytest.raises(jim.ServerError):
            notebook.save(code_cell(name))
    disk.error = None
    assert run_and_save(notebook, code_cell("d")) is jim.Saved.WELL
    assert disk.ids() == ["a", "b", "c", "d"]


@pytest.mark.pure
def test_outputs_whose_save_failed_are_saved_with_the_next_cell(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a", "half"))
    confirm_later(notebook, disk)
    disk.error = jim.ServerError("away")
    with pytest.raises(jim.ServerError):
        notebook.save(code_cell("a", "whole"))
    disk.error = None
    run_and_save(notebook, code_cell("b"))
    assert disk.cell("a")["outputs"][0]["text"] == "whole"


@pytest.mark.pure
def test_what_json_cannot_compare_is_confirmed_too(disk: Disk) -> None:
    notebook = notebook_on(disk)
    data = {"application/json": {"x": float("nan")}, "text/plain": "\ud83d"}
    display = {"output_type": "display_data", "data": data, "metadata": {}}
    run_and_save(notebook, {**code_cell("a"), "outputs": [display]})
    disk.put(disk.text)
    disk.requests.clear()
    confirm_later(notebook, disk)
    assert disk.requests == ["look", "read"]


@pytest.mark.pure
def test_a_folder_that_was_removed_is_made_for_the_next_cell(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    assert disk.requests.count("folder") == 1
    disk.put(None)
    run_and_save(notebook, code_cell("b"))
    assert disk.requests.count("folder") == 2


@pytest.mark.pure
def test_a_persons_notebook_that_was_repaired_is_adopted(disk: Disk) -> None:
    disk.put("not JSON")
    notebook = notebook_on(disk)
    with pytest.raises(jim.NotebookError):
        notebook.load()
    disk.put(notebook_text(code_cell("p"), metadata={}))
    run_and_save(notebook, code_cell("a"))
    assert json.loads(disk.text or "")["metadata"][MARK]["adopted"]


@pytest.mark.pure
def test_a_notebook_deleted_while_a_cell_runs_stays_deleted(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    notebook.begin()
    disk.now += 1
    disk.put(None)
    assert notebook.save(code_cell("b")) is jim.Saved.STAYS_DELETED
    assert notebook.save(code_cell("b", "more")) is jim.Saved.STAYS_DELETED
    assert notebook.is_confirmed
    assert disk.text is None
    assert run_and_save(notebook, code_cell("c")) is jim.Saved.ANEW
    assert run_and_save(notebook, code_cell("d")) is jim.Saved.WELL
    assert disk.ids() == ["c", "d"]


@pytest.mark.pure
def test_a_notebook_deleted_between_cells_begins_anew(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    disk.put(None)
    notebook.confirm(is_last=True)
    assert disk.text is None
    assert run_and_save(notebook, code_cell("b")) is jim.Saved.ANEW
    assert disk.ids() == ["b"]


@pytest.mark.pure
def test_a_running_cell_that_a_person_edited_gets_our_outputs(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a", "half"))
    confirm_later(notebook, disk)
    edited = {**code_cell("a", "half"), "source": "edited"}
    edited["metadata"] = {"tags": ["mine"]}
    disk.put(notebook_text(edited))
    assert notebook.save(code_cell("a", "whole")) is jim.Saved.WELL
    assert disk.cell("a")["source"] == "edited"
    assert disk.cell("a")["outputs"][0]["text"] == "whole"
    assert disk.cell("a")["metadata"]["tags"] == ["mine"]
    confirm_later(notebook, disk)


@pytest.mark.pure
def test_a_running_cell_that_a_person_deleted_stays_deleted(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("other"))
    run_and_save(notebook, code_cell("a", "half"))
    confirm_later(notebook, disk)
    disk.put(notebook_text(code_cell("other")))
    for text in ("more", "whole"):
        assert notebook.save(code_cell("a", text)) is jim.Saved.CELL_DELETED
    assert notebook.is_confirmed
    assert disk.ids() == ["other"]


@pytest.mark.pure
def test_a_running_cell_that_became_a_text_is_left_a_text(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a", "half"))
    confirm_later(notebook, disk)
    disk.put(notebook_text(text_cell("a")))
    assert notebook.save(code_cell("a", "whole")) is jim.Saved.WELL
    assert disk.cell("a") == text_cell("a")
    confirm_later(notebook, disk)


@pytest.mark.pure
def test_old_outputs_of_a_running_cell_are_renewed(disk: Disk) -> None:
    """Another writer saved what it had seen a moment before our last save."""
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a", "half"))
    before = disk.text
    notebook.save(code_cell("a", "whole"))
    disk.put(before)
    disk.now += 1.1
    notebook.confirm()
    assert disk.cell("a")["outputs"][0]["text"] == "whole"


@pytest.mark.pure
def test_a_persons_own_notebook_is_adopted_for_good(disk: Disk) -> None:
    disk.put(notebook_text({**code_cell("p"), "metadata": {}}, metadata={"mine": 1}))
    notebook = notebook_on(disk)
    notebook.load()
    assert notebook.mark["adopted"]
    run_and_save(notebook, code_cell("a"))
    again = notebook_on(disk)
    assert [cell.is_ours for cell in again.load() or []] == [False, True]
    assert again.mark["adopted"]
    assert json.loads(disk.text or "")["metadata"]["mine"] == 1


@pytest.mark.pure
def test_what_is_left_of_a_restore_is_found_by_the_next_process(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    notebook.mark["left"] = ["a"]
    run_and_save(notebook, code_cell("b"))
    again = notebook_on(disk)
    again.load()
    assert again.mark["left"] == ["a"]


@pytest.mark.pure
def test_released_cells_are_read_again(disk: Disk) -> None:
    notebook = notebook_on(disk)
    run_and_save(notebook, code_cell("a"))
    confirm_later(notebook, disk)
    notebook.release()
    assert run_and_save(notebook, code_cell("b")) is jim.Saved.WELL
    assert disk.ids() == ["a", "b"]
    confirm_later(notebook, disk)
    notebook.release()
    disk.put(None)
    assert run_and_save(notebook, code_cell("c")) is jim.Saved.ANEW


@pytest.mark.pure
def test_a_first_cell_that_was_not_saved_is_kept_when_idle(disk: Disk) -> None:
    """There is no file yet, and so nothing that could confirm the cell."""
    notebook = notebook_on(disk)
    notebook.load()
    disk.hooks["write"] = lambda: setattr(disk, "error", jim.ServerError("full"))
    with pytest.raises(jim.ServerError):
        run_and_save(notebook, code_cell("a"))
    disk.error = None
    for _ in range(5):
        disk.now += 1.1
        notebook.confirm()
    notebook.release()
    assert run_and_save(notebook, code_cell("b")) is jim.Saved.WELL
    assert disk.ids() == ["a", "b"]


def pending(name: str, *, may_return: bool = True) -> tuple[str, jim.Pending]:
    return name, jim.Pending(code_cell(name, "ours"), 0.0, may_return=may_return)


MERGES: list[tuple[str, str, list[tuple[str, jim.Pending]], str]] = [
    ("ab", "ab", [], "ab"),
    ("", "a", [pending("a")], "a"),
    ("ab", "abc", [pending("c")], "abc"),
    ("abx", "ab", [pending("c")], "abxc"),
    ("abx", "abc", [pending("c")], "abcx"),
    ("ac", "abc", [pending("b")], "abc"),
    ("acx", "abc", [pending("b")], "abcx"),
    ("xa", "abcd", [pending("b"), pending("c"), pending("d")], "xabcd"),
    ("", "ab", [pending("a"), pending("b")], "ab"),
    ("x", "ab", [pending("a"), pending("b")], "xab"),
    ("x", "ab", [], "x"),
    ("x", "xa", [pending("a", may_return=False)], "x"),
    ("xa", "xa", [pending("a", may_return=False)], "xa"),
    ("ba", "ab", [pending("a"), pending("b")], "ba"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("theirs", "order", "ours", "merged"), MERGES)
def test_merging_keeps_theirs_and_puts_ours_back(
    theirs: str, order: str, ours: list[tuple[str, jim.Pending]], merged: str
) -> None:
    cells = jim.merge([code_cell(name) for name in theirs], list(order), dict(ours))
    assert "".join(cell["id"] for cell in cells) == merged
    for cell in cells:
        is_ours = cell["id"] in dict(ours)
        assert cell["outputs"][0]["text"] == ("ours" if is_ours else cell["id"])


def without(cell: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in cell.items() if key != name}


TOLERATED_NOTEBOOKS: list[str] = [
    notebook_text(code_cell("a"), metadata=None),
    notebook_text(code_cell("a"), metadata={"kernelspec": None}),
    notebook_text(code_cell("a"), metadata={"kernelspec": {"name": ["python3"]}}),
    notebook_text(code_cell("a"), metadata={MARK: None}),
    notebook_text(code_cell("a"), nbformat_minor=2),
    notebook_text({**code_cell("a"), "metadata": None}),
    notebook_text({**code_cell("a"), "outputs": None}),
    notebook_text({**code_cell("a"), "source": None}),
    notebook_text({**code_cell("a"), "source": ["x\n", "y"]}),
    notebook_text({**code_cell("a"), "id": 7}),
    notebook_text({**code_cell("a"), "id": "a b"}),
    notebook_text(code_cell("a"), code_cell("a")),
    notebook_text(
        *(without(code_cell("a"), name) for name in ("id", "outputs", "metadata"))
    ),
    notebook_text(
        without(code_cell("a"), "execution_count"), without(text_cell("m"), "id")
    ),
    notebook_text({**code_cell("a"), "metadata": {"execution": {}, MARK: "x"}}),
]


@pytest.mark.pure
@pytest.mark.parametrize("text", TOLERATED_NOTEBOOKS)
def test_a_harmless_defect_of_a_notebook_is_mended(disk: Disk, text: str) -> None:
    disk.put(text)
    notebook = notebook_on(disk)
    cells = notebook.load()
    notebook.defaults = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    run_and_save(notebook, code_cell("new"))
    assert cells is not None
    assert len(disk.ids()) == len(cells) + 1
    assert disk.text is not None
    nbformat.validate(parse_notebook(disk.text))


MALFORMED_NOTEBOOKS: list[str] = [
    "not JSON",
    "[]",
    "null",
    "3",
    '{"cells": [{}], "nbformat": 4}',
    notebook_text(metadata=[1]),
    notebook_text(nbformat=3),
    notebook_text(nbformat_minor=None),
    notebook_text(nbformat_minor="5"),
    notebook_text(cells=None),
    notebook_text(cells={"a": 1}),
    notebook_text(3),
    notebook_text(None),
    notebook_text({}),
    notebook_text({**code_cell("a"), "outputs": ["text"]}),
    notebook_text({**code_cell("a"), "outputs": [None]}),
    notebook_text({**code_cell("a"), "outputs": "text"}),
    notebook_text({**code_cell("a"), "source": 3}),
    notebook_text({**code_cell("a"), "source": [3]}),
    notebook_text({**code_cell("a"), "metadata": "x"}),
    notebook_text({**code_cell("a"), "cell_type": None}),
    notebook_text({**code_cell("a"), "cell_type": ["code"]}),
    '{"cells": ' + "[" * 100_000,
    '{"nbformat": 4, "nbformat_minor": ' + "9" * 5_000 + "}",
]


@pytest.mark.pure
@pytest.mark.parametrize("text", MALFORMED_NOTEBOOKS, ids=lambda text: text[:60])
def test_a_malformed_notebook_is_named_and_left_as_it_is(disk: Disk, text: str) -> None:
    disk.put(text)
    notebook = notebook_on(disk)
    with pytest.raises(jim.NotebookError, match=r"notebooks/1\.ipynb"):
        notebook.load()
    with pytest.raises(jim.NotebookError, match=r"notebooks/1\.ipynb"):
        notebook.save(code_cell("new"))
    assert disk.text == text
    disk.put(None)
    assert run_and_save(notebook, code_cell("newer")) is jim.Saved.WELL
    assert disk.ids() == ["new", "newer"]


@pytest.mark.pure
def test_a_file_that_is_no_text_is_named(disk: Disk) -> None:
    disk.error = jim.ServerError("is not UTF-8 encoded")
    disk.error.status = 400
    with pytest.raises(jim.NotebookError, match=r"notebooks/1\.ipynb"):
        notebook_on(disk).load()
    disk.error.status = 503
    with pytest.raises(jim.ServerError):
        notebook_on(disk).load()


def error_output(name: str = "ValueError", value: str = "x") -> list[dict[str, Any]]:
    output = {"output_type": "error", "ename": name, "evalue": value, "traceback": []}
    return [output]


def unmarked(**fields: Any) -> dict[str, Any]:
    """A cell without a mark of ours, as of a person or an older version."""
    metadata = fields.pop("metadata", {})
    return {**code_cell("a"), "metadata": metadata, "outputs": [], **fields}


BEGUN = {"iopub.status.busy": "2026-11-26T01:00:00Z"}


OUTCOMES: list[tuple[dict[str, Any], jim.Outcome]] = [
    (code_cell("a"), jim.Outcome.ENDED_WELL),
    (code_cell("a", outcome="outcome unknown"), jim.Outcome.UNKNOWN),
    (code_cell("a", outcome="killed its kernel"), jim.Outcome.KILLED),
    (code_cell("a", outcome="what"), jim.Outcome.UNKNOWN),
    (
        {**code_cell("a", outcome="failed"), "outputs": error_output()},
        jim.Outcome.FAILED,
    ),
    ({**code_cell("a"), "outputs": error_output()}, jim.Outcome.FAILED),
    (
        {**code_cell("a"), "outputs": error_output("SystemExit", "0")},
        jim.Outcome.ENDED_WELL,
    ),
    (
        {**code_cell("a"), "outputs": error_output("SystemExit", "3")},
        jim.Outcome.FAILED,
    ),
    (unmarked(), jim.Outcome.ENDED_WELL),
    (unmarked(execution_count=None), jim.Outcome.NEVER_RAN),
    (
        unmarked(execution_count=None, metadata={"execution": TIMES}),
        jim.Outcome.ENDED_WELL,
    ),
    (
        unmarked(execution_count=None, metadata={"execution": BEGUN}),
        jim.Outcome.UNKNOWN,
    ),
    (unmarked(outputs=error_output()), jim.Outcome.FAILED),
    (
        unmarked(metadata={"execution": 3, "tags": None, MARK: "x"}),
        jim.Outcome.ENDED_WELL,
    ),
    (
        unmarked(metadata={"execution": {"shell.execute_reply": 5}}),
        jim.Outcome.ENDED_WELL,
    ),
    (text_cell("m"), jim.Outcome.NEVER_RAN),
]


@pytest.mark.pure
@pytest.mark.parametrize(("cell", "outcome"), OUTCOMES)
def test_the_file_tells_how_a_cell_ended(
    cell: dict[str, Any], outcome: jim.Outcome
) -> None:
    assert jim.parse_cell(1, cell).outcome is outcome


@pytest.mark.pure
def test_the_file_tells_where_a_cell_ran_and_how_long() -> None:
    cell = jim.parse_cell(3, code_cell("a", folder="/data", ended_in="/tmp"))
    assert (cell.number, cell.cell_id, cell.folder) == (3, "a", "/data")
    assert cell.ended_in == "/tmp"
    assert cell.duration_s == 2.5
    assert cell.is_ours
    assert not cell.is_tagged


FORGERIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"source": "print('b')"}, {}),
    ({"source": ""}, {}),
    ({}, {"outcome": "failed"}),
    ({}, {"folder": "/"}),
    ({}, {"ended_in": "/"}),
    ({}, {"folder": "/tmp", "ended_in": "/home"}),
    ({}, {"folder": None}),
    ({}, {"signature": ""}),
    ({}, {"signature": None}),
    ({}, {"signature": "\ud83d\xe9"}),
    ({}, {"signature": ["x"]}),
    ({"metadata": {}}, {}),
]


def signed_cell(disk: Disk, source: str = "") -> dict[str, Any]:
    """A cell as it is saved with a key."""
    client: Any = disk
    path = "notebooks/1.ipynb"
    notebook = jim.Notebook(client, path, lambda: disk.now, signing_key=b"key")
    notebook.save(code_cell("a", source=source, folder="/home", ended_in="/tmp"))
    return disk.cell("a")


@pytest.mark.pure
@pytest.mark.parametrize("source", ["x = 1", "'\ud83d' '\xe9'\n\n"])
def test_a_signature_holds_with_its_key_only(disk: Disk, source: str) -> None:
    cell = signed_cell(disk, source)
    assert jim.parse_cell(1, cell, b"key").is_ours
    assert not jim.parse_cell(1, cell, b"another").is_ours
    assert jim.parse_cell(1, cell).is_ours


@pytest.mark.pure
@pytest.mark.parametrize(("fields", "mark"), FORGERIES)
def test_a_copied_signature_holds_for_nothing_else(
    disk: Disk, fields: dict[str, Any], mark: dict[str, Any]
) -> None:
    cell = signed_cell(disk)
    cell["metadata"][MARK].update(mark)
    cell.update(fields)
    assert not jim.parse_cell(1, cell, b"key").is_ours


@pytest.mark.faults
@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.load)])
def test_two_servers_on_one_session_lose_no_cell(
    clients: Clients, server: JupyterServer, count: int
) -> None:
    """Small cells of each, as fast as they go."""
    pair = [clients(), clients()]
    session_id = pair[0].open("both = 1")
    codes = [[f"'{name}{n}'" for n in range(count)] for name in "ab"]

    async def run_all(client: Client, cells: list[str]) -> None:
        for code in cells:
            given = {"code": code, "session_id": session_id}
            answer = await client.session.call_tool("execute_code", given)
            assert result_of(wire(answer))["error"] == []

    done = [
        client.on_loop(run_all(client, cells))
        for client, cells in zip(pair, codes, strict=True)
    ]
    while not all(each.done() for each in done):
        with suppress(json.JSONDecodeError):  # a look in mid-write
            server.notebook(session_id)
        time.sleep(0.2)
    for each in done:
        each.result(60)
    for client in pair:
        client.close()

    nbformat.validate(read_notebook(server.path(session_id)))
    cells = sources(server.notebook(session_id))
    assert sorted(cells[1:]) == sorted(codes[0] + codes[1])
    for name, own in zip("ab", codes, strict=True):
        assert [cell for cell in cells if cell.startswith(f"'{name}")] == own


def save_as_person(server: JupyterServer, session_id: int, name: str) -> None:
    """Add a text to a session's notebook, as an editor does that has it open."""
    path = f"contents/notebooks/{session_id}.ipynb"

    def read() -> Any:
        answer = server.api("GET", path)
        return answer.ok and answer.json()

    model = eventually(read)  # the server writes in place: a look can be too early
    cell = {"cell_type": "markdown", "id": name, "metadata": {}, "source": name}
    model["content"]["cells"].append(cell)
    server.api("PUT", path, json=model).raise_for_status()


@pytest.mark.faults
def test_what_a_person_saves_while_a_cell_runs_is_kept(
    trial: Trial, server: JupyterServer
) -> None:
    """Some milliseconds before the agent's own save."""
    for name in ("first", "second", "third"):
        call = trial.start(trial.code(f"tell('{name}')\nwait('go {name}')"))
        trial.await_told(name)
        save_as_person(server, trial.session_id, name)
        trial.open_gate(f"go {name}")
        assert outcome(call)["error"] == []
        cells = sources(server.notebook(trial.session_id))
        assert cells[-2] == name
        assert f"wait('go {name}')" in cells[-1]


@pytest.mark.faults
@pytest.mark.load
def test_what_a_person_saves_at_any_moment_is_kept(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("import time")
    codes = [f"time.sleep({n % 4 / 4}) or 'agent {n}'" for n in range(100)]
    written: list[str] = []

    async def run_all() -> None:
        for code in codes:
            given = {"code": code, "session_id": session_id}
            await client.session.call_tool("execute_code", given)

    done = client.on_loop(run_all())
    while not done.done():
        written.append(f"person{len(written)}")
        save_as_person(server, session_id, written[-1])
        time.sleep(0.2 + secrets.randbelow(300) / 1000)

    def missing() -> set[str]:
        return {*codes, *written} - set(sources(server.notebook(session_id)))

    with suppress(AssertionError):
        eventually(lambda: not missing(), 5)
    assert missing() == set()
    nbformat.validate(read_notebook(server.path(session_id)))


def test_a_notebook_is_valid_and_shows_what_the_agent_saw(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("print('a')\n21 * 2")
    warn = "import sys\nprint('é', file=sys.stderr)"
    for code in (SHOW_PIXEL, "ls -d .", "1 / 0", warn, "x = 1"):
        client.run(code, session_id)
    notebook = read_notebook(server.path(session_id))
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.nbformat_minor == 5
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.display_name
    assert notebook.metadata.language_info.name

    first, picture, bash, failed, warned, silent = notebook.cells
    stream, value = first.outputs
    assert stream.output_type == "stream"
    assert stream.text == "a\n"
    assert value.output_type == "execute_result"
    assert value.data == {"text/plain": "42"}
    assert value.execution_count == 1
    assert first.execution_count == 1
    assert picture.outputs[0].data["image/png"].strip() == PIXEL
    assert bash.source == "%%bash\nls -d ."
    assert bash.outputs[0].text == ".\n"
    assert failed.outputs[0].output_type == "error"
    assert failed.outputs[0].ename == "ZeroDivisionError"
    assert warned.outputs[0].name == "stderr"
    assert warned.outputs[0].text == "é\n"
    assert silent.outputs == []

    for cell in notebook.cells:
        times = cell.metadata.execution
        assert times["iopub.status.busy"] <= times["shell.execute_reply"]


def test_a_notebook_runs_in_nbclient(client: Client, server: JupyterServer) -> None:
    session_id = client.open("x = 6; print('a')")
    for code in ("x * 7", "mkdir -p d && cd d && echo hi | tr a-z A-Z", SHOW_PIXEL):
        client.run(code, session_id)
    path = server.path(session_id)
    notebook = read_notebook(path)
    before = texts_of(notebook)
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, resources=resources).execute()

    assert texts_of(notebook) == before
    assert before[1:3] == [["42"], ["HI\n"]]


def test_a_cell_is_on_the_disk_before_its_result(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open()
    for number in range(1, 6):
        client.run(f"print({number})", session_id)
        assert sources(server.notebook(session_id))[number:] == [f"print({number})"]


def test_what_somebody_else_changed_in_the_file_is_kept(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("x = 1")
    path = server.path(session_id)
    for n in range(3):
        client.run(f"x = {n}", session_id)
        notebook = server.notebook(session_id)
        notebook["cells"][0]["source"] = f"# edited {n}"
        notebook["metadata"]["mine"] = n
        note = {"cell_type": "markdown", "id": f"m{n}", "metadata": {}}
        notebook["cells"].append({**note, "source": "mine"})
        path.write_text(json.dumps(notebook))
        assert client.run("21 * 2", session_id)["error"] == []
        merged = server.notebook(session_id)
        assert merged["cells"][:-1] == notebook["cells"]
        assert merged["metadata"]["mine"] == n
        assert sources(merged)[-1] == "21 * 2"


def test_cells_that_somebody_deleted_stay_deleted(
    hasty: Hasty, server: JupyterServer
) -> None:
    session_id = hasty.open("x = 1")
    hasty.await_confirmed(session_id)
    notebook = server.notebook(session_id)
    notebook["cells"] = [
        {"cell_type": "markdown", "id": "m", "metadata": {}, "source": "mine"}
    ]
    server.path(session_id).write_text(json.dumps(notebook))
    hasty.run("x", session_id)
    assert sources(server.notebook(session_id)) == ["mine", "x"]


def test_a_cell_that_vanished_after_its_save_is_put_back(
    client: Client, server: JupyterServer
) -> None:
    """Another server had read the file before, and wrote without it."""
    session_id = client.open("x = 1")
    without = server.path(session_id).read_bytes()
    client.run("x = 2", session_id)
    server.path(session_id).write_bytes(without)
    client.run("x", session_id)
    assert sources(server.notebook(session_id)) == ["x = 1", "x = 2", "x"]


def test_a_mixture_of_our_own_making_is_written_anew(
    client: Client, server: JupyterServer
) -> None:
    """Two servers that write in place leave one text over another."""
    session_id = client.open("x = 1")
    path = server.path(session_id)
    path.write_bytes(path.read_bytes()[:-100] + path.read_bytes()[100:])
    assert shown(client.run("x", session_id)) == ["1"]
    assert sources(server.notebook(session_id)) == ["x = 1", "x"]


def test_an_empty_file_is_no_notebook_to_keep(
    hasty: Hasty, server: JupyterServer
) -> None:
    """A full disk leaves one."""
    session_id = hasty.open("x = 1")
    hasty.await_confirmed(session_id)
    server.path(session_id).write_bytes(b"")
    assert shown(hasty.run("x", session_id)) == ["1"]
    assert sources(server.notebook(session_id))[-1] == "x"


@pytest.mark.parametrize("through", ["contents", "disk"])
def test_a_persons_notebook_of_an_older_format_is_continued(
    client: Client, server: JupyterServer, through: str
) -> None:
    """Its cells run only by `%restore`.

    Notebooks of older formats and of other programs, opened under their number.
    """
    session_id = 1234 if through == "disk" else 1235
    cell = {"cell_type": "code", "metadata": {}, "outputs": []}
    ran = {**cell, "source": ["x = 5\n", "x"], "execution_count": 1}
    unrun = {**cell, "source": "raise SystemExit('never')", "execution_count": None}
    notebook: dict[str, Any] = {"cells": [ran, unrun], "metadata": {}}
    notebook |= {"nbformat": 4, "nbformat_minor": 2}
    if through == "disk":
        server.path(session_id).parent.mkdir(exist_ok=True)
        server.path(session_id).write_text(json.dumps(notebook))
    else:
        body = {"type": "notebook", "content": notebook}
        name = f"contents/notebooks/{session_id}.ipynb"
        server.api("PUT", name, json=body).raise_for_status()
    adopted = client.run("x + 1", session_id)
    assert "a person's own notebook" in adopted["result"][0]
    assert "NameError" in adopted["error"][0]
    report = shown(client.run("%restore", session_id))[0]
    assert "1 cell (1) ran again" in report
    assert shown(client.run("x + 1", session_id)) == ["6"]

    saved = server.notebook(session_id)
    nbformat.validate(read_notebook(server.path(session_id)))
    theirs = ["x = 5\nx", "raise SystemExit('never')"]
    assert sources(saved) == [*theirs, "x + 1", "x + 1"]


def test_the_kernel_of_a_persons_notebook_outlives_the_command(
    clients: Clients, server: JupyterServer
) -> None:
    """Nothing was restored in it, and so no restore was cut short."""
    session_id = 1236
    server.path(session_id).parent.mkdir(exist_ok=True)
    theirs = {**code_cell("a", source="y = 1"), "metadata": {}}
    server.path(session_id).write_text(notebook_text(theirs, metadata={}))
    before = clients().run("import os; x = os.urandom(8).hex(); x", session_id)
    after = clients().run("x", session_id)
    assert shown(after)[-1] == shown(before)[-1]


def test_two_cells_with_one_id_are_both_kept(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("x = 6")
    notebook = server.notebook(session_id)
    notebook["cells"].append({**notebook["cells"][0], "source": "a copy"})
    server.path(session_id).write_text(json.dumps(notebook))
    assert client.run("x * 7", session_id)["result"] == ["42"]
    assert sources(server.notebook(session_id)) == ["x = 6", "a copy", "x * 7"]


UNREADABLE = [
    b"not JSON",
    b"[]",
    b"\xff\xfe\x00",
    b'{"cells": [{}], "nbformat": 4}',
    b'{"cells": [], "metadata": [], "nbformat": 4}',
    b'{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}',
]


def test_an_unreadable_notebook_is_reported_and_left_alone(
    hasty: Hasty, server: JupyterServer
) -> None:
    session_id = hasty.open("x = 6")
    path = server.path(session_id)
    good = path.read_bytes()
    hasty.await_confirmed(session_id)
    for text in UNREADABLE:
        path.write_bytes(text)
        result = hasty.run("print(x * 7)", session_id)
        assert result["result"] == ["42"], text
        assert path.name in str(result["error"]), text
        assert path.read_bytes() == text
    path.write_bytes(good)
    assert hasty.run("x * 7", session_id)["error"] == []

    cells = sources(server.notebook(session_id))
    assert cells[0] == "x = 6"
    assert cells[-1] == "x * 7"


@pytest.mark.parametrize("text", [b"not JSON", b'{"cells": [3], "nbformat": 4}'])
def test_a_session_may_begin_with_an_unreadable_notebook(
    client: Client, server: JupyterServer, text: bytes
) -> None:
    """It runs and says so."""
    session_id = 4000 + len(text)
    path = server.path(session_id)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text)
    for _ in range(2):
        result = client.run("21 * 2", session_id)
        assert result["result"][-1:] == ["42"]
        assert path.name in result["error"][0]
        assert path.read_bytes() == text


def test_a_failed_save_is_told_beside_the_result(
    clients: Clients, server: JupyterServer
) -> None:
    folder = server.root / "blocked"
    away = server.root / "moved"
    client = clients("--notebooks-folder", "blocked")
    session_id = client.open("x = 42")
    folder.rename(away)
    folder.write_text("a file where the folder was")
    for _ in range(2):
        answer = client.call("x", session_id)
        assert not answer["isError"]
        assert result_of(answer)["result"] == ["42"]
        assert f"{session_id}.ipynb" in result_of(answer)["error"][0]
    folder.unlink()
    away.rename(folder)
    assert shown(client.run("x + 1", session_id)) == ["43"]
    saved = sources(server.notebook(session_id, "blocked"))
    assert saved == ["x = 42", "x", "x", "x + 1"]


def test_a_deleted_notebook_begins_anew_and_says_so(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("x = 42")
    server.path(session_id).unlink()
    note, value = shown(client.run("x", session_id))
    assert f"{session_id}.ipynb was deleted" in note
    assert value == "42"
    assert sources(server.notebook(session_id)) == ["x"]


def test_a_notebook_deleted_during_a_cell_stays_deleted(
    mortal: Trial, server: JupyterServer
) -> None:
    call = mortal.begin("wait()")
    mortal.rest(timeout=0.5)  # so that the file was looked at when the cell began
    server.path(mortal.session_id).unlink()
    mortal.open_gate()
    (error,) = outcome(call)["error"]
    assert "stays deleted" in error
    assert not server.path(mortal.session_id).exists()


def test_a_folder_that_was_removed_is_made_again(
    clients: Clients, server: JupyterServer
) -> None:
    client = clients("--notebooks-folder", "deep/removed")
    session_id = client.open("x = 42")
    shutil.rmtree(server.root / "deep")
    note, value = shown(client.run("x", session_id))
    assert "begins anew" in note
    assert value == "42"
    assert sources(server.notebook(session_id, "deep/removed")) == ["x"]


# --- Restoring ------------------------------------------------------------------------

STATE_SCRIPTS = """\
cd x
cd
cd "my data" && export A=1
export A=1 B="two words"; unset C
export PATH="$HOME/bin:$PATH"
A=1
A+=1
source .venv/bin/activate
. ./env.sh || cd ..
# don't `run` this
cd x # && rm -rf *
cd a#b
export A=${B:-c}
cd 'it is'\\''s'
A=1 cd x
export A=\\$\\(x\\)
export 'A=$(x) `x` > y'
cd \\
  x""".replace("\\\n", "\0").splitlines()


WORK_SCRIPTS = """\
rm x
cd x && make
cd x; rm -rf *
cd x || rm y
cd a#b; rm -rf *
export A=$(date)
export A="$(date)"
export A="a `date`"
export A=`date`
export A=$((1 + 2))
export A > x
cd x & rm y
cd x | rm y
source <(curl x)
A=1 rm x
A=1; rm x
A=(1 2)
a[0]=1
cd x\0rm y
cd 'open
cd "open
export A=$'\\'; rm x #'
cd x &&& rm
{ cd x; }
( cd x )
cd() { rm x; }
if true; then cd x; fi
"cd" x && ./y
exec rm x
eval rm x
cat <<E""".splitlines()


@pytest.mark.pure
@pytest.mark.parametrize("script", STATE_SCRIPTS)
def test_a_script_that_only_changes_the_shells_state_runs_again(script: str) -> None:
    assert jim.changes_only_state(script.replace("\0", "\\\n"))


@pytest.mark.pure
@pytest.mark.parametrize("script", WORK_SCRIPTS)
def test_a_script_that_may_do_more_does_not_run_again(script: str) -> None:
    assert not jim.changes_only_state(script.replace("\0", "\n"))


SHELL_LINES: list[tuple[str, str]] = [
    ("x = 1", "x = 1"),
    ("!make\nx = 1", "pass\nx = 1"),
    ("x = 1\n%pip install y\n", "x = 1\npass\n"),
    ("x = 1\npip install y\n", "x = 1\npass\n"),
    ("x = 1\n%conda install y", "x = 1\npass"),
    ("if x:\n    !rm y\nz = 1", "if x:\n    pass\nz = 1"),
    ("if x:\n\t!rm y\nelse:\n\tz()", "if x:\n\tpass\nelse:\n\tz()"),
    ("files = !ls\nx = 1", "pass\nx = 1"),
    ('d["a"], b = !ls\nx = 1', "pass\nx = 1"),
    ("!a \\\n  b\nx = 1", "pass\nx = 1"),
    ("!echo it's\nx = 1\n!echo it's", "pass\nx = 1\npass"),
    ("!!ls\nx = 1", "pass\nx = 1"),
    ("%rm x\ny = 1", "pass\ny = 1"),
    ('t = """\n!not\n%pip install x\n"""', 't = """\n!not\n%pip install x\n"""'),
    ("t = '''\n!not\n'''\n!x", "t = '''\n!not\n'''\npass"),
    ("t = 'a\\\n!b'", "t = 'a\\\n!b'"),
    ("x = (1\n!= 2)", "x = (1\n!= 2)"),
    ("x != y", "x != y"),
    ('x = "= !y"', 'x = "= !y"'),
    ("# '''\n!x\ny = 1", "# '''\npass\ny = 1"),
    ("x = 5 %pip", "x = 5 %pip"),
    ("uv - 1", "uv - 1"),
    ("pip = 1", "pip = 1"),
    ("%matplotlib inline\n%cd x", "%matplotlib inline\n%cd x"),
    ("%env A=it's\n!x", "%env A=it's\npass"),
    ("if x:\n    !y", "if x:\n    pass"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("source", "left"), SHELL_LINES)
def test_lines_that_call_the_shell_are_taken_out(source: str, left: str) -> None:
    assert jim.SHELL_LINE.sub(jim.as_pass, source) == left


RUN_AGAIN: list[tuple[str, str, str]] = [
    ("x = 1", "x = 1", ""),
    ("%%bash\ncd x", "%%bash\ncd x", ""),
    ("%%bash\nmake", "", jim.BASH_WORKS),
    ("%%bash --bg\ncd x", "", "%%bash"),
    ("%%writefile a.py\nx = 1", "", "%%writefile"),
    ("\n%%sh\nls", "", "%%sh"),
    ("%%time\nx = 1", "%%time\nx = 1", ""),
    ("%%time\n!ls\nx = 1", "%%time\npass\nx = 1", ""),
    ("%%time\n%%capture out\nx = 1", "%%time\n%%capture out\nx = 1", ""),
    ("%%time\n%%bash\nls", "", "%%bash"),
    ("%%sql\nselect", "", "%%sql"),
    ("!ls", "", jim.ONLY_SHELL),
    ("# why\n!x\n\n%pip install y\n", "", jim.ONLY_SHELL),
]


@pytest.mark.pure
@pytest.mark.parametrize(("source", "again", "reason"), RUN_AGAIN)
def test_a_cell_runs_again_as_far_as_it_is_python(
    source: str, again: str, reason: str
) -> None:
    assert jim.source_again(source) == (again, reason)


def saved_cell(number: int, source: str = "x", **fields: Any) -> jim.SavedCell:
    fields = {"outcome": jim.Outcome.ENDED_WELL, "folder": "/home", **fields}
    return jim.SavedCell(number, f"id{number}", source, **fields)


@pytest.mark.pure
def test_a_restore_names_what_it_does_not_run() -> None:
    cells = [
        saved_cell(1),
        saved_cell(2, outcome=jim.Outcome.FAILED),
        saved_cell(3, outcome=jim.Outcome.NEVER_RAN),
        saved_cell(4, outcome=jim.Outcome.UNKNOWN),
        saved_cell(5, is_tagged=True),
        saved_cell(6, "%%bash\nmake"),
        saved_cell(7, "   "),
        saved_cell(8, "y", folder="/data"),
    ]
    plan = jim.plan_restore(cells, 60.0)
    assert plan.steps == [cells[0], cells[7]]
    assert plan.skipped == {
        2: "failed",
        4: "outcome unknown",
        5: jim.TAGGED,
        6: jim.BASH_WORKS,
    }
    assert plan.left == []
    assert plan.last_folder == ""


@pytest.mark.pure
def test_a_restore_stops_before_the_cell_that_passes_the_limit() -> None:
    cells = [saved_cell(n, duration_s=20.0) for n in (1, 2, 3, 4)]
    cells.append(saved_cell(5, folder="/end"))
    plan = jim.plan_restore(cells, 60.0)
    assert [step.number for step in plan.steps] == [1, 2, 3]
    assert [cell.number for cell in plan.left] == [4, 5]
    assert plan.last_folder == "/end"
    rest = [cell for cell in cells if cell.cell_id in {c.cell_id for c in plan.left}]
    again = jim.plan_restore(rest, float("inf"))
    assert [step.number for step in again.steps] == [4, 5]


@pytest.mark.pure
def test_a_limit_of_nothing_restores_nothing() -> None:
    plan = jim.plan_restore([saved_cell(1), saved_cell(2)], 0.0)
    assert plan.steps == []
    assert len(plan.left) == 2


@pytest.mark.pure
def test_a_restore_ends_where_the_last_cell_did() -> None:
    last = saved_cell(2, "%%bash\ncd x && make", folder="/home", ended_in="/home/x")
    assert jim.plan_restore([saved_cell(1), last], 60.0).last_folder == "/home/x"
    failed = saved_cell(2, outcome=jim.Outcome.FAILED, folder="/data")
    assert jim.plan_restore([saved_cell(1), failed], 60.0).last_folder == "/data"


@pytest.mark.pure
def test_another_kernels_cells_run_again_as_they_are() -> None:
    plan = jim.plan_restore([saved_cell(1, "!x\n%%y")], 60.0, is_python=False)
    assert plan.steps[0].source == "!x\n%%y"


@pytest.mark.pure
def test_only_our_cells_of_a_persons_notebook_run_again() -> None:
    cells = [saved_cell(1, is_ours=False), saved_cell(2)]
    plan = jim.plan_restore(cells, 60.0, not_ours=jim.NOT_OURS)
    assert [step.number for step in plan.steps] == [2]
    assert plan.skipped == {1: jim.NOT_OURS}


@pytest.mark.pure
def test_the_folder_of_a_cell_that_is_not_ours_is_not_believed() -> None:
    cells = [saved_cell(1, folder="/data"), saved_cell(2, ended_in="/", is_ours=False)]
    plan = jim.plan_restore(cells, 0.0, not_ours=jim.NOT_SIGNED)
    assert plan.last_folder == "/data"


@pytest.mark.pure
def test_a_restore_report_says_what_became_of_each_cell() -> None:
    cells = [saved_cell(n) for n in (1, 2, 3, 5, 6)]
    cells += [saved_cell(8, outcome=jim.Outcome.FAILED), saved_cell(9, duration_s=90.0)]
    plan = jim.plan_restore(cells, 60.0)
    failures = {5: jim.NOW_FAILS.format("NameError: no y"), 6: jim.FOLDER_GONE}
    report = jim.restore_report("Lost", plan, 1.25, failures, ["a", "b"])
    assert report == (
        "Lost: 3 cells (1-3) ran again in 1.2 s. Did not run again, or not to the end: "
        "1 cell (5) (now fails: NameError: no y); 1 cell (6) (the working directory is "
        "gone); 1 cell (8) (failed). Left, as they took 90 s: 1 cell (9); a cell that "
        "is just %restore runs them. Variables: a, b"
    )


@pytest.mark.pure
def test_a_restore_report_is_never_long() -> None:
    cells = [saved_cell(n, f"%%m{n}\nx") for n in range(1, 400, 2)]
    cells += [saved_cell(n) for n in range(401, 900, 2)]
    plan = jim.plan_restore(cells, 60.0)
    failures = {step.number: "x" * 500 for step in plan.steps[:50]}
    names = [f"name{n}" for n in range(500)]
    report = jim.restore_report("Lost", plan, 1.0, failures, names)
    assert len(report) <= 1_000
    assert "Variables: name0, name1" in report


@pytest.mark.pure
def test_a_summary_is_the_number_of_cells_and_the_first_line() -> None:
    cells = (code_cell("a", source="%%bash\nls -la\ncd"), text_cell("m"))
    assert jim.summary(notebook_text(*cells), "1.ipynb") == (2, "ls -la")
    assert jim.summary(notebook_text(), "1.ipynb") == (0, "")
    with pytest.raises(jim.NotebookError, match=r"1\.ipynb"):
        jim.summary("", "1.ipynb")


def local_flags(tmp_path: Path) -> list[str]:
    """A project's folder under --local, whose user has signed nothing before."""
    (tmp_path / "project" / "notebooks").mkdir(parents=True)
    return ["--local", str(tmp_path / "project"), "--execute"]


def test_local_runs_a_strangers_cells_only_when_it_is_asked_to(tmp_path: Path) -> None:
    flags = local_flags(tmp_path)
    user = {"JUPYTER_DATA_DIR": str(tmp_path / "user")}
    trace = tmp_path / "run by a stranger"
    source = f"x = open({str(trace)!r}, 'w').write('x')"
    forged = code_cell("a", source=source, folder=str(tmp_path), signature="0" * 64)
    notebook = tmp_path / "project" / "notebooks" / "7.ipynb"
    notebook.write_text(notebook_text(forged))
    code = "import os; os.getcwd()"
    result = execute(*flags, code, "--session-id", "7", environment=user)
    report, folder = shown(result)
    assert folder == repr(str(notebook.parent))
    assert f"1 cell (1) ({jim.NOT_SIGNED})" in report
    assert not trace.exists()

    execute(*flags, "%restore", "--session-id", "7", environment=user)
    assert trace.exists()


def test_local_restores_what_an_earlier_process_of_the_user_ran(tmp_path: Path) -> None:
    flags = local_flags(tmp_path)
    user = {"JUPYTER_DATA_DIR": str(tmp_path / "user")}
    session_id = execute(*flags, "x = 41", environment=user)["session_id"]
    flags += ["x + 1", "--session-id", str(session_id)]
    report, value = shown(execute(*flags, environment=user))
    assert value == "42"
    assert "1 cell (1) ran again" in report

    # A person edits the first cell and runs it, in another server.
    notebook = tmp_path / "project" / "notebooks" / f"{session_id}.ipynb"
    notebook.write_text(notebook.read_text().replace("x = 41", "x = 40"))
    result = execute(*flags, environment=user)
    assert "NameError" in str(result["error"])
    assert f"1 cell (1) ({jim.NOT_SIGNED})" in result["result"][0]


# What an engineer's day leaves: each of these would do harm a second time.
WORKED_ONCE = [
    "mkdir -p day/sub && cd day && echo one >> appended.txt",
    "git init -q . && git config user.email a@b && git config user.name A",
    "git commit -q --allow-empty -m first",
    "!echo more >> appended.txt",
    "x = 41\n!touch stale.o",
    "%pip --version > pip.txt\n!echo pip >> appended.txt",
    "cd sub && touch kept.o",
    "cd no-such-folder",
    "cd .. && rm -rf *.o",
    "import sys; y = x + 1; sys.exit(0)",
    "%%bash\necho last >> appended.txt",
    "export LEVEL=3; cd sub",
]


def test_a_restore_repeats_no_work_on_files(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.open("import os; home = os.getcwd()")
    for code in WORKED_ONCE:
        client.run(code, session_id)
    folder = server.root / "notebooks" / "day"
    client.run("touch kept-later.o", session_id)
    server.delete_kernel(session_id)
    result = client.run("print(y, os.environ['LEVEL'], os.getcwd(), home)", session_id)

    report, value = shown(result)
    home = str(server.root / "notebooks")
    assert value == f"42 3 {home}/day/sub {home}"
    assert (folder / "appended.txt").read_text() == "one\nmore\npip\nlast\n"
    assert (folder / "sub" / "kept-later.o").exists()
    git = ["git", "-C", str(folder), "rev-list", "--count", "HEAD"]
    assert subprocess.check_output(git) == b"1\n"
    assert "(failed)" in report
    assert f"({jim.BASH_WORKS})" in report
    assert len(report) <= 1_000


def test_what_is_over_the_restore_limit_is_left_for_restore(
    clients: Clients, server: JupyterServer
) -> None:
    client = clients("--restore-limit", "0.5")
    session_id = client.open("x = 1")
    client.run("import time; time.sleep(0.6); x += 1", session_id)
    client.run("x += 40", session_id)
    server.delete_kernel(session_id)
    report, value = shown(client.run("x", session_id))
    assert value == "1"
    assert "%restore" in report
    assert "2 cells (2-3)" in report

    shown(client.run("%restore", session_id))
    assert shown(client.run("x", session_id)) == ["42"]
    assert "%restore" not in sources(server.notebook(session_id))


# --- Worker ---------------------------------------------------------------------------

BRING_UPS: dict[str, tuple[str, str, str]] = {
    "fresh": ("GO_ON", "RESTORE", "START_EMPTY"),
    "used": ("GO_ON", "LEAVE_USED", "LEAVE_USED"),
    "restoring": ("GO_ON", "RESTORE_AFRESH", "START_EMPTY"),
    "restored": ("GO_ON", "SAY_RESTORED", "SAY_RESTORED"),
    "ready": ("GO_ON", "GO_ON", "GO_ON"),
}


@pytest.mark.pure
@pytest.mark.parametrize("state", jim.KernelState)
def test_what_is_done_with_a_kernel_follows_from_its_state(
    state: jim.KernelState,
) -> None:
    empty, restored, left = BRING_UPS[state.value]
    plan = jim.plan_bring_up
    assert plan(state, has_cells=False, may_restore=True).name == empty
    assert plan(state, has_cells=True, may_restore=True).name == restored
    assert plan(state, has_cells=True, may_restore=False).name == left


# --- Session --------------------------------------------------------------------------


@pytest.mark.sdk
def test_list_sessions_finds_earlier_work(
    clients: Clients, server: JupyterServer
) -> None:
    client = clients("--notebooks-folder", "listed")
    listed = client.start_tool("list_sessions", {})
    assert outcome(listed)["result"] == ["There are no sessions yet"]
    older = client.open("# clean the data\nx = 1")
    newer = client.open("ls")
    client.run("x", newer)
    client.interrupt(older, shutdown=True)
    (server.root / "listed" / "5.ipynb").write_text("no JSON")

    answer = outcome(client.start_tool("list_sessions", {}))
    lines = {line.partition(":")[0]: line for line in shown(answer)}
    assert set(lines) == {"5", str(older), str(newer)}
    utc = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"
    assert re.search(
        rf"{utc}, 1 cells, no kernel: # clean the data$", lines[str(older)]
    )
    assert re.search(rf"{utc}, 2 cells, kernel python3 idle: ls$", lines[str(newer)])
    assert "not readable" in lines["5"]


@pytest.mark.sdk
def test_a_continued_session_says_so_once(
    client: Client, clients: Clients, server: JupyterServer
) -> None:
    session_id = client.open("x = 42")
    other = clients()
    note, value = shown(other.run("x", session_id))
    assert note.startswith(f"Continuing session {session_id}: 1 cells, last used 20")
    assert value == "42"
    assert shown(other.run("x", session_id)) == ["42"]


@pytest.mark.sdk
def test_kernel_name_chooses_the_kernel_of_a_session(
    clients: Clients, other_kernels: JupyterServer
) -> None:
    client = clients(server=other_kernels)
    assert "bash" in json.dumps(client.tools()["execute_code"]["inputSchema"])
    answer = client.run("echo $((6 * 7))", kernel_name="bash")
    assert answer["result"] == ["42"]
    again = client.run("A=1; echo $A", answer["session_id"])
    assert again["result"] == ["1"]
    assert other_kernels.kernel(answer["session_id"])["name"] == "bash"
    (error,) = client.run("1", kernel_name="cobol")["error"]
    assert "cobol" in error
    assert "python3" in error


@pytest.mark.sdk
def test_where_there_is_one_kernel_there_is_nothing_to_choose(client: Client) -> None:
    assert "kernel_name" not in str(client.tools()["execute_code"]["inputSchema"])


@pytest.mark.sdk
def test_state_lasts_from_call_to_call(client: Client) -> None:
    session_id = client.open("import math\nx = 41\ndef f(n): return n + 1")
    result = client.run("f(x), math.floor(1.5)", session_id)
    assert shown(result) == ["(42, 1)"]
    assert result["session_id"] == session_id


def test_each_session_has_variables_of_its_own(run: Run, shell: SharedSession) -> None:
    run("mine = 1")
    assert "NameError" in shell.run("print(mine)")["error"][0]


def test_a_session_is_a_notebook_bound_to_its_kernel(
    client: Client, server: JupyterServer
) -> None:
    """In its folder; a person can go on in the kernel."""
    result = client.run("import os; print(os.getcwd())\nx = 42")
    session_id = result["session_id"]
    assert result["result"] == [str(server.root / "notebooks")]
    path = f"notebooks/{session_id}.ipynb"
    body = {"path": path, "name": path, "type": "notebook", "kernel": {}}
    kernel_id = server.api("POST", "sessions", json=body).json()["kernel"]["id"]
    assert server.run_as_person(kernel_id, "x") == "42"
    server.run_as_person(kernel_id, "y = 'a person'; print('not for the agent')")
    assert client.run("y", session_id)["result"] == ["'a person'"]


def test_another_mcp_server_goes_on_and_replays_nothing(
    client: Client, server: JupyterServer, clients: Clients
) -> None:
    """With all variables; also when the first one has ended."""
    first = clients()
    session_id = first.open(f"{COUNT.format('replayed')} x = 41")
    assert_continued(client.run("x += 1", session_id), [], cells=1)
    assert shown(first.run("x", session_id)) == ["42"]
    first.close()
    assert shown(client.run("x", session_id)) == ["42"]
    assert (server.root / "notebooks" / "replayed").read_text() == "."
    assert sources(server.notebook(session_id))[1:] == ["x += 1", "x", "x"]


def test_a_session_whose_kernel_was_deleted_is_restored(
    client: Client, server: JupyterServer
) -> None:
    session_id = make_session(client, "deleted")
    server.delete_kernel(session_id)
    assert_session_restored(client, server, session_id, "deleted")


def test_a_session_whose_kernel_was_restarted_is_restored(
    client: Client, server: JupyterServer
) -> None:
    session_id = make_session(client, "restarted")
    kernel_id = server.kernel_id(session_id)
    server.restart_kernel(session_id)
    assert_session_restored(client, server, session_id, "restarted")
    assert server.kernel_id(session_id) == kernel_id


def test_a_restart_during_our_absence_is_restored(
    client: Client, clients: Clients, server: JupyterServer
) -> None:
    other = clients()
    session_id = make_session(other, "away")
    other.close()
    server.restart_kernel(session_id)
    assert_session_restored(client, server, session_id, "away")


def test_a_result_that_was_delivered_survives_everything(
    client: Client, clients: Clients, server: JupyterServer
) -> None:
    other = clients()
    session_id = other.open("x = 40")
    other.run("x += 2; print('saved')", session_id)
    other.kill()
    server.delete_kernel(session_id)
    last = server.last_cell(session_id)

    assert "".join(last["source"]) == "x += 2; print('saved')"
    assert "".join(last["outputs"][0]["text"]) == "saved\n"
    assert_restored(client.run("x", session_id), ["42"], cells=2)


def test_a_failing_cell_does_not_stop_a_restore(
    client: Client, server: JupyterServer
) -> None:
    """And it is named."""
    session_id = client.open("import os; x = 1")
    client.run("os.mkdir('only-once'); x = 2", session_id)
    client.run("mkdir only-once-bash", session_id)
    client.run("y = x", session_id)
    server.delete_kernel(session_id)
    result = client.run("x, y", session_id)
    assert_restored(result, ["(1, 1)"], cells=2)
    report = result["result"][0]
    assert "2 cells (1, 4) ran again" in report
    assert "1 cell (2) (now fails: FileExistsError" in report
    assert "1 cell (3) (bash that may work on files)" in report
    assert report.endswith("Variables: os, x, y")


GATE = """import pathlib, time
pathlib.Path('gate-reached').touch()
while not pathlib.Path('gate-open').exists(): time.sleep(0.02)
x += 1"""


def test_a_restore_cut_short_is_completed_by_another(
    client: Client, clients: Clients, server: JupyterServer
) -> None:
    folder = server.root / "notebooks"
    (folder / "gate-open").touch()
    session_id = client.open("x = 40")
    client.run(GATE, session_id)
    client.run("x += 1", session_id)
    server.delete_kernel(session_id)
    (folder / "gate-open").unlink()
    (folder / "gate-reached").unlink()
    other = clients()
    other.start("x", session_id)
    eventually((folder / "gate-reached").exists)
    other.kill()
    (folder / "gate-open").touch()
    report, *rest = shown(client.run("x", session_id))

    assert "restored" in report
    assert rest == ["42"]


def test_a_restore_under_way_is_waited_for_by_another_command(
    client: Client, clients: Clients, server: JupyterServer
) -> None:
    """What it prints was told when the cells ran first."""
    folder = server.root / "notebooks"
    (folder / "gate-open").touch()
    session_id = client.open("x = 40")
    client.run(GATE, session_id)
    client.run("print('told before')", session_id)
    server.delete_kernel(session_id)
    (folder / "gate-open").unlink()
    (folder / "gate-reached").unlink()
    restores = client.start("x", session_id)
    eventually((folder / "gate-reached").exists)
    other = clients(command=patched(PROGRESS_S=0.2))
    waits = other.start("x", session_id)
    eventually(lambda: any("other code" in said for said in other.progress))
    (folder / "gate-open").touch()
    report, value = shown(outcome(restores))
    assert "3 cells (1-3) ran again" in report
    assert value == "41"
    told, value = shown(outcome(waits))
    assert "Another process restored" in told
    assert value == "41"


def test_two_commands_that_call_at_once_restore_once(
    client: Client, clients: Clients, server: JupyterServer
) -> None:
    """Of the kernels that the server gives them they take the same one."""
    session_id = client.open("n = open('at-once', 'a').write('r')")
    other = clients()
    other.run("n", session_id)
    server.delete_kernel(session_id)
    calls = [each.start("n", session_id) for each in (client, other)]
    results = [shown(outcome(call)) for call in calls]
    assert [result[-1] for result in results] == ["1", "1"]
    assert str(results).count("ran again") == 1
    assert (server.root / "notebooks" / "at-once").read_text() == "rr"
    assert server.kernel_id(session_id) in server.kernels()


BOMB = """import os
if os.path.exists('armed'): os._exit(1)"""


def test_a_restore_that_kills_does_not_wedge_the_session(
    client: Client, server: JupyterServer
) -> None:
    armed = server.root / "notebooks" / "armed"
    session_id = client.open("x = 40")
    client.run(BOMB, session_id)
    client.run("x += 2", session_id)
    armed.touch()
    server.delete_kernel(session_id)
    (error,) = client.run("x", session_id)["error"]
    assert "kill it again" in error
    assert f"{session_id}.ipynb" in error
    armed.unlink()
    assert client.run("x", session_id)["result"][-1:] == ["42"]


def test_a_kernel_that_a_person_used_is_left_alone(
    client: Client, clients: Clients, server: JupyterServer
) -> None:
    """It was restarted, and a person has run something in it."""
    other = clients()
    session_id = other.open(f"{COUNT.format('person')} x = 1")
    other.close()
    server.restart_kernel(session_id)
    server.run_as_person(server.kernel_id(session_id), "y = 42")
    assert client.run("y", session_id)["result"][-1:] == ["42"]
    assert "NameError" in client.run("x", session_id)["error"][0]
    assert (server.root / "notebooks" / "person").read_text() == "."


def test_no_restore_starts_empty_and_says_so(
    clients: Clients, server: JupyterServer
) -> None:
    client = clients("--no-restore")
    session_id = client.open("x = 1")
    server.delete_kernel(session_id)
    result = client.run("print(2)\nx", session_id)
    assert "empty" in result["result"][0]
    assert result["result"][1:] == ["2"]
    assert "NameError" in result["error"][0]
    assert client.run("3", session_id)["result"] == ["3"]


MEET = """import os, time
os.makedirs('meeting', exist_ok=True)
open(f'meeting/{os.getpid()}', 'w').close()
end = time.time() + 40
while len(os.listdir('meeting')) < 4 and time.time() < end: time.sleep(0.02)
len(os.listdir('meeting'))"""


def test_sessions_opened_at_once_are_different_and_parallel(
    client: Client, server: JupyterServer
) -> None:
    """Each waits until all have begun.

    None would end if they did not run side by side.
    """
    calls = [client.start(MEET, timeout=50) for _ in range(4)]
    results = [outcome(call, 60) for call in calls]
    assert [result["result"] for result in results] == [["4"]] * 4
    ids = {result["session_id"] for result in results}
    assert len(ids) == 4
    assert {len(str(number)) for number in ids} == {10}
    for number in ids:  # four kernels less for the tests that follow
        server.delete_kernel(number)


@pytest.mark.sdk
@pytest.mark.faults
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.load)])
def test_calls_that_wait_keep_their_order(
    trial: Trial, server: JupyterServer, count: int
) -> None:
    """50 calls at once, and then one after the other."""
    trial.run_counted("seen = []")
    cells = [f"seen.append({n})\nprint({n})" for n in range(count)]
    calls = [trial.start(cell) for cell in cells[:50]]
    for n, call in enumerate(calls):
        assert shown(outcome(call)) == [str(n)]
    for n, cell in enumerate(cells[50:], 50):
        assert shown(trial.run(cell)) == [str(n)]
    assert trial.run(f"seen == list(range({count}))")["result"] == ["True"]

    notebook = server.notebook(trial.session_id)
    assert [s for s in sources(notebook) if s.startswith("seen.append")] == cells
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    trial.survived()


@pytest.mark.load
def test_100_sessions_at_once_each_get_their_own(
    clients: Clients, own_server: JupyterServer
) -> None:
    client = clients(server=own_server)
    calls = [client.start(f"own = {n}", timeout=300) for n in range(100)]
    opened = [outcome(call, 330) for call in calls]
    assert [each["error"] for each in opened] == [[]] * 100
    ids = [each["session_id"] for each in opened]
    assert len(set(ids)) == 100
    assert {len(str(number)) for number in ids} == {10}
    code = "import time\ntime.sleep(1)\nprint(own)"
    with within(33):  # one after the other they would take 100 s
        slept = [outcome(call) for call in [client.start(code, i) for i in ids]]
    assert [shown(each) for each in slept] == [[str(n)] for n in range(100)]


@pytest.mark.faults
@pytest.mark.parametrize("rounds", [5, pytest.param(50, marks=pytest.mark.load)])
def test_threads_and_descriptors_do_not_leak(
    clients: Clients, own_network: Network, tmp_path: Path, rounds: int
) -> None:
    """After many calls, cancelled ones and dropped connections."""
    far = Trial(clients(url=own_network.url), tmp_path)
    process = psutil.Process(far.client.pid)
    threads = process.num_threads()
    descriptors = process.num_fds()
    far.run_counted()
    for n in range(rounds):
        sleeps = f"folder.joinpath('cancelled{n}').touch()\ntime.sleep(100)"
        call = far.start(sleeps)
        far.await_told(f"cancelled{n}")
        far.client.cancel(call)
        far.rest()
        if n % 5 in (1, 3):
            own_network.cut()
        for m in range(rounds // 2):
            assert far.run(f"print({m})")["result"][-1:] == [str(m)]
    far.survived()
    eventually(lambda: process.num_threads() <= threads + 4, 45)
    eventually(lambda: process.num_fds() <= descriptors + 4, 45)


@pytest.mark.faults
def test_code_goes_on_when_the_mcp_server_is_killed(
    client: Client, clients: Clients, tmp_path: Path
) -> None:
    """The next server waits for it, and says what it cannot know."""
    trial = Trial(clients(), tmp_path)
    found = "wait()\nfound = 'by then'\ntell('done')"
    trial.begin(f"print('before', flush=True)\n{found}")
    trial.client.kill()
    trial.client = client
    with within(10):
        busy = trial.run_counted("tell('late')", timeout=1)
    assert "not run" in text_of(busy).lower()

    call = trial.start("found")
    assert not trial.told("done")
    trial.open_gate()
    waited = outcome(call)
    assert shown(waited)[-1] == "'by then'"

    told = text_of(busy) + text_of(waited)
    assert "not known" in told or "cannot know" in told, told
    assert not trial.told("late")
    trial.survived()


LEFT_RUNNING = """print('before', flush=True)
tell('said')
wait()
found = 'by then'
tell('done')"""


@pytest.mark.sdk
@pytest.mark.faults
def test_a_client_that_goes_away_leaves_its_code_running(
    client: Client, clients: Clients, tmp_path: Path, server: JupyterServer
) -> None:
    """And finds it in the notebook."""
    trial = Trial(clients(), tmp_path)
    trial.begin_alone(LEFT_RUNNING, until="said")
    pid = trial.client.pid
    trial.rest(timeout=0.5)
    waiting = trial.start("")
    with within(8):
        trial.client.close()
        eventually(lambda: is_gone(pid), 8)
    assert waiting.done() or waiting.cancel()

    cell = server.last_cell(trial.session_id)
    assert "tell('said')" in "".join(cell["source"])
    assert "before" in json.dumps(cell["outputs"])
    assert_goes_on(trial, client)


@pytest.mark.sdk
@pytest.mark.faults
def test_code_left_behind_while_its_kernel_starts_is_begun(
    server: JupyterServer,
) -> None:
    """The call said that it is still running, and the client goes at once.

    With more patience than clients have: a kernel may need longer to start.
    """
    raw = RawClient([*patched(EXIT_S=60), *flags_for(server)])
    raw.initialize()
    given = {"code": "open('begun', 'w').close()", "timeout": 0}
    call = {"name": "execute_code", "arguments": given}
    left = result_of(raw.ask("tools/call", call)["result"])
    assert "Still running" in left["error"][0]
    raw.close()
    eventually((server.root / "notebooks" / "begun").exists)
    assert sources(server.notebook(left["session_id"])) == [given["code"]]


@pytest.mark.sdk
@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_code_running_and_output_saved(
    client: Client,
    clients: Clients,
    tmp_path: Path,
    server: JupyterServer,
    number: signal.Signals,
) -> None:
    """And ends the command."""
    trial = Trial(clients(), tmp_path)
    trial.begin_alone(LEFT_RUNNING, until="said")
    trial.rest(timeout=0.5)
    pid = trial.client.pid
    os.kill(pid, number)
    eventually(lambda: is_gone(pid), 5)
    trial.client.close()
    cell = server.last_cell(trial.session_id)

    assert "before" in json.dumps(cell["outputs"])
    assert_goes_on(trial, client)


# --- Files ----------------------------------------------------------------------------


@pytest.mark.pure
@pytest.mark.parametrize(
    ("folder", "remote_path", "target"),
    [
        ("notebooks", "data.csv", "notebooks/data.csv"),
        ("notebooks", "a/../b//c", "notebooks/b/c"),
        ("notebooks", "../data.csv", "data.csv"),
        ("a/b", "../../c", "c"),
        ("", "c d.csv", "c d.csv"),
        ("notebooks", "../../data.csv", None),
        ("notebooks", "..", "."),
        ("", "..", None),
        ("notebooks", "/data.csv", None),
        ("notebooks", "..data", "notebooks/..data"),
    ],
)
def test_remote_paths_never_lead_above_the_servers_root(
    folder: str, remote_path: str, target: str | None
) -> None:
    if target is not None:
        assert jim.remote_target(folder, remote_path) == target
        return
    with pytest.raises(jim.TransferError, match=re.escape(remote_path)):
        jim.remote_target(folder, remote_path)


@pytest.mark.pure
@pytest.mark.parametrize(
    "model", [None, [], {}, {"type": "file"}, {"type": "file", "size": None}]
)
def test_an_answer_that_describes_no_file_is_one_error(model: Any) -> None:
    with pytest.raises(jim.ProtocolError, match=r"data\.csv"):
        jim.parse_remote_file("data.csv", model)


CSV = b"a,b\r\n1,2\r\n\xff\xfe\x00"  # text for a person; no UTF-8, line ends of DOS
LEFT = "jupyter-interpreter-mcp-*"  # temporary files, on both sides


class TurnsTaken:
    """A server's folder in memory; its clients make their requests in a given order."""

    def __init__(self, files: dict[str, bytes], turns: Iterable[int]) -> None:
        self.files = files
        self.turns = list(turns)
        self.changed = threading.Condition()

    def request(self, number: int, verb: str, url: str, body: Any) -> Any:
        with self.changed:
            ours = self.changed.wait_for(lambda: self.turns[0] == number, 30)
            assert ours, "the others took no turn"
            self.turns.pop(0)
            self.changed.notify_all()
            return self._answer(verb, url.removeprefix("contents/").split("?")[0], body)

    def _answer(self, verb: str, name: str, body: Any) -> dict[str, Any]:
        if verb == "PUT":
            self.files[name] = base64.b64decode(json.loads(body)["content"])
        elif name not in self.files:
            raise jim.NotFound(name, status=404)
        elif verb == "DELETE":
            del self.files[name]
            return {}
        elif verb == "PATCH":
            if body["path"] in self.files:
                raise jim.ServerError("File already exists", status=409)
            self.files[body["path"]] = self.files.pop(name)
            name = body["path"]
        return {"type": "file", "size": len(self.files[name]), "last_modified": ""}

    def leave(self, number: int) -> None:
        with self.changed:
            self.turns = [each for each in self.turns if each != number]
            self.changed.notify_all()

    def upload(self, number: int, host: Path) -> bool:
        """Upload the file of this number; whether that went well."""

        def request(verb: str, url: str, body: Any = None, **_: Any) -> Any:
            return self.request(number, verb, url, body)

        client: Any = SimpleNamespace(request=request, make_folder=lambda _: None)
        transfer = jim.Transfer(client, host, "")
        try:
            transfer.upload(str(number), "name", overwrite=True)
        except (jim.TransferError, jim.ServerError):
            return False
        finally:
            self.leave(number)
        return True


@pytest.mark.pure
@pytest.mark.parametrize("is_there", [True, False])
def test_two_overwrites_in_any_order_leave_one_whole_file(
    tmp_path: Path, is_there: bool
) -> None:
    """Both look and store; then they take turns, in each order that there is."""
    for number in range(2):
        (tmp_path / str(number)).write_bytes(f"ours {number}".encode())

    for order in itertools.product(range(2), repeat=8):
        files = {"name": b"old"} if is_there else {}
        rest = [0] * 20 + [1] * 20
        folder = TurnsTaken(files, [0, 0, 1, 1, *order, *rest])
        with ThreadPoolExecutor(2) as pool:
            went_well = list(pool.map(folder.upload, range(2), [tmp_path] * 2))
        assert list(files) == ["name"], order
        assert files["name"] in (b"ours 0", b"ours 1"), order
        assert any(went_well), order


@pytest.mark.pure
def test_a_link_that_is_swapped_meanwhile_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a path and its opening another process puts links there."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "data").write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "data").write_bytes(b"ours")
    real = os.path.realpath

    def look_and_swap(path: Any) -> str:
        answer = real(path)
        if str(path).endswith("data"):
            (root / "sub").rename(root / "was")
            (root / "sub").symlink_to(secret)
        return str(answer)

    monkeypatch.setattr(os.path, "realpath", look_and_swap)
    with pytest.raises(jim.TransferError), jim.host_source(root, "sub/data") as file:
        assert file.read() != b"secret"


HOSTS_WRONG = ["../outside", "link", "new", "new/data/x", "gone", "nul\0"]


@pytest.mark.pure
@pytest.mark.parametrize("has_descriptors", [True, False])
def test_host_files_stay_below_their_folder_on_every_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_descriptors: bool
) -> None:
    """Windows opens no file relative to a folder's descriptor."""
    if not has_descriptors:
        monkeypatch.setattr(os, "supports_dir_fd", set())
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path / "outside")

    for content, overwrite in [(b"one", False), (b"two", True)]:
        with jim.host_replacement(root, "new/data", overwrite) as target:
            target.write(content)
    with jim.host_source(root, "new/data") as source:
        assert source.read() == b"two"
    with (
        pytest.raises(jim.TransferError),
        jim.host_replacement(root, "new/data", False),
    ):
        pass
    with (
        pytest.raises(jim.TransferError, match="no space is left"),
        jim.host_replacement(root, "new/half", False),
    ):
        raise OSError("no space is left")
    for wrong in [*HOSTS_WRONG, str(tmp_path / "outside")]:
        with pytest.raises(jim.TransferError), jim.host_source(root, wrong):
            pass
    assert os.listdir(root / "new") == ["data"]


class Files:
    """A command with a folder of this host, and the server's notebooks folder."""

    def __init__(self, client: Client, host: Path, remote: Path) -> None:
        self.client = client
        self.host = host
        self.remote = remote

    def start(self, tool: str, source: str, target: str, **more: Any) -> Any:
        names = ["host_path", "remote_path"]
        if tool == "download_file":
            names.reverse()
        paths = dict(zip(names, (source, target), strict=True))
        return self.client.start_tool(tool, {**paths, **more})

    def call(self, tool: str, source: str, target: str, **more: Any) -> dict[str, Any]:
        answer = wire(self.start(tool, source, target, **more).result(170))
        result = result_of(answer)
        assert answer["isError"] == bool(result["error"])
        return result

    def up(self, source: str, target: str, **more: Any) -> str:
        (text,) = shown(self.call("upload_file", source, target, **more))
        return str(text)

    def down(self, source: str, target: str, **more: Any) -> str:
        (text,) = shown(self.call("download_file", source, target, **more))
        return str(text)

    def refused(self, tool: str, source: str, target: str, **more: Any) -> str:
        (text,) = self.call(tool, source, target, **more)["error"]
        return str(text)

    def left(self) -> list[Path]:
        return [*self.host.rglob(LEFT), *self.remote.rglob(LEFT)]


def files_with(
    make: Callable[..., Client], server: JupyterServer, folder: Path, url: str = ""
) -> Files:
    """Make a command with folders of its own on both sides."""
    name = f"files-{secrets.token_hex(4)}"
    host = folder / name
    remote = server.root / name
    host.mkdir()
    remote.mkdir()
    flags = ["--files-dir", str(host), "--notebooks-folder", name]
    return Files(make(*flags, server=server, url=url), host, remote)


@pytest.fixture(scope="session")
def files(
    server: JupyterServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Files]:
    """Start the command that the tests of files share; each has names of its own."""

    def make(*flags: str, server: JupyterServer, url: str) -> Client:
        return Client(server, *flags, url=url)

    files = files_with(make, server, tmp_path_factory.mktemp("host"))
    yield files
    files.client.close()


@pytest.fixture(scope="session")
def far_files(
    server: JupyterServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Network, Files]]:
    """Start a command whose server is behind a network of its own."""
    network = Network(server.port)

    def make(*flags: str, server: JupyterServer, url: str) -> Client:
        return Client(server, *flags, url=url)

    folder = tmp_path_factory.mktemp("far")
    files = files_with(make, server, folder, network.url)
    yield network, files
    files.client.close()
    network.close()


@pytest.fixture
def cut_files(far_files: tuple[Network, Files]) -> Iterator[tuple[Network, Files]]:
    yield far_files
    far_files[0].reset()


def test_a_file_goes_up_and_a_fresh_session_finds_it(files: Files) -> None:
    (files.host / "data.csv").write_bytes(b"x" * 20_971_520)
    said = files.up("data.csv", "data.csv")
    target = f"{files.remote.name}/data.csv"
    assert said == f"uploaded data.csv (20,971,520 bytes) to {target}"
    code = "import os; os.path.getsize('data.csv')"
    assert files.client.run(code)["result"] == ["20971520"]
    assert files.left() == []


ODD_FILES = [
    ("plain.csv", b""),
    ("a b é#?%41&+;=~.txt", CSV),
    ("ü%20.ipynb", b"no JSON"),
    ("x/y z/w.bin", CSV * 200_000),
]


@pytest.mark.parametrize(("name", "content"), ODD_FILES)
def test_bytes_are_bytes_whatever_the_name(
    files: Files, name: str, content: bytes
) -> None:
    (files.host / "given").write_bytes(content)
    files.up("given", name)
    assert (files.remote / name).read_bytes() == content
    files.down(name, name)
    assert (files.host / name).read_bytes() == content
    assert files.left() == []


def test_a_file_that_exists_stays_unless_overwrite_is_given(files: Files) -> None:
    (files.remote / "same").write_bytes(b"theirs")
    (files.host / "same").write_bytes(b"ours")
    assert "overwrite=true" in files.refused("upload_file", "same", "same")
    assert (files.remote / "same").read_bytes() == b"theirs"
    assert "overwrite=true" in files.refused("download_file", "same", "same")
    assert (files.host / "same").read_bytes() == b"ours"

    files.up("same", "same", overwrite=True)
    assert (files.remote / "same").read_bytes() == b"ours"
    (files.remote / "same").write_bytes(b"theirs")
    files.down("same", "same", overwrite=True)
    assert (files.host / "same").read_bytes() == b"theirs"
    assert files.left() == []


def test_host_paths_never_lead_out_of_the_files_dir(
    files: Files, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (files.host / "link").symlink_to(secret)
    (files.host / "out").symlink_to(tmp_path)
    (files.host / "loop").symlink_to("loop")
    os.mkfifo(files.host / "fifo")
    (files.remote / "sent").write_bytes(CSV)
    above = os.path.relpath(secret, files.host)
    odd = ["link", "out/secret", "loop", "fifo", "", ".", "a\0b"]
    for path in [above, str(secret), *odd]:
        assert path in files.refused("upload_file", path, "stolen")
        assert path in files.refused("download_file", "sent", path, overwrite=True)
    assert secret.read_bytes() == b"secret"
    assert not (files.remote / "stolen").exists()
    assert list(tmp_path.iterdir()) == [secret]


def test_host_paths_below_the_files_dir_may_be_absolute_or_links(files: Files) -> None:
    (files.host / "sub").mkdir()
    (files.host / "sub" / "data").write_bytes(CSV)
    (files.host / "near").symlink_to("sub")
    files.up(str(files.host / "sub" / "data"), "one")
    files.up("near/../near/data", "two")
    assert (files.remote / "one").read_bytes() == CSV
    assert (files.remote / "two").read_bytes() == CSV


def test_hidden_and_missing_files_are_explained(files: Files) -> None:
    (files.host / "given").write_bytes(CSV)
    for remote in (".hidden", ".hidden/data", "x/.hidden"):
        assert "allow_hidden" in files.refused("upload_file", "given", remote)
    assert "allow_hidden" in files.refused("download_file", ".hidden", "gone")
    assert "notebooks folder" in files.refused("download_file", "nothing", "gone")
    assert "nothing" in files.refused("upload_file", "nothing", "gone")
    assert "tar" in files.refused("download_file", ".", "gone")
    assert not (files.host / "gone").exists()
    assert files.left() == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_uploads_to_one_name_leave_one_whole_file(
    files: Files, overwrite: bool
) -> None:
    contents = [bytes([number]) * 3_000_000 for number in range(4)]
    target = f"at-once-{overwrite}"
    calls = []
    for number, content in enumerate(contents):
        (files.host / str(number)).write_bytes(content)
        given = (str(number), target)
        calls.append(files.start("upload_file", *given, overwrite=overwrite))
    assert [outcome(call)["error"] for call in calls].count([]) >= 1
    assert (files.remote / target).read_bytes() in contents
    assert files.left() == []


def test_transfers_wait_neither_for_cells_nor_each_other(
    files: Files, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    cell = files.client.start(f"until [ -e {gate} ]; do sleep 0.05; done")
    (files.host / "large").write_bytes(CSV * 500_000)
    calls = [files.start("upload_file", "large", f"copy{n}") for n in range(5)]
    assert [outcome(call)["error"] for call in calls] == [[]] * 5
    assert not cell.done()
    gate.touch()
    assert outcome(cell)["error"] == []


@pytest.mark.faults
def test_a_gateway_without_files_is_told_in_one_sentence(
    clients: Clients, web: Webs, server: JupyterServer, tmp_path: Path
) -> None:
    gateway = web({"/api/contents": (404, {}, b"{}")}, server.url)
    files = files_with(clients, server, tmp_path, gateway.url)
    (files.host / "data").write_bytes(CSV)
    assert "gateway" in files.refused("upload_file", "data", "data")
    assert "gateway" in files.refused("download_file", "data", "gone")


@pytest.mark.faults
def test_without_its_files_handler_the_contents_api_gives_the_file(
    clients: Clients, web: Webs, server: JupyterServer, tmp_path: Path
) -> None:
    off = web({"/files/": (404, {}, b"{}")}, server.url)
    files = files_with(clients, server, tmp_path, off.url)
    (files.remote / "data.ipynb").write_bytes(CSV * 1000)
    files.down("data.ipynb", "data")
    assert (files.host / "data").read_bytes() == CSV * 1000
    with open(files.remote / "large", "wb") as file:
        file.truncate(32_000_001)
    assert "32,000,000" in files.refused("download_file", "large", "large")
    assert files.left() == []


def cut_each(network: Network, limit: int) -> Callable[[], int]:
    """Cut the connections whenever so many bytes have passed; returns how many did."""
    passed = [0, 0]
    lock = threading.Lock()

    def count(data: bytes) -> bool:
        with lock:
            passed[0] += len(data)
            passed[1] += len(data)
            if passed[1] < limit:
                return True
            passed[1] = 0
        network.cut()
        return False

    network.on_client = count
    network.on_answer = count
    return lambda: passed[0]


@pytest.mark.faults
def test_a_transfer_that_breaks_goes_on_where_it_was(
    cut_files: tuple[Network, Files],
) -> None:
    network, files = cut_files
    content = os.urandom(30_000_000)
    (files.host / "long").write_bytes(content)
    sent = cut_each(network, 10_000_000)
    files.up("long", "long")
    assert (files.remote / "long").read_bytes() == content
    assert sent() < 1.5 * len(content), "it was begun anew"

    sent = cut_each(network, 7_000_000)
    files.down("long", "back")
    assert (files.host / "back").read_bytes() == content
    assert sent() < 1.2 * len(content), "it was begun anew"
    assert files.left() == []


@pytest.mark.faults
def test_an_answer_that_is_lost_repeats_no_chunk(
    cut_files: tuple[Network, Files],
) -> None:
    """The server takes each chunk and each renaming; every third answer is cut off."""
    network, files = cut_files
    content = os.urandom(9_000_000)
    (files.host / "chunks").write_bytes(content)
    answers: list[bytes] = []

    def lose(data: bytes) -> bool:
        if data.startswith(b"HTTP/1.1 20"):
            answers.append(data)
        return not data.startswith(b"HTTP/1.1 20") or len(answers) % 3 != 0

    network.on_answer = lose
    files.up("chunks", "chunks")
    assert (files.remote / "chunks").read_bytes() == content
    (files.host / "chunks").write_bytes(content[::-1])
    answers.clear()
    files.up("chunks", "chunks", overwrite=True)
    assert (files.remote / "chunks").read_bytes() == content[::-1]
    assert files.left() == []


@pytest.mark.faults
@pytest.mark.load
def test_a_file_that_changes_at_a_break_is_begun_anew(
    cut_files: tuple[Network, Files],
) -> None:
    network, files = cut_files
    source = files.remote / "changes"
    source.write_bytes(b"old" * 5_000_000)
    passed: list[int] = []

    def cut_once(data: bytes) -> bool:
        passed.append(len(data))
        if sum(passed) < 2_000_000 or source.read_bytes()[:1] == b"n":
            return True
        source.write_bytes(b"new" * 4_000_000)
        return False

    network.on_answer = cut_once
    files.down("changes", "changes")
    assert (files.host / "changes").read_bytes() == b"new" * 4_000_000


@pytest.mark.faults
def test_a_file_that_changes_while_it_is_copied_is_an_error(
    cut_files: tuple[Network, Files],
) -> None:
    network, files = cut_files
    (files.remote / "log").write_bytes(b"line\n" * 2_000_000)

    def grow(data: bytes) -> bool:
        if len(data) > 10_000:
            with open(files.remote / "log", "ab") as log:
                log.write(b"line\n")
        return True

    network.on_answer = grow
    assert "changed" in files.refused("download_file", "log", "log")
    assert not (files.host / "log").exists()
    assert files.left() == []


@pytest.mark.sdk
@pytest.mark.faults
@pytest.mark.parametrize("tool", ["upload_file", "download_file"])
def test_a_cancelled_transfer_stops_soon_and_leaves_nothing(
    cut_files: tuple[Network, Files], tool: str
) -> None:
    network, files = cut_files
    (files.host / "whole").write_bytes(b"x" * 50_000_000)
    (files.remote / "whole").write_bytes(b"x" * 50_000_000)

    def slow_down(data: bytes) -> bool:
        time.sleep(len(data) / 5_000_000)
        return True

    network.on_client = network.on_answer = slow_down
    call = files.start(tool, "whole", f"new-{tool}")
    eventually(files.left)
    files.client.cancel(call)
    eventually(lambda: not files.left(), 1.5)
    network.reset()
    assert not (files.remote / f"new-{tool}").exists()
    assert not (files.host / f"new-{tool}").exists()
    assert files.client.run("1 + 1")["result"] == ["2"]


@pytest.mark.sdk
@pytest.mark.faults
def test_an_overwrite_that_is_cut_short_leaves_the_old_file(
    cut_files: tuple[Network, Files],
) -> None:
    """It is cancelled when the old file has been set aside."""
    network, files = cut_files
    (files.host / "precious").write_bytes(b"new")
    (files.remote / "precious").write_bytes(b"old")
    calls: list[Any] = []

    def cancel_at_second_rename(data: bytes) -> bool:
        if not data.startswith(b"PATCH") or b".part" not in data:
            return True
        if calls:
            files.client.cancel(calls.pop())
        return False

    network.on_client = cancel_at_second_rename
    given = ("upload_file", "precious", "precious")
    calls.append(files.start(*given, overwrite=True))
    eventually(lambda: not calls)
    network.reset()
    eventually(lambda: not files.left(), 5)
    assert (files.remote / "precious").read_bytes() == b"old"


@pytest.mark.faults
def test_an_overwrite_that_finds_the_name_taken_leaves_nothing_beside(
    cut_files: tuple[Network, Files],
) -> None:
    """A person makes the file anew when the old one has been set aside."""
    network, files = cut_files
    (files.host / "shared").write_bytes(b"ours")
    (files.remote / "shared").write_bytes(b"old")

    def make_anew(data: bytes) -> bool:
        if data.startswith(b"PATCH") and b".part" in data:
            (files.remote / "shared").write_bytes(b"theirs")
        return True

    network.on_client = make_anew
    said = files.refused("upload_file", "shared", "shared", overwrite=True)
    assert "exists" in said
    assert (files.remote / "shared").read_bytes() == b"theirs"
    assert files.left() == []


@pytest.mark.faults
def test_an_overwrite_that_is_cancelled_at_its_end_leaves_nothing_beside(
    cut_files: tuple[Network, Files],
) -> None:
    """The new file has the name already; the old one is still to go."""
    network, files = cut_files
    (files.host / "late").write_bytes(b"new")
    (files.remote / "late").write_bytes(b"old")
    calls: list[Any] = []

    def cancel_at_removal(data: bytes) -> bool:
        if data.startswith(b"DELETE") and calls:
            files.client.cancel(calls.pop())
            return False
        return True

    network.on_client = cancel_at_removal
    calls.append(files.start("upload_file", "late", "late", overwrite=True))
    eventually(lambda: not calls)
    eventually(lambda: not files.left(), 5)
    assert (files.remote / "late").read_bytes() == b"new"


@pytest.mark.faults
@pytest.mark.load
def test_a_server_that_restarts_meanwhile_gets_the_rest(
    clients: Clients, own_server: JupyterServer, tmp_path: Path
) -> None:
    files = files_with(clients, own_server, tmp_path)
    content = os.urandom(50_000_000)
    (files.host / "data").write_bytes(content)
    call = files.start("upload_file", "data", "data")
    eventually(files.left)
    own_server.kill()
    assert not call.done()
    own_server.start()
    assert outcome(call)["error"] == []
    assert (files.remote / "data").read_bytes() == content
    assert files.left() == []


@pytest.mark.load
def test_a_gigabyte_passes_in_constant_memory(
    clients: Clients, own_server: JupyterServer, tmp_path: Path
) -> None:
    files = files_with(clients, own_server, tmp_path)
    block = os.urandom(1_000_000)
    with open(files.host / "data", "wb") as file:
        for number in range(1_000):
            file.write(number.to_bytes(4, "big") + block[4:])
    (files.host / "small").write_bytes(block * 5)
    files.up("small", "small")
    files.down("small", "back-small")
    before = files.client.memory()
    peak = before
    for given in (("upload_file", "data", "data"), ("download_file", "data", "back")):
        call = files.start(*given)
        while not call.done():
            peak = max(peak, files.client.memory())
            time.sleep(0.1)
        assert outcome(call)["error"] == []

    assert peak - before < 20e6
    compared = ["cmp", str(files.host / "data"), str(files.host / "back")]
    assert subprocess.call(compared) == 0
    assert any("of 1,000,000,000 bytes" in said for said in files.client.progress)


# --- Tools ----------------------------------------------------------------------------

REASONS_OF_CANCELLATION = [
    ("MCP error -32001: Request timed out", True),
    ("Timeout waiting for response", True),
    ("time-out", True),
    ("user pressed stop", False),
    ("", False),
]


def stdin_of(
    data: bytes,
    on_end: Callable[[], None] = lambda: None,
    on_stop: Callable[[str], None] = lambda _: None,
) -> jim.Stdin:
    """The reader of standard input, on a pipe that holds these bytes."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    kept = os.dup(0)
    os.dup2(reader, 0)
    try:
        return jim.Stdin(on_end, on_stop)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(reader)


@pytest.mark.pure
@pytest.mark.parametrize(("reason", "is_timeout"), REASONS_OF_CANCELLATION)
def test_a_cancellation_whose_reason_is_a_time_out_is_known(
    reason: str, is_timeout: bool
) -> None:
    params = {"requestId": 7, "reason": reason}
    line = json.dumps({"method": "notifications/cancelled", "params": params})
    stopped: list[str] = []
    stdin = stdin_of(line.encode() + b"\n", on_stop=stopped.append)
    assert json.loads(stdin.readline())["params"] == params
    assert stopped == ([] if is_timeout else ["7"])


@pytest.mark.pure
def test_half_an_emoji_is_replaced_before_the_sdk_sees_it() -> None:
    line = rb'{"code": "print(\"\ud83d\") # \\ud83d \ud83d\ude00"}'
    stdin = stdin_of(line + b"\n", lambda: None)
    assert json.loads(stdin.readline())["code"] == 'print("?") # \\ud83d \U0001f600'


@pytest.mark.pure
def test_the_end_of_standard_input_is_told() -> None:
    ends: list[bool] = []
    stdin = stdin_of(b"one\n", lambda: ends.append(True))
    assert stdin.readline() == "one\n"
    assert ends == []
    assert stdin.readline() == ""
    assert ends == [True]


@pytest.mark.sdk
def test_a_client_reads_what_this_is_before_any_tool(client: Client) -> None:
    """In Codex a model knows a server by the first line of its instructions."""
    initialized = wire(client.initialized)
    instructions = initialized["instructions"]
    first, *_ = instructions.splitlines()
    assert first.startswith("Run Python and bash on a remote Jupyter server")
    assert len(instructions) <= 1_500
    for name in ("session_id", "list_sessions", "timeout=0", "interrupt_execution"):
        assert name in instructions
    offered = {name for name, value in initialized["capabilities"].items() if value}
    assert offered == {"tools"}
    assert initialized["serverInfo"]["version"] == jim.__version__


@pytest.mark.sdk
def test_each_tool_has_a_title_and_hints(client: Client) -> None:
    tools = client.tools()
    limit = int(jim.Settings().max_output * 1.2) + 2_000
    for tool in tools.values():
        assert tool["title"]
        assert tool["_meta"] == {"anthropic/maxResultSizeChars": limit}
    assert tools["list_sessions"]["annotations"]["readOnlyHint"]
    assert not tools["execute_code"]["annotations"].get("readOnlyHint")


@pytest.mark.sdk
def test_files_have_tools_only_with_their_flag(client: Client, files: Files) -> None:
    assert "upload_file" not in client.tools()
    tools = files.client.tools()
    assert {"upload_file", "download_file"} < set(tools)
    assert str(files.host) in tools["upload_file"]["description"]


@pytest.mark.sdk
def test_null_stands_for_what_is_not_given(client: Client) -> None:
    nothing = {"session_id": None, "timeout": None}
    answer = wire(
        client.start_tool("execute_code", {"code": "1", **nothing}).result(60)
    )
    result = result_of(answer)
    assert result["result"] == ["1"]
    given = {"session_id": result["session_id"], "restart": None, "shutdown": None}
    stopped = outcome(client.start_tool("interrupt_execution", given))
    assert "Nothing ran" in text_of(stopped)


@pytest.mark.sdk
def test_the_tools_declare_what_they_take_and_return(client: Client) -> None:
    tools = client.tools()
    assert set(tools) == {"execute_code", "interrupt_execution", "list_sessions"}
    execute_code = tools["execute_code"]["inputSchema"]
    assert set(execute_code["properties"]) == {"code", "session_id", "timeout"}
    assert execute_code["required"] == ["code"]
    interrupt = tools["interrupt_execution"]["inputSchema"]

    assert set(interrupt["properties"]) == {"session_id", "restart", "shutdown"}
    assert interrupt["required"] == ["session_id"]
    assert tools["list_sessions"]["inputSchema"]["properties"] == {}
    assert all(tool["description"] for tool in tools.values())


@pytest.mark.sdk
def test_results_have_no_schema_and_nothing_structured(client: Client) -> None:
    """So every client shows the same, once, with its pictures."""
    for tool in client.tools().values():
        assert tool.get("outputSchema") is None
        assert tool["_meta"] == {"anthropic/maxResultSizeChars": 26_000}
    answer = client.call("21 * 2")
    assert answer.get("structuredContent") is None
    assert len(answer["content"]) == 1


# Whatever a cell does, it does not write to the command's stdout.
NOISY = [
    "print('x'); import sys; print('y', file=sys.stderr); sys.__stdout__.write('z')",
    "1 / 0",
    "echo hi; nosuch",
    "x = 1\x1b[0m",
    "'\\udc80'",
    "import os\nos._exit(1)",
]


@pytest.mark.sdk
def test_stdout_holds_json_rpc_and_nothing_else(server: JupyterServer) -> None:
    raw = RawClient([*COMMAND, *flags_for(server), "--verbose"])
    raw.initialize()
    tools = raw.ask("tools/list", {})["result"]
    assert len(json.dumps(tools, separators=(",", ":"))) < 3_500
    assert "error" in raw.ask("no/such/method", {})

    raw.ask("tools/call", {"name": "no_such_tool", "arguments": {}})
    for code in NOISY:
        arguments = {"code": code, "session_id": 51}
        called = {"name": "execute_code", "arguments": arguments}
        answer = raw.ask("tools/call", called)["result"]
        assert result_of(answer)["session_id"] == 51
    log = raw.close()
    assert raw.process.returncode == 0
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in raw.lines)
    assert "/api/kernelspecs" in log
    assert server.token not in log
    assert "Traceback" not in log


@pytest.mark.sdk
def test_an_unused_id_opens_a_session_and_says_so(
    client: Client, server: JupyterServer
) -> None:
    """The largest one, too."""
    largest = 2**53 - 1
    note, *rest = shown(client.run("x = 42\nx", largest))
    assert str(largest) in note
    assert "new" in note
    assert rest == ["42"]
    again = client.run("x", largest)

    assert shown(again) == ["42"]
    assert again["session_id"] == largest
    assert sources(server.notebook(largest)) == ["x = 42\nx", "x"]


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"code": "1", "session_id": -1}, "session_id"),
    ({"code": "1", "session_id": 2**53}, "session_id"),
    ({"code": "1", "session_id": 10**30}, "session_id"),
    ({"code": "1", "session_id": "seven"}, "session_id"),
    ({"code": "1", "session_id": 1.5}, "session_id"),
    ({"code": "1", "session_id": [1]}, "session_id"),
    ({"code": "1", "timeout": -1}, "timeout"),
    ({"code": "1", "timeout": "soon"}, "timeout"),
    ({"code": 3}, "code"),
    ({"code": ["1"]}, "code"),
    ({}, "code"),
    ({"session_id": 5}, "code"),
]


@pytest.mark.sdk
@pytest.mark.parametrize(("arguments", "name"), BAD_ARGUMENTS)
def test_bad_arguments_get_a_tool_error_that_names_them(
    client: Client, arguments: dict[str, Any], name: str
) -> None:
    answer = wire(client.start_tool("execute_code", arguments).result(60))
    assert answer["isError"]
    assert name in answer["content"][0]["text"]


# --- Command line ---------------------------------------------------------------------

SECRET = "s3cret"


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJuYW1lIjoibWUifQ.c2lnbmF0dXJl"


URLS = {
    "http://localhost:8888": "http://localhost:8888",
    "http://localhost:8888/": "http://localhost:8888",
    "https://hub.example/user/me/": "https://hub.example/user/me",
    "https://hub.example/user/me@example.com/": "https://hub.example/user/me@example.com",
    "http://[::1]:8888/lab": "http://[::1]:8888/lab",
    "http://localhost:8888?": "http://localhost:8888",
}


@pytest.mark.pure
@pytest.mark.parametrize("url", URLS)
def test_a_servers_url_is_taken_without_its_last_slash(url: str) -> None:
    assert jim.check_url(url) == URLS[url]


MISTAKEN_URLS = {
    "": "http",
    SECRET: "http",
    JWT: "http",
    f"http:{JWT}": "http",
    "localhost:8888": "http",
    "ftp://localhost": "http",
    "http://": "HOST",
    "http://localhost:port": "HOST",
    "http://localhost:99999": "HOST",
    "http://[::1": "HOST",
    "http://a..b": "HOST",
    "http://two words": "HOST",
    "http://localhost\n": "HOST",
    f"http://me:{SECRET}@localhost": "HOST",
    f"http://good.example\\@{SECRET}.example": "HOST",
    f"http://localhost:8888/#{SECRET}": "HOST",
    f"http://localhost:8888/?token={SECRET}": "give http://localhost:8888 as",
    f"http://localhost:8888/lab?token={SECRET}": "give http://localhost:8888 as",
    f"http://h/user/me/lab/tree/a.ipynb?token={SECRET}": "give http://h/user/me as",
    f"http://h/tree?token={SECRET}": "--jupyter-token",
    f"http://me:{SECRET}@h/tree?token={SECRET}": "HOST",
}


@pytest.mark.pure
@pytest.mark.parametrize("url", MISTAKEN_URLS)
def test_what_is_no_url_is_explained_without_what_could_be_a_token(url: str) -> None:
    with pytest.raises(jim.ConfigError) as caught:
        jim.check_url(url)
    text = str(caught.value)
    assert MISTAKEN_URLS[url] in text
    assert SECRET not in text
    assert "eyJ" not in text


HOSTS = {
    "localhost": True,
    "127.0.0.1": True,
    "127.8.9.10": True,
    "::1": True,
    "127.evil.example.com": False,
    "localhost.evil.example.com": False,
    "127.0.0.1.example.com": False,
    "10.0.0.1": False,
    "::2": False,
    "": False,
}


@pytest.mark.pure
@pytest.mark.parametrize("host", HOSTS)
def test_loopback_is_an_address_not_how_a_name_begins(host: str) -> None:
    assert jim.is_loopback(host) is HOSTS[host]


PROXY_VARIABLES = {"http_proxy": "http://me:pw@proxy.example:3128"}


# The URL, variables -> what the warning says; None for no warning.
WARNINGS: list[tuple[str, dict[str, str], str | None]] = [
    ("http://127.0.0.1:8888", {}, None),
    ("http://[::1]:8888", {}, None),
    ("https://far.example", {}, None),
    ("https://far.example", PROXY_VARIABLES, None),
    ("http://far.example", {}, "far.example; use https"),
    ("http://127.evil.example.com:8888", {}, "use https"),
    ("http://127.0.0.1:8888", PROXY_VARIABLES, "NO_PROXY=127.0.0.1"),
    ("http://far.example", PROXY_VARIABLES, "HTTP_PROXY"),
    ("http://127.0.0.1:8888", {**PROXY_VARIABLES, "no_proxy": "127.0.0.1"}, None),
]


@pytest.mark.pure
@pytest.mark.parametrize(("url", "variables", "words"), WARNINGS)
def test_who_can_read_the_token_on_its_way_is_told(
    url: str,
    variables: dict[str, str],
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    warning = jim.clear_text_warning(url, SECRET)
    assert (warning is None) == (words is None)
    assert (words or "") in (warning or "")
    assert SECRET not in (warning or "")
    assert "pw" not in (warning or "")
    assert jim.clear_text_warning(url, "") is None


PIPED_TEXTS = {
    "print('é')".encode(): "print('é')",
    "print('é')".encode("utf-8-sig"): "print('é')",
    "print('é')".encode("utf-16"): "print('é')",
    b"\xfe\xff" + "é".encode("utf-16-be"): "é",
    b"a\xe9b": "a\ufffdb",
    b"\xff\xfea": "\ufffd",
    b"one\r\ntwo\n": "one\ntwo\n",
    b"": "",
}


@pytest.mark.pure
@pytest.mark.parametrize("data", PIPED_TEXTS)
def test_text_of_a_pipe_may_have_any_encoding(data: bytes) -> None:
    assert jim.decode_text(data) == PIPED_TEXTS[data]


ENV_LINES = {
    "NAME=value": "value",
    "NAME = value": "value",
    "  export NAME=value": "value",
    "NAME='two words'": "two words",
    'NAME="two words"  # a comment': "two words",
    "NAME=value # a comment": "value",
    "NAME=a#b": "a#b",
    "NAME=a=b": "a=b",
    "NAME= # empty": "",
    "NAME=": "",
    "NAME": None,
    "# NAME=value": None,
    "OTHER NAME=value": None,
    "NAME.X=value": None,
}


@pytest.mark.pure
@pytest.mark.parametrize("line", ENV_LINES)
def test_a_line_of_the_file_assigns_as_in_a_shell(line: str, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(f"\n\n{line}\r\nLAST=1")
    values = jim.read_env_file(path)
    assert values.get("NAME") == ENV_LINES[line]
    assert values["LAST"] == "1"


@pytest.mark.pure
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_file_is_read_in_the_encodings_of_windows(
    encoding: str, tmp_path: Path
) -> None:
    path = tmp_path / ".env"
    path.write_text("JUPYTER_TOKEN=abc\n", encoding)
    assert jim.read_env_file(path) == {"JUPYTER_TOKEN": "abc"}


LONG_FILES = {
    "blank lines": "\n" * 100_000,
    "blanks": " " * 300_000,
    "blanks behind a value": "NAME=a" + " " * 300_000 + "b",
    "export": "export " * 50_000,
    "quotes": "NAME=" + "'" * 300_000,
    "no assignment": "word" * 100_000,
}


@pytest.mark.pure
@pytest.mark.parametrize("kind", LONG_FILES)
def test_a_long_file_is_read_in_linear_time(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text(LONG_FILES[kind])
    started = time.process_time()
    jim.read_env_file(path)
    assert time.process_time() - started < 1


@pytest.mark.pure
def test_a_folder_of_that_name_is_no_file(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    assert jim.read_env_file(tmp_path / ".env") == {}
    assert jim.read_env_file(tmp_path / "missing") == {}


@pytest.mark.pure
def test_a_file_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / ".env").write_text("")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(jim.ConfigError, match=r"\.env .* Permission denied"):
        jim.read_env_file(tmp_path / ".env")


FILE_OF_SETTINGS = (
    "JUPYTER_BASE_URL=http://file\nJUPYTER_TOKEN=file-token\nNOTEBOOKS_FOLDER=file\n"
)


URL_FLAG = ["--jupyter-base-url", "http://flag"]


TOKEN_FLAG = ["--jupyter-token", "flag-token"]


# Flags, variables -> the URL, token and folder that count, with FILE as .env.
SETTINGS: list[tuple[list[str], dict[str, str], tuple[Any, Any, Any]]] = [
    ([], {}, ("http://file", "file-token", "file")),
    (["--notebooks-folder", "flag"], {}, ("http://file", "file-token", "flag")),
    ([], {"NOTEBOOKS_FOLDER": "var"}, ("http://file", "file-token", "var")),
    ([], {"JUPYTER_BASE_URL": ""}, ("http://file", "file-token", "file")),
    (URL_FLAG, {}, ("http://flag", None, None)),
    ([], {"JUPYTER_BASE_URL": "http://var"}, ("http://var", None, None)),
    (URL_FLAG, {"JUPYTER_BASE_URL": "http://var"}, ("http://flag", None, None)),
    (URL_FLAG, {"JUPYTER_TOKEN": "var-token"}, ("http://flag", "var-token", None)),
    (URL_FLAG + TOKEN_FLAG, {}, ("http://flag", "flag-token", None)),
    (
        [*URL_FLAG, "--jupyter-token="],
        {"JUPYTER_TOKEN": "v"},
        ("http://flag", "", None),
    ),
    (["--local"], {}, (None, None, None)),
    (["--local"], {"NOTEBOOKS_FOLDER": "var"}, (None, None, "var")),
]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and none of our variables."""
    monkeypatch.chdir(tmp_path)
    for name in jim.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.pure
@pytest.mark.parametrize(("flags", "variables", "expected"), SETTINGS)
def test_a_flag_beats_a_variable_and_the_file_counts_as_a_whole(
    flags: list[str],
    variables: dict[str, str],
    expected: tuple[Any, Any, Any],
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (in_folder / ".env").write_text(FILE_OF_SETTINGS)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    options = jim.parse_args(flags)
    found = (options.jupyter_base_url, options.jupyter_token, options.notebooks_folder)
    assert found == expected


@pytest.mark.pure
@pytest.mark.parametrize("flags", [TOKEN_FLAG, ["--timeout", "5"]])
def test_a_token_from_elsewhere_never_goes_to_a_url_from_the_file(
    flags: list[str], in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_folder / ".env").write_text("JUPYTER_BASE_URL=http://thief.example\n")
    monkeypatch.setenv("JUPYTER_TOKEN", SECRET)
    with pytest.raises(SystemExit) as caught:
        jim.parse_args(flags)
    assert caught.value.code == 2


@pytest.mark.pure
def test_nothing_but_the_three_names_is_read_from_variables_and_file(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = jim.settings_of(jim.parse_args(URL_FLAG))
    names = ["EXECUTE", "LOCAL", "KERNEL_NAME", "TIMEOUT", "NO_RESTORE", "FILES_DIR"]
    lines = [f"JUPYTER_INTERPRETER_{name}=." for name in names]
    lines += [f"{name}=." for name in names]
    (in_folder / ".env").write_text("\n".join([*lines, "JUPYTER_BASE_URL=http://x"]))
    for line in lines:
        monkeypatch.setenv(*line.split("="))

    options = jim.parse_args([])
    assert options.jupyter_base_url == "http://x"
    assert options.execute is None
    assert options.local is None
    assert jim.settings_of(options) == before


GIVEN: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--notebooks-folder", "deep/er"], {"folder": "deep/er"}),
    (["--kernel-name", "ir"], {"kernel_name": "ir"}),
    (["--timeout", "0"], {"timeout_s": 0.0}),
    (["--max-output", "5000"], {"max_output": 5000}),
    (["--restore-limit", "7.5"], {"restore_limit_s": 7.5}),
    (["--restore-limit", "0"], {"restore_limit_s": 0.0}),
    (["--no-restore"], {"restore_limit_s": 0.0}),
    (["--no-restore", "--restore-limit", "9"], {"restore_limit_s": 0.0}),
    (["--plain"], {"is_plain": True}),
]


@pytest.mark.pure
@pytest.mark.parametrize(("flags", "expected"), GIVEN)
def test_flags_become_settings_and_the_rest_has_its_defaults(
    flags: list[str], expected: dict[str, Any], in_folder: Path
) -> None:
    settings = jim.settings_of(jim.parse_args([*URL_FLAG, *flags]))
    assert settings == jim.Settings(**expected)


@pytest.mark.pure
def test_folders_of_this_machine_are_taken_with_their_home(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(in_folder))
    monkeypatch.setenv("USERPROFILE", str(in_folder))
    (in_folder / "data").mkdir()
    assert jim.parse_args(["--local"]).local == in_folder.resolve()
    assert jim.parse_args(["--local", "~/data"]).local == (in_folder / "data").resolve()
    options = jim.parse_args([*URL_FLAG, "--files-dir", "~/data"])
    assert jim.settings_of(options).files_dir == (in_folder / "data").resolve()


# Flags -> what the message names.
MISTAKEN_FLAGS: list[tuple[list[str], str]] = [
    ([], "--jupyter-base-url"),
    ([*URL_FLAG, "--nonsense"], "--nonsense"),
    ([*URL_FLAG, SECRET], "unrecognized"),
    ([*URL_FLAG, f"--token={SECRET} b", "--token", SECRET, f"-{SECRET}"], "--token"),
    ([f"--jupyter={SECRET}"], "--jupyter"),
    ([*URL_FLAG, "--jupyter-tok", SECRET], "--jupyter-tok"),
    ([*URL_FLAG, f"--{SECRET}"], "unrecognized"),
    ([*URL_FLAG, "--timeout", "soon"], "--timeout"),
    ([*URL_FLAG, "--timeout", "-1"], "--timeout"),
    ([*URL_FLAG, "--timeout", "nan"], "--timeout"),
    ([*URL_FLAG, "--timeout", "inf"], "--timeout"),
    ([*URL_FLAG, "--max-output", "0"], "--max-output"),
    ([*URL_FLAG, "--max-output", "1e3"], "--max-output"),
    ([*URL_FLAG, "--restore-limit", "-1"], "--restore-limit"),
    ([*URL_FLAG, "--execute", "1", "--session-id", "-3"], "--session-id"),
    ([*URL_FLAG, "--execute", "1", "--session-id", str(2**53)], "--session-id"),
    ([*URL_FLAG, "--session-id", "5"], "--execute"),
    ([*URL_FLAG, "--execute"], "--execute"),
    ([*URL_FLAG, "--notebooks-folder", "~/nb"], "--notebooks-folder"),
    ([*URL_FLAG, "--files-dir", "/no/such/folder"], "/no/such/folder"),
    (["--local", "/no/such/folder"], "/no/such/folder"),
    (["--local", *URL_FLAG], "--local"),
]


@pytest.mark.pure
@pytest.mark.parametrize(("flags", "name"), MISTAKEN_FLAGS)
def test_unknown_flags_and_malformed_values_exit_with_2(
    flags: list[str], name: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        jim.parse_args(flags)
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.out == ""
    assert name in said.err.splitlines()[-1]
    assert SECRET not in said.err


@pytest.mark.pure
def test_a_local_server_beside_a_url_variable_is_an_error(
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody should run code here who meant to run it there."""
    monkeypatch.setenv("JUPYTER_BASE_URL", "http://var")
    with pytest.raises(SystemExit) as caught:
        jim.parse_args(["--local"])
    assert caught.value.code == 2
    assert "variable" in capsys.readouterr().err


REFUSED = jim.ServerRefused("refused")


NOT_FOUND = jim.NotFound("not found")


# The error, the URL, the token -> what the advice says.
ADVICE: list[tuple[jim.ServerError, str, str, str]] = [
    (REFUSED, "http://h", "", "no token was given"),
    (REFUSED, "http://h", SECRET, ""),
    (NOT_FOUND, "http://h/lab", SECRET, "--jupyter-base-url http://h"),
    (NOT_FOUND, "http://h/user/me/tree/a/b", "", "--jupyter-base-url http://h/user/me"),
    (NOT_FOUND, "http://h/label", "", ""),
    (NOT_FOUND, "http://h", "", ""),
    (jim.ServerUnreachable("away"), "http://h/lab", "", ""),
]


@pytest.mark.pure
@pytest.mark.parametrize(("err", "url", "token", "words"), ADVICE)
def test_a_failed_start_says_what_is_wrong_with_url_and_token(
    err: jim.ServerError, url: str, token: str, words: str
) -> None:
    advice = jim.advice(err, url, token)
    assert words in advice
    assert bool(advice) == bool(words)
    assert SECRET not in advice


@pytest.mark.parametrize("level", ["", "2"])
def test_help_and_bash_work_without_docstrings(
    server: JupyterServer, level: str
) -> None:
    environment = {"PYTHONOPTIMIZE": level, "COLUMNS": "80"}
    text = command("--help", environment=environment).stdout
    assert "code interpreter" in text
    assert "JUPYTER_BASE_URL" in text
    flags = [*flags_for(server), "--execute", "echo $((6 * 7))"]
    assert shown(execute(*flags, environment=environment)) == ["42"]


def test_a_file_of_settings_is_enough(server: JupyterServer, tmp_path: Path) -> None:
    lines = f"JUPYTER_BASE_URL={server.url}\nexport JUPYTER_TOKEN='{server.token}'\n"
    folder = "NOTEBOOKS_FOLDER=from-file  # a comment\n"
    (tmp_path / ".env").write_text(lines + folder, "utf-16")
    code = "import os; os.path.basename(os.getcwd())"
    assert shown(execute("--execute", code, cwd=tmp_path)) == ["'from-file'"]


def test_stdin_of_execute_may_have_any_encoding(server: JupyterServer) -> None:
    given = [*COMMAND, *flags_for(server), "--execute", "-"]
    code = "print('é')".encode("utf-16")
    printed = subprocess.check_output(given, input=code, timeout=60)
    assert shown(json.loads(printed)) == ["é"]


def test_execute_with_a_short_timeout_names_flags_to_go_on(
    server: JupyterServer, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    # The pause: a connection is counted before all of its channels are open.
    code = f"until [ -e {gate} ]; do sleep 0.05; done; sleep 1; echo ran"
    flags = flags_for(server)
    early = execute(*flags, "--execute", code, "--timeout", "4")
    (error,) = early["error"]
    session_id = early["session_id"]
    assert f"--session-id {session_id}" in error
    assert "execute_code" not in error
    assert "interrupt_execution" not in error

    session = ["--session-id", str(session_id)]
    given = [*COMMAND, *flags, "--execute", "", *session]
    server.until_noticed(session_id)
    with subprocess.Popen(given, stdout=PIPE) as process:
        server.until_noticed(session_id, left=1)
        gate.touch()
        out, _ = process.communicate(timeout=60)
    assert "ran" in text_of(json.loads(out))


def test_execute_says_of_code_that_never_ran_that_it_did_not(
    server: JupyterServer, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()"
    flags = flags_for(server)
    result = execute(*flags, "--execute", code, "--timeout", "0.001")
    (error,) = result["error"]
    assert "Not run" in error
    assert "nothing is lost" not in error
    session = ["--session-id", str(result["session_id"])]
    execute(*flags, "--execute", "1", *session)
    assert not ran.exists()


def test_ctrl_c_interrupts_the_cell_of_execute(
    server: JupyterServer, tmp_path: Path
) -> None:
    """And prints the rest."""
    begun = tmp_path / "begun"
    code = f"import time; print('a'); open({str(begun)!r}, 'w').close(); time.sleep(60)"
    given = [*COMMAND, *flags_for(server), "--execute", code]
    with subprocess.Popen(given, stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        eventually(begun.exists)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    printed = json.loads(out)
    assert printed["result"] == ["a"]
    assert "KeyboardInterrupt" in "".join(printed["error"])
    assert process.returncode == 1
    assert err == b""


def test_execute_into_a_pipe_that_nobody_reads_is_quiet(server: JupyterServer) -> None:
    given = [*COMMAND, *flags_for(server), "--execute", "print('x' * 9_999)"]
    with subprocess.Popen(given, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_files_of_the_folder_never_reach_the_local_server(tmp_path: Path) -> None:
    """The server must not import them; a kernel may, as kernels do."""
    mark = tmp_path / "imported"
    trap = f"open({str(mark)!r}, 'a').write(__name__ + ' ')"
    for name in ("tornado", "queue", "random", "jupyter_server", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(trap)
    (tmp_path / ".env").write_text("JUPYTER_BASE_URL=http://thief.example\n")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "mine.py").write_text("x = 42")
    code = "import mine, pip\nmine.x, pip.__name__"
    ended = command("--local", "--verbose", "--execute", code, cwd=tmp_path)

    assert shown(json.loads(ended.stdout)) == ["(42, 'pip')"]
    assert not mark.exists()
    assert "/api/kernelspecs" in ended.stderr
    assert not re.search("[0-9a-f]{48}", ended.stderr)  # its token


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose command line names a folder."""
    every = psutil.process_iter(["cmdline"])
    return [process for process in every if str(folder) in str(process.info)]


@pytest.mark.parametrize(
    ("number", "starts"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_signal_ends_command_and_local_server_without_a_word(
    number: signal.Signals, starts: bool, tmp_path: Path
) -> None:
    """While the server starts, and when it is there."""
    given = [*COMMAND, "--local", str(tmp_path), "--verbose"]
    with subprocess.Popen(
        given, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        eventually(lambda: processes_of(tmp_path)[1:])
        if not starts:
            assert process.stderr is not None
            process.stderr.readline()  # the start check was answered
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    eventually(lambda: not processes_of(tmp_path), 10)


def test_local_says_how_to_install_what_it_needs(tmp_path: Path) -> None:
    """As the copied file beside its three dependencies: without the extra."""
    (tmp_path / "jupyter_server.py").write_text("raise ImportError")
    environment = {"PYTHONPATH": str(tmp_path)}
    ended = command("--local", cwd=tmp_path, environment=environment)
    assert ended.returncode == 1
    assert "[local]" in ended.stderr
    assert "jupyter-server, ipykernel and pip" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.sdk
@pytest.mark.faults
@pytest.mark.parametrize("first", ["stdin", "stdout"])
def test_a_client_that_dies_in_a_call_leaves_stderr_empty(
    trial: Trial, server: JupyterServer, first: str
) -> None:
    """And its code running."""
    raw = RawClient([*COMMAND, *flags_for(server)])
    begin_raw(trial, raw)
    ends = [raw.process.stdin, raw.process.stdout]
    if first == "stdout":
        ends.reverse()
    for end in ends:
        assert end is not None
        end.close()
    assert raw.process.stderr is not None
    assert raw.process.stderr.read() == ""
    assert raw.process.wait(10) == 0
    trial.open_gate()
    trial.await_told("ran on")


@pytest.mark.pure
def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        jim.main(["--version"])
    assert capsys.readouterr().out == f"jupyter-interpreter-mcp {jim.__version__}\n"


@pytest.mark.pure
def test_help_lists_each_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_flags(capsys) == {
        "--jupyter-base-url",
        "--jupyter-token",
        "--notebooks-folder",
        "--kernel-name",
        "--timeout",
        "--max-output",
        "--restore-limit",
        "--no-restore",
        "--plain",
        "--files-dir",
        "--verbose",
        "--version",
        "--ca-bundle",
        "--local",
        "--execute",
        "--session-id",
        "--help",
    }


def test_a_malformed_flag_ends_the_command() -> None:
    ended = command("--nonsense")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr


HTML_PAGE = (200, {"Content-Type": "text/html"}, b"<html>Hello")
LOGIN = "https://hub.example/hub/login"
TO_HUB = (302, {"Location": f"{LOGIN}?next=%2Fuser%2Fme%2Fapi"}, b"")

# What is asked for ({server}, {html}, {hub} are servers, {free} a free port, {right}
# the flags of the right server) -> the words of the answer.
# fmt: off
FAILURES: dict[str, tuple[list[str], list[str]]] = {
    "refused": (["--jupyter-base-url", "http://127.0.0.1:{free}"], ["refused", "{free}"]),
    "unknown host": (["--jupyter-base-url", "https://no-such-host.invalid"], ["no-such-host.invalid"]),
    "wrong token": (["--jupyter-base-url", "{server}", "--jupyter-token", "s3cret"], ["token", "403"]),
    "no token": (["--jupyter-base-url", "{server}"], ["token", "403"]),
    "wrong path": (["--jupyter-base-url", "{server}/lab/tree"], ["--jupyter-base-url"]),
    "redirect": (["--jupyter-base-url", "{hub}"], ["https://hub.example/hub/login", "redirect"]),
    "a web page": (["--jupyter-base-url", "{html}"], ["not a Jupyter server"]),
    "not a URL": (["--jupyter-base-url", "s3cret:8888"], ["http(s)://HOST"]),
    "port no number": (["--jupyter-base-url", "http://localhost:s3cret"], ["http(s)://HOST"]),
    "wrong kernel": (["{right}", "--kernel-name", "cobol"], ["cobol", "python3"]),
    "folder above": (["{right}", "--notebooks-folder", "../up"], ["../up", "root"]),
    "folder far above": (["{right}", "--notebooks-folder", "a/../../b"], ["a/../../b", "root"]),
    "folder outside": (["{right}", "--notebooks-folder", "/etc/notebooks"], ["/etc/notebooks", "root"]),
    "folder a file": (["{right}", "--notebooks-folder", "in-the-way"], ["in-the-way"]),
    "below a file": (["{right}", "--notebooks-folder", "in-the-way/deep"], ["in-the-way"]),
    "no CA bundle": (["{right}", "--ca-bundle", "/no/such.pem"], ["/no/such.pem"]),
}
# fmt: on


@pytest.mark.parametrize("cause", FAILURES)
def test_each_cause_of_a_failed_start_is_one_clear_sentence(
    cause: str, server: JupyterServer, web: Webs
) -> None:
    (server.root / "in-the-way").write_text("a file")
    names = {"server": server.url, "free": str(free_port())}
    names["html"] = web({"": HTML_PAGE}).url
    names["hub"] = web({"": TO_HUB}).url
    flags, words = FAILURES[cause]
    given = [each.format(**names) for each in flags if each != "{right}"]
    if "{right}" in flags:
        given += flags_for(server)
    if cause not in ("refused", "wrong token"):
        given += ["--execute", "1"]  # without the SDK: faster
    ended = command(*given)

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert [w for w in words if w.format(**names) not in ended.stderr] == [], ended
    assert ended.stderr.count("\n") == 1
    assert len(ended.stderr) < 500
    assert not re.search("Traceback|s3cret|Error:|object at", ended.stderr)
    assert server.token not in ended.stderr


def test_a_token_over_plain_http_earns_a_warning() -> None:
    """If it goes to another machine."""
    flags = ["--jupyter-base-url", "http://no-such-host.invalid"]
    ended = command(*flags, "--jupyter-token", "s3cret", "--execute", "1")
    assert ended.returncode == 1
    assert "https" in ended.stderr.splitlines()[0]
    assert "s3cret" not in ended.stderr
    assert ended.stderr.count("\n") == 2


SETTINGS_FILE = """# where
JUPYTER_BASE_URL={server.url}
export JUPYTER_TOKEN='{server.token}'
NOTEBOOKS_FOLDER=../from-file  # a comment
"""


@pytest.mark.parametrize("winner", ["file", "variable", "flag"])
def test_a_flag_beats_a_variable_beats_the_file(
    server: JupyterServer, tmp_path: Path, winner: str
) -> None:
    """A folder outside of the server's root is named, before a kernel is started."""
    (tmp_path / ".env").write_text(SETTINGS_FILE.format(server=server))
    environment = {}
    if winner != "file":
        environment["NOTEBOOKS_FOLDER"] = "../from-variable"
    flags = []
    if winner == "flag":
        flags = ["--notebooks-folder", "../from-flag"]
    ended = command(*flags, "--execute", "1", cwd=tmp_path, environment=environment)
    assert re.findall(r"from-\w+", ended.stderr) == [f"from-{winner}"]


# What would run, start or reach something, or change how, if it counted.
HOSTILE = {
    "HTTP_PROXY": "http://127.0.0.1:1",
    "REQUESTS_CA_BUNDLE": "/no/such/file",
    "PATH": "",
    "JUPYTER_INTERPRETER_EXECUTE": "print('stranger')",
    "JUPYTER_INTERPRETER_LOCAL": ".",
    "JUPYTER_INTERPRETER_KERNEL_NAME": "stranger",
    "JUPYTER_INTERPRETER_MAX_OUTPUT": "60",
    "LOCAL": ".",
    "EXECUTE": "print('stranger')",
    "MAX_OUTPUT": "60",
}


def env_file(folder: Path, values: Mapping[str, str]) -> None:
    lines = [f"{name}={value}" for name, value in values.items()]
    (folder / ".env").write_text("\n".join([*lines, "no assignment"]))


def url_and_token(server: JupyterServer) -> dict[str, str]:
    return {"JUPYTER_BASE_URL": server.url, "JUPYTER_TOKEN": server.token}


def test_only_three_names_are_read_from_the_file(
    server: JupyterServer, tmp_path: Path
) -> None:
    env_file(tmp_path, {**HOSTILE, **url_and_token(server)})
    result = execute("--execute", "print('x' * 200)", cwd=tmp_path)
    assert shown(result) == ["x" * 200]


def test_only_three_variables_count(server: JupyterServer, tmp_path: Path) -> None:
    hostile = {k: v for k, v in HOSTILE.items() if k.startswith("JUPYTER_")}
    environment = {**hostile, **url_and_token(server)}
    code = "print('x' * 200)"
    result = execute("--execute", code, cwd=tmp_path, environment=environment)
    assert shown(result) == ["x" * 200]


def test_the_file_gives_no_url_to_a_token_from_elsewhere(
    tmp_path: Path, web: Webs
) -> None:
    thief = web({"": (403, {}, b"")})
    env_file(tmp_path, {"JUPYTER_BASE_URL": thief.url})
    token = {"JUPYTER_TOKEN": "s3cret"}
    ended = command("--execute", "1", cwd=tmp_path, environment=token)
    assert ended.returncode == 2
    assert "--jupyter-base-url" in ended.stderr
    assert thief.asked == []


def test_the_file_gives_no_token_to_a_url_from_elsewhere(
    server: JupyterServer, tmp_path: Path
) -> None:
    env_file(tmp_path, url_and_token(server))
    url = ["--jupyter-base-url", server.url]
    ended = command(*url, "--execute", "1", cwd=tmp_path)
    assert ended.returncode == 1
    assert "--jupyter-token" in ended.stderr


EXECUTIONS: list[tuple[str, str, list[str], str, int]] = [
    ("print('a')\n21 * 2", "", ["a", "42"], "", 0),
    ("1 / 0", "", [], "ZeroDivisionError", 1),
    ("-", "echo é | tr -d x; exit 3", ["é"], "Command exited with status 3", 1),
]


@pytest.mark.parametrize(("code", "stdin", "result", "error", "status"), EXECUTIONS)
def test_execute_runs_one_cell_and_prints_the_result(
    server: JupyterServer,
    code: str,
    stdin: str,
    result: list[str],
    error: str,
    status: int,
) -> None:
    ended = command(*flags_for(server), "--execute", code, stdin=stdin)
    printed = json.loads(ended.stdout)
    assert list(printed) == ["session_id", "error", "result"]
    assert printed["result"] == result
    assert error in "".join(printed["error"])
    assert bool(printed["error"]) == bool(error)
    assert ended.returncode == status
    assert ended.stderr == ""


def test_execute_continues_a_session(client: Client, server: JupyterServer) -> None:
    session_id = client.open("x = 42")
    flags = [*flags_for(server), "--session-id", str(session_id)]
    again = execute(*flags, "--execute", "x")
    assert_continued(again, ["42"], cells=1)
    assert again["session_id"] == session_id


def test_execute_names_the_step_that_failed(other_kernels: JupyterServer) -> None:
    flags = flags_for(other_kernels)
    ended = command(*flags, "--kernel-name", "broken", "--execute", "1")
    assert ended.returncode == 1
    assert ended.stderr == ""
    assert "kernel" in json.loads(ended.stdout)["error"][0].lower()
    assert execute(*flags, "--execute", "21 * 2")["result"] == ["42"]


@pytest.mark.parametrize("folder", ["a/b c/é", "{root}/absolute/deep", ".", "x/../y/"])
def test_the_notebooks_folder_is_made_and_used(
    server: JupyterServer, folder: str
) -> None:
    given = folder.format(root=server.root)
    flags = [*flags_for(server), "--notebooks-folder", given]
    result = execute(*flags, "--execute", "import os; print(os.getcwd())")
    used = Path(os.path.normpath(server.root / given))
    assert shown(result) == [str(used)]
    assert (used / f"{result['session_id']}.ipynb").exists()


def test_an_absolute_folder_leaves_no_kernel_behind(server: JupyterServer) -> None:
    """A kernel says where the server's root is."""
    before = server.kernels()
    flags = [*flags_for(server), "--notebooks-folder"]
    assert command(*flags, f"{server.root}/absolute").returncode == 0
    assert command(*flags, "/etc").returncode == 1
    assert server.kernels() == before


def test_local_runs_no_kernel_of_the_projects(tmp_path: Path) -> None:
    """A project's file with the name of ipykernel's; its own modules are imported."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "ipykernel_launcher.py").write_text("open('run by a stranger', 'w')")
    (folder / "mine.py").write_text("value = 42")
    ended = command(
        "--local", str(tmp_path), "--execute", "import mine; mine.value", cwd=tmp_path
    )
    assert json.loads(ended.stdout)["result"] == ["42"]
    if sys.version_info >= (3, 11):
        assert not (folder / "run by a stranger").exists()


TRANSPORT = """import ipykernel, os
told = ipykernel.get_connection_info(unpack=True)
told["transport"], "JUPYTER_TOKEN" in os.environ"""


@pytest.mark.parametrize(("name", "transport"), [("jupyter", "ipc"), ("x" * 90, "tcp")])
def test_local_runs_a_server_of_its_own(
    name: str, transport: str, tmp_path: Path
) -> None:
    """The kernel need not know its token, and no proxy is asked.

    Nor does the kernel need ports: one whose port was taken is started with the same
    one until it is given up. A path that is too long for a socket leaves only ports.
    """
    proxies = {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": ""}
    flags = ["--local", str(tmp_path), "--execute", TRANSPORT]
    with tempfile.TemporaryDirectory(prefix="j", dir="/tmp") as short:
        runtime = Path(short) / name
        variables = {**proxies, "JUPYTER_RUNTIME_DIR": str(runtime)}
        ended = command(*flags, environment=variables)
        assert not list(runtime.glob("kernel-*"))
    assert ended.stderr == ""
    result = json.loads(ended.stdout)
    assert shown(result) == [f"('{transport}', False)"]
    notebook = tmp_path / "notebooks" / f"{result['session_id']}.ipynb"
    assert sources(json.loads(notebook.read_text())) == [TRANSPORT]
    processes = psutil.process_iter(["cmdline"])
    assert [each for each in processes if str(tmp_path) in str(each.info)] == []


def test_the_local_server_ends_with_the_command(
    clients: Clients, tmp_path: Path
) -> None:
    """However that ends."""
    client = clients("--local", str(tmp_path), server=None)
    assert client.run("21 * 2")["result"] == ["42"]
    processes = psutil.Process(client.pid).children(recursive=True)
    assert len(processes) > 1  # the Jupyter server and a kernel
    client.kill()
    eventually(lambda: not any(map(psutil.Process.is_running, processes)))


def test_the_local_server_ends_while_a_kernel_is_restarted(tmp_path: Path) -> None:
    """Its own end fails then, about every second time."""
    ended = command("--local", str(tmp_path), "--execute", "import os; os._exit(1)")
    assert "The kernel died" in json.loads(ended.stdout)["error"][0]
    eventually(lambda: not processes_of(tmp_path))


@pytest.mark.pure
def test_the_package_is_used_without_the_sdk() -> None:
    """Other agents copy the file and call its classes; they need not have `mcp`."""
    check = (
        "import sys, jupyter_interpreter_mcp\n"
        "print(sorted({'mcp', 'pydantic'} & set(sys.modules)))"
    )
    assert command("-c", check, program=[sys.executable]).stdout == "[]\n"


@pytest.mark.sdk
def test_the_copied_file_runs_alone(
    server: JupyterServer, clients: Clients, tmp_path: Path
) -> None:
    copy = [sys.executable, str(shutil.copy(MODULE, tmp_path / "copied.py"))]
    version = command("--version", program=copy, cwd=tmp_path)
    assert version.stdout.endswith(f"{jim.__version__}\n")
    assert clients(command=copy).run("21 * 2")["result"] == ["42"]


@pytest.mark.pure
def test_the_script_metadata_names_the_packages_dependencies() -> None:
    project = (HERE / "pyproject.toml").read_text()
    inline = re.search(r"(?m)^# dependencies = (\[.*\])$", MODULE.read_text())
    packaged = re.search(r"(?ms)^dependencies = \[\n(.*?)^\]", project)
    assert inline
    assert packaged
    assert json.loads(inline[1]) == re.findall(r'(?m)^ *"([^"]+)"', packaged[1])


@pytest.mark.pure
def test_readme_names_each_flag(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"`(--[a-z-]+)", flag_table()))
    assert named == help_flags(capsys)


@pytest.mark.pure
def test_the_settings_example_names_each_variable() -> None:
    names = set(re.findall(r"`((?:JUPYTER|NOTEBOOKS)_[A-Z_]+)`", flag_table()))
    example = (HERE / ".env.example").read_text()
    assert names
    assert {name for name in names if f"{name}=" not in example} == set()


def test_readme_lines_for_another_program_run(
    server: JupyterServer, tmp_path: Path
) -> None:
    """Beside a copied file, without the SDK."""
    shutil.copy(MODULE, tmp_path)
    readme = (HERE / "README.md").read_text()
    program = re.search(r"```python\n(# vendored\.py\n.*?)```", readme, re.S)
    assert program is not None
    check = "\nimport sys\nassert 'mcp' not in sys.modules\n"
    (tmp_path / "vendored.py").write_text(program[1] + check)
    names = {"JUPYTER_BASE_URL": server.url, "JUPYTER_TOKEN": server.token}
    python = [sys.executable, "vendored.py"]
    ended = command(program=python, cwd=tmp_path, environment=names)

    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["result"] == ["42"]


@pytest.mark.hub
def test_jupyterhub_serves_the_whole_job(clients: Clients, hub: Hub) -> None:
    """Under a user's path."""
    hub.api("POST", "users/alice")
    token = hub.api("POST", "users/alice/tokens")["token"]
    stopped = hub.execute("alice", token)
    assert stopped.returncode == 1
    assert "/hub/" in stopped.stderr
    assert "start" in stopped.stderr

    hub.api("POST", "users/alice/server")
    eventually(hub.has_started, 60)
    assert json.loads(hub.execute("alice", token).stdout)["result"] == ["42"]
    wrong = hub.execute("alice", "wrong")
    assert wrong.returncode == 1
    assert "token" in wrong.stderr
    nobody = hub.execute("nobody", token)
    assert nobody.returncode == 1
    assert "name" in nobody.stderr

    flags = hub.flags("alice", token)
    client = clients(*flags, server=None)
    session_id = client.open("x = 41")
    assert client.run("echo hi", session_id)["result"] == ["hi"]
    client.close()
    again = clients(*flags, server=None)
    assert again.run("x + 1", session_id)["result"][-1:] == ["42"]
    headers = {"Authorization": f"token {token}"}
    api = f"{hub.url}/user/alice/api"
    sessions = requests.get(f"{api}/sessions", headers=headers, timeout=30).json()
    kernel = f"{api}/kernels/{sessions[-1]['kernel']['id']}"
    requests.delete(kernel, headers=headers, timeout=30)
    assert_restored(again.run("x + 1", session_id), ["42"])


# --- Figures --------------------------------------------------------------------------

# `pytest -m bench -s` prints the table of README: figure, ratio, bar. A test fails only
# if something is wrong, never because the machine is slow.


@pytest.mark.bench
def test_bench_small_call(fast: Client, zeromq: ZeroMQ) -> None:
    session_id = fast.timed("x = 1")[1]["session_id"]
    ours = []
    floor = []
    for n in range(110):
        took = fast.timed("x = 1", session_id)[0]
        least = zeromq.timed("x = 1")
        if n >= 10:  # the first ones warm up
            ours.append(took)
            floor.append(least)
    compare("small call / ZeroMQ", ours, floor, 3)


@pytest.mark.bench
def test_bench_small_call_at_1000_cells(
    fast: Client, fast_server: JupyterServer
) -> None:
    cell = "x = 1\n".ljust(499, "#") + "\n"
    long_id = fast.timed(cell)[1]["session_id"]
    for _ in range(999):
        fast.timed(cell, long_id)
    assert len(fast_server.notebook(long_id)["cells"]) == 1000

    first = []
    late = []
    for _ in range(5):
        new_id = fast.timed(cell)[1]["session_id"]
        for _ in range(10):
            first.append(fast.timed(cell, new_id)[0])
            late.append(fast.timed(cell, long_id)[0])
    assert len(fast_server.notebook(long_id)["cells"]) == 1050
    compare("small call at 1,000 cells / first ten", late, first, 1.5)


@pytest.mark.bench
def test_bench_new_session(fast: Client) -> None:
    ours = []
    floor = []
    for _ in range(8):
        ours.append(fast.timed("x = 1")[0])
        started = time.perf_counter()
        zeromq = ZeroMQ()
        zeromq.timed("x = 1")
        floor.append(time.perf_counter() - started)
        zeromq.close()
    name = "first result of a new session / jupyter_client"
    compare(name, ours, floor, 1.0)


@pytest.mark.bench
def test_bench_first_call_after_restart(fast_server: JupyterServer) -> None:
    client = Client(fast_server)
    session_id = client.timed("x = 1")[1]["session_id"]
    small = [client.timed("x = 1", session_id)[0] for _ in range(60)][10:]
    first = []
    for _ in range(7):
        client.close()
        client = Client(fast_server)
        took, result = client.timed("x", session_id)
        assert result["result"][-1:] == ["1"]
        first.append(took)
    client.close()
    compare("first call after a restart / small call", first, small, 10)


LARGE = {
    "300,000 lines of é": "print('é\\n' * 300_000)",
    "one line of 600,000 é": "print('é' * 600_000)",
}


@pytest.mark.bench
@pytest.mark.parametrize("kind", LARGE)
def test_bench_large_output(
    fast: Client, fast_server: JupyterServer, zeromq: ZeroMQ, kind: str
) -> None:
    session_id = fast.timed("x = 1")[1]["session_id"]
    ours = []
    floor = []
    for _ in range(20):
        took, result = fast.timed(LARGE[kind], session_id)
        ours.append(took)
        floor.append(zeromq.timed(LARGE[kind]))
        assert_cut(result, 600_000)
    texts = list((fast_server.root / "notebooks").glob(f"{session_id}*.txt"))

    assert len(texts) == 20
    assert texts[0].read_text().count("é") in (300_000, 600_000)
    compare(f"{kind} / ZeroMQ", ours, floor, 4)


EMPTY_SERVER = """
try:
    from mcp.server.mcpserver import MCPServer as Server
except ImportError:
    from mcp.server.fastmcp import FastMCP as Server
server = Server("empty")
server.run("stdio")
"""


@pytest.mark.bench
def test_bench_start(fast_server: JupyterServer, tmp_path: Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text(EMPTY_SERVER)
    ours = []
    empty = []
    for _ in range(12):
        ours.append(seconds_to_initialize([*COMMAND, *flags_for(fast_server)]))
        empty.append(seconds_to_initialize([sys.executable, str(script)]))
    compare("start to `initialize` / empty server", ours, empty, 1.3)


@pytest.mark.bench
def test_bench_memory(tmp_path: Path) -> None:
    """--local has no rate limits."""
    client = Client(None, "--local", str(tmp_path))
    session_id = client.timed("x = 1")[1]["session_id"]
    start = client.memory()
    used = []
    for _ in range(5):
        client.timed("print('x' * 100_000_000)", session_id)
        used.append(client.memory())
    client.close()
    figure = f"{start / 1e6:.0f} MB, then " + ", ".join(f"{n / 1e6:.0f}" for n in used)
    more = (used[-1] - used[0]) / 1e6
    row("memory of five 100 MB prints, MB more than after one", figure, more, 30)


def curl_up(server: JupyterServer, folder: Path, data: bytes) -> float:
    """Send a file with curl as we do, in chunks over one connection; the seconds."""
    token = f"Authorization: token {server.token}"
    arguments = ["curl"]
    starts = range(0, len(data), jim.CHUNK_BYTES)
    for number, start in enumerate(starts, 1):
        content = base64.b64encode(data[start : start + jim.CHUNK_BYTES]).decode()
        chunk = -1 if number == len(starts) else number
        model = {"type": "file", "format": "base64", "chunk": chunk, "content": content}
        body = folder / f"chunk{number}"
        body.write_text(json.dumps(model))
        if number > 1:
            arguments.append("--next")
        json_type = "Content-Type: application/json"
        arguments += [
            "-sSf",
            "-X",
            "PUT",
            "-H",
            token,
            "-H",
            json_type,
            "-H",
            "Expect:",
        ]
        arguments += ["--data-binary", f"@{body}", "-o", "/dev/null"]
        arguments.append(f"{server.url}/api/contents/curl")
    started = time.perf_counter()
    subprocess.run(arguments, check=True)
    return time.perf_counter() - started


def curl_down(server: JupyterServer, folder: Path) -> float:
    token = f"Authorization: token {server.token}"
    target = ["-o", str(folder / "down"), f"{server.url}/files/curl"]
    started = time.perf_counter()
    subprocess.run(["curl", "-sSf", "-H", token, *target], check=True)
    return time.perf_counter() - started


@pytest.mark.bench
def test_bench_files(
    fast_server: JupyterServer, clients: Clients, tmp_path: Path
) -> None:
    """A file of 100 MB up and down again."""
    files = files_with(clients, fast_server, tmp_path)
    data = os.urandom(100_000_000)
    (files.host / "data").write_bytes(data)
    (files.host / "small").write_bytes(data[:5_000_000])
    files.up("small", "small")
    before = files.client.memory()
    up: list[float] = []
    down: list[float] = []
    curls_up: list[float] = []
    curls_down: list[float] = []
    for number in range(3):
        curls_up.append(curl_up(fast_server, tmp_path, data))
        curls_down.append(curl_down(fast_server, tmp_path))
        started = time.perf_counter()
        files.up("data", f"data{number}")
        up.append(time.perf_counter() - started)
        started = time.perf_counter()
        files.down(f"data{number}", f"back{number}")
        down.append(time.perf_counter() - started)
    compare("100 MB up / curl", up, curls_up, 1.5)
    compare("100 MB down / curl", down, curls_down, 1.5)
    more = (files.client.memory() - before) / 1e6
    row("memory of 100 MB up and down, MB more", f"{more:.1f} MB", more, 20)


CHARACTERS = {
    "print(42)": "print(42)",
    "a table of 20 rows": "import pandas\npandas.DataFrame({'a': range(20), 'b': 1.5})",
    "a KeyError of pandas": "import pandas\npandas.DataFrame({'a': [1]})['b']",
    "a plot": "import matplotlib.pyplot as plt\nplt.plot([1, 4, 9]);",
}


@pytest.mark.bench
@pytest.mark.parametrize("what", CHARACTERS)
def test_bench_characters(fast: Client, what: str) -> None:
    """What reaches the model; of other servers README has figures."""
    answer = fast.call(CHARACTERS[what])
    size = len(answer["content"][0]["text"])
    pictures = len(answer["content"]) - 1
    row(f"characters of {what}", f"{size} and {pictures} pictures", size, 1_000)


@pytest.mark.bench
def test_bench_50_sessions(fast: Client) -> None:
    calls = [fast.start("own = 1", timeout=170) for _ in range(50)]
    opened = [outcome(call, 180) for call in calls]
    assert [each["error"] for each in opened] == [[]] * 50
    sleeps = "import time\ntime.sleep(1)\n'slept'"
    started = time.perf_counter()
    calls = [fast.start(sleeps, each["session_id"]) for each in opened]
    slept = [outcome(call, 60) for call in calls]
    took = time.perf_counter() - started
    assert [shown(each) for each in slept] == [["'slept'"]] * 50
    row("50 sessions that sleep 1 s at once", f"{took:.2f} s", took, 2)


@pytest.mark.bench
@pytest.mark.parametrize("delay_ms", [20, 200])
def test_bench_network_delay(fast_server: JupyterServer, delay_ms: int) -> None:
    """Round trips of a small call.

    The proxy ends TCP on either side, so acknowledgements do not cross the delay: what
    Nagle's algorithm costs between server and proxy is that of loopback.
    """
    network = Network(fast_server.port)
    client = Client(fast_server, url=network.url)
    session_id = client.timed("x = 1")[1]["session_id"]
    network.delay_s = delay_ms / 1000
    count = 55 if delay_ms < 100 else 12
    took = [client.timed("x = 1", session_id)[0] for _ in range(count)][2:]
    client.close()
    network.close()
    took_ms = 1000 * statistics.median(took)
    trips = took_ms / (2 * delay_ms)
    figure = f"{took_ms:.0f} ms, round trips"
    row(f"small call at {delay_ms} ms each way", figure, trips)


def name_rooms() -> None:
    """Let `pytest -k notebook` find the tests below the banner of that room.

    pytest looks at the attributes of a test function, too.
    """
    room = ""
    for line in Path(__file__).read_text().splitlines():
        banner = re.match(r"# --- ([A-Z][a-z ]+) -", line)
        if banner:
            room = banner[1].lower().replace(" ", "_")
        test = re.match(r"def (test_\w+)", line)
        if test:
            setattr(globals()[test[1]], room, True)


name_rooms()
