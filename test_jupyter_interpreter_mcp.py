"""Tests, in the order of the module. The real things are the default: a Jupyter server that a fixture
starts, and the installed command over stdio with the SDK's own client. `responses` answers for what a
real server does not do on demand, a socket proxy makes the faults of a network."""

import asyncio
import base64
import contextlib
import http.server
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import psutil
import pytest
import requests
import responses
import trustme
import websocket
from jupyter_client import BlockingKernelClient, KernelManager
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

import jupyter_interpreter_mcp as jim

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
    """A port that nothing uses: of a range of this test process's own, below those that the system gives."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 10
    while True:
        with suppress(OSError), socket.socket() as probe:
            probe.bind((LOOPBACK, 10_000 + 2_000 * worker + secrets.randbelow(2_000)))
            return int(probe.getsockname()[1])


class JupyterServer:
    """A real Jupyter server: free port, random token, temporary root. Can be stopped and started again.

    transport: between the server and its kernels. A port that was chosen for a kernel can be taken before
    the kernel is there, which then hangs: one of some hundred kernels beside as many connections of other
    tests. Sockets with a path have no such race.
    """

    def __init__(
        self, folder: Path, *options: str, token: str | None = None, transport: str = "ipc"
    ) -> None:
        self.root, self.log = folder / "root", folder / "server.log"
        self.root.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(16) if token is None else token
        self.port = free_port()
        self.options = [f"--KernelManager.transport={transport}", *options]
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._runtime = tempfile.TemporaryDirectory(prefix="jupyter")  # short: it has sockets
        self.runtime = Path(self._runtime.name)
        self.start()

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
        return requests.request(
            method, f"{self.url}/api/{path}", headers=headers, timeout=30, **options
        )

    def kernel_id(self, session_id: int) -> str:
        """The kernel of a session."""
        (kernel_id,) = [
            s["kernel"]["id"]
            for s in self.api("GET", "sessions").json()
            if s["path"].endswith(f"{session_id}.ipynb")
        ]
        return str(kernel_id)

    def notebook(self, session_id: int, folder: str = "notebooks") -> dict[str, Any]:
        """A session's file, as it is on the disk."""
        notebook: dict[str, Any] = json.loads(
            (self.root / folder / f"{session_id}.ipynb").read_text()
        )
        return notebook


class Client:
    """The installed command over stdio with the SDK's client, for tests that are not asynchronous.

    The client's event loop runs in a thread of its own; `start` begins a call and returns its future, `run`
    waits for the result's structure.
    """

    def __init__(
        self,
        server: JupyterServer | None,
        *flags: str,
        url: str = "",
        command: list[str] | None = None,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        arguments = list(flags)
        if server is not None:
            arguments += [
                "--jupyter-base-url",
                url or server.url,
                f"--jupyter-token={server.token}",
            ]
        program, *rest = command or COMMAND
        self.parameters = StdioServerParameters(
            command=program,
            args=[*rest, *arguments],
            env={**os.environ, **(environment or {})},
            cwd=cwd,
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

    def start(
        self, code: str, session_id: int = 0, *, tool: str = "execute_code", **arguments: Any
    ) -> Any:
        """Begin a call; a future of the SDK's CallToolResult. Cancelling it sends notifications/cancelled."""
        given = {"code": code, **arguments} if tool == "execute_code" else arguments
        given = {**given, "session_id": session_id} if session_id else given
        call = self.session.call_tool(tool, given, progress_callback=self._note)
        return asyncio.run_coroutine_threadsafe(call, self.loop)

    def call(self, code: str, session_id: int = 0, **arguments: Any) -> Any:
        """The SDK's CallToolResult, as a dictionary with the names of the wire."""
        return (
            self.start(code, session_id, **arguments)
            .result(120)
            .model_dump(by_alias=True, mode="json")
        )

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
                threading.Thread(
                    target=self._pump, args=(client, server, True), daemon=True
                ).start()
                threading.Thread(
                    target=self._pump, args=(server, client, False), daemon=True
                ).start()

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


@pytest.fixture(scope="session", autouse=True)
def history_in_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Many kernels at once would lock the database in which IPython keeps the history of cells."""
    folder = tmp_path_factory.mktemp("ipython")
    (folder / "profile_default").mkdir()
    config = folder / "profile_default" / "ipython_kernel_config.py"
    config.write_text("c.HistoryManager.hist_file = ':memory:'\n")
    os.environ["IPYTHONDIR"] = str(folder)


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


PIXEL = (  # a picture of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
SHOW_PIXEL = f"import base64, IPython.display as d\nd.display(d.Image(base64.b64decode('{PIXEL}')))"
TOUCH = "import pathlib; pathlib.Path({!r}).touch()"
COUNT = "with open({!r}, 'a') as f: f.write('.');"


def command(
    *flags: str,
    stdin: str = "",
    cwd: Path | None = None,
    program: list[str] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The installed command, run to its end in an environment without settings of our own."""
    ours = ("JUPYTER_", "NOTEBOOKS_FOLDER")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [*(program or COMMAND), *flags],
        input=stdin,
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def flags_for(server: JupyterServer, url: str = "") -> list[str]:
    return ["--jupyter-base-url", url or server.url, f"--jupyter-token={server.token}"]


def tool_call(client: Client, arguments: dict[str, Any]) -> Any:
    """execute_code with arguments that a well-behaved client would not send."""
    call = client.session.call_tool("execute_code", arguments)
    result = asyncio.run_coroutine_threadsafe(call, client.loop).result(60)
    return result.model_dump(by_alias=True, mode="json")


def run_as_person(server: JupyterServer, kernel_id: str, code: str) -> str:
    """Run a cell as JupyterLab does, without our module; its stream text and value."""
    url = f"ws{server.url.removeprefix('http')}/api/kernels/{kernel_id}/channels"
    ws = websocket.create_connection(url, header=[f"Authorization: token {server.token}"])
    header = {"msg_id": secrets.token_hex(8), "msg_type": "execute_request", "session": "lab"}
    content = {"code": code, "silent": False, "allow_stdin": False}
    ws.send(
        json.dumps(
            {
                "channel": "shell",
                "header": header,
                "content": content,
                "metadata": {},
                "parent_header": {},
            }
        )
    )
    text = ""
    while True:
        message = json.loads(ws.recv())
        if message["parent_header"].get("msg_id") != header["msg_id"]:
            continue
        content = message["content"]
        if content.get("execution_state") == "idle":
            ws.close()
            return text
        if message["channel"] == "iopub":
            text += content.get("text", "") + content.get("data", {}).get("text/plain", "")


def sources(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"]]


def is_report(line: str, cells: int) -> bool:
    """The line that begins the result of a restored session: how many cells, in how long."""
    return bool(re.fullmatch(rf".*restored.*\b{cells} cells?\b.*\d s\b.*", line))


class Web:
    """An HTTP server that answers as told, keeps what it was asked, and may pass on to another.

    answers: the beginning of a path -> (status, headers, body), for every method.
    """

    def __init__(
        self, answers: Mapping[str, tuple[int, dict[str, str], bytes]], behind: str = ""
    ) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                web.asked.append((self.path, dict(self.headers)))
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                answer = next(
                    (a for start, a in answers.items() if re.match(start, self.path)), None
                )
                if answer:
                    status, headers, text = answer
                else:
                    reply = requests.request(
                        self.command,
                        behind + self.path,
                        data=body,
                        headers=dict(self.headers),
                        timeout=60,
                    )
                    kept = {"Content-Type": reply.headers.get("Content-Type", "text/plain")}
                    status, headers, text = reply.status_code, kept, reply.content
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *args: Any) -> None:
                pass

        self.httpd = http.server.ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()


@pytest.fixture
def web() -> Iterator[Callable[..., Web]]:
    """Makes HTTP servers that answer as told, and stops them."""
    made: list[Web] = []

    def make(*arguments: Any) -> Web:
        made.append(Web(*arguments))
        return made[-1]

    yield make
    for each in made:
        each.httpd.shutdown()
        each.httpd.server_close()


@pytest.fixture(scope="session")
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """A Jupyter server with two more kernels: `broken` cannot start, `bash` is not IPython."""
    folder = tmp_path_factory.mktemp("other")
    for name, program in {
        "broken": ["/no/such/python"],
        "bash": [sys.executable, "-m", "bash_kernel"],
    }.items():
        spec = {
            "argv": [*program, "-f", "{connection_file}"],
            "display_name": name,
            "language": name,
        }
        (folder / "share" / "kernels" / name).mkdir(parents=True)
        (folder / "share" / "kernels" / name / "kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "share"))
        server = JupyterServer(folder)
    yield server
    server.process.kill()  # it waits long for such kernels when it is asked to end
    server.process.wait()


@pytest.fixture(scope="session")
def run(client: Client) -> Callable[..., dict[str, Any]]:
    """Runs code in a session that those tests share which leave nothing behind."""
    session_id = client.run("0")["session_id"]
    return lambda code, **arguments: client.run(code, session_id, **arguments)


# --- Jupyter server: HTTP ------------------------------------------------------------------------

SPECS = {"default": "python3", "kernelspecs": {}}
HTML = {"body": "<html>Sign in", "content_type": "text/html"}

HTTP_FAILURES: list[tuple[dict[str, Any], list[str]]] = [
    ({"status": 401}, ["token", "401"]),
    ({"status": 403, "json": {"message": "Forbidden"}}, ["token", "403"]),
    (
        {"status": 404, "json": {"message": "nothing here"}},
        ["https://jupyter.test/lab", "--jupyter-base-url"],
    ),
    ({"status": 409, "body": "no JSON"}, ["409", "Conflict"]),
    ({"status": 500, "json": {"message": "disk full"}}, ["500", "disk full"]),
    ({"status": 500, "json": []}, ["500"]),
    ({"status": 502, **HTML}, ["502"]),
    (
        {"status": 302, "headers": {"Location": "https://hub.example/hub/login?next=x"}},
        ["https://hub.example/hub/login"],
    ),
    (
        {"status": 301, "headers": {"Location": "https://jupyter.example/"}},
        ["https://jupyter.example/"],
    ),
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


@pytest.mark.parametrize(("answer", "words"), HTTP_FAILURES)
@responses.activate
def test_each_http_failure_is_one_sentence_with_its_cause(
    answer: dict[str, Any], words: list[str]
) -> None:
    responses.add("GET", "https://jupyter.test/lab/api/kernelspecs", **answer)
    client = jim.RemoteJupyterClient("https://jupyter.test/lab/", "s3cret")
    with pytest.raises(jim.InterpreterError) as caught:
        client.kernelspecs()
    text = str(caught.value)
    assert [word for word in words if word.lower() not in text.lower()] == []
    assert "s3cret" not in text + repr(caught.value) and "\n" not in text
    responses.replace("GET", "https://jupyter.test/lab/api/kernelspecs", json=SPECS)
    assert client.kernelspecs() == SPECS


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8888",
        "ftp://localhost",
        "http://",
        "http://localhost:8888/?token=s3cret",
        "http://me:s3cret@localhost",
        "http://localhost:port",
        "http://[::1",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(jim.InterpreterError) as caught:
        jim.RemoteJupyterClient(url, "")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("token", ["two words", "line\n", "line\r\nX-Header: 1", "ä"])
def test_what_cannot_be_a_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(jim.InterpreterError) as caught:
        jim.RemoteJupyterClient("http://localhost", token)
    assert token not in str(caught.value)


def test_the_token_travels_in_the_header_only(
    server: JupyterServer, proxy: Proxy, clients: Callable[..., Client]
) -> None:
    seen: list[bytes] = []
    proxy.on_client = lambda data: not seen.append(data)  # type: ignore[func-returns-value]
    assert clients(url=proxy.url).run("21 * 2")["result"] == ["42"]
    sent, token = b"".join(seen), server.token.encode()
    asked = re.findall(rb"(?:GET|POST|PUT|PATCH) (/\S*) HTTP/1.1\r\n", sent)
    assert [path for path in asked if b"/channels" in path]
    assert [path for path in asked if b"token=" in path or token in path] == []
    assert sent.count(b"Authorization: token " + token) == sent.count(token) == len(asked)


def test_the_token_does_not_follow_a_redirect(web: Callable[..., Web]) -> None:
    thief = web({"": (200, {"Content-Type": "application/json"}, json.dumps(SPECS).encode())})
    decoy = web({"": (302, {"Location": f"{thief.url}/api/kernelspecs?x=1"}, b"")})
    ended = command("--jupyter-base-url", decoy.url, "--jupyter-token", "s3cret")
    assert ended.returncode == 1 and thief.url in ended.stderr
    assert len(decoy.asked) >= 1 and thief.asked == []


def test_the_token_does_not_follow_a_redirect_of_the_websocket(
    server: JupyterServer, web: Callable[..., Web]
) -> None:
    thief = web({"": (403, {}, b"")})
    away = (302, {"Location": f"{thief.url}/channels"}, b"")
    decoy = web({"/api/kernels/[^/]+/channels": away}, server.url)
    ended = command(*flags_for(server, decoy.url), "--execute", "1")
    assert ended.returncode == 1 and thief.asked == []
    assert "websocket" in json.loads(ended.stdout)["error"][0]


def test_a_password_file_does_not_replace_the_token(server: JupyterServer, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine {LOOPBACK} login me password wrong\n")
    (tmp_path / ".netrc").chmod(0o600)
    ended = command(*flags_for(server), "--execute", "1", HOME=str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")


class ServerWithPath(JupyterServer):
    """As behind a hub: everything lies below a path."""

    def start(self) -> None:
        self.url = f"http://{LOOPBACK}:{self.port}/user/me"
        super().start()


def test_a_base_url_with_a_path_works(tmp_path: Path) -> None:
    server = ServerWithPath(tmp_path, "--ServerApp.base_url=/user/me/")
    try:
        for url in (server.url, f"{server.url}/"):
            ended = command(*flags_for(server, url), "--execute", "21 * 2", "--session-id", "7")
            assert json.loads(ended.stdout)["result"][-1] == "42", ended
        assert sources(server.notebook(7)) == ["21 * 2"] * 2
    finally:
        server.stop()


def test_a_server_without_a_token_works(tmp_path: Path) -> None:
    server = JupyterServer(tmp_path, token="")
    try:
        ended = command("--jupyter-base-url", server.url, "--execute", "21 * 2")
        result = json.loads(ended.stdout)
        assert (result["result"], result["error"]) == (["42"], [])
        assert sources(server.notebook(result["session_id"])) == ["21 * 2"]
    finally:
        server.stop()


class ServerWithTls(JupyterServer):
    """Serves HTTPS with a certificate of a private authority."""

    def __init__(self, folder: Path) -> None:
        self.authority, leaf = str(folder / "ca.pem"), trustme.CA()
        leaf.cert_pem.write_to_path(self.authority)
        certificate = leaf.issue_cert(LOOPBACK)
        certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "both.pem"))
        both = folder / "both.pem"
        super().__init__(folder, f"--ServerApp.certfile={both}", f"--ServerApp.keyfile={both}")

    def start(self) -> None:
        self.url = f"https://{LOOPBACK}:{self.port}"
        super().start()

    def api(self, method: str, path: str, **options: Any) -> requests.Response:
        return super().api(method, path, verify=self.authority, **options)


def test_a_private_authority_is_trusted_with_ca_bundle_only(tmp_path: Path) -> None:
    server = ServerWithTls(tmp_path)
    try:
        other = str(tmp_path / "other.pem")
        trustme.CA().cert_pem.write_to_path(other)
        for wrong in ([], ["--ca-bundle", other]):
            refused = command(*flags_for(server), *wrong, "--execute", "1")
            assert refused.returncode == 1 and "--ca-bundle" in refused.stderr
            assert refused.stderr.count("\n") == 1 and refused.stdout == ""
            assert server.token not in refused.stderr
        for way in (["--ca-bundle", server.authority], []):
            environment = {} if way else {"REQUESTS_CA_BUNDLE": server.authority}
            ended = command(*flags_for(server), *way, "--execute", "21 * 2", **environment)
            assert json.loads(ended.stdout)["result"] == ["42"], ended
    finally:
        server.stop()


# --- Notebook ------------------------------------------------------------------------------------


def test_a_notebook_is_valid_and_shows_what_the_agent_saw(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("print('a')\n21 * 2")["session_id"]
    for code in (
        SHOW_PIXEL,
        "ls -d .",
        "1 / 0",
        "import sys\nprint('é', file=sys.stderr)",
        "x = 1",
    ):
        client.run(code, session_id)
    path = server.root / "notebooks" / f"{session_id}.ipynb"
    notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.display_name and notebook.metadata.language_info.name
    first, picture, bash, failed, warned, silent = notebook.cells
    assert [output.output_type for output in first.outputs] == ["stream", "execute_result"]
    assert first.outputs[0].text == "a\n" and first.outputs[1].data == {"text/plain": "42"}
    assert first.execution_count == first.outputs[1].execution_count == 1
    assert picture.outputs[0].data["image/png"].strip() == PIXEL
    assert (bash.source, bash.outputs[0].text) == ("%%bash\nls -d .", ".\n")
    assert (failed.outputs[0].output_type, failed.outputs[0].ename) == (
        "error",
        "ZeroDivisionError",
    )
    assert (warned.outputs[0].name, warned.outputs[0].text, silent.outputs) == ("stderr", "é\n", [])
    for cell in notebook.cells:
        times = cell.metadata.execution
        assert times["iopub.status.busy"] <= times["shell.execute_reply"]


def test_a_notebook_runs_in_nbclient(client: Client, server: JupyterServer) -> None:
    session_id = client.run("x = 6; print('a')")["session_id"]
    for code in ("x * 7", "mkdir -p d && cd d && echo hi | tr a-z A-Z", SHOW_PIXEL):
        client.run(code, session_id)
    path = server.root / "notebooks" / f"{session_id}.ipynb"
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    again = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}})
    outputs = [[dict(output) for output in cell.outputs] for cell in notebook.cells]
    again.execute()
    texts = [[o.get("text") or o["data"]["text/plain"] for o in cell] for cell in outputs]
    assert texts == [
        [o.get("text") or o["data"]["text/plain"] for o in cell.outputs] for cell in notebook.cells
    ]
    assert texts[1:3] == [["42"], ["HI\n"]]


def test_a_cell_is_on_the_disk_when_its_result_is_there(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("0")["session_id"]
    for number in range(1, 6):
        client.run(f"print({number})", session_id)
        assert sources(server.notebook(session_id))[number:] == [f"print({number})"]


def test_what_somebody_else_changed_in_the_file_is_kept(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("x = 1")["session_id"]
    path = server.root / "notebooks" / f"{session_id}.ipynb"
    for round_number in range(3):
        client.run(f"x = {round_number}", session_id)
        notebook = server.notebook(session_id)
        notebook["cells"][0]["source"] = f"# edited {round_number}"
        notebook["metadata"]["mine"] = round_number
        text = {"cell_type": "markdown", "id": f"m{round_number}", "metadata": {}, "source": "mine"}
        notebook["cells"].append(text)
        path.write_text(json.dumps(notebook))
        assert client.run("21 * 2", session_id)["error"] == []
        merged = server.notebook(session_id)
        assert (
            merged["cells"][:-1] == notebook["cells"] and merged["metadata"]["mine"] == round_number
        )
        assert sources(merged)[-1] == "21 * 2"
    notebook["cells"] = notebook["cells"][-1:]
    path.write_text(json.dumps(notebook))
    client.run("x", session_id)
    assert sources(server.notebook(session_id)) == ["mine", "x"]


@pytest.mark.parametrize("through", ["contents", "disk"])
def test_a_notebook_without_cell_ids_or_of_a_person_is_continued(
    client: Client, server: JupyterServer, through: str
) -> None:
    """Notebooks of older formats and of other programs, opened under their number."""
    session_id = 1234 if through == "disk" else 1235
    cell = {
        "cell_type": "code",
        "metadata": {},
        "source": ["x = 5\n", "x"],
        "outputs": [],
        "execution_count": 1,
    }
    unrun = {**cell, "source": "raise SystemExit('never run')", "execution_count": None}
    notebook = {"cells": [cell, unrun], "metadata": {}, "nbformat": 4, "nbformat_minor": 2}
    if through == "disk":
        path = server.root / "notebooks" / f"{session_id}.ipynb"
        path.write_text(json.dumps(notebook))
    else:
        body = {"type": "notebook", "content": notebook}
        server.api("PUT", f"contents/notebooks/{session_id}.ipynb", json=body).raise_for_status()
    result = client.run("x + 1", session_id)
    assert is_report(result["result"][0], 1) and result["result"][1:] == ["6"], result
    saved = server.notebook(session_id)
    nbformat.validate(nbformat.from_dict(saved))
    assert sources(saved) == ["x = 5\nx", "raise SystemExit('never run')", "x + 1"]


def test_two_cells_with_one_id_are_both_kept(client: Client, server: JupyterServer) -> None:
    session_id = client.run("x = 6")["session_id"]
    path = server.root / "notebooks" / f"{session_id}.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"].append({**notebook["cells"][0], "source": "a person's copy"})
    path.write_text(json.dumps(notebook))
    assert client.run("x * 7", session_id)["result"] == ["42"]
    assert sources(json.loads(path.read_text())) == ["x = 6", "a person's copy", "x * 7"]


UNREADABLE = [
    b"not JSON",
    b"",
    b"[]",
    b"\xff\xfe\x00",
    b'{"cells": [{}], "nbformat": 4}',
    b'{"cells": [], "metadata": [], "nbformat": 4}',
    b'{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}',
]


def test_an_unreadable_notebook_is_reported_and_left_as_it_is(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("x = 6")["session_id"]
    path = server.root / "notebooks" / f"{session_id}.ipynb"
    good, problems = path.read_bytes(), []
    for text in UNREADABLE:
        path.write_bytes(text)
        result = client.run("print(x * 7)", session_id)
        if (
            result["result"] != ["42"]
            or path.read_bytes() != text
            or path.name not in str(result["error"])
        ):
            problems.append((text, result, path.read_bytes()))
    assert problems == []
    path.write_bytes(good)
    assert client.run("x * 7", session_id)["error"] == []
    assert sources(server.notebook(session_id))[0] == "x = 6"
    assert sources(server.notebook(session_id))[-1] == "x * 7"


@pytest.mark.parametrize("text", [b"not JSON", b'{"cells": [3], "nbformat": 4}'])
def test_a_session_that_begins_with_an_unreadable_notebook_runs_and_says_so(
    client: Client, server: JupyterServer, text: bytes
) -> None:
    session_id = 4000 + len(text)
    path = server.root / "notebooks" / f"{session_id}.ipynb"
    path.write_bytes(text)
    for _ in range(2):
        result = client.run("21 * 2", session_id)
        assert result["result"][-1:] == ["42"] and path.name in result["error"][0]
        assert path.read_bytes() == text


def test_if_saving_fails_the_result_is_delivered_with_the_reason(
    clients: Callable[..., Client], server: JupyterServer
) -> None:
    folder, away = server.root / "blocked", server.root / "moved"
    client = clients("--notebooks-folder", "blocked")
    session_id = client.run("x = 42")["session_id"]
    folder.rename(away)
    folder.write_text("a file where the folder was")
    for _ in range(2):
        result = client.call("x", session_id)
        assert result["structuredContent"]["result"] == ["42"] and not result["isError"]
        assert f"{session_id}.ipynb" in result["structuredContent"]["error"][0]
    folder.unlink()
    away.rename(folder)
    assert client.run("x + 1", session_id) == {
        "result": ["43"],
        "error": [],
        "session_id": session_id,
    }
    assert sources(server.notebook(session_id, "blocked")) == ["x = 42", "x", "x", "x + 1"]


def test_a_folder_that_was_removed_is_made_again(
    clients: Callable[..., Client], server: JupyterServer
) -> None:
    client = clients("--notebooks-folder", "deep/removed")
    session_id = client.run("x = 42")["session_id"]
    shutil.rmtree(server.root / "deep")
    assert client.run("x", session_id) == {"result": ["42"], "error": [], "session_id": session_id}
    assert sources(server.notebook(session_id, "deep/removed"))[-1] == "x"


# --- Session -------------------------------------------------------------------------------------


@pytest.mark.sdk
def test_state_lasts_from_call_to_call(client: Client) -> None:
    session_id = client.run("import math\nx = 41\ndef f(n): return n + 1")["session_id"]
    result = client.run("f(x), math.floor(1.5)", session_id)
    assert result == {"result": ["(42, 1)"], "error": [], "session_id": session_id}
    assert "NameError" in client.run("x")["error"][0]


def test_a_session_is_a_notebook_bound_to_its_kernel_in_its_folder(
    client: Client, server: JupyterServer
) -> None:
    result = client.run("import os; print(os.getcwd())\nx = 42")
    session_id = result["session_id"]
    assert result["result"] == [str(server.root / "notebooks")]
    path = f"notebooks/{session_id}.ipynb"
    body = {"path": path, "name": path, "type": "notebook", "kernel": {}}
    kernel_id = server.api("POST", "sessions", json=body).json()["kernel"]["id"]
    assert run_as_person(server, kernel_id, "x") == "42"
    run_as_person(server, kernel_id, "y = 'a person was here'; print('not for the agent')")
    assert client.run("y", session_id)["result"] == ["'a person was here'"]


def test_another_mcp_server_goes_on_with_the_variables_and_replays_nothing(
    server: JupyterServer, clients: Callable[..., Client]
) -> None:
    first = clients()
    session_id = first.run(f"{COUNT.format('replayed')} x = 41")["session_id"]
    second = clients()
    assert second.run("x += 1", session_id)["result"] == []
    assert first.run("x", session_id)["result"] == ["42"]
    first.close()
    assert second.run("x", session_id) == {"result": ["42"], "error": [], "session_id": session_id}
    assert (server.root / "notebooks" / "replayed").read_text() == "."
    assert sources(server.notebook(session_id))[1:] == ["x += 1", "x", "x"]


def make_session(client: Client, name: str) -> int:
    """A session of four cells: one counts in the file `name`, one ends in an error and one is bash."""
    session_id: int = client.run(f"{COUNT.format(name)} x = 40")["session_id"]
    client.run(f"{COUNT.format(name + '-failed')} x = 99; 1 / 0", session_id)
    client.run("export RESTORED=yes", session_id)
    client.run("x += 2", session_id)
    return session_id


def assert_restored(client: Client, server: JupyterServer, session_id: int, name: str) -> None:
    """Its next call reports three cells and has their state; the failed one did not run again."""
    result = client.run("x, __import__('os').environ['RESTORED']", session_id)
    assert is_report(result["result"][0], 3), result
    assert result["result"][1:] == ["(42, 'yes')"] and result["error"] == []
    folder = server.root / "notebooks"
    assert (folder / name).read_text() == ".." and (folder / f"{name}-failed").read_text() == "."
    assert client.run("x", session_id)["result"] == ["42"]


def test_a_session_whose_kernel_was_deleted_is_restored(
    client: Client, server: JupyterServer
) -> None:
    session_id = make_session(client, "deleted")
    server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
    assert_restored(client, server, session_id, "deleted")


def test_a_session_whose_kernel_was_restarted_is_restored(
    client: Client, server: JupyterServer
) -> None:
    session_id = make_session(client, "restarted")
    kernel_id = server.kernel_id(session_id)
    server.api("POST", f"kernels/{kernel_id}/restart").raise_for_status()
    assert_restored(client, server, session_id, "restarted")
    assert server.kernel_id(session_id) == kernel_id


def test_a_kernel_restarted_while_the_mcp_server_was_away_is_restored(
    clients: Callable[..., Client], server: JupyterServer
) -> None:
    client = clients()
    session_id = make_session(client, "away")
    client.close()
    kernel_id = server.kernel_id(session_id)
    server.api("POST", f"kernels/{kernel_id}/restart").raise_for_status()
    assert_restored(clients(), server, session_id, "away")


def test_a_kernel_deleted_while_its_code_runs_is_noticed_and_restored(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("x = 42")["session_id"]
    call = client.start(f"{TOUCH.format('runs')}\nimport time; time.sleep(60)", session_id)
    eventually((server.root / "notebooks" / "runs").exists)
    server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
    error = call.result(10).model_dump(by_alias=True)["structuredContent"]["error"]
    assert "kernel" in error[0]
    result = client.run("x", session_id)
    assert is_report(result["result"][0], 1) and result["result"][1:] == ["42"]


def test_a_result_that_was_delivered_survives_everything(
    clients: Callable[..., Client], server: JupyterServer
) -> None:
    client = clients()
    session_id = client.run("x = 40")["session_id"]
    client.run("x += 2; print('saved')", session_id)
    client.kill()
    kernel_id = server.kernel_id(session_id)
    server.api("DELETE", f"kernels/{kernel_id}").raise_for_status()
    last = server.notebook(session_id)["cells"][-1]
    text = "".join(last["outputs"][0]["text"])
    assert (last["source"], text) == ("x += 2; print('saved')", "saved\n")
    result = clients().run("x", session_id)
    assert is_report(result["result"][0], 2) and result["result"][1:] == ["42"]


def test_a_cell_that_fails_does_not_stop_a_restore_and_is_named(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("import os; x = 1")["session_id"]
    client.run("os.mkdir('only-once'); x = 2", session_id)
    client.run("mkdir only-once-bash", session_id)
    client.run("y = x", session_id)
    server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
    result = client.run("x, y", session_id)
    assert is_report(result["result"][0], 4) and result["result"][1:] == ["(1, 1)"], result
    assert result["result"][0].endswith("; failed: 2, 3") and result["error"] == [], result


GATE = """import pathlib, time
pathlib.Path('gate-reached').touch()
while not pathlib.Path('gate-open').exists(): time.sleep(0.02)
x += 1"""


def test_a_restore_that_was_cut_short_is_completed_by_whoever_comes_next(
    clients: Callable[..., Client], server: JupyterServer
) -> None:
    client, gate = clients(), server.root / "notebooks" / "gate-open"
    gate.touch()
    session_id = client.run("x = 40")["session_id"]
    client.run(GATE, session_id)
    client.run("x += 1", session_id)
    server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
    gate.unlink()
    gate.with_name("gate-reached").unlink()
    client.start("x", session_id)
    eventually(gate.with_name("gate-reached").exists)
    client.kill()
    gate.touch()
    result = clients().run("x", session_id)
    assert "restored" in result["result"][0] and result["result"][1:] == ["42"], result
    assert result["error"] == []


def test_a_cell_that_killed_its_kernel_is_not_run_again(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("x = 42")["session_id"]
    died = client.run(
        f"{COUNT.format('deadly')}\nprint('before', flush=True)\n"
        "import os, time; time.sleep(0.5); os._exit(1)",
        session_id,
    )
    assert died["result"] == ["before"] and "kernel" in died["error"][0]
    result = client.run("x", session_id)
    assert is_report(result["result"][0], 1) and result["result"][1:] == ["42"], result
    assert (server.root / "notebooks" / "deadly").read_text() == "."


def test_cells_that_kill_the_kernel_in_a_restore_do_not_wedge_the_session(
    client: Client, server: JupyterServer
) -> None:
    bomb = "import os\nif os.path.exists('armed'): open('bang', 'a').write('.'); os._exit(1)"
    session_id = client.run("x = 40")["session_id"]
    client.run(bomb, session_id)
    client.run("x += 2", session_id)
    folder = server.root / "notebooks"
    (folder / "armed").touch()
    server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
    (error,) = client.run("x", session_id)["error"]
    assert "kill it again" in error and f"{session_id}.ipynb" in error
    (folder / "armed").unlink()
    assert client.run("x", session_id)["result"][-1:] == ["42"]


def test_a_kernel_in_which_a_person_has_run_something_is_left_as_it_is(
    clients: Callable[..., Client], server: JupyterServer
) -> None:
    client = clients()
    session_id = client.run(f"{COUNT.format('person')} x = 1")["session_id"]
    client.close()
    kernel_id = server.kernel_id(session_id)
    server.api("POST", f"kernels/{kernel_id}/restart").raise_for_status()
    run_as_person(server, kernel_id, "y = 42")
    client = clients()
    assert client.run("y", session_id)["result"][-1:] == ["42"]
    assert "NameError" in client.run("x", session_id)["error"][0]
    assert (server.root / "notebooks" / "person").read_text() == "."


def test_no_restore_starts_empty_and_says_so(
    clients: Callable[..., Client], server: JupyterServer
) -> None:
    client = clients("--no-restore")
    session_id = client.run("x = 1")["session_id"]
    server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
    result = client.run("print(2)\nx", session_id)
    assert "empty" in result["result"][0] and result["result"][1:] == ["2"]
    assert "NameError" in result["error"][0]
    assert client.run("3", session_id)["result"] == ["3"]


@pytest.mark.sdk
def test_calls_on_one_session_run_in_the_order_they_came(client: Client) -> None:
    session_id = client.run("seen = []")["session_id"]
    calls = [client.start(f"seen.append({i})", session_id) for i in range(20)]
    assert client.run("seen", session_id)["result"] == [str(list(range(20)))]
    assert all(call.done() for call in calls)


def test_sessions_opened_in_the_same_instant_are_different_and_run_at_once(
    client: Client, server: JupyterServer
) -> None:
    """Each waits until all have begun: none would end if they did not run side by side."""
    count = 10
    meet = (
        "import os, time; os.makedirs('meeting', exist_ok=True)\n"
        "open(f'meeting/{os.getpid()}', 'w').close()\nend = time.time() + 40\n"
        f"while len(os.listdir('meeting')) < {count} and time.time() < end: time.sleep(0.02)\n"
        "len(os.listdir('meeting'))"
    )
    calls = [client.start(meet, timeout=50) for _ in range(count)]
    results = [call.result(60).model_dump(by_alias=True)["structuredContent"] for call in calls]
    assert [result["result"] for result in results] == [[str(count)]] * count
    ids = {result["session_id"] for result in results}
    assert len(ids) == count and {len(str(number)) for number in ids} == {10}
    for number in ids:  # ten kernels less for the tests that follow
        server.api("DELETE", f"kernels/{server.kernel_id(number)}").raise_for_status()


# --- Tools ---------------------------------------------------------------------------------------

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
    (
        "import sys\nprint('a', flush=True); print('b', file=sys.stderr, flush=True)\nprint('c')",
        ["a\nb\nc"],
    ),
    ("import warnings\nwarnings.warn('careful')", ["UserWarning: careful"]),
    (
        "print('\\x1b[1;31mred\\x1b[0m \\x1b]8;;http://x\\x1b\\\\link\\x1b]8;;\\x1b\\\\')",
        ["red link"],
    ),
    ("print('\\r' * 300_000 + 'x')", ["x"]),  # quickly
    ("print('é 漢 🎉 \\u2028 \\0 .')", ["é 漢 🎉 \u2028 \0 ."]),
    ("import asyncio\nawait asyncio.sleep(0, 42)", ["42"]),
    (
        "class Shown:\n    def _repr_markdown_(self): return '**bold**'\n"
        "    def __repr__(self): return 'plain'\nShown()",
        ["plain"],
    ),
    ("def f():\n    '''Docs'''\n    return 42\n\nf()", ["42"]),
]


@pytest.mark.sdk
@pytest.mark.parametrize(("code", "result"), RESULTS)
def test_a_result_is_what_a_person_sees_below_the_cell(
    run: Callable[..., dict[str, Any]], code: str, result: list[str]
) -> None:
    answer = run(code)
    if "warn(" in code:
        assert result[0] in answer.pop("result")[0]
    else:
        assert answer.pop("result") == result
    assert answer.pop("error") == [] and list(answer) == ["session_id"]


ERRORS: list[tuple[str, list[str], str]] = [
    ("print(1)\n1 / 0", ["1"], "ZeroDivisionError: division by zero"),
    ("def f():\n    return missing\nf()", [], "NameError: name 'missing' is not defined"),
    ("x = )", [], "SyntaxError"),
    ("raise KeyError('a\\x1b[31mb')", [], "KeyError"),
    ("raise SystemExit(3)", [], "SystemExit: 3"),
    ("raise KeyboardInterrupt", [], "KeyboardInterrupt"),
    (
        "class Odd(Exception):\n    def __str__(self): raise ValueError('no text')\nraise Odd",
        [],
        "Odd",
    ),
    ("import json\njson.loads('{')", [], "JSONDecodeError"),
]


def test_help_of_ipython_is_shown(run: Callable[..., dict[str, Any]]) -> None:
    shown = run("len?")
    assert "Return the number of items" in shown["result"][0] and shown["error"] == []


@pytest.mark.sdk
@pytest.mark.parametrize(("code", "result", "text"), ERRORS)
def test_an_exception_gives_its_traceback_in_error(
    run: Callable[..., dict[str, Any]], code: str, result: list[str], text: str
) -> None:
    answer = run(code)
    assert answer["result"][: len(result)] == result
    assert text in answer["error"][0] and len(answer["error"]) == 1 and "\x1b" not in str(answer)
    assert run("21 * 2")["result"] == ["42"]


@pytest.mark.sdk
def test_pictures_follow_as_image_blocks(client: Client, server: JupyterServer) -> None:
    answer = client.call(f"print('two')\n{SHOW_PIXEL}\nd.Image(base64.b64decode('{PIXEL}'))")
    blocks = answer["content"]
    assert [block["type"] for block in blocks] == ["text", "image", "image"]
    assert {(block["mimeType"], block["data"]) for block in blocks[1:]} == {("image/png", PIXEL)}
    structure = answer["structuredContent"]
    assert structure["result"] == ["two", *["<IPython.core.display.Image object>"] * 2]
    outputs = server.notebook(structure["session_id"])["cells"][0]["outputs"]
    assert [o["data"]["image/png"].strip() for o in outputs[1:]] == [PIXEL] * 2


@pytest.mark.sdk
def test_a_plot_comes_back_as_a_picture(client: Client) -> None:
    answer = client.call("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
    assert answer["structuredContent"]["error"] == []
    (picture,) = [block for block in answer["content"] if block["type"] == "image"]
    assert base64.b64decode(picture["data"]).startswith(b"\x89PNG")


@pytest.mark.sdk
def test_the_tools_declare_what_they_take_and_return(client: Client) -> None:
    tools = {tool.name: tool.model_dump(by_alias=True) for tool in client.list_tools().tools}
    assert set(tools) == {"execute_code", "interrupt_execution"}
    given = tools["execute_code"]["inputSchema"]
    assert set(given["properties"]) == {"code", "session_id", "timeout"}
    assert given["required"] == ["code"]
    assert set(tools["interrupt_execution"]["inputSchema"]["properties"]) == {
        "session_id",
        "restart",
    }
    for tool in tools.values():
        returned = tool["outputSchema"]["properties"]
        assert {name: each["type"] for name, each in returned.items()} == {
            "result": "array",
            "error": "array",
            "session_id": "integer",
        }
        assert set(tool["outputSchema"]["required"]) == set(returned) and tool["description"]


@pytest.mark.sdk
def test_stdout_holds_json_rpc_and_nothing_else(server: JupyterServer) -> None:
    """And the list of the tools has under 2,500 characters on the wire."""
    info = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "0"},
    }
    noisy = "print('x'); import sys; print('y', file=sys.stderr); sys.__stdout__.write('z')"
    process = subprocess.Popen(
        [*COMMAND, *flags_for(server), "--verbose"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    lines: list[str] = []

    def ask(number: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
        request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        print(json.dumps(request), file=process.stdin, flush=True)
        while True:
            lines.append(process.stdout.readline())  # type: ignore[union-attr]
            answer: dict[str, Any] = json.loads(lines[-1])
            if answer.get("id") == number:
                return answer

    ask(1, "initialize", {**info})
    print(
        '{"jsonrpc": "2.0", "method": "notifications/initialized"}', file=process.stdin, flush=True
    )
    ask(2, "tools/list", {})
    assert len(json.dumps(json.loads(lines[-1])["result"], separators=(",", ":"))) < 2500
    for number, code in enumerate([noisy, "1 / 0", "echo hi; nosuch"], 3):
        arguments = {"name": "execute_code", "arguments": {"code": code, "session_id": 51}}
        assert (
            ask(number, "tools/call", arguments)["result"]["structuredContent"]["session_id"] == 51
        )
    process.stdin.close()
    rest, log = process.stdout.read(), process.stderr.read()
    assert process.wait(20) == 0
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in [*lines, *rest.splitlines()])
    assert "/api/kernelspecs" in log and server.token not in log and "Traceback" not in log


@pytest.mark.sdk
def test_an_id_that_nobody_has_used_opens_a_session_and_says_so(
    client: Client, server: JupyterServer
) -> None:
    result = client.run("x = 42\nx", 31337)
    assert "31337" in result["result"][0] and "new" in result["result"][0]
    assert result["result"][1:] == ["42"] and result["error"] == []
    assert client.run("x", 31337) == {"result": ["42"], "error": [], "session_id": 31337}
    assert sources(server.notebook(31337)) == ["x = 42\nx", "x"]


@pytest.mark.sdk
def test_the_largest_id_works(client: Client) -> None:
    result = client.run("42", 2**53 - 1)
    assert result["result"][-1] == "42" and result["session_id"] == 2**53 - 1


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
    answer = tool_call(client, arguments)
    assert answer["isError"] and name in answer["content"][0]["text"]


# --- Command line --------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert command("--version").stdout == f"jupyter-interpreter-mcp {jim.__version__}\n"
    text = command("--help").stdout
    flags = [
        "--jupyter-base-url",
        "--jupyter-token",
        "--notebooks-folder",
        "--kernel-name",
        "--timeout",
        "--max-output",
        "--no-restore",
        "--verbose",
        "--version",
        "--ca-bundle",
        "--local",
        "--execute",
        "--session-id",
        "JUPYTER_BASE_URL",
    ]
    assert [flag for flag in flags if flag not in text] == []


MALFORMED: list[tuple[list[str], dict[str, str], str]] = [
    ([], {}, "--jupyter-base-url"),
    (["--nonsense"], {}, "--nonsense"),
    (["extra"], {}, "unrecognized"),
    (["--token=extra b", "--token", "extra", "-extra"], {}, "--token"),
    (["--jupyter=extra"], {}, "--jupyter"),
    (["--jupyter-tok", "extra"], {}, "--jupyter-tok"),
    (["--timeout", "soon"], {}, "--timeout"),
    (["--timeout", "-1"], {}, "--timeout"),
    (["--timeout", "nan"], {}, "--timeout"),
    (["--max-output", "0"], {}, "--max-output"),
    (["--max-output", "1e3"], {}, "--max-output"),
    (["--session-id", "-3"], {}, "--session-id"),
    (["--session-id", str(2**53)], {}, "--session-id"),
    (["--execute"], {}, "--execute"),
    ([], {"JUPYTER_INTERPRETER_TIMEOUT": "soon"}, "timeout"),
    ([], {"JUPYTER_INTERPRETER_MAX_OUTPUT": "-5"}, "max-output"),
]


@pytest.mark.parametrize(("flags", "environment", "name"), MALFORMED)
def test_unknown_flags_and_malformed_values_exit_with_2(
    flags: list[str], environment: dict[str, str], name: str
) -> None:
    url = ["--jupyter-base-url", "http://localhost:1"] if flags or environment else []
    ended = command(*url, *flags, **environment)
    assert (ended.returncode, ended.stdout) == (2, "") and name in ended.stderr
    assert "Traceback" not in ended.stderr and "extra" not in ended.stderr


HTML_PAGE = (200, {"Content-Type": "text/html"}, b"<html>Hello")
TO_HUB = (302, {"Location": "https://hub.example/hub/login?next=%2Fuser%2Fme%2Fapi"}, b"")

# What is asked for ({server}, {html}, {hub} are servers, {free} a free port) -> the words of the answer.
FAILURES: dict[str, tuple[list[str], list[str]]] = {
    "refused": (["--jupyter-base-url", "http://127.0.0.1:{free}"], ["refused", "{free}"]),
    "unknown host": (
        ["--jupyter-base-url", "https://no-such-host.invalid"],
        ["no-such-host.invalid"],
    ),
    "wrong token": (
        ["--jupyter-base-url", "{server}", "--jupyter-token", "s3cret"],
        ["token", "403"],
    ),
    "no token": (["--jupyter-base-url", "{server}"], ["token", "403"]),
    "wrong path": (["--jupyter-base-url", "{server}/lab/tree"], ["--jupyter-base-url"]),
    "redirect": (["--jupyter-base-url", "{hub}"], ["https://hub.example/hub/login", "redirect"]),
    "a web page": (["--jupyter-base-url", "{html}"], ["not a Jupyter server"]),
    "not a URL": (["--jupyter-base-url", "localhost:8888"], ["localhost:8888"]),
    "port no number": (["--jupyter-base-url", "http://localhost:abc"], ["http://localhost:abc"]),
    "wrong kernel": (["{right}", "--kernel-name", "cobol"], ["cobol", "python3"]),
    "folder above": (["{right}", "--notebooks-folder", "../up"], ["../up", "root"]),
    "folder far above": (["{right}", "--notebooks-folder", "a/../../b"], ["a/../../b", "root"]),
    "folder outside": (
        ["{right}", "--notebooks-folder", "/etc/notebooks"],
        ["/etc/notebooks", "root"],
    ),
    "folder a file": (["{right}", "--notebooks-folder", "in-the-way"], ["in-the-way"]),
    "below a file": (["{right}", "--notebooks-folder", "in-the-way/deep"], ["in-the-way"]),
    "no CA bundle": (["{right}", "--ca-bundle", "/no/such.pem"], ["/no/such.pem"]),
    "local folder": (["--local", "/no/such/folder"], ["/no/such/folder"]),
}


@pytest.mark.parametrize("cause", FAILURES)
def test_each_cause_of_a_failed_start_is_one_clear_sentence(
    cause: str, server: JupyterServer, web: Callable[..., Web]
) -> None:
    (server.root / "in-the-way").write_text("a file")
    names = {"server": server.url, "free": str(free_port())}
    names |= {"html": web({"": HTML_PAGE}).url, "hub": web({"": TO_HUB}).url}
    flags, words = FAILURES[cause]
    given = [each.format(**names) for each in flags if each != "{right}"]
    given += (
        [] if cause in ("refused", "wrong token") else ["--execute", "1"]
    )  # without the SDK: faster
    ended = command(*(flags_for(server) if "{right}" in flags else []), *given)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert [word for word in words if word.format(**names) not in ended.stderr] == [], ended.stderr
    assert ended.stderr.count("\n") == 1 and len(ended.stderr) < 500
    assert not re.search("Traceback|s3cret|Error:|object at", ended.stderr)
    assert server.token not in ended.stderr


def test_a_token_over_plain_http_to_another_machine_earns_a_warning() -> None:
    ended = command(
        "--jupyter-base-url", "http://no-such-host.invalid", "--jupyter-token", "s3cret"
    )
    assert "https" in ended.stderr.splitlines()[0] and "s3cret" not in ended.stderr
    assert ended.returncode == 1 and ended.stderr.count("\n") == 2


FOLDER = "import os; os.path.basename(os.getcwd())"


@pytest.mark.parametrize(
    "settings", [("file",), ("file", "variable"), ("file", "variable", "flag")]
)
def test_a_flag_beats_a_variable_beats_the_file(
    server: JupyterServer, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    (tmp_path / ".env").write_text(
        f"# where\nJUPYTER_INTERPRETER_KERNEL_NAME=\nJUPYTER_BASE_URL={server.url}\nexport JUPYTER_TOKEN='{server.token}'\n"
        "NOTEBOOKS_FOLDER=from-file  # a comment\n"
    )
    environment = {"NOTEBOOKS_FOLDER": "from-variable"} if "variable" in settings else {}
    flags = ["--notebooks-folder", "from-flag"] if "flag" in settings else []
    ended = command(*flags, "--execute", FOLDER, cwd=tmp_path, **environment)
    assert json.loads(ended.stdout)["result"] == [f"'from-{settings[-1]}'"], ended


def test_only_our_own_names_are_read_from_the_file(server: JupyterServer, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "HTTP_PROXY=http://127.0.0.1:1\nREQUESTS_CA_BUNDLE=/no/such/file\nOTHER=1\nPATH=\n"
        'no assignment\nJUPYTER_INTERPRETER_MAX_OUTPUT = "60"\nJUPYTER_INTERPRETER_NO_RESTORE=no\n'
    )
    ended = command(*flags_for(server), "--execute", "print('x' * 200)", cwd=tmp_path)
    result = json.loads(ended.stdout)["result"][0]
    assert (
        ended.returncode == 0 and result.startswith("x" * 30 + "\n[") and result.endswith("x" * 30)
    )


EXECUTIONS: list[tuple[str, str, list[str], str, int]] = [
    ("print('a')\n21 * 2", "", ["a", "42"], "", 0),
    ("1 / 0", "", [], "ZeroDivisionError", 1),
    ("-", "print('from stdin')", ["from stdin"], "", 0),
    ("-", "echo é | tr -d x; exit 3", ["é"], "Command exited with status 3", 1),
]


def test_execute_runs_one_cell_and_prints_the_result(server: JupyterServer) -> None:
    for code, stdin, result, error, status in EXECUTIONS:
        ended = command(*flags_for(server), "--execute", code, stdin=stdin)
        printed = json.loads(ended.stdout)
        assert list(printed) == ["result", "error", "session_id"]
        assert (printed["result"], ended.returncode, ended.stderr) == (result, status, "")
        assert error in "".join(printed["error"]) and bool(printed["error"]) == bool(error)
    session_id = printed["session_id"]
    again = command(*flags_for(server), "--execute", "21 * 2", "--session-id", str(session_id))
    assert json.loads(again.stdout) == {"result": ["42"], "error": [], "session_id": session_id}


def test_execute_names_the_step_that_failed(other_kernels: JupyterServer) -> None:
    ended = command(*flags_for(other_kernels), "--kernel-name", "broken", "--execute", "1")
    assert ended.returncode == 1 and "kernel" in json.loads(ended.stdout)["error"][0].lower()
    assert ended.stderr == ""
    ended = command(*flags_for(other_kernels), "--execute", "21 * 2")
    assert json.loads(ended.stdout)["result"] == ["42"]


@pytest.mark.parametrize("folder", ["a/b c/é", "{root}/absolute/deep", ".", "x/../y/"])
def test_the_notebooks_folder_is_made_and_used(server: JupyterServer, folder: str) -> None:
    given = folder.format(root=server.root)
    ended = command(
        *flags_for(server),
        "--notebooks-folder",
        given,
        "--execute",
        "import os; print(os.getcwd())",
    )
    result = json.loads(ended.stdout)
    used = Path(os.path.normpath(server.root / given))
    assert (result["result"], result["error"]) == ([str(used)], []), ended
    assert (used / f"{result['session_id']}.ipynb").exists()


def test_an_absolute_folder_leaves_no_kernel_behind(server: JupyterServer) -> None:
    before = {kernel["id"] for kernel in server.api("GET", "kernels").json()}
    flags = [*flags_for(server), "--notebooks-folder"]
    assert command(*flags, f"{server.root}/absolute", stdin="").returncode == 0
    assert command(*flags, "/etc", stdin="").returncode == 1
    assert {kernel["id"] for kernel in server.api("GET", "kernels").json()} == before


def test_local_runs_a_server_of_its_own(tmp_path: Path) -> None:
    code = "import os; 'JUPYTER_TOKEN' in os.environ"  # which the kernel need not know
    nowhere = {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": ""}  # which is not asked
    ended = command("--local", str(tmp_path), "--execute", code, **nowhere)
    result = json.loads(ended.stdout)
    assert (result["result"], result["error"], ended.stderr) == (["False"], [], "")
    notebook = tmp_path / "notebooks" / f"{result['session_id']}.ipynb"
    assert sources(json.loads(notebook.read_text())) == [code]
    assert [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)] == []


def test_the_local_server_ends_with_the_command_however_that_ends(tmp_path: Path) -> None:
    client = Client(None, "--local", str(tmp_path))
    assert client.run("21 * 2")["result"] == ["42"]
    processes = psutil.Process(client.pid).children(recursive=True)
    assert len(processes) > 1  # the Jupyter server and a kernel
    client.kill()
    eventually(lambda: not any(map(psutil.Process.is_running, processes)))


def test_kernels_stay_when_the_mcp_server_exits(
    server: JupyterServer, clients: Callable[..., Client]
) -> None:
    client = clients()
    session_id = client.run("x = 42")["session_id"]
    client.close()
    assert run_as_person(server, server.kernel_id(session_id), "x") == "42"


def test_the_package_is_used_without_the_sdk() -> None:
    """Other agents copy the file and call its classes; they need not have `mcp`."""
    check = (
        "import sys, jupyter_interpreter_mcp; print(sorted({'mcp', 'pydantic'} & set(sys.modules)))"
    )
    assert command("-c", check, program=[sys.executable]).stdout == "[]\n"


@pytest.mark.sdk
def test_the_copied_file_runs_alone(server: JupyterServer, tmp_path: Path) -> None:
    copy = [sys.executable, str(shutil.copy(jim.__file__, tmp_path / "copied.py"))]
    assert command("--version", program=copy, cwd=tmp_path).stdout.endswith(f"{jim.__version__}\n")
    ended = command(*flags_for(server), "--execute", "21 * 2", program=copy, cwd=tmp_path)
    assert json.loads(ended.stdout)["result"] == ["42"]
    client = Client(server, command=copy)
    assert client.run("21 * 2")["result"] == ["42"]
    client.close()


def test_the_script_metadata_asks_for_what_the_package_needs() -> None:
    source = Path(jim.__file__)
    inline = re.search(r"(?m)^# dependencies = (\[.*\])$", source.read_text())
    packaged = re.search(
        r"(?ms)^dependencies = \[\n(.*?)^\]", source.with_name("pyproject.toml").read_text()
    )
    assert inline and packaged
    assert json.loads(inline[1]) == re.findall(r'^ *"([^"]+)"', packaged[1], re.M)


# --- Bash ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shell(client: Client) -> Callable[..., dict[str, Any]]:
    """Runs cells in one session, in a folder of its own, which the tests of bash share."""
    session_id = client.run("mkdir -p shell && cd shell && export HERE=$PWD")["session_id"]

    def run_there(code: str, **arguments: Any) -> dict[str, Any]:
        return client.run(code, session_id, **arguments)

    run_there.session_id = session_id  # type: ignore[attr-defined]
    run_there.folder = Path(client.run("pwd", session_id)["result"][0])  # type: ignore[attr-defined]
    return run_there


PYTHON, BASH = "python", "bash"

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
    ("pip --version", PYTHON),
    ("uv --version", PYTHON),
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


def language(notebook: dict[str, Any]) -> str:
    return BASH if sources(notebook)[-1].startswith("%%bash") else PYTHON


@pytest.mark.parametrize("rows", [RULE_1, RULE_2, RULE_3], ids=["rule 1", "rule 2", "rule 3"])
def test_whose_language_a_cell_is_in(
    client: Client, server: JupyterServer, rows: list[tuple[str, str | None]]
) -> None:
    session_id = client.run("0")["session_id"]
    wrong = []
    for code, expected in rows:
        result = client.run(code, session_id)
        notebook = server.notebook(session_id)
        if expected is not None and language(notebook) != expected:
            wrong.append((code, "is not", expected, result))
        shown = code.removeprefix(
            "%%bash\n"
        ).strip()  # `pip` is kept as the magic that it stands for
        if expected and shown not in sources(notebook)[-1].replace("%pip", "pip"):
            wrong.append((code, "is shown as", sources(notebook)[-1]))
    assert rows and wrong == []


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


def test_a_broken_python_cell_is_never_run_as_bash(client: Client, server: JupyterServer) -> None:
    session_id = client.run("import os; os.makedirs('broken'); os.chdir('broken')")["session_id"]
    wrong = []
    for code in BROKEN_PYTHON:
        result = client.run(code, session_id)
        if (
            not re.search("SyntaxError|IndentationError", str(result["error"]))
            or language(server.notebook(session_id)) == BASH
        ):
            wrong.append((code, result))
    assert wrong == [] and os.listdir(server.root / "notebooks" / "broken") == []
    assert client.run("21 * 2", session_id)["result"] == ["42"]


def test_package_installers_are_turned_towards_the_kernels_environment(
    client: Client, server: JupyterServer
) -> None:
    """A folder `pip` in the working directory stands for the real one, which may be missing."""
    folder = server.root / "notebooks" / "installers"
    for name in ("pip", "uv"):
        (folder / name).mkdir(parents=True)
        text = f"import sys; print('{name} of', sys.executable, sys.argv[1:])"
        (folder / name / "__main__.py").write_text(text)
    session_id = client.run("cd installers")["session_id"]
    for code in (
        "pip install 'a b>=1' -q",
        "%pip install 'a b>=1' -q",
        "x = 5\npip install 'a b>=1' -q",
    ):
        result = client.run(code, session_id)
        assert f"pip of {sys.executable} ['install', 'a b>=1', '-q']" in result["result"][0], result
    assert client.run("x", session_id)["result"] == ["5"]
    client.run("pip = 5", session_id)
    assert client.run("pip", session_id)["result"] == ["5"]


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
    (
        "cat > hi.py <<'EOF'\nimport sys\nprint('hi', *sys.argv[1:])\nEOF\npython hi.py there",
        "hi there",
    ),
    (
        "printf '#!/bin/bash\\necho run $1\\n' > run.sh && chmod +x run.sh && ./run.sh now",
        "run now",
    ),
    ("git init -q . && git config user.email a@b && git config user.name A", ""),
    ("git add -A && git commit -qm 'first' && git log --oneline", r"[0-9a-f]{7,} first"),
    ("git log", r"commit [0-9a-f]{40}\nAuthor: A <a@b>\nDate: .*\n\n    first"),
    ("echo more >> a.txt; git status --short", r" M a\.txt"),
    ("git diff", r"diff --git a/a\.txt b/a\.txt\n(.*\n)*\+more"),
    ("git diff --stat | cat", r" a\.txt \| 1 \+\n.*"),
    ("curl -s {url}/api", r'\{{"version": ".*"\}}'),
    ("curl -sS -o /dev/null -w '%{{http_code}}' {url}/api/kernelspecs", "403"),
    ("printf 'all:\\n\\t@echo made $(X)\\n' > Makefile && make", "made"),
    ("make X=it", "made it"),
    ("make -n", "echo made ?"),
    ("diff <(echo a) <(echo a) && echo same", "same"),
    ('for f in *.txt; do echo "$f"; done', r"a\.txt\nb c\.txt\nlines\.txt"),
    ("i=0; while [ $i -lt 3 ]; do i=$((i+1)); done; echo $i", "3"),
    ("if [ -f a.txt ]; then echo there; else echo not; fi", "there"),
    ("seq 3 | paste -sd+ | sed 's/$/\\n/' | head -1", r"1\+2\+3"),
    ("[[ lines.txt =~ ^l.*t$ ]] && echo match", "match"),
    ("a=(x y z); echo ${{#a[@]}} ${{a[1]}}", "3 y"),
    ("nproc", r"\d+"),
    ("ln -s a.txt link && readlink link", r"a\.txt"),
    ("rm -rf src x.tgz link && ls", r"Makefile\na\.txt\nb c\.txt\nhi\.py\nlines\.txt\nrun\.sh"),
]


def test_commands_do_what_they_do_in_a_terminal(
    shell: Callable[..., dict[str, Any]], server: JupyterServer
) -> None:
    assert len(COMMANDS) >= 40
    wrong = []
    for code, pattern in COMMANDS:
        if "{url}" in code or "{{" in code:
            code, pattern = (
                code.format(url=server.url),
                pattern.replace("{{", "{").replace("}}", "}"),
            )
        result = shell(code)
        if result["error"] or not re.fullmatch(pattern, "\n".join(result["result"])):
            wrong.append((code, result))
    assert wrong == []


STATUSES: list[tuple[str, list[str], str]] = [
    ("exit 3", [], "Command exited with status 3"),
    ("false", [], "Command exited with status 1"),
    ("grep -c zzz /dev/null", ["0"], "Command exited with status 1"),
    (
        "ls /no/such/thing",
        ["ls: cannot access '/no/such/thing': No such file or directory"],
        "Command exited with status 2",
    ),
    ("echo a; nosuchcommand; echo b", ["a\n*nosuchcommand: command not found\nb"], ""),
    (
        "echo a; nosuchcommand",
        ["a\n*nosuchcommand: command not found"],
        "Command exited with status 127",
    ),
    ("set -e\nfalse\necho never", [], "Command exited with status 1"),
    ("set -euo pipefail\nfalse | cat\necho never", [], "Command exited with status 1"),
    (
        "set -u\necho $NO_SUCH_VARIABLE\necho never",
        ["*unbound variable"],
        "Command exited with status *",
    ),
    ("%%bash\nset -x\ntrue", ["+* true"], ""),
    ("f() { return 7; }\nf", [], "Command exited with status 7"),
    ("(exit 4)", [], "Command exited with status 4"),
    ("kill -9 $$", [], "*SIGKILL*"),
    ("kill -TERM $$", [], "*SIGTERM*"),
    ("bash -c 'kill -SEGV $$'", None, "*SIGSEGV*"),  # type: ignore[list-item]
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
    (
        'x=$(cat <<\'EOF\'\nit\'s "quoted" \\ `here`\nEOF\n)\necho "$x"',
        ['it\'s "quoted" \\ `here`'],
        "",
    ),
    ("echo a\r\necho b\r\n", ["a\nb"], ""),
]


def matches(text: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text, re.S) is not None


@pytest.mark.parametrize(("code", "result", "error"), STATUSES)
def test_output_and_exit_status_of_commands(
    shell: Callable[..., dict[str, Any]], code: str, result: list[str] | None, error: str
) -> None:
    answer = shell(code)
    if result is not None:
        assert len(answer["result"]) == len(result) and all(
            map(matches, answer["result"], result)
        ), answer
    assert len(answer["error"]) == bool(error) and matches("".join(answer["error"]), error), answer
    assert shell("%%bash\necho on")["result"] == ["on"]


def test_random_bytes_are_shown_somehow(shell: Callable[..., dict[str, Any]]) -> None:
    answer = shell("head -c 20000 /dev/urandom")
    assert answer["error"] == [] and "\ufffd" in answer["result"][0]
    assert shell("21 * 2")["result"] == ["42"]


# A sequence of cells in one session and what each prints: what carries over, both ways.
SHARED: list[tuple[str, str]] = [
    ("mkdir -p shared/inner 'shared/with space' && cd shared && pwd", "{shared}"),
    ("pwd", "{shared}"),
    ("import os; print(os.getcwd())", "{shared}"),
    ("os.chdir('inner')", ""),
    ("pwd", "{shared}/inner"),
    ("cd '../with space'; (cd /tmp; export INNER=1; pwd)", "/tmp"),
    ("pwd; echo ${INNER-unset}", "{shared}/with space\nunset"),
    ("cd .. && cd - > /dev/null && pwd && cd ..", "{shared}/with space"),
    ("export A=1 B='two words' C=$'a\\nb=c' D= E=é; F=not-exported", ""),
    ('echo "$A|$B|$C|$D|$E|${F-unset}"', "1|two words|a\nb=c||é|unset"),
    (
        "print([os.environ.get(n) for n in 'ABCDEF'])",
        "['1', 'two words', 'a\\nb=c', '', 'é', None]",
    ),
    ("os.environ['A'] = 'from python'; del os.environ['B']", ""),
    ('echo "$A ${B-unset}"', "from python unset"),
    ("unset A", ""),
    ("print('A' in os.environ)", "False"),
    ("echo ${A-unset}", "unset"),
    ('export -n C; echo "$C"', "a\nb=c"),
    ("print('C' in os.environ)", "False"),
    (
        "export PATH=$PATH:$PWD/bin; mkdir -p bin; printf '#!/bin/sh\\necho mine' > bin/mytool; "
        "chmod +x bin/mytool",
        "",
    ),
    ("mytool", "mine"),
    ("mytool --flag x", "mine"),
    ("A=1 true; echo ${A-unset}", "unset"),
    ("cd inner; export LAST=yes; exit 0", ""),
    ("echo $PWD $LAST", "{shared}/inner yes"),
    ("set -e; cd ..; export LAST=failed; false; echo never", ""),
    ("echo $PWD $LAST", "{shared} failed"),
    ("cd inner; exit 3", ""),
    ("pwd", "{shared}/inner"),
    ("trap 'echo bye' EXIT; cd ..; export LAST=trapped", "bye"),
    ("echo $PWD $LAST", "{shared} trapped"),
    ("cd inner; exec 1>/dev/null; echo unseen", ""),
    ("pwd", "{shared}/inner"),
    ("ln -s inner ../link && cd ../link && true", ""),
    ("import os; os.path.realpath(os.getcwd()) == os.path.realpath('{shared}/inner')", "True"),
    ('for i in 1 2; do cd ..; break; done; echo "${{PS4}}" > /dev/null', ""),
    ("f() { export FROM_FUNCTION=yes; cd /tmp; }; f", ""),
    ("echo $FROM_FUNCTION $PWD", "yes /tmp"),
    ("printf -v BIG '%0100000d' 7; export BIG; echo ${{#BIG}}", "100000"),
    ("print(len(os.environ.pop('BIG')))", "100000"),
    ("readonly FIXED=1; export FIXED; cd {shared}", ""),
    ("echo $FIXED $PWD", "1 {shared}"),
    ("echo $SHLVL $_ > /dev/null; export PS1=x IFS=:; printf '%s\\n' \"a b\"", "a b"),
    ("for x in a b; do printf $x; done; pwd", "ab{shared}"),
    ("os.environ['BASH_FUNC_greet%%'] = '() {{  echo hello\\n}}'; os.environ['a.b'] = 'c'", ""),
    ("greet", "hello"),
    ("greet; env | grep ^a.b", "hello\na.b=c"),
]


def test_directory_and_exports_carry_over_and_are_shared_with_python(
    client: Client, server: JupyterServer
) -> None:
    names = {"shared": server.root / "notebooks" / "shared"}
    session_id, wrong = client.run("0")["session_id"], []
    for code, expected in SHARED:
        given = code
        for name, value in names.items():
            given = given.replace(f"{{{name}}}", str(value)).replace("{{", "{").replace("}}", "}")
        result = client.run(given, session_id)
        if "\n".join(result["result"]) != expected.format(**names):
            wrong.append((code, result, expected))
    assert wrong == []


def test_a_working_directory_that_was_deleted_does_not_wedge_the_session(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("mkdir doomed && cd doomed && pwd")["session_id"]
    (server.root / "notebooks" / "doomed").rmdir()
    result = client.run("echo on", session_id)
    assert result["result"][-1].splitlines()[-1] == "on" and result["error"] == []
    assert client.run("cd /tmp && pwd", session_id)["result"] == ["/tmp"]
    client.run(
        "mkdir -p /tmp/doomed-too && cd /tmp/doomed-too && rmdir /tmp/doomed-too", session_id
    )
    assert client.run("21 * 2", session_id)["result"] == ["42"]
    assert client.run("cd /tmp; pwd", session_id)["result"][-1].splitlines()[-1] == "/tmp"


def test_directory_and_exports_come_back_with_a_restored_session(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("export A=5; mkdir -p restored && cd restored")["session_id"]
    client.run("echo broken; exit 3", session_id)
    server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
    result = client.run("echo $A; basename $PWD", session_id)
    assert is_report(result["result"][0], 1) and result["result"][1:] == ["5\nrestored"]


# Python cells with bash between them: the kernel must look as if only the Python cells had run.
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
    body = {"path": "notebooks/plain.ipynb", "name": "", "type": "notebook", "kernel": {}}
    plain = server.api("POST", "sessions", json=body).json()["kernel"]["id"]
    expected = [run_as_person(server, plain, code) for code in TRACES]
    server.api("DELETE", f"kernels/{plain}").raise_for_status()
    session_id, seen = client.run("echo hi")["session_id"], []
    for code in TRACES:
        client.run("ls -la > /dev/null; export TRACE=1", session_id)
        client.run("%%bash\necho hi; exit 3", session_id)
        client.run("df -h | head -1", session_id)
        seen.append("".join(client.run(code, session_id)["result"]))
    assert seen == [text.removesuffix("\n") for text in expected]
    counts = [cell["execution_count"] for cell in server.notebook(session_id)["cells"]]
    assert [count for count in counts if count] == list(range(1, len(TRACES) + 1))


def test_nothing_of_the_helper_shows_in_a_traceback(client: Client) -> None:
    session_id = client.run("echo hi")["session_id"]
    codes = [
        "def f():\n    1 / 0\nf()",
        "ls undefined",
        "raise KeyError",
        "import traceback\n"
        "try: 1 / 0\nexcept Exception: traceback.print_exc()\ntraceback.print_stack()\nfoo bar",
    ]
    text = "\n".join(str(client.run(code, session_id)) for code in codes)
    assert text.count("Error") > 3 and "interpreter_mcp" not in text


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


def test_bash_works_whatever_the_users_code_has_shadowed(client: Client) -> None:
    session_id, wrong = (
        client.run("import sys; out, err = sys.stdout, sys.stderr; x = 6")["session_id"],
        [],
    )
    for code in SHADOWS:
        client.run(code, session_id)
        for command, expected in (("echo hi", ["hi"]), ("ls -d /tmp", ["/tmp"]), ("x * 7", ["42"])):
            result = client.run(command, session_id, timeout=10)
            if (result["result"], result["error"]) != (expected, []) and not (
                command == "x * 7" and "sys." in code  # its output is the user's own affair
            ):
                wrong.append((code, command, result))
        client.run("import sys; sys.stdout, sys.stderr = out, err", session_id)
    assert wrong == []


def running(mark: str) -> list[psutil.Process]:
    """Processes, other than zombies, with a mark on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if mark in (process.info["cmdline"] or []) and process.info["status"] != "zombie":
            found.append(process)
    return found


FAMILIES = {
    "a command": "sleep {0}",
    "child and grandchild": "bash -c 'sleep {0} & sleep {0}; true'; true",
    "in the background": "sleep {0} & sleep {0} & wait",
    "ignoring signals": "trap '' INT TERM; bash -c 'trap \"\" INT; sleep {0}; sleep {0}'; sleep {0}",
    "python": 'python -c \'import subprocess, sys; subprocess.call(["sleep", "{0}"])\'',
    "a pipe": "sleep {0} | cat | cat",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupt_takes_children_and_grandchildren(
    client: Client, shell: Callable[..., dict[str, Any]], family: str
) -> None:
    mark = f"{1000 + secrets.randbelow(10**6)}.5"
    session_id = shell.session_id  # type: ignore[attr-defined]
    call = client.start(f"echo begun\n{FAMILIES[family].format(mark)}", session_id)
    eventually(lambda: running(mark))
    client.interrupt(session_id)
    result = call.result(10).model_dump(by_alias=True)["structuredContent"]
    assert result["result"][0].startswith("begun") and result["error"] != []
    eventually(lambda: not running(mark), 5)
    assert shell("echo on")["result"][-1:] == ["on"]


def test_output_streams_while_the_command_runs(client: Client, server: JupyterServer) -> None:
    gate = server.root / "notebooks" / "stream-gate"
    session_id = client.run("0")["session_id"]
    code = f"echo first; until [ -e {gate} ]; do sleep 0.05; done; echo second"
    result = client.run(code, session_id, timeout=1)
    assert result["result"] == ["first"] and "running" in result["error"][0]
    gate.touch()
    assert client.run("", session_id)["result"] == ["second"]


def test_a_server_in_the_background_neither_hangs_the_call_nor_dies_with_it(
    shell: Callable[..., dict[str, Any]],
) -> None:
    port = free_port()
    started = time.monotonic()
    result = shell(f"python -u -m http.server {port} --bind {LOOPBACK} & echo started $!")
    assert time.monotonic() - started < 10 and result["error"] == []
    pid = int(re.search(r"started (\d+)", result["result"][0])[1])  # type: ignore[index]
    for _ in range(2):
        fetch = f"curl -s --retry 50 --retry-connrefused --retry-delay 0 http://{LOOPBACK}:{port}/"
        result = shell(f"{fetch} | grep -o '<title>.*</title>'; true")
        assert "Directory listing" in str(result["result"]) and result["error"] == []
    shell(f"kill {pid}")
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_what_a_background_child_prints_comes_with_a_later_call(
    shell: Callable[..., dict[str, Any]],
) -> None:
    gate: Path = shell.folder / "late-gate"  # type: ignore[attr-defined]
    shell(f"(until [ -e {gate} ]; do sleep 0.02; done; echo late) & true")
    gate.touch()
    eventually(lambda: "late" in str(shell("1")["result"]), 10)


def test_200000_lines_arrive_whole(clients: Callable[..., Client]) -> None:
    client, whole = clients("--max-output", "2000000"), "\n".join(map(str, range(1, 200001)))
    result = client.run("seq 200000")
    assert result["result"] == [whole] and result["error"] == []


def test_200000_lines_are_cut_to_the_limit_and_whole_in_a_file(
    shell: Callable[..., dict[str, Any]], server: JupyterServer
) -> None:
    (text,), whole = shell("seq 200000")["result"], "\n".join(map(str, range(1, 200001)))
    assert text.startswith(whole[:20000]) and text.endswith(whole[-20000:]) and len(text) < 51000
    (path,) = re.findall(r"\S+\.txt", text)
    assert (server.root / path).read_text() == whole + "\n"


def test_no_bash_gives_one_clear_error_and_python_goes_on(client: Client) -> None:
    hide = "import os; path = os.environ['PATH']; os.environ['PATH'] = '/no/such'"
    session_id = client.run(hide)["session_id"]
    for code in ("%%bash\necho hi", "%%bash\nls -la"):
        result = client.run(code, session_id)
        assert result["result"] == [] and len(result["error"]) == 1, result
        assert "bash" in result["error"][0] and "Traceback" not in result["error"][0]
    assert "NameError" in client.run("df -h", session_id)["error"][0]
    assert "SyntaxError" in client.run("echo hi", session_id)["error"][0]
    assert client.run("os.environ['PATH'] = path; 21 * 2", session_id)["result"] == ["42"]
    assert client.run("echo hi", session_id)["result"] == ["hi"]


def test_the_notebook_shows_bash_cells_as_percent_bash(
    client: Client, server: JupyterServer
) -> None:
    session_id = client.run("# why\necho \"it's\" 'é\\n'\n")["session_id"]
    client.run("%%bash\necho hi; exit 3", session_id)
    first, second = server.notebook(session_id)["cells"]
    assert "".join(first["source"]).rstrip() == "%%bash\n# why\necho \"it's\" 'é\\n'"
    assert "".join(first["outputs"][0]["text"]) == "it's é\\n\n"
    assert "".join(second["source"]) == "%%bash\necho hi; exit 3"
    assert second["outputs"][-1]["output_type"] == "error"


def test_a_newer_helper_replaces_an_older_one_in_a_living_kernel(
    server: JupyterServer, client: Client, clients: Callable[..., Client], tmp_path: Path
) -> None:
    source = Path(jim.__file__).read_text()
    newer, count = re.subn(r"(?m)^(HELPER_VERSION = )\d+", r"\g<1>10_000", source)
    assert count == 1 and "exited with status" in newer
    copy = tmp_path / "newer.py"
    copy.write_text(newer.replace("exited with status", "finished with status"))
    session_id = client.run("x = 42\n%cd -q /tmp")["session_id"]
    assert client.run("exit 3", session_id)["error"] == ["Command exited with status 3"]
    new = clients(command=[sys.executable, str(copy)])
    assert new.run("exit 3", session_id)["error"] == ["Command finished with status 3"]
    assert new.run("x", session_id)["result"] == ["42"]
    assert client.run("exit 3", session_id)["error"] == ["Command finished with status 3"]
    assert clients().run("exit 3", session_id)["error"] == ["Command finished with status 3"]


def test_other_kernels_than_ipython_get_their_cells_unchanged(
    other_kernels: JupyterServer, clients: Callable[..., Client]
) -> None:
    server = other_kernels
    client = clients("--kernel-name", "bash", server=server)
    session_id = client.run("x=5; print() { echo printed; }")["session_id"]
    assert client.run("echo $x; print", session_id)["result"] == ["5\nprinted"]
    assert sources(server.notebook(session_id))[1] == "echo $x; print"
    assert server.notebook(session_id)["metadata"]["kernelspec"]["name"] == "bash"
    server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
    result = client.run("echo $x", session_id)
    assert is_report(result["result"][0], 2) and result["result"][1:] == ["5"]


# --- Tools of the tests of faults ----------------------------------------------------------------


class Network(Proxy):
    """A proxy that delays without making one chunk wait for another, and can leave connections
    half open. on_server(data) is told what was passed on to the client."""

    def __init__(self, port: int) -> None:
        self.on_server: Callable[[bytes], object] = lambda data: None
        self.frozen: set[socket.socket] = set()
        super().__init__(port)

    def freeze(self) -> None:
        """Present connections stay open and say nothing any more; new ones work."""
        for pair in self.pairs:
            self.frozen.update(pair)
        self.pairs.clear()

    def _pump(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(10_000)
        deliver = (waiting, source, target, from_client)
        threading.Thread(target=self._deliver, args=deliver, daemon=True).start()
        with suppress(OSError):
            while data := source.recv(65536):
                if from_client and not self.on_client(data):
                    break
                waiting.put((time.monotonic() + self.delay_s, data))
        waiting.put((time.monotonic() + self.delay_s, b""))

    def _deliver(
        self, waiting: Any, source: socket.socket, target: socket.socket, from_client: bool
    ) -> None:
        with suppress(OSError):
            while (item := waiting.get())[1]:
                time.sleep(max(0.0, item[0] - time.monotonic()))
                while self.mode == "stall" or target in self.frozen:
                    time.sleep(0.02)
                target.sendall(item[1])
                if not from_client:
                    self.on_server(item[1])
        if source in self.frozen:
            return  # the other side is not told
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def is_execute_request(data: bytes) -> bool:
    """Is this what a websocket client sends for a cell? Its frames are masked, but a first byte of
    0x8N is no HTTP, and a Pong or a Close is short."""
    return data[0] >= 0x80 and len(data) > 300


class Trial:
    """A session that is hurt and one beside it that must not notice, on one MCP server. Cells write
    to files: how often they ran, and that they saw something; and wait for a file."""

    def __init__(self, client: Client, folder: Path, beside: int = 0, session_id: int = 0) -> None:
        self.client, self.folder = client, folder
        self.session_id: int = session_id or client.run("kept = 5")["session_id"]
        self.beside = beside or client.run("beside = 42")["session_id"]

    def code(self, body: str) -> str:
        """A cell that counts its runs. In it, wait() waits for `open_gate`; tell(name) writes."""
        return (
            "import os, pathlib, time\n"
            f"folder = pathlib.Path({str(self.folder)!r})\n"
            "with open(folder / 'runs', 'a') as file:\n    file.write('x')\n"
            "def wait():\n    while not (folder / 'gate').exists():\n        time.sleep(0.01)\n"
            "def tell(name):\n    (folder / name).touch()\n" + body
        )

    def runs(self) -> int:
        path = self.folder / "runs"
        return len(path.read_text()) if path.exists() else 0

    def begin(self, body: str, *, until: str = "", timeout: float = 50) -> Any:
        """Begin a call; returns when its code runs (and has told `until`)."""
        call = self.client.start(self.code(body), self.session_id, timeout=timeout)
        eventually(self.runs)
        eventually(lambda: self.told(until) if until else True)
        return call

    def told(self, name: str) -> bool:
        return (self.folder / name).exists()

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def survived(self, session_id: int = 0) -> None:
        """The code ran once; this session works and has its variables; the other did not notice."""
        assert self.runs() == 1
        after = self.client.run("print('works', kept)", session_id or self.session_id)
        assert (after["result"][-1:], after["error"]) == (["works 5"], []), after
        assert self.runs() == 1
        beside = self.client.run("beside", self.beside)
        assert (beside["result"], beside["error"]) == (["42"], []), beside


def outcome(call: Any, timeout_s: float = 120) -> dict[str, Any]:
    """The structure of a call that was begun."""
    result: dict[str, Any] = call.result(timeout_s).model_dump(by_alias=True)
    structure: dict[str, Any] = result["structuredContent"]
    return structure


def text_of(structure: dict[str, Any]) -> str:
    return "\n".join(structure["result"] + structure["error"])


def cancel(client: Client, call: Any) -> None:
    """Press stop for the newest call: 2.x of the SDK tells the server, for 1.x it is done here."""
    pending = getattr(client.session, "_response_streams", None)
    if pending is not None:
        from mcp import types

        params = types.CancelledNotificationParams(requestId=max(pending), reason="stop")
        note = types.CancelledNotification(method="notifications/cancelled", params=params)
        said = client.session.send_notification(types.ClientNotification(note))
        asyncio.run_coroutine_threadsafe(said, client.loop).result(10)
    call.cancel()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is done here takes no longer."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took <= seconds, f"took {took:.1f} s, not {seconds:g} s"


def memory(client: Client) -> int:
    """Bytes, as the operating system counts them."""
    return int(psutil.Process(client.pid).memory_info().rss)


@pytest.fixture(scope="session")
def beside(client: Client) -> int:
    """A session on the shared command that never notices anything."""
    return int(client.run("beside = 42")["session_id"])


@pytest.fixture(scope="session")
def kept_sessions() -> dict[int, int]:
    """A session for each command, shared by the tests that leave the kernel alive."""
    return {}


def shared_trial(client: Client, folder: Path, beside: int, sessions: dict[int, int]) -> Trial:
    """A trial on the command's shared session, as long as that one works."""
    session_id = sessions.get(client.pid, 0)
    if session_id and client.run("kept", session_id, timeout=10)["result"] != ["5"]:
        session_id = 0
    trial = Trial(client, folder, beside, session_id)
    sessions[client.pid] = trial.session_id
    return trial


@pytest.fixture
def trial(client: Client, tmp_path: Path, beside: int, kept_sessions: dict[int, int]) -> Trial:
    """A trial that the kernel survives."""
    return shared_trial(client, tmp_path, beside, kept_sessions)


@pytest.fixture
def mortal(client: Client, tmp_path: Path, beside: int) -> Trial:
    """A trial that the kernel does not survive: a session of its own."""
    return Trial(client, tmp_path, beside)


@pytest.fixture(scope="session")
def far_side(server: JupyterServer) -> Iterator[tuple[Network, Client, int]]:
    """A network, a command behind it, and a session there that must not notice."""
    network = Network(server.port)
    client = Client(server, url=network.url)
    yield network, client, client.run("beside = 42")["session_id"]
    client.close()
    network.close()


@pytest.fixture
def network(far_side: tuple[Network, Client, int]) -> Iterator[Network]:
    network = far_side[0]
    yield network
    network.mode = "pass"
    network.on_client, network.on_server = lambda data: True, lambda data: None


@pytest.fixture
def own_network(server: JupyterServer) -> Iterator[Network]:
    """For what would hurt the sessions that other tests keep behind theirs."""
    network = Network(server.port)
    yield network
    network.close()


@pytest.fixture
def far(
    network: Network,
    far_side: tuple[Network, Client, int],
    tmp_path: Path,
    kept_sessions: dict[int, int],
) -> Trial:
    """A trial whose server is behind a network, which the kernel survives."""
    return shared_trial(far_side[1], tmp_path, far_side[2], kept_sessions)


@pytest.fixture(scope="session")
def local_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="session")
def local(local_folder: Path) -> Iterator[Client]:
    """The command with a Jupyter server of its own, which has no rate limits."""
    local = Client(None, "--local", str(local_folder))
    yield local
    local.close()


# --- Time ----------------------------------------------------------------------------------------


@pytest.mark.sdk
@pytest.mark.faults
def test_code_that_outlives_its_call_goes_on_and_the_rest_comes_once_in_full(trial: Trial) -> None:
    with within(10):
        body = "print('first')\nwait()\nprint('second')\n3 * 7"
        early = outcome(trial.begin(body, timeout=1))
    assert early["result"] == ["first"]
    (error,) = early["error"]
    assert "still running" in error.lower() and "nothing is lost" in error
    assert "execute_code" in error and "interrupt_execution" in error
    assert str(trial.session_id) in error
    trial.open_gate()
    rest = trial.client.run("", trial.session_id)
    assert (rest["result"], rest["error"]) == (["second", "21"], [])
    again = trial.client.run("", trial.session_id)
    assert (again["result"], again["error"]) == ([], [])
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_timeout_zero_starts_the_code_and_returns_at_once(trial: Trial) -> None:
    with within(3):
        code = trial.code("tell('started')\nwait()\nprint('end')")
        early = trial.client.run(code, trial.session_id, timeout=0)
    assert len(early["error"]) == 1 and early["result"] == []
    eventually(lambda: trial.told("started"))
    trial.open_gate()
    assert trial.client.run("", trial.session_id)["result"] == ["end"]
    trial.survived()


@pytest.mark.faults
def test_a_time_that_is_over_before_the_kernel_is_up_still_starts_the_code(
    client: Client, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    with within(5.1):
        early = client.run(f"open({str(marker)!r}, 'a').write('x')", timeout=0.01)
    assert len(early["error"]) == 1
    rest = client.run("", early["session_id"])
    assert (rest["result"], rest["error"]) == (["1"], [])
    assert marker.read_text() == "x"


@pytest.mark.faults
def test_empty_code_waits_as_long_as_its_own_timeout(trial: Trial) -> None:
    trial.begin("print('a')\nwait()\nprint('b')", timeout=0).result(20)
    with within(6):
        waited = trial.client.run("", trial.session_id, timeout=0.5)
    assert "still running" in waited["error"][0].lower()
    trial.open_gate()
    rest = trial.client.run("", trial.session_id)
    assert waited["result"] + rest["result"] in (["a", "b"], ["a\nb"])
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_new_code_for_a_busy_session_is_not_run_if_its_time_is_over_first(trial: Trial) -> None:
    trial.begin("wait()\nprint('end')", timeout=0).result(20)
    with within(6):
        late = trial.client.run(trial.code("tell('late')"), trial.session_id, timeout=0.5)
    assert "not run" in text_of(late).lower()
    assert str(trial.session_id) in text_of(late)
    trial.open_gate()
    assert trial.client.run("", trial.session_id)["result"] == ["end"]
    trial.survived()
    assert not trial.told("late")


@pytest.mark.faults
def test_earlier_code_that_ends_while_new_code_waits_comes_first_and_is_marked(
    trial: Trial,
) -> None:
    body = "wait()\nprint('rest')\nraise ValueError('of the first')"
    trial.begin(body, timeout=0).result(20)
    call = trial.client.start("print('new')\n1 / 0", trial.session_id)
    trial.open_gate()
    both = outcome(call)
    old, new = both["result"]
    assert "rest" in old and old != "rest" and "earlier" in old
    assert new == "new"
    assert "of the first" in both["error"][0] and "earlier" in both["error"][0]
    assert "ZeroDivisionError" in both["error"][1] and "earlier" not in both["error"][1]
    trial.survived()


@pytest.mark.faults
def test_a_run_that_nobody_collects_is_saved_when_it_ends(
    mortal: Trial, server: JupyterServer
) -> None:
    mortal.begin("wait()\nprint('uncollected')", timeout=0).result(20)
    mortal.open_gate()

    def saved() -> bool:
        with suppress(ValueError):  # it is just being written
            cell = server.notebook(mortal.session_id)["cells"][-1]
            return "uncollected" in json.dumps(cell["outputs"])
        return False

    eventually(saved, 20)
    assert mortal.client.run("", mortal.session_id)["result"] == ["uncollected"]
    mortal.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_progress_comes_at_least_every_5_s_with_the_newest_line(
    clients: Callable[..., Client], tmp_path: Path
) -> None:
    trial = Trial(clients(), tmp_path)
    body = "n = 0\nwhile not (folder / 'gate').exists():\n    n += 1\n    print('line', n)\n"
    call = trial.begin(body + "    time.sleep(0.05)\n")

    def lines() -> list[str]:
        return [p for p in trial.client.progress if re.fullmatch(r"line \d+", p)]

    eventually(lambda: len(lines()) >= 2, 11.5)
    first, second = (int(line.split()[1]) for line in lines()[:2])
    assert first > 20 and second > first + 20, "not the newest line"
    trial.open_gate()
    assert outcome(call)["error"] == []
    trial.survived()


@pytest.mark.faults
def test_a_call_is_back_in_time_while_the_server_stalls_in_mid_run(
    far: Trial, network: Network
) -> None:
    call = far.begin("print('end')\ntell('done')", timeout=2)
    network.mode = "stall"
    with within(7.5):
        stalled = outcome(call)
    with within(6.5):
        waited = far.client.run("", far.session_id, timeout=1)
    network.mode = "pass"
    rest = far.client.run("", far.session_id)
    everything = text_of(stalled) + text_of(waited) + text_of(rest)
    assert everything.count("end\n") + everything.endswith("end") <= 1
    assert stalled["error"] or stalled["result"] == ["end"]
    assert "end" in stalled["result"] + waited["result"] + rest["result"], everything
    far.survived()


@pytest.mark.faults
def test_a_call_is_back_in_time_when_the_server_accepts_and_never_answers(
    far: Trial, network: Network
) -> None:
    network.mode = "stall"
    with within(6.5):
        old = far.client.run(far.code("print('later')"), far.session_id, timeout=1)
    with within(6.5):
        new = far.client.run("1", timeout=1)
    assert old["error"] and new["error"]
    network.mode = "pass"
    rest = far.client.run("", far.session_id)
    if "not run" in (text_of(old) + text_of(rest)).lower():
        assert far.runs() == 0
        far.client.run(far.code(""), far.session_id)
    else:
        assert "later" in text_of(rest)
    far.survived()
    assert far.client.run("print('up')", new["session_id"])["result"][-1] == "up"


@pytest.mark.faults
def test_a_call_is_back_in_time_when_the_save_stalls(
    far: Trial, network: Network, server: JupyterServer
) -> None:
    def stall_at_save(data: bytes) -> bool:
        if data.startswith(b"PUT /api/contents"):
            network.mode = "stall"
        return True

    network.on_client = stall_at_save
    with within(7.5):
        code = far.code("print('output')  # saved late")
        stalled = far.client.run(code, far.session_id, timeout=2)
    assert stalled["result"] == ["output"]
    assert stalled["error"], "an unsaved cell is an error"
    network.on_client, network.mode = lambda data: True, "pass"
    far.survived()
    sources = [cell["source"] for cell in server.notebook(far.session_id)["cells"]]
    assert sum("# saved late" in "".join(source) for source in sources) == 1


@pytest.mark.faults
def test_an_interrupt_is_back_in_time_while_the_server_stalls(far: Trial, network: Network) -> None:
    far.begin("wait()\nprint('end')", timeout=0).result(20)
    network.mode = "stall"
    with within(11):
        stalled = far.client.interrupt(far.session_id)
    assert stalled["error"]
    network.mode = "pass"
    far.open_gate()
    far.client.run("", far.session_id)
    far.survived()


# --- Stopping ------------------------------------------------------------------------------------

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
    cancel(trial.client, call)
    eventually(lambda: trial.told("stopped"), 6)
    rest = trial.client.run("", trial.session_id)
    assert "before" in text_of(rest) and "KeyboardInterrupt" in text_of(rest)
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_a_cancelled_bash_call_ends_with_its_children(trial: Trial) -> None:
    trial.client.run(trial.code(""), trial.session_id)
    child = trial.folder / "child"
    bash = f"%%bash\nsleep 100 & echo $! > {child}; wait"
    call = trial.client.start(bash, trial.session_id)
    pid = int(eventually(lambda: child.exists() and child.read_text().strip()))
    cancel(trial.client, call)
    eventually(lambda: not psutil.pid_exists(pid), 8)
    trial.client.run("", trial.session_id)
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_a_cancelled_call_that_waits_is_withdrawn_and_stops_nothing(trial: Trial) -> None:
    running = trial.begin("wait()\nprint('end')")
    waiting = trial.client.start(trial.code("tell('late')"), trial.session_id)
    assert trial.client.run("beside", trial.beside)["result"] == ["42"]  # so that it has arrived
    cancel(trial.client, waiting)
    trial.client.run("beside", trial.beside)
    trial.open_gate()
    ended = outcome(running)
    assert (ended["result"], ended["error"]) == (["end"], [])
    trial.survived()
    assert not trial.told("late")


@pytest.mark.sdk
@pytest.mark.faults
def test_an_interrupt_returns_the_rest_of_the_output_and_keeps_variables(trial: Trial) -> None:
    call = trial.begin("print('before', flush=True)" + SLEEPS, until="sleeps", timeout=1)
    assert outcome(call)["result"] == ["before"]
    with within(5):
        stopped = trial.client.interrupt(trial.session_id)
    assert trial.told("stopped")
    assert "KeyboardInterrupt" in text_of(stopped) and "before" not in text_of(stopped)
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_an_interrupt_while_a_call_waits_ends_that_call(trial: Trial) -> None:
    call = trial.begin("print('before')" + SLEEPS, until="sleeps")
    with within(5):
        stopped = trial.client.interrupt(trial.session_id)
        ended = outcome(call)
    whole = text_of(stopped) + text_of(ended)
    assert ended["error"] and whole.count("before\n") <= 1
    assert "before" in whole and "KeyboardInterrupt" in whole
    trial.survived()


@pytest.mark.faults
@pytest.mark.parametrize("restart", [False, True])
def test_an_interrupt_stops_what_runs_and_not_what_waits(trial: Trial, restart: bool) -> None:
    waiting = "tell('next')\nwait()\nprint('next')"
    stopped = trial.begin("tell('runs')\ntime.sleep(100)", until="runs")
    call = trial.client.start(waiting, trial.session_id)
    with within(5):
        assert trial.client.interrupt(trial.session_id, restart=restart)["error"] == []
    assert "KeyboardInterrupt" in outcome(stopped)["error"][0]
    eventually(lambda: trial.told("next"))
    trial.open_gate()
    assert (outcome(call)["result"], outcome(call)["error"]) == (["next"], [])
    trial.survived()


@pytest.mark.faults
def test_an_interrupt_with_nothing_running_leaves_the_session_as_it_is(trial: Trial) -> None:
    trial.client.run(trial.code(""), trial.session_id)
    with within(5):
        stopped = trial.client.interrupt(trial.session_id)
    assert stopped["session_id"] == trial.session_id
    assert "KeyboardInterrupt" not in text_of(stopped)
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_an_interrupt_of_a_session_that_nobody_opened_says_so(client: Client) -> None:
    with within(5):
        stopped = client.interrupt(777_000_777)
    assert "777000777" in text_of(stopped).replace("_", "")


def check_restart(trial: Trial) -> None:
    """A restart stops what runs and restores the session."""
    with within(15.5):
        restarted = text_of(trial.client.interrupt(trial.session_id, restart=True))
    if "Still" in restarted:  # a busy machine: the time was over before the kernel was up
        restarted += text_of(trial.client.run("", trial.session_id))
        restarted += text_of(trial.client.run("1", trial.session_id))
    assert "ran again" in restarted and "Not run" not in restarted, restarted


@pytest.mark.faults
def test_a_cell_that_swallows_the_interrupt_is_named_and_stopped_by_a_restart(
    mortal: Trial,
) -> None:
    body = (
        "while True:\n    try:\n        time.sleep(100)\n"
        "    except KeyboardInterrupt:\n        print('no')\n"
    )
    mortal.begin(body, timeout=0).result(20)
    with within(7):
        ignored = mortal.client.interrupt(mortal.session_id)
    assert "restart=True" in text_of(ignored)
    check_restart(mortal)
    mortal.survived()


@pytest.mark.faults
def test_native_code_that_ignores_the_interrupt_is_stopped_by_a_restart(mortal: Trial) -> None:
    mortal.begin("tell('native')\nsum(range(10 ** 13))", until="native", timeout=0).result(20)
    check_restart(mortal)
    mortal.survived()


@pytest.mark.faults
def test_native_code_that_says_nothing_at_all_is_stopped_by_a_restart_and_not_restored(
    mortal: Trial,
) -> None:
    """It holds the GIL from its first moment, so the kernel cannot even say that it is busy."""
    early = mortal.client.run("sum(range(10 ** 13))", mortal.session_id, timeout=1)
    assert "running" in text_of(early)
    check_restart(mortal)
    mortal.client.run(mortal.code(""), mortal.session_id)
    mortal.survived()


@pytest.mark.faults
def test_an_interrupt_after_the_mcp_server_was_restarted_stops_the_code(
    clients: Callable[..., Client], tmp_path: Path
) -> None:
    trial = Trial(clients(), tmp_path)
    call = trial.begin(SLEEPS, until="sleeps")
    trial.client.kill()
    call.cancel()
    trial.client = clients()
    with within(10):
        stopped = trial.client.interrupt(trial.session_id)
    eventually(lambda: trial.told("stopped"), 3)
    assert stopped["session_id"] == trial.session_id
    trial.survived()


# --- Nothing lost: the network -------------------------------------------------------------------


def heard(network: Network, text: bytes) -> Callable[[], bool]:
    """Was this passed on to the client? To be asked for before it is said."""
    so_far = bytearray()
    network.on_server = so_far.extend
    return lambda: text in so_far


def until_noticed(server: JupyterServer, session_id: int, left: int = 0) -> None:
    """Wait until the server knows that a connection is gone: from then on it keeps the output."""
    kernel = f"kernels/{server.kernel_id(session_id)}"
    eventually(lambda: server.api("GET", kernel).json()["connections"] == left)


AWAY = """
print('fir' + 'st')
wait()
for n in range(100):
    print('line', n)
print('la' + 'st')
import sys
sys.stdout.flush()
tell('said')
while not (folder / 'end').exists():
    time.sleep(0.01)
'value'
"""
AWAY_LINES = ["first", *(f"line {n}" for n in range(100)), "last"]


def cut_while_it_runs(
    far: Trial, network: Network, server: JupyterServer, *, ends: bool, left: int = 0
) -> dict[str, Any]:
    """The connection breaks after "first", everything else is said (the end too, if it `ends`)
    while it is away."""
    first = heard(network, b"first")
    call = far.begin(AWAY, timeout=30)
    eventually(first)
    network.mode = "refuse"
    network.cut()
    until_noticed(server, far.session_id, left)
    far.open_gate()
    eventually(lambda: far.told("said"))
    if ends:
        (far.folder / "end").touch()
        kernel = f"kernels/{server.kernel_id(far.session_id)}"
        eventually(lambda: server.api("GET", kernel).json()["execution_state"] == "idle")
    network.mode = "pass"
    (far.folder / "end").touch()
    return outcome(call)


@pytest.mark.faults
@pytest.mark.parametrize("ends", [False, True], ids=["runs on", "ends meanwhile"])
def test_what_is_said_while_the_connection_is_broken_joins_up(
    far: Trial, network: Network, server: JupyterServer, ends: bool
) -> None:
    whole = cut_while_it_runs(far, network, server, ends=ends)
    assert whole["error"] == [], whole
    assert "\n".join(whole["result"]).splitlines() == [*AWAY_LINES, "'value'"]
    far.survived()


@pytest.mark.faults
@pytest.mark.parametrize("ends", [False, True], ids=["runs on", "ends meanwhile"])
def test_output_that_the_server_did_not_keep_because_somebody_else_is_connected_is_told(
    far: Trial, network: Network, server: JupyterServer, ends: bool
) -> None:
    channels = f"/api/kernels/{server.kernel_id(far.session_id)}/channels?session_id=lab"
    header = [f"Authorization: token {server.token}"]
    lab = websocket.create_connection(server.url.replace("http", "ws") + channels, header=header)
    try:
        with within(25):
            whole = cut_while_it_runs(far, network, server, ends=ends, left=1)
    finally:
        lab.close()
    complete = "\n".join(whole["result"]).splitlines() == [*AWAY_LINES, "'value'"]
    assert complete or "missing" in text_of(whole), whole
    assert whole["result"][0].startswith("first")
    far.survived()


@pytest.mark.faults
def test_a_connection_that_breaks_often_in_one_run_joins_up(
    far: Trial, network: Network, server: JupyterServer
) -> None:
    seen = [heard(network, b"step 0")]
    body = (
        "for n in range(3):\n    print('step', n)\n"
        "    while not (folder / f'go{n}').exists():\n        time.sleep(0.01)\n"
    )
    call = far.begin(body, timeout=40)
    for n in range(3):
        eventually(seen[n])
        seen.append(heard(network, b"step %d" % (n + 1)))
        network.mode = "refuse"
        network.cut()
        until_noticed(server, far.session_id)
        (far.folder / f"go{n}").touch()
        network.mode = "pass"
    whole = outcome(call)
    assert ("\n".join(whole["result"]), whole["error"]) == ("step 0\nstep 1\nstep 2", [])
    far.survived()


@pytest.mark.faults
def test_a_connection_lost_before_the_kernel_took_the_code_is_told(
    far: Trial, network: Network
) -> None:
    def cut_at_code(data: bytes) -> bool:
        if is_execute_request(data):
            network.on_client = lambda data: True
            return False
        return True

    network.on_client = cut_at_code
    with within(20):
        lost = far.client.call(far.code("print('ran')"), far.session_id)
    assert lost["isError"]
    assert "not run" in text_of(lost["structuredContent"]).lower()
    assert far.runs() == 0
    ran = far.client.run(far.code("print('ran')"), far.session_id)
    assert (ran["result"], ran["error"]) == (["ran"], [])
    far.survived()


@pytest.mark.faults
def test_a_connection_lost_between_two_cells_is_not_noticed(far: Trial, network: Network) -> None:
    network.cut()
    ran = far.client.run(far.code("print('ran')"), far.session_id)
    assert (ran["result"], ran["error"]) == (["ran"], [])
    far.survived()


@pytest.mark.faults
@pytest.mark.parametrize("server_noticed", [True, False])
def test_a_half_open_connection_does_not_hold_a_call(
    far: Trial, network: Network, server: JupyterServer, server_noticed: bool
) -> None:
    """A connection that a router forgot: nothing comes, and nobody is told. The server has noticed,
    then it kept the output, or it has not, then the output went nowhere."""
    call = far.begin("wait()\nprint('out' + 'put')", timeout=30)
    pairs = list(network.pairs)
    network.freeze()
    for _, to_server in pairs if server_noticed else []:
        with suppress(OSError):  # some ended long ago
            to_server.shutdown(socket.SHUT_RDWR)
    if server_noticed:
        until_noticed(server, far.session_id)
    far.open_gate()
    with within(20):
        ended = outcome(call)
    if server_noticed:
        assert (ended["result"], ended["error"]) == (["output"], [])
    else:
        assert ended["result"] == ["output"] or "missing" in text_of(ended)
    # the other session's connection is silent too: its next cell may be lost, and that told
    other = far.client.run("beside", far.beside)
    assert other["result"] == ["42"] or "not run" in text_of(other).lower()
    far.survived()
    # A break before the server has closed the old connections is the test after this one.
    kernels = [f"kernels/{server.kernel_id(number)}" for number in (far.session_id, far.beside)]
    eventually(lambda: {server.api("GET", k).json()["connections"] for k in kernels} == {1}, 20)


@pytest.mark.faults
def test_a_connection_that_breaks_twice_in_5_s_does_not_leave_the_session_deaf(
    own_network: Network, clients: Callable[..., Client], server: JupyterServer, tmp_path: Path
) -> None:
    """The first is half open. The server closes it 5 s after the second came, and keeps its channels,
    which are dead, for the third, the fourth, ... With 2 s of patience instead of 30."""
    code = "import jupyter_interpreter_mcp as m; m.STARTS_S, m.FRESH_S = 2, 0; raise SystemExit(m.main())"
    far = Trial(clients(url=own_network.url, command=[sys.executable, "-c", code]), tmp_path)
    kept = f"Starting buffering for {server.kernel_id(far.session_id)}"
    so_far = server.log.read_text().count(kept)
    own_network.freeze()
    assert far.client.run("kept", far.session_id)["result"] == ["5"]
    own_network.cut()
    eventually(lambda: server.log.read_text().count(kept) > so_far, 20)
    assert far.client.run(far.code("kept"), far.session_id)["result"] == ["5"]
    far.survived()


@pytest.mark.faults
def test_a_connection_that_does_not_come_back_is_given_up_with_a_clear_error(
    own_network: Network, clients: Callable[..., Client], tmp_path: Path
) -> None:
    """With 2 s of trying instead of 60, so that the test need not wait."""
    code = "import jupyter_interpreter_mcp as m; m.KERNEL_TIMEOUT_S = 2.0; raise SystemExit(m.main())"
    client = clients(url=own_network.url, command=[sys.executable, "-c", code])
    far = Trial(client, tmp_path)
    first = heard(own_network, b"first")
    call = far.begin("print('fir' + 'st')\nwait()", timeout=40)
    eventually(first)
    own_network.mode = "refuse"
    own_network.cut()
    with within(15):
        given_up = outcome(call)
    assert given_up["result"] == ["first"]
    assert re.search("may (still run|go on)", text_of(given_up)), given_up
    assert "Traceback" not in text_of(given_up) and "ended" not in text_of(given_up)
    own_network.mode = "pass"
    far.open_gate()
    far.survived()


# --- Nothing lost: kernels and servers -----------------------------------------------------------

DEATHS = {
    "exit": "os._exit(1)",
    "kill": "import signal\nos.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.faults
@pytest.mark.parametrize("death", DEATHS)
def test_a_kernel_that_dies_is_told_with_the_output_so_far(mortal: Trial, death: str) -> None:
    body = "print('before', flush=True)\nwait()\n" + DEATHS[death]
    call = mortal.begin(body, timeout=2)
    early = outcome(call)
    mortal.open_gate()
    with within(6):
        dead = mortal.client.run("", mortal.session_id)
    assert early["result"] == ["before"]
    assert "kernel died" in text_of(dead).lower()
    restored = mortal.client.run("kept", mortal.session_id)
    assert restored["result"][-1] == "5" and restored["error"] == []
    assert "ran again" in text_of(dead) + text_of(restored)
    mortal.survived()


@pytest.mark.faults
@pytest.mark.parametrize("code", ["import os\nos._exit(1)", "import os\nos.abort()"])
def test_a_kernel_that_ends_before_it_says_anything_is_not_called_unreached(
    mortal: Trial, server: JupyterServer, code: str
) -> None:
    """Its messages are sent by another thread: they are lost when the first statement ends it."""
    for _ in range(3):  # which is a matter of luck
        with within(6):
            dead = mortal.client.call(code, mortal.session_id)
        said = text_of(dead["structuredContent"])
        assert not dead["isError"] and "kernel died" in said and "Not run" not in said, said
        cell = server.notebook(mortal.session_id)["cells"][-1]
        assert cell["source"] == code and cell["outputs"][-1]["ename"] == "KernelDied", cell
        restored = mortal.client.run("kept", mortal.session_id)
        assert "ran again" in restored["result"][0] and restored["result"][1:] == ["5"], restored
    mortal.client.run(mortal.code(""), mortal.session_id)
    mortal.survived()


@pytest.mark.faults
@pytest.mark.parametrize("code", ["exit()", "print('bye')\nquit()"])
def test_code_that_ends_its_kernel_says_so_and_is_not_run_again(mortal: Trial, code: str) -> None:
    ended = mortal.client.run(mortal.code(code), mortal.session_id)
    assert ended["result"] == ([] if code == "exit()" else ["bye"])
    assert "exit or quit" in ended["error"][0] and "next call restores" in ended["error"][0]
    after = mortal.client.run("print(kept)", mortal.session_id)
    assert (is_report(after["result"][0], 1), after["result"][1:]) == (True, ["5"])
    mortal.survived()


@pytest.mark.faults
def test_code_that_ends_its_kernel_is_not_run_again_when_the_restart_fails(
    network: Network, far_side: tuple[Network, Client, int], tmp_path: Path, server: JupyterServer
) -> None:
    trial = Trial(far_side[1], tmp_path, far_side[2])
    pid = int(trial.client.run("import os\nos.getpid()", trial.session_id)["result"][0])
    network.on_client = lambda data: b"/restart " not in data
    ended = trial.client.run(trial.code("exit()"), trial.session_id)
    network.on_client = lambda data: True
    assert "exit or quit" in ended["error"][0] and "next call restores" in ended["error"][0]
    cell = server.notebook(trial.session_id)["cells"][-1]
    assert cell["outputs"][-1]["ename"] == "KernelDied", cell
    eventually(lambda: not psutil.pid_exists(pid), 30)
    after = trial.client.run("print(kept)", trial.session_id)
    assert (is_report(after["result"][0], 2), after["result"][1:]) == (True, ["5"]), after
    trial.survived()


@pytest.mark.faults
def test_a_kernel_that_is_killed_from_outside_is_told_within_5_s(mortal: Trial) -> None:
    pid = int(mortal.client.run("import os\nos.getpid()", mortal.session_id)["result"][0])
    call = mortal.begin("print('before', flush=True)\nwait()", timeout=30)
    os.kill(pid, signal.SIGKILL)
    with within(5.5):
        dead = outcome(call)
    assert "kernel died" in text_of(dead).lower()
    restored = mortal.client.run("kept", mortal.session_id)
    assert "ran again" in restored["result"][0] and restored["result"][1:] == ["5"], restored
    mortal.survived()


def kill_idle_kernel(trial: Trial) -> None:
    pid = int(trial.client.run("import os\nos.getpid()", trial.session_id)["result"][0])
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


@pytest.mark.faults
def test_a_kernel_that_died_between_two_cells_is_restored_by_the_next(
    mortal: Trial, server: JupyterServer
) -> None:
    kernel_id = server.kernel_id(mortal.session_id)
    kill_idle_kernel(mortal)

    def started_anew() -> bool:
        with suppress(psutil.Error):
            processes = psutil.Process(server.process.pid).children(recursive=True)
            lines = [" ".join(p.cmdline()) for p in processes if p.status() != "zombie"]
            return any(kernel_id in line for line in lines)
        return False

    eventually(started_anew)
    restored = mortal.client.run("kept", mortal.session_id)
    if restored["error"]:  # the kernel had not come up
        restored = mortal.client.run("kept", mortal.session_id)
    assert "ran again" in restored["result"][0] and restored["result"][1:] == ["5"], restored
    mortal.client.run(mortal.code(""), mortal.session_id)
    mortal.survived()


@pytest.mark.faults
def test_code_sent_to_a_dead_kernel_runs_once_at_most_and_what_is_said_of_it_is_true(
    mortal: Trial,
) -> None:
    """The server queues it for the kernel that it starts in the dead one's place."""
    kill_idle_kernel(mortal)
    with within(10):
        sent = mortal.client.run(mortal.code("print('ran')"), mortal.session_id)
    for _ in range(2):
        restored = mortal.client.run("kept", mortal.session_id)
        assert (restored["result"][-1:], restored["error"]) == (["5"], []), restored
        assert len(restored["result"]) <= 2 and "Traceback" not in text_of(restored), restored
    if "not run" in text_of(sent).lower():
        assert mortal.runs() == 0, "told that it was not run, but it was"
    if not mortal.runs():
        assert re.search("not run|not known", text_of(sent), re.I), sent
        mortal.client.run(mortal.code("print('ran')"), mortal.session_id)
    mortal.survived()


@pytest.mark.faults
@pytest.mark.parametrize("method", ["DELETE", "restart"])
def test_a_kernel_that_somebody_ends_over_rest_is_told_within_5_s(
    mortal: Trial, server: JupyterServer, method: str
) -> None:
    kernel_id = server.kernel_id(mortal.session_id)
    call = mortal.begin("print('before', flush=True)\nwait()", timeout=30)
    if method == "DELETE":
        assert server.api("DELETE", f"kernels/{kernel_id}").ok
    else:
        assert server.api("POST", f"kernels/{kernel_id}/restart").ok
    with within(5.5):
        dead = outcome(call)
    assert "kernel" in text_of(dead).lower() and dead["error"]
    assert dead["result"] in (["before"], [])
    restored = mortal.client.run("kept", mortal.session_id)
    assert "ran again" in restored["result"][0] and restored["result"][1:] == ["5"]
    mortal.survived()


@pytest.mark.faults
def test_a_kernel_that_was_killed_by_a_restart_without_a_word_is_restored(
    mortal: Trial, server: JupyterServer
) -> None:
    """A kernel that hangs, between two cells: it cannot say that it is shut down, and is killed."""
    pid = int(mortal.client.run("import os\nos.getpid()", mortal.session_id)["result"][0])
    os.kill(pid, signal.SIGSTOP)
    assert server.api("POST", f"kernels/{server.kernel_id(mortal.session_id)}/restart").ok
    restored = mortal.client.run("kept", mortal.session_id)
    assert (is_report(restored["result"][0], 2), restored["result"][1:]) == (True, ["5"]), restored
    mortal.client.run(mortal.code(""), mortal.session_id)
    mortal.survived()


def add_kernel(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, *argv: str) -> None:
    """A kernel specification for the Jupyter servers that this test starts."""
    spec = {"argv": [*argv, "-f", "{connection_file}"], "display_name": name, "language": "python"}
    (folder / "kernels" / name).mkdir(parents=True)
    (folder / "kernels" / name / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))


@pytest.mark.faults
@pytest.mark.load
@pytest.mark.parametrize("by", ["a person", "a tool", "a crash"])
def test_a_kernel_that_takes_long_to_start_again_is_waited_for(
    clients: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """As on a busy machine or a network drive. The server calls it idle meanwhile."""
    slow = f"""import pathlib, time; from ipykernel.kernelapp import main
seen = pathlib.Path({str(tmp_path)!r}, "seen")
if seen.exists(): time.sleep(5)
seen.touch(); main()"""
    add_kernel(tmp_path / "share", monkeypatch, "slow", sys.executable, "-c", slow)
    server = JupyterServer(tmp_path / "server")
    client = clients("--kernel-name", "slow", server=server)
    session_id = client.run("kept = 5")["session_id"]
    if by == "a person":
        assert server.api("POST", f"kernels/{server.kernel_id(session_id)}/restart").ok
    elif by == "a crash":
        assert "kernel died" in text_of(client.run("import os\nos._exit(1)", session_id))
    else:
        stubborn = "import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True:\n    pass"
        client.run(stubborn, session_id, timeout=1)
        said = text_of(client.interrupt(session_id, restart=True))
        assert "restart" in said and "Not run" not in said, said
    restored = client.run("kept", session_id)
    assert (restored["result"][-1:], restored["error"]) == (["5"], []), restored
    assert [cell["source"] for cell in server.notebook(session_id)["cells"]][-1] == "kept"
    again = client.run("kept + 1", session_id)
    assert (again["result"], again["error"]) == (["6"], [])
    server.stop()


@pytest.mark.faults
def test_a_cell_is_not_run_into_the_ground_by_the_restore_of_the_one_that_kills(
    mortal: Trial,
) -> None:
    """The code that ended the kernel is not run again, though it is in the notebook."""
    with within(20):
        mortal.client.run(mortal.code("os._exit(1)"), mortal.session_id)
    for _ in range(2):
        after = mortal.client.run("kept", mortal.session_id)
        assert after["result"][-1:] == ["5"], after
    mortal.survived()


@pytest.mark.faults
def test_a_server_that_stops_and_comes_back_is_told_and_the_session_restored(
    own_server: JupyterServer, clients: Callable[..., Client], tmp_path: Path
) -> None:
    trial = Trial(clients(server=own_server), tmp_path)
    call = trial.begin("print('before', flush=True)\nwait()", timeout=3)
    assert "before" in text_of(outcome(call))
    own_server.stop()
    with within(8):
        away = trial.client.run("", trial.session_id, timeout=2)
    assert away["error"] and "Traceback" not in text_of(away)
    with within(8):
        unknown = trial.client.call("1", timeout=2)
    assert unknown["isError"] and own_server.url in text_of(unknown["structuredContent"])
    own_server.start()
    with within(40):
        lost = trial.client.run("", trial.session_id, timeout=30)
    back = trial.client.run("kept", trial.session_id)
    assert back["result"][-1] == "5" and back["error"] == [], back
    assert "ran again" in text_of(lost) + text_of(back)
    assert "kernel" in text_of(lost), "that the running code was lost is told"
    assert trial.client.run("beside", trial.beside)["result"][-1] == "42"
    trial.survived()


# --- Nothing lost: output ------------------------------------------------------------------------

FLOODS = {
    "iopub_data_rate_limit": "print('x' * 8_000_000)",
    "iopub_msg_rate_limit": "for n in range(2000):\n    print(n, flush=True)",
}


@pytest.mark.faults
@pytest.mark.parametrize("limit", FLOODS)
def test_output_that_the_server_drops_is_told_with_the_name_of_the_limit(
    clients: Callable[..., Client], tmp_path: Path, limit: str
) -> None:
    low = "--ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=100"  # this machine may be busy
    server = JupyterServer(tmp_path / "server", low)
    trial = Trial(clients(server=server), tmp_path)
    flooded = trial.client.run(trial.code(FLOODS[limit]), trial.session_id)
    (error,) = flooded["error"]
    assert limit in error and "missing" in error

    def works() -> bool:  # the server counts over 3 s
        return trial.client.run("print('again')", trial.session_id)["result"] == ["again"]

    eventually(works)
    trial.survived()
    server.stop()


def wait_until_idle(connection_file: Path) -> None:
    """Returns when a kernel has sent all that it has to say; its Jupyter server is not asked."""
    listener = BlockingKernelClient(connection_file=str(connection_file))
    listener.load_connection_file()
    listener.start_channels()

    def is_idle() -> bool:
        sent, state = listener.kernel_info(), ""
        with suppress(queue.Empty):
            while state != "idle":
                message = listener.get_iopub_msg(timeout=1)
                if message["parent_header"].get("msg_id") == sent:
                    state = message["content"].get("execution_state", "")
        return state == "idle"

    eventually(is_idle, 30)
    listener.stop_channels()


@pytest.mark.faults
def test_output_that_a_stalled_server_did_not_take_is_told_and_the_outcome_is_known(
    own_server: JupyterServer, clients: Callable[..., Client], tmp_path: Path
) -> None:
    """ZeroMQ drops what is beyond its queues, the end of the cell with it; not the reply."""
    trial = Trial(clients(server=own_server), tmp_path)
    kernel_id = own_server.kernel_id(trial.session_id)
    body = "for n in range(5_000):\n    print(n, flush=True)\nraise ValueError('the reason')"
    call = trial.begin(f"wait()\n{body}")
    own_server.process.send_signal(signal.SIGSTOP)
    trial.open_gate()
    wait_until_idle(own_server.runtime / f"kernel-{kernel_id}.json")
    own_server.process.send_signal(signal.SIGCONT)
    flooded = outcome(call)
    assert flooded["result"][0].startswith("0\n1\n2\n"), flooded
    failed, missing = flooded["error"]
    assert missing.startswith("Output is missing") and "the reason" in failed
    trial.survived()


@pytest.mark.faults
def test_output_that_was_dropped_from_the_middle_is_told(
    own_server: JupyterServer, clients: Callable[..., Client], tmp_path: Path
) -> None:
    """The beginning and the end are there, and nothing else says that something lacks."""
    trial = Trial(clients(server=own_server), tmp_path)
    call = trial.begin(
        "wait()\nfor n in range(5_000):\n    print(n, flush=True)\ntell('printed')\n"
        "while not (folder / 'noticed').exists():\n"
        "    time.sleep(0.05)\n    print('end', flush=True)"
    )
    own_server.process.send_signal(signal.SIGSTOP)
    trial.open_gate()
    eventually(lambda: trial.told("printed"))
    own_server.process.send_signal(signal.SIGCONT)
    eventually(lambda: "end" in trial.client.progress, 30)
    (tmp_path / "noticed").touch()
    dropped = outcome(call)
    text = dropped["result"][0]
    assert text.startswith("0\n1\n2\n") and text.endswith("end") and "\n4999\n" not in text
    (missing,) = dropped["error"]
    assert missing.startswith("Output is missing")
    trial.survived()


LONG = {
    "printed": ("print('h' * 100_000 + 'é' * 100_000)", "h" * 100_000 + "é" * 100_000),
    "value": ("'v' * 200_000", repr("v" * 200_000)),
    "traceback": ("raise ValueError('t' * 200_000)", "t" * 200_000),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", LONG)
def test_output_beyond_the_limit_is_cut_and_lies_in_full_beside_the_notebook(
    trial: Trial, server: JupyterServer, kind: str
) -> None:
    code, full = LONG[kind]
    cut = trial.client.run(trial.code(code), trial.session_id)
    text = text_of(cut)
    assert 40_000 < len(text) < 51_000
    left_out = re.search(r"([\d,]+) characters left out", text)
    assert left_out is not None and abs(int(left_out[1].replace(",", "")) - 150_000) < 5_000
    path = re.search(r"[\w./-]+\.txt", text)
    assert path is not None and Path(path[0]).parent == Path("notebooks")
    assert full in (server.root / path[0]).read_text()
    assert bool(cut["error"]) == (kind == "traceback")
    if kind == "traceback":
        assert "ValueError" in cut["error"][0]
    cell = json.dumps(server.notebook(trial.session_id)["cells"][-1], ensure_ascii=False)
    assert len(cell) < 60_000, "the notebook stays small too"
    trial.survived()


@pytest.mark.faults
def test_the_limit_counts_for_the_call_and_its_errors_are_kept(trial: Trial) -> None:
    body = "print('a' * 40_000)\ndisplay('b' * 40_000)\nraise ValueError('the reason')"
    cut = trial.client.run(trial.code(body), trial.session_id)
    assert len(text_of(cut)) < 51_000
    assert "the reason" in text_of({"result": [], "error": cut["error"]})
    assert cut["result"][0].startswith("aaa") and "characters left out" in text_of(cut)
    trial.survived()


@pytest.mark.faults
def test_up_to_16_mb_of_the_full_text_are_kept(local: Client, local_folder: Path) -> None:
    cut = local.run("for n in range(30_000):\n    print('%07d' % n + '.' * 992)")
    assert cut["error"] == [] and len(text_of(cut)) < 51_000
    assert cut["result"][0].startswith("0000000...") and cut["result"][-1].endswith(".")
    assert "0029999" in cut["result"][-1]
    path = re.search(r"[\w./-]+\.txt", text_of(cut))
    assert path is not None
    text = (local_folder / path[0]).read_text()
    assert 15_000_000 < len(text) < 18_000_000
    assert text.startswith("0000000...") and "0029999" in text[-2000:]
    left_out = re.search(r"([\d,]+) characters left out", text_of(cut))
    assert left_out is not None
    assert abs(int(left_out[1].replace(",", "")) - (30_000_000 - 50_000)) < 5_000


@pytest.mark.faults
def test_endless_output_is_held_in_bounded_memory_and_the_call_is_back_in_time(
    local: Client, tmp_path: Path
) -> None:
    trial = Trial(local, tmp_path)
    before = memory(local)
    with within(9.5):
        body = "while True:\n    print('endless ' * 20)"
        first = outcome(trial.begin(body, timeout=4))
    grown = memory(local)
    with within(9):
        second = local.run("", trial.session_id, timeout=4)
    for each in (first, second):
        assert "still running" in each["error"][-1].lower(), each["error"]
    assert len(text_of(first)) < 51_000 and len(text_of(second)) < 51_000
    assert memory(local) - grown < 60e6, "it grows with the output"
    assert memory(local) - before < 300e6
    with within(15):
        stopped = local.interrupt(trial.session_id)
    assert "KeyboardInterrupt" in text_of(stopped) + text_of(local.run("", trial.session_id))
    trial.survived()


@pytest.mark.faults
@pytest.mark.load
def test_endless_displays_are_held_in_bounded_memory(local: Client, tmp_path: Path) -> None:
    trial = Trial(local, tmp_path)
    before = memory(local)
    body = "from IPython.display import HTML\n"
    body += "for n in range(400):\n    display(HTML('d' * 1_000_000))"
    shown = local.run(trial.code(body), trial.session_id, timeout=60)
    assert len(text_of(shown)) < 51_000
    assert memory(local) - before < 350e6, "400 MB were displayed"
    trial.survived()


@pytest.mark.load
def test_five_prints_of_100_mb_do_not_add_up(
    clients: Callable[..., Client], tmp_path: Path
) -> None:
    local = clients("--local", str(tmp_path), server=None)
    trial = Trial(local, tmp_path)
    used = []
    for _ in range(5):
        printed = local.run("print('x' * 100_000_000)", trial.session_id, timeout=60)
        assert printed["error"] == [] and len(text_of(printed)) < 51_000
        used.append(memory(local))
    assert used[-1] - used[0] < 30e6, [round(n / 1e6) for n in used]
    local.run(trial.code(""), trial.session_id)
    trial.survived()


class SlowNetwork(Proxy):
    """After each megabyte of the server nothing comes for a while."""

    def _pump(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                passed += len(data)
                if not from_client and passed > 1_000_000:
                    time.sleep(0.8)
                    passed = 0
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.faults
@pytest.mark.load
def test_a_large_message_on_a_slow_network_is_no_silence(
    clients: Callable[..., Client], tmp_path: Path
) -> None:
    no_limit = "--ZMQChannelsWebsocketConnection.iopub_data_rate_limit=0"
    server = JupyterServer(tmp_path / "server", no_limit)
    network = SlowNetwork(server.port)
    trial = Trial(clients(server=server, url=network.url), tmp_path)
    printed = trial.client.run(trial.code("print('x' * 8_000_000)"), trial.session_id)
    assert printed["error"] == [] and "characters left out" in text_of(printed)
    trial.survived()
    network.close()
    server.stop()


PICTURE = "from IPython.display import Image\nPNG = b'\\x89PNG\\r\\n\\x1a\\n'\n"


@pytest.mark.faults
def test_a_picture_over_4_mb_is_named_instead_of_sent(local: Client, tmp_path: Path) -> None:
    trial = Trial(local, tmp_path)
    body = PICTURE + "display(Image(PNG + os.urandom(5_000_000), format='png'))"
    shown = local.call(trial.code(body), trial.session_id)
    assert [block["type"] for block in shown["content"]] == ["text"]
    assert "image/png" in text_of(shown["structuredContent"])
    assert shown["structuredContent"]["error"] == []
    trial.survived()


@pytest.mark.faults
def test_pictures_beyond_the_tenth_are_named_instead_of_sent(local: Client, tmp_path: Path) -> None:
    trial = Trial(local, tmp_path)
    body = PICTURE + "for n in range(12):\n    display(Image(PNG + bytes([n]), format='png'))"
    shown = local.call(trial.code(body), trial.session_id)
    images = [block for block in shown["content"] if block["type"] == "image"]
    assert len(images) == 10 and {block["mimeType"] for block in images} == {"image/png"}
    assert len({block["data"] for block in images}) == 10
    assert text_of(shown["structuredContent"]).count("image/png") == 2
    trial.survived()


@pytest.mark.faults
def test_pictures_of_earlier_code_count_too_and_none_is_left_unsaid(
    local: Client, tmp_path: Path
) -> None:
    trial = Trial(local, tmp_path)
    body = "for n in range(8):\n    display(Image(PNG + bytes([n]), format='png'))"
    trial.begin(PICTURE + "wait()\n" + body, timeout=0).result(20)
    trial.open_gate()
    shown = local.call(body, trial.session_id)
    assert [block["type"] for block in shown["content"]].count("image") == 10
    assert text_of(shown["structuredContent"]).count("image/png") == 6
    trial.survived()


@pytest.mark.faults
@pytest.mark.parametrize("code", ["input()", "import getpass\ngetpass.getpass()"])
def test_input_is_an_immediate_error_that_says_so(trial: Trial, code: str) -> None:
    with within(5):
        asked = trial.client.run(trial.code(code), trial.session_id)
    assert len(asked["error"]) == 1 and "input" in asked["error"][0]
    trial.survived()


FINAL = {
    "display update": ("h = display('one', display_id=True)\nh.update('two')", ["'two'"]),
    "clear_output": ("print('a')\nclear_output()\nprint('b')", ["b"]),
    "clear_output(wait)": ("print('a')\nclear_output(wait=True)\nprint('b')", ["b"]),
    "clear_output(wait) and nothing": ("print('a')\nclear_output(wait=True)", ["a"]),
    "progress bar": ("for n in range(101):\n    print(f'\\r{n}%', end='', flush=True)", ["100%"]),
    "bar of a line": ("print('old\\rnew')\nprint('windows\\r\\nlines')", ["new\nwindows\nlines"]),
    "bar on stderr": (
        "import sys\nfor n in range(9):\n    print(n, end='\\r', file=sys.stderr)",
        ["8"],
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", FINAL)
def test_of_what_is_shown_again_only_the_final_state_is_left(
    trial: Trial, server: JupyterServer, kind: str
) -> None:
    code, final = FINAL[kind]
    body = "from IPython.display import clear_output\n" + code
    shown = trial.client.run(trial.code(body), trial.session_id)
    assert (shown["result"], shown["error"]) == (final, [])
    outputs = server.notebook(trial.session_id)["cells"][-1]["outputs"]
    assert len(outputs) == 1 and "one" not in json.dumps(outputs)
    trial.survived()


@pytest.mark.faults
def test_a_progress_bar_that_outlives_its_call_is_not_repeated(trial: Trial) -> None:
    body = "print('\\r10%', end='', flush=True)\nwait()\nprint('\\r100%', end='')"
    early = outcome(trial.begin(body, timeout=1))
    trial.open_gate()
    rest = trial.client.run("", trial.session_id)
    assert (early["result"], rest["result"]) == (["10%"], ["100%"])
    trial.survived()


@pytest.mark.faults
def test_output_of_a_background_thread_comes_with_the_next_calls(trial: Trial) -> None:
    body = (
        "import threading\n"
        "def later():\n    wait()\n    print('from the thread', flush=True)\n    tell('said')\n"
        "threading.Thread(target=later).start()\nprint('cell')"
    )
    assert trial.client.run(trial.code(body), trial.session_id)["result"] == ["cell"]
    trial.open_gate()
    eventually(lambda: trial.told("said"))
    collected: list[str] = []

    def came() -> bool:
        collected.append(text_of(trial.client.run("print('next')", trial.session_id)))
        return "from the thread" in collected[-1]

    eventually(came, 5)
    assert len(collected) <= 2 and "next" in collected[-1]
    assert "from the thread" not in text_of(trial.client.run("1", trial.session_id))
    trial.survived()


@pytest.mark.faults
def test_output_that_comes_while_an_unused_connection_is_open_is_not_lost_when_it_closes(
    server: JupyterServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jim, "IDLE_S", 0.5)
    session = jim.Interpreter(jim.RemoteJupyterClient(server.url, server.token)).session()
    gate = tmp_path / "gate"
    body = (
        "import pathlib, threading, time\n"
        f"def later():\n    while not pathlib.Path({str(gate)!r}).exists():\n        time.sleep(0.01)\n"
        "    print('from the thread', flush=True)\n"
        "threading.Thread(target=later).start()\nprint('cell')"
    )
    assert session.execute(body).result == ["cell"]
    gate.touch()
    eventually(lambda: not session._works)
    after = session.execute("6 * 7").result
    assert "from the thread" in after[0] and after[1:] == ["42"]


# --- Nothing lost: the MCP server ----------------------------------------------------------------


@pytest.mark.faults
def test_code_goes_on_when_the_mcp_server_is_killed_and_the_next_one_waits_for_it(
    clients: Callable[..., Client], tmp_path: Path
) -> None:
    trial = Trial(clients(), tmp_path)
    trial.begin("print('before', flush=True)\nwait()\nfound = 'by then'\ntell('done')")
    trial.client.kill()
    trial.client = clients()
    with within(10):
        busy = trial.client.run(trial.code("tell('late')"), trial.session_id, timeout=1)
    assert "not run" in text_of(busy).lower()
    call = trial.client.start("found", trial.session_id)
    assert not trial.told("done")
    trial.open_gate()
    waited = outcome(call)
    assert waited["result"][-1] == "'by then'" and waited["error"] == []
    told = text_of(busy) + text_of(waited)
    assert "not known" in told or "cannot know" in told, told
    assert not trial.told("late")
    trial.survived()


def assert_goes_on(trial: Trial, clients: Callable[..., Client]) -> None:
    """The code went on without its MCP server, and the next one finds what it left."""
    trial.open_gate()
    eventually(lambda: trial.told("done"))
    trial.client = clients()
    after = trial.client.run("found", trial.session_id)
    assert (after["result"][-1], after["error"]) == ("'by then'", [])
    trial.survived()


@pytest.mark.sdk
@pytest.mark.faults
def test_a_client_that_goes_away_leaves_its_code_running_and_finds_it_in_the_notebook(
    clients: Callable[..., Client], tmp_path: Path, server: JupyterServer
) -> None:
    trial = Trial(clients(), tmp_path)
    body = "print('before', flush=True)\ntell('said')\nwait()\nfound = 'by then'\ntell('done')"
    trial.client.start(trial.code(body), trial.session_id, timeout=0).result(20)
    eventually(lambda: trial.told("said"))
    pid = trial.client.pid
    trial.client.run("", trial.session_id, timeout=0.5)
    waiting = trial.client.start("", trial.session_id)
    with within(8):
        trial.client.close()
        eventually(lambda: not psutil.pid_exists(pid), 8)
    assert waiting.done() or waiting.cancel()
    cell = server.notebook(trial.session_id)["cells"][-1]
    assert "tell('said')" in "".join(cell["source"]) and "before" in json.dumps(cell["outputs"])
    assert_goes_on(trial, clients)


@pytest.mark.sdk
@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_and_leaves_code_running_and_its_output_saved(
    clients: Callable[..., Client], tmp_path: Path, server: JupyterServer, number: signal.Signals
) -> None:
    trial = Trial(clients(), tmp_path)
    body = "print('before', flush=True)\ntell('said')\nwait()\nfound = 'by then'\ntell('done')"
    trial.client.start(trial.code(body), trial.session_id, timeout=0).result(20)
    eventually(lambda: trial.told("said"))
    trial.client.run("", trial.session_id, timeout=0.5)
    process = psutil.Process(trial.client.pid)
    os.kill(trial.client.pid, number)

    def ended() -> bool:
        with suppress(psutil.NoSuchProcess):
            return process.status() == "zombie"
        return True

    eventually(ended, 5)
    trial.client.close()
    assert "before" in json.dumps(server.notebook(trial.session_id)["cells"][-1]["outputs"])
    assert_goes_on(trial, clients)


@pytest.mark.sdk
@pytest.mark.faults
def test_stdout_carries_json_rpc_and_nothing_else(server: JupyterServer) -> None:
    cells = ["print('out')", "1 / 0", "ls", "import os\nos._exit(1)", "x = 1\x1b[0m", "'\\udc80'"]
    start = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "raw", "version": "1"},
    }
    messages: list[dict[str, Any]] = [
        {"id": 0, "method": "initialize", "params": start},
        {"method": "notifications/initialized"},
        {"id": 90, "method": "tools/list"},
        {"id": 91, "method": "no/such/method"},
        {"id": 92, "method": "tools/call", "params": {"name": "no_such_tool", "arguments": {}}},
        *(
            {
                "id": n,
                "method": "tools/call",
                "params": {
                    "name": "execute_code",
                    "arguments": {"code": code, "session_id": 31337},
                },
            }
            for n, code in enumerate(cells, 1)
        ),
    ]
    flags = ["--jupyter-base-url", server.url, "--jupyter-token", server.token, "--verbose"]
    pipe = subprocess.PIPE
    command = [*COMMAND, *flags]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        answered: set[int] = set()
        for message in messages:
            process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
            process.stdin.flush()
            while "id" in message and message["id"] not in answered:
                line = json.loads(process.stdout.readline())
                assert line["jsonrpc"] == "2.0"
                answered.add(line.get("id", -1))
        process.stdin.close()
        assert [json.loads(line) for line in process.stdout] == []
        assert process.stderr is not None
        log = process.stderr.read()
    assert process.returncode == 0
    assert "/api/" in log and server.token not in log and "Traceback" not in log


# --- Load ----------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.load)])
def test_calls_that_wait_keep_their_order(trial: Trial, server: JupyterServer, count: int) -> None:
    trial.client.run(trial.code("seen = []"), trial.session_id)
    calls = [
        trial.client.start(f"seen.append({n})\nprint({n})", trial.session_id) for n in range(100)
    ]
    for n, call in enumerate(calls):
        result = outcome(call)
        assert (result["result"], result["error"]) == ([str(n)], [])
    for n in range(100, count):
        result = trial.client.run(f"seen.append({n})\nprint({n})", trial.session_id)
        assert (result["result"], result["error"]) == ([str(n)], [])
    assert trial.client.run(f"seen == list(range({count}))", trial.session_id)["result"] == ["True"]
    cells = server.notebook(trial.session_id)["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    sources = [source for source in sources if source.startswith("seen.append")]
    assert sources == [f"seen.append({n})\nprint({n})" for n in range(count)]
    assert len({cell["id"] for cell in cells}) == len(cells)
    trial.survived()


@pytest.mark.faults
@pytest.mark.parametrize(("rounds", "calls"), [(10, 3), pytest.param(50, 20, marks=pytest.mark.load)])
def test_threads_and_descriptors_do_not_leak(
    clients: Callable[..., Client], network: Network, tmp_path: Path, rounds: int, calls: int
) -> None:
    """After many calls, up to 50 cancelled ones and 20 dropped connections."""
    far = Trial(clients(url=network.url), tmp_path)
    process = psutil.Process(far.client.pid)
    before = (process.num_threads(), process.num_fds())
    for n in range(rounds):
        mark = far.folder / f"cancelled{n}"
        code = f"import pathlib, time\npathlib.Path({str(mark)!r}).touch()\ntime.sleep(100)"
        call = far.client.start(code, far.session_id)
        eventually(mark.exists)
        cancel(far.client, call)
        far.client.run("", far.session_id)
        if n % 5 in (1, 3):
            network.cut()
        for m in range(calls):
            assert far.client.run(f"print({m})", far.session_id)["result"][-1:] == [str(m)]
    far.client.run(far.code(""), far.session_id)
    far.survived()
    eventually(lambda: process.num_threads() <= before[0] + 5, 45)
    eventually(lambda: process.num_fds() <= before[1] + 5, 45)


@pytest.mark.load
def test_100_sessions_at_once_each_get_their_own(
    clients: Callable[..., Client], own_server: JupyterServer
) -> None:
    client, count = clients(server=own_server), 100
    calls = [client.start(f"own = {n}", timeout=300) for n in range(count)]
    opened = [outcome(call, 330) for call in calls]
    assert [o["error"] for o in opened] == [[]] * count
    ids = [o["session_id"] for o in opened]
    assert len(set(ids)) == count and {len(str(i)) for i in ids} == {10}
    code = "import time\ntime.sleep(1)\nprint(own)"
    with within(count / 3):  # one after the other they would take `count` seconds
        slept = [outcome(call) for call in [client.start(code, i) for i in ids]]
    assert [(o["result"], o["error"]) for o in slept] == [([str(n)], []) for n in range(count)]


# --- At home everywhere --------------------------------------------------------------------------


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


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelGateway]:
    gateway = KernelGateway(tmp_path_factory.mktemp("gateway"))
    yield gateway
    gateway.stop()


def test_a_bare_kernel_gateway_has_sessions_and_a_warning_that_no_notebook_is_kept(
    gateway: KernelGateway, clients: Callable[..., Client], tmp_path: Path
) -> None:
    ended = command(*flags_for(gateway), "--execute", "6 * 7")
    assert json.loads(ended.stdout)["result"] == ["42"] and ended.returncode == 0
    assert "no contents API" in ended.stderr and ended.stderr.count("\n") == 1
    client = clients(server=gateway)
    session_id = client.run("x = 1")["session_id"]
    assert client.run("echo $((x + 2)); cd /tmp", session_id)["error"] == []
    assert client.run("import os; x, os.getcwd()", session_id)["result"] == ["(1, '/tmp')"]
    died = client.run("os._exit(1)", session_id)
    assert "died" in died["error"][0]
    again = client.run("'x' in globals()", session_id)
    assert again["result"][-1:] == ["False"], again
    assert "starts empty" in again["result"][0]


def test_a_server_in_front_of_a_gateway_keeps_notebooks_and_restores(
    gateway: KernelGateway, clients: Callable[..., Client], tmp_path: Path
) -> None:
    """--gateway-url: the way to a cluster."""
    front = JupyterServer(
        tmp_path / "front",
        f"--gateway-url={gateway.url}",
        f"--GatewayClient.auth_token={gateway.token}",
    )
    try:
        client = clients(server=front)
        session_id = client.run("x = 41")["session_id"]
        assert client.run("x + 1", session_id)["result"] == ["42"]
        sources = [cell["source"] for cell in front.notebook(session_id)["cells"]]
        assert sources == ["x = 41", "x + 1"]
        front.api("DELETE", f"kernels/{front.kernel_id(session_id)}").raise_for_status()
        restored = client.run("x", session_id)
        assert restored["result"][-1] == "41" and "ran again" in restored["result"][0]
        client.close()
        assert clients(server=front).run("x", session_id)["result"] == ["41"]
    finally:
        front.stop()


class ConnectProxy(Proxy):
    """An HTTP proxy: CONNECT, and whole URLs for plain HTTP. seen: the first line of each."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__(0)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
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
            server.sendall(b"%s %s HTTP/1.1\r\nConnection: close\r\n%s" % (method, path, rest))
        pair = (client, server)
        threading.Thread(target=self._pump, args=(*pair[::-1], False), daemon=True).start()
        self._pump(*pair, True)


def test_the_usual_proxy_variables_count_for_rest_and_websocket(
    server: JupyterServer, clients: Callable[..., Client]
) -> None:
    proxy = ConnectProxy()
    clean = {name: "" for name in ("NO_PROXY", "no_proxy", "http_proxy")}
    through = {**clean, "HTTP_PROXY": proxy.url, "http_proxy": proxy.url}
    client = clients(environment=through)
    session_id = client.run("x = 41")["session_id"]
    assert client.run("x + 1", session_id)["result"] == ["42"]
    assert any(line.startswith("GET http://") for line in proxy.seen)
    assert any(line == f"CONNECT {LOOPBACK}:{server.port}" for line in proxy.seen)
    seen = len(proxy.seen)
    direct = clients(environment={**through, "NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK})
    assert direct.run("x + 1", session_id)["result"] == ["42"]
    assert len(proxy.seen) == seen
    proxy.close()


def test_a_message_without_a_parent_belongs_to_nobody(client: Client) -> None:
    """xeus kernels send some, with null in place of the parent's header."""
    code = """kernel = get_ipython().kernel
lonely = kernel.session.msg("stream", {"name": "stdout", "text": "lonely"})
kernel.session.send(kernel.iopub_socket, {**lonely, "parent_header": None})
print("after")"""
    answer = client.run(code)
    assert (answer["result"], answer["error"]) == (["after"], [])
    assert client.run("1", answer["session_id"])["result"] == ["1"]


def test_a_kernel_of_another_language_gets_its_cells_unchanged(
    clients: Callable[..., Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_kernel(tmp_path / "share", monkeypatch, "bash", sys.executable, "-m", "bash_kernel")
    server = JupyterServer(tmp_path / "jupyter")
    try:
        client = clients("--kernel-name", "bash", server=server)
        first = client.run("x=41; echo first")
        assert (first["result"], first["error"]) == (["first"], [])
        session_id = first["session_id"]
        assert client.run("echo $((x + 1))", session_id)["result"] == ["42"]
        assert client.run("(exit 3)", session_id)["error"] != []
        notebook = server.notebook(session_id)
        assert notebook["metadata"]["kernelspec"]["name"] == "bash"
        assert [cell["source"] for cell in notebook["cells"]][:1] == ["x=41; echo first"]
        server.api("DELETE", f"kernels/{server.kernel_id(session_id)}").raise_for_status()
        restored = client.run("echo $x", session_id)
        assert restored["result"][-1] == "41" and "ran again" in restored["result"][0]
        kernel = f"kernels/{server.kernel_id(session_id)}"
        server.api("POST", f"{kernel}/restart").raise_for_status()
        again = client.run("echo $x $PPID", session_id)
        assert "ran again" in text_of(again) and again["result"][-1].startswith("41 "), again
        os.kill(int(again["result"][-1].split()[1]), signal.SIGSTOP)  # it hangs
        server.api("POST", f"{kernel}/restart").raise_for_status()
        hung = client.run("echo $x", session_id)
        assert "ran again" in text_of(hung) and hung["result"][-1] == "41", hung
    finally:
        server.stop()


def test_readme_and_the_settings_example_name_each_flag_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        jim.main(["--help"])
    flags = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.M))
    here = Path(__file__).parent
    table = (here / "README.md").read_text().partition("## Flags")[2].partition("\n## ")[0]
    rows = "\n".join(line for line in table.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(--[a-z-]+)", rows)) == flags
    names = set(re.findall(r"`((?:JUPYTER|NOTEBOOKS)_[A-Z_]+)`", rows))
    example = (here / ".env.example").read_text()
    assert {name for name in names if f"{name}=" not in example} == set()


def test_the_readme_lines_for_another_program_run_beside_a_copied_file(
    server: JupyterServer, tmp_path: Path
) -> None:
    here = Path(jim.__file__)
    shutil.copy(here, tmp_path)
    readme = (Path(__file__).parent / "README.md").read_text()
    program = re.search(r"```python\n(# vendored\.py\n.*?)```", readme, re.S)
    assert program is not None
    (tmp_path / "vendored.py").write_text(
        program[1] + "\nimport sys\nassert 'mcp' not in sys.modules\n"
    )
    names = {"JUPYTER_BASE_URL": server.url, "JUPYTER_TOKEN": server.token}
    ended = subprocess.run(
        [sys.executable, "vendored.py"],
        cwd=tmp_path,
        env={**os.environ, **names},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0 and "result=['42']" in ended.stdout, ended.stderr


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
    'scopes': ['admin:users', 'admin:servers', 'tokens', 'access:servers', 'list:users']}}]
"""


@pytest.mark.hub
def test_jupyterhub_serves_the_whole_job_under_a_users_path(
    clients: Callable[..., Client], tmp_path: Path
) -> None:
    admin, ports = secrets.token_hex(16), [free_port() for _ in range(3)]
    bin_folder = Path(sys.executable).parent
    (tmp_path / "home").mkdir()
    config = HUB.format(ports=ports, admin=admin, folder=tmp_path, bin=bin_folder)
    (tmp_path / "config.py").write_text(config)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    with open(tmp_path / "hub.log", "wb") as output:
        hub = subprocess.Popen(
            [bin_folder / "jupyterhub", "-f", tmp_path / "config.py"],
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            env={**os.environ, "PATH": path},
        )
    url = f"http://{LOOPBACK}:{ports[0]}"

    def api(method: str, what: str) -> Any:
        headers = {"Authorization": f"token {admin}"}
        with contextlib.suppress(requests.ConnectionError):
            answer = requests.request(method, f"{url}/hub/api/{what}", headers=headers, timeout=60)
            return answer.json() if "json" in answer.headers.get("Content-Type", "") else None

    def ready() -> Any:
        return api("GET", "users/alice")["servers"].get("", {}).get("ready")

    def run_once(name: str, *flags: str, token: str) -> subprocess.CompletedProcess[str]:
        server = ["--jupyter-base-url", f"{url}/user/{name}/", "--jupyter-token", token]
        command = [*COMMAND, *server, "--execute", "6 * 7", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    try:
        eventually(lambda: api("GET", ""), 60)
        api("POST", "users/alice")
        token = api("POST", "users/alice/tokens")["token"]
        stopped = run_once("alice", token=token)
        assert stopped.returncode == 1 and "/hub/" in stopped.stderr and "start" in stopped.stderr
        api("POST", "users/alice/server")
        eventually(ready, 60)
        assert json.loads(run_once("alice", token=token).stdout)["result"] == ["42"]
        wrong = run_once("alice", token="wrong")
        assert wrong.returncode == 1 and "token" in wrong.stderr
        nobody = run_once("nobody", token=token)
        assert nobody.returncode == 1 and "name" in nobody.stderr
        flags = ("--jupyter-base-url", f"{url}/user/alice/", f"--jupyter-token={token}")
        client = clients(*flags, server=None)
        session_id = client.run("x = 41")["session_id"]
        assert client.run("echo hi", session_id)["result"] == ["hi"]
        client.close()
        again = clients(*flags, server=None)
        assert again.run("x + 1", session_id)["result"] == ["42"]
        headers = {"Authorization": f"token {token}"}
        sessions = requests.get(
            f"{url}/user/alice/api/sessions", headers=headers, timeout=30
        ).json()
        kernel_id = sessions[-1]["kernel"]["id"]
        kernel = f"{url}/user/alice/api/kernels/{kernel_id}"
        requests.delete(kernel, headers=headers, timeout=30)
        restored = again.run("x + 1", session_id)["result"]
        assert restored[-1] == "42" and "ran again" in restored[0]
    finally:
        with contextlib.suppress(Exception):
            api("DELETE", "users/alice/server")
        hub.terminate()
        hub.wait(30)


# --- Figures -------------------------------------------------------------------------------------
# `pytest -m bench -s` prints the table of README: figure, ratio, bar. A test fails only if
# something is wrong, never because the machine is slow.

NO_LIMITS = [
    f"--ZMQChannelsWebsocketConnection.iopub_{kind}_rate_limit=0" for kind in ("data", "msg")
]


def row(name: str, figure: str, ratio: float | None = None, bar: float | None = None) -> None:
    """One line of the table."""
    shown = f"{ratio:8.2f}" if ratio is not None else " " * 8
    met = ""
    if bar is not None and ratio is not None:
        met = f"  bar {bar:g}: {'met' if ratio <= bar else 'MISSED'}"
    print(f"\n{name:52} {figure:38} {shown}{met}", end="", flush=True)


def milliseconds(values: list[float]) -> float:
    return 1000 * statistics.median(values)


class ZeroMQ:
    """A kernel of this machine through jupyter_client: what there is to compare with."""

    def __init__(self) -> None:
        self.manager = KernelManager()
        self.manager.start_kernel(stderr=subprocess.DEVNULL)
        self.client: BlockingKernelClient = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def timed(self, code: str) -> float:
        """Seconds until the reply and the idle status of a cell are here."""
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


def timed(client: Client, code: str, session_id: int = 0) -> tuple[float, dict[str, Any]]:
    """Seconds of one call, on the client's own loop, and the result's structure."""

    async def call() -> tuple[float, Any]:
        given = {"code": code, "session_id": session_id}
        started = time.perf_counter()
        result = await client.session.call_tool("execute_code", given)
        return time.perf_counter() - started, result

    took, result = asyncio.run_coroutine_threadsafe(call(), client.loop).result(180)
    structure: dict[str, Any] = result.model_dump(by_alias=True)["structuredContent"]
    assert structure["error"] == [], structure
    return took, structure


@pytest.fixture(scope="module")
def fast_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """A Jupyter server without rate limits, which speaks with its kernels as `ZeroMQ` does."""
    server = JupyterServer(tmp_path_factory.mktemp("bench"), *NO_LIMITS, transport="tcp")
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


@pytest.mark.bench
def test_bench_small_call(fast: Client, zeromq: ZeroMQ) -> None:
    session_id = timed(fast, "x = 1")[1]["session_id"]
    ours, floor = [], []
    for n in range(110):
        took = timed(fast, "x = 1", session_id)[0], zeromq.timed("x = 1")
        if n >= 10:  # the first ones warm up
            ours.append(took[0])
            floor.append(took[1])
    ratio = milliseconds(ours) / milliseconds(floor)
    figure = f"{milliseconds(ours):.1f} / {milliseconds(floor):.1f} ms"
    row("small call / ZeroMQ", figure, ratio, 2.5)


@pytest.mark.bench
def test_bench_small_call_at_1000_cells(fast: Client, fast_server: JupyterServer) -> None:
    cell = "x = 1\n".ljust(499, "#") + "\n"
    long_id = timed(fast, cell)[1]["session_id"]
    for _ in range(999):
        timed(fast, cell, long_id)
    assert len(fast_server.notebook(long_id)["cells"]) == 1000
    first, late = [], []
    for _ in range(5):
        new_id = timed(fast, cell)[1]["session_id"]
        for _ in range(10):
            first.append(timed(fast, cell, new_id)[0])
            late.append(timed(fast, cell, long_id)[0])
    assert len(fast_server.notebook(long_id)["cells"]) == 1050
    figure = f"{milliseconds(late):.1f} / {milliseconds(first):.1f} ms"
    ratio = milliseconds(late) / milliseconds(first)
    row("small call at 1,000 cells / first ten", figure, ratio, 1.5)


@pytest.mark.bench
def test_bench_new_session(fast: Client) -> None:
    ours, floor = [], []
    for _ in range(8):
        ours.append(timed(fast, "x = 1")[0])
        started = time.perf_counter()
        zeromq = ZeroMQ()
        zeromq.timed("x = 1")
        floor.append(time.perf_counter() - started)
        zeromq.close()
    figure = f"{milliseconds(ours):.0f} / {milliseconds(floor):.0f} ms"
    row(
        "first result of a new session / jupyter_client",
        figure,
        milliseconds(ours) / milliseconds(floor),
        1.3,
    )


@pytest.mark.bench
def test_bench_first_call_after_restart(fast_server: JupyterServer) -> None:
    client = Client(fast_server)
    session_id = timed(client, "x = 1")[1]["session_id"]
    small = [timed(client, "x = 1", session_id)[0] for _ in range(60)][10:]
    first = []
    for _ in range(7):
        client.close()
        client = Client(fast_server)
        took, result = timed(client, "x", session_id)
        assert result["result"] == ["1"]
        first.append(took)
    client.close()
    ratio = milliseconds(first) / milliseconds(small)
    figure = f"{milliseconds(first):.1f} / {milliseconds(small):.1f} ms"
    row("first call after a restart / small call", figure, ratio, 10)


LARGE = {
    "300,000 lines of é": "print('é\\n' * 300_000)",
    "one line of 600,000 é": "print('é' * 600_000)",
}


@pytest.mark.bench
@pytest.mark.parametrize("kind", LARGE)
def test_bench_large_output(
    fast: Client, fast_server: JupyterServer, zeromq: ZeroMQ, kind: str
) -> None:
    session_id = timed(fast, "x = 1")[1]["session_id"]
    ours, floor = [], []
    for _ in range(20):
        took, result = timed(fast, LARGE[kind], session_id)
        ours.append(took)
        floor.append(zeromq.timed(LARGE[kind]))
        text = "".join(result["result"])
        assert "characters left out" in text and len(text) < 51_000
    texts = list((fast_server.root / "notebooks").glob(f"{session_id}*.txt"))
    assert len(texts) == 20 and texts[0].read_text().count("é") in (300_000, 600_000)
    ratio = milliseconds(ours) / milliseconds(floor)
    figure = f"{milliseconds(ours):.0f} / {milliseconds(floor):.0f} ms"
    row(f"{kind} / ZeroMQ", figure, ratio, 4)


EMPTY_SERVER = """
try:
    from mcp.server.mcpserver import MCPServer as Server
except ImportError:
    from mcp.server.fastmcp import FastMCP as Server
server = Server("empty")
server.run("stdio")
"""


def seconds_to_initialize(command: list[str]) -> float:
    """From the start of a process to its answer to `initialize`."""
    start = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "bench", "version": "1"},
    }
    message = {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": start}
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    started = time.perf_counter()
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        took = time.perf_counter() - started
        process.stdin.close()
    assert "serverInfo" in answer["result"]
    return took


@pytest.mark.bench
def test_bench_start(fast_server: JupyterServer, tmp_path: Path) -> None:
    script = tmp_path / "empty.py"
    script.write_text(EMPTY_SERVER)
    ours_command = [
        *COMMAND,
        f"--jupyter-base-url={fast_server.url}",
        f"--jupyter-token={fast_server.token}",
    ]
    ours, empty = [], []
    for _ in range(12):
        ours.append(seconds_to_initialize(ours_command))
        empty.append(seconds_to_initialize([sys.executable, str(script)]))
    figure = f"{milliseconds(ours):.0f} / {milliseconds(empty):.0f} ms"
    ratio = milliseconds(ours) / milliseconds(empty)
    row("start to `initialize` / empty server", figure, ratio, 1.3)


@pytest.mark.bench
def test_bench_memory(tmp_path: Path) -> None:
    """--local has no rate limits."""
    client = Client(None, "--local", str(tmp_path))
    session_id = timed(client, "x = 1")[1]["session_id"]
    process, used = psutil.Process(client.pid), []
    start = process.memory_info().rss
    for _ in range(5):
        timed(client, "print('x' * 100_000_000)", session_id)
        used.append(process.memory_info().rss)
    client.close()
    figure = f"{start / 1e6:.0f} MB, then " + ", ".join(f"{n / 1e6:.0f}" for n in used)
    more = (used[-1] - used[0]) / 1e6
    row("memory of five 100 MB prints, MB more than after one", figure, more, 30)


@pytest.mark.bench
def test_bench_50_sessions(fast: Client) -> None:
    calls = [fast.start("own = 1", timeout=170) for _ in range(50)]
    opened = [call.result(180).model_dump(by_alias=True)["structuredContent"] for call in calls]
    assert [structure["error"] for structure in opened] == [[]] * 50
    ids = [structure["session_id"] for structure in opened]
    started = time.perf_counter()
    calls = [fast.start("import time\ntime.sleep(1)\n'slept'", session_id) for session_id in ids]
    for call in calls:
        structure = call.result(60).model_dump(by_alias=True)["structuredContent"]
        assert (structure["result"], structure["error"]) == (["'slept'"], [])
    took = time.perf_counter() - started
    row("50 sessions that sleep 1 s at once", f"{took:.2f} s", took, 2)


@pytest.mark.bench
@pytest.mark.parametrize("delay_ms", [20, 200])
def test_bench_network_delay(fast_server: JupyterServer, delay_ms: int) -> None:
    """Round trips of a small call. The proxy ends TCP on either side, so acknowledgements do not
    cross the delay: what Nagle's algorithm costs between server and proxy is that of loopback."""
    network = Network(fast_server.port)
    client = Client(fast_server, url=network.url)
    session_id = timed(client, "x = 1")[1]["session_id"]
    network.delay_s = delay_ms / 1000
    count = 55 if delay_ms < 100 else 12
    took = [timed(client, "x = 1", session_id)[0] for _ in range(count)][2:]
    client.close()
    network.close()
    trips = milliseconds(took) / (2 * delay_ms)
    row(f"small call at {delay_ms} ms each way", f"{milliseconds(took):.0f} ms, round trips", trips)
