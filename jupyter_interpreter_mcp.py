#!/usr/bin/env python3
"""Give an agent a code interpreter on a remote Jupyter server, over the Model Context Protocol.

A session is a notebook on the Jupyter server, bound to a kernel there: the agent works in it
through one tool, a person can open the notebook in JupyterLab and go on in the same kernel. Nothing
runs on the machine of the MCP server, but with --local. It does not serve HTTP, cull kernels, start
containers or resize pictures; the README names what does.

The file reads from top to bottom:

    Constants           numbers and names, each with its reason
    Errors and data     what can go wrong, what is handed over
    Protocol, pure      frames, the output of a cell, whose language a cell is in
    Jupyter server      REST
    Kernel              one kernel over one websocket
    Notebook            one session's file
    Session             one cell after the other; restoring, time, interrupting; all sessions
    Bash                the helper inside the kernel
    Tools               the MCP side, the one place where threads and asyncio meet
    Command line        flags, variables, .env, --local, --execute

Errors, all raised on purpose:

    InterpreterError
      ConfigError(ValueError)                a setting is missing or malformed
      ServerError                            the Jupyter server answered with a failure
        ServerUnreachable(ConnectionError)   no answer: refused, unknown host, TLS, time-out
        ServerRefused(PermissionError)       401 or 403: the token is wrong or lacks rights
        NotFound(LookupError)                404
      NotebookError                          the session's file is no notebook to continue
      KernelError
        KernelDied                           it ended or restarted; its variables are gone
        ConnectionLost(ConnectionError)      the websocket broke, or lost what we wait for

Sources: "Messaging in Jupyter" (jupyter-client.readthedocs.io, messaging.html), "WebSocket kernel
wire protocols" (jupyter-server.readthedocs.io, websocket-protocols.html), the server's REST API
(jupyter_server/services/api/api.yaml), the notebook format (nbformat.readthedocs.io), RFC 6455.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["mcp>=1.23,<3", "requests>=2.31,<3", "websocket-client>=1.9.1,<2"]
# ///
import argparse
import ast
import asyncio
import contextlib
import ctypes
import importlib.util
import io
import json
import logging
import os
import posixpath
import re
import secrets
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import datetime, timezone
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote, urlsplit

import requests
import websocket

__version__ = "0.3.0"

log = logging.getLogger("jupyter_interpreter_mcp")

# --- Constants -----------------------------------------------------------------------------------

PROGRAM = "jupyter-interpreter-mcp"  # begins each client_session_id: so we know our own kind
MAX_SESSION_ID = 2**53 - 1  # the largest integer that every JSON reader keeps exact
CONNECT_TIMEOUT_S = 10.0  # for a TCP connection
HTTP_TIMEOUT_S = 30.0  # for an answer
STARTS_S = 30.0  # a kernel whose websocket is not answered by then hangs: it is started once more
KERNEL_TIMEOUT_S = 60.0  # for a kernel to start, or to connect to one again
TICK_S = 0.5  # how often a waiting thread looks up: closing? kernel lost? time to save?
SILENCE_S = 2.0  # no message for so long: ask over REST, a deleted kernel's websocket is silent
LOST_S = 10.0  # a busy kernel that has not begun our request for so long: connect again
IDLE_S = 30.0  # an unused websocket is closed; the server drops one that is not read for 90 s
SAVE_EVERY_S = 10.0  # a cell that runs on is saved so often, for whoever opens the notebook
FRESH_S = 1.0  # so long we believe what we saw: the kernel is there, nobody changed the file
PROGRESS_S = 5.0  # between two progress notifications
INTERRUPT_S = 5.0  # how long an interrupt may take before we say that it did not work
RESTART_S = 14.5  # the same for an interrupt and a restart together
EXIT_S = 2.0  # for saving at exit; MCP clients kill a server that takes longer

TEXT_KEPT = 15_000_000  # characters of one cell's text that are kept, then
TAIL_KEPT = 1_000_000  # characters of the end of it
NOTEBOOK_TEXT = 10_000  # characters of an output over --max-output that the notebook shows
DATA_KEPT = 64_000_000  # characters of pictures and other rich output of one cell
ITEM_COST = 1_000  # what one more output costs, however short it is
IMAGES_SENT = 10  # pictures in one result
IMAGE_BYTES = 4_000_000  # larger pictures are named instead of sent; clients refuse them
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"  # binary frames: 18 x faster for large text
HELPER_NAME = "_jupyter_interpreter_mcp"  # of the module in the kernel
KERNEL_GONE = "The kernel is gone: it was shut down, or culled when it was idle."

# --- Errors and data -----------------------------------------------------------------------------


class InterpreterError(Exception):
    """Every error that this module raises on purpose; its text says what to do next."""


class ConfigError(InterpreterError, ValueError):
    """A setting is missing, malformed or does not fit the server."""


class ServerError(InterpreterError):
    """The Jupyter server answered with a failure."""


class ServerUnreachable(ServerError, ConnectionError):
    """No answer from the server: refused, unknown host, TLS, time-out."""


class ServerRefused(ServerError, PermissionError):
    """401 or 403: the token is wrong or lacks rights."""


class NotFound(ServerError, LookupError):
    """404: no such kernel, file or API on this server."""


class NotebookError(InterpreterError):
    """The session's file is not a notebook that can be continued; it is left as it is."""


class KernelError(InterpreterError):
    """The kernel or the connection to it failed."""


class KernelDied(KernelError):
    """The kernel ended or restarted; its variables are gone."""


class ConnectionLost(KernelError, ConnectionError):
    """The websocket broke, or lost the request that we wait for."""


class Settings(NamedTuple):
    """How an interpreter works. folder: on the server, relative to its root or absolute."""

    folder: str = "notebooks"
    kernel_name: str = ""
    timeout_s: float = 50.0
    max_output: int = 50_000
    restore: bool = True


class Result(NamedTuple):
    """What one call hands back. images: (mime type, base64); not_run: nothing could be run."""

    result: list[str]
    error: list[str]
    session_id: int
    images: list[tuple[str, str]]
    not_run: bool

    def as_dict(self) -> dict[str, Any]:
        return {"result": self.result, "error": self.error, "session_id": self.session_id}


# As it travels: channel, header, parent_header, content. Source: Messaging in Jupyter, "General
# Message Format".
Message = dict[str, Any]


class Request:
    """One request on its way. Done when its reply *and* its idle status are here, in any order."""

    def __init__(self) -> None:
        self.msg_id = secrets.token_hex(16)
        self.reply: dict[str, Any] | None = None  # the content
        self.answer: dict[str, Any] = {}  # of the helper in the kernel, from the reply's payload
        # heard: the kernel took it, a message names it as parent
        # harmless: the kernel after the one that it was sent to may take it, too
        self.idle = self.heard = self.harmless = False

    def done(self) -> bool:
        return self.reply is not None and self.idle

    def note(self, message: Message) -> None:
        self.heard = True
        self.idle |= message["content"].get("execution_state") == "idle"
        if message["channel"] == "shell":
            self.reply = {k: v for k, v in message["content"].items() if v is not None}
            payload = message["content"].get("payload") or []
            self.answer = next((p for p in payload if p.get("source") == HELPER_NAME), {})
            if text := self.answer.get("error"):  # of a command: as if the reply said so
                self.reply = dict(status="error", ename="BashError", evalue=text, traceback=[text])


# --- Protocol, pure ------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def encode(channel: str, header: Any, content: Any, *, binary: bool) -> bytes:
    """A message as a websocket frame. Source: WebSocket kernel wire protocols."""
    names = {"header": header, "parent_header": {}, "metadata": {}, "content": content}
    if not binary:
        return json.dumps({"channel": channel, **names, "buffers": []}).encode()
    parts = [channel.encode(), *(json.dumps(part).encode() for part in names.values())]
    # of each part and of the end; their number comes first
    offsets = [8 * (len(parts) + 2) + len(b"".join(parts[:n])) for n in range(len(parts) + 1)]
    return b"".join([*(n.to_bytes(8, "little") for n in (len(offsets), *offsets)), *parts])


def decode(frame: bytes, *, binary: bool) -> Message:
    """A websocket frame as a message. Buffers, which only widgets have, are left out."""
    if binary:
        ends = [int.from_bytes(frame[i : i + 8], "little") for i in range(8, 56, 8)]
        channel, *parts = (frame[ends[i] : ends[i + 1]] for i in range(5))
        names = ("channel", "header", "parent_header", "metadata", "content")
        return dict(zip(names, (channel.decode(), *map(json.loads, parts)), strict=True))
    if frame[:1] != b"{":  # JSON with buffers: their number and the offsets, in 4 bytes each
        frame = frame[int.from_bytes(frame[4:8], "big") : int.from_bytes(frame[8:12], "big")]
    return Message(json.loads(frame))


ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


def clean(text: str) -> str:
    """Text without ANSI codes and carriage returns."""
    return (ANSI.sub("", text) if "\x1b" in text else text).replace("\r", "")


def overwrite(text: str) -> str:
    r"""The final state of lines rewritten with "\r"; one at the very end waits for what follows."""
    return re.sub(r"(?m)^.*\r(?=[^\r\n])|(?<!\r)\r+(?=\n)", "", text) if "\r" in text else text


def shorten(texts: list[str], limit: int, note: str) -> list[str]:
    """Head and tail of texts, `limit` characters in all; `note` stands for the middle.

    What UTF-8 cannot hold (lone surrogates) becomes "?": here, because it takes time.
    """
    head, excess, kept = limit // 2, max(0, sum(map(len, texts)) - limit), list[str]()
    for text in texts:
        cut = max(0, min(excess, len(text) - head))
        shown = text[:head] + (note if cut else "") + text[head + cut :]
        kept.append(shown.encode("utf-8", "replace").decode())
        head, excess, note = max(0, head - len(text)), excess - cut, "" if cut else note
    return kept


DROPPED = """Output is missing, the Jupyter server dropped it: {} Print less per second, or \
write to a file and read parts of it; or start the server with higher limits, \
--ZMQChannelsWebsocketConnection.iopub_data_rate_limit=1e10 and .iopub_msg_rate_limit=1e10"""
DISPLAYS = ("display_data", "execute_result", "update_display_data")


class Outputs:
    """The output of one cell as its notebook shows it, in bounded memory.

    Sources: Messaging in Jupyter, "Messages on the IOPub (PUB/SUB) channel"; nbformat, "Code cell
    outputs".
    """

    def __init__(self) -> None:
        # error: that ended the cell; its text is not new output. lost: what the server dropped
        self.error, self.lost = list[dict[str, Any]](), ""
        self.clear()

    def clear(self) -> None:
        # displays: those that no caller has seen, by id
        self._items, self._displays = list[dict[str, Any]](), dict[str, dict[str, Any]]()
        # mark: the items before it have been handed to a caller; omitted: characters before tail
        self._mark = self.omitted = self._text_size = self._data_size = 0
        self._tail, self._clear_first = "", False  # tail: the end of endless text

    def add(self, msg_type: str, content: dict[str, Any]) -> None:
        """Take the content of one IOPub message."""
        shows = msg_type in ("stream", "error", *DISPLAYS)
        if content.get("wait"):  # clear, but not before there is something new
            self._clear_first = True
        elif msg_type == "clear_output" or (shows and self._clear_first):
            self.clear()
        if msg_type == "error" and self._data_size < DATA_KEPT:
            self._items.append(error_output(content))
            self._data_size += ITEM_COST + sum(map(len, content.get("traceback", ())))
        elif msg_type in DISPLAYS:
            self._add_data(msg_type, content)
        elif re.match(r"IOPub (data|message) rate exceeded", content.get("text", "")):
            self.lost = DROPPED.format(content["text"])
        elif msg_type == "stream":
            self._add_text(content["name"], content["text"])

    def items(self) -> list[dict[str, Any]]:
        """All that is kept, as outputs of nbformat."""
        return self._items + ([stream_output("stdout", self._tail)] if self._tail else [])

    def take_new(self) -> list[dict[str, Any]]:
        """What has not been handed over yet."""
        new = self.items()[self._mark :]
        # A display that is updated later is shown again: the caller has an older state.
        self._mark, self._tail, self._displays = len(self._items), "", {}
        return new

    def fail(self, content: dict[str, Any]) -> None:
        """The error that ended the cell, from its reply; its own message can have been lost."""
        if self._items[self._mark :] and self._items[-1]["output_type"] == "error":
            self._items.pop()
        self.error = [error_output(content)]

    def size(self) -> int:
        """Characters of all text that is kept, as it came."""
        return sum(len(item_text(item)) for item in self.items() + self.error)

    def last_line(self) -> str:
        """The newest line of text, for progress notifications."""
        text = "".join(item_text(item)[-1000:] for item in self.items()[-1:])
        return clean(text.encode("utf-8", "replace").decode()).strip().rpartition("\n")[2]

    def _add_text(self, name: str, text: str) -> None:
        if self._text_size < TEXT_KEPT:
            if not self._items[self._mark :] or self._items[-1].get("name") != name:
                self._items.append(stream_output(name))
                self._text_size += ITEM_COST
            chunks = self._items[-1]["text"]
            line = chunks.pop() if chunks and not chunks[-1].endswith("\n") else ""
            room = max(0, TEXT_KEPT - self._text_size + len(line))
            text = overwrite(line + text)
            head, newline, line = text[:room].rpartition("\n")  # the open line can be rewritten
            chunks += [part for part in (head + newline, line) if part]
            self._text_size = TEXT_KEPT - room + len(text[:room])
            text = text[room:]
        tail = overwrite(self._tail + text)
        self.omitted += max(0, len(tail) - TAIL_KEPT)
        self._tail = tail[-TAIL_KEPT:]

    def _add_data(self, msg_type: str, content: dict[str, Any]) -> None:
        shown = {"data": content["data"], "metadata": content.get("metadata") or {}}
        item: dict[str, Any] = {"output_type": "display_data", **shown}
        if msg_type == "execute_result":
            item |= {"output_type": msg_type, "execution_count": content.get("execution_count")}
        self._data_size += (size := ITEM_COST + len(json.dumps(shown)))
        if self._data_size > DATA_KEPT:
            text = f"[{', '.join(content['data'])}: {size:,} characters not kept]\n"
            return self._add_text("stderr", text)
        if display_id := (content.get("transient") or {}).get("display_id"):
            first = self._displays.setdefault(display_id, item)
            if msg_type == "update_display_data" and first is not item:
                return first.update(shown)
        return self._items.append(item)


def stream_output(name: str, *texts: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": list(texts)}


def error_output(content: dict[str, Any]) -> dict[str, Any]:
    """The content of an error message, or of a reply with status "error" or "aborted"."""
    names = {"ename": "Aborted", "evalue": "by an interrupt or another's error", "traceback": []}
    return {"output_type": "error", **{name: content.get(name, names[name]) for name in names}}


def item_text(item: dict[str, Any]) -> str:
    """The text of one output: a stream's, a traceback, or what stands for a mime bundle."""
    if "text" in item:
        return "".join(item["text"])
    if "data" not in item:
        return "\n".join(item["traceback"]) or f"{item['ename']}: {item['evalue']}"
    for mime in ("text/plain", "text/markdown", "text/latex", "text/html", "application/json"):
        if (value := item["data"].get(mime)) is not None:
            return value if isinstance(value, str) else json.dumps(value)
    return f"[{', '.join(item['data'])}]"


def brief(items: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    """Long outputs as the file keeps them: head and tail of their texts, and the pictures."""
    rest = [item for item in items if set(item.get("data", ())) & set(IMAGE_TYPES)]
    rest += [{**x, "evalue": x["evalue"][:999], "traceback": []} for x in items if "ename" in x]
    return [stream_output("stdout", *texts), *rest]


def render(items: list[dict[str, Any]], most: int) -> tuple[list[str], list[tuple[str, str]]]:
    """What a person sees below the cell, in order, as strings; and at most so many pictures."""
    texts, images = list[list[str]](), list[tuple[str, str]]()
    for before, item in zip([{}, *items], items, strict=False):
        texts += [] if "text" in before and "text" in item else [[]]  # streams are joined
        texts[-1].append(clean(item_text(item)))
        for mime in [mime for mime in IMAGE_TYPES if mime in item.get("data", ())][:1]:
            data = "".join("".join(item["data"][mime]).split())
            sent = (size := len(data) * 3 // 4) <= IMAGE_BYTES and len(images) < most
            images += [(mime, data)] if sent else []
            why = f"only {IMAGES_SENT} pictures of {IMAGE_BYTES:,} bytes are sent"
            texts[-1] += [] if sent else [f"\n[{mime}, {size:,} bytes, is in the notebook: {why}]"]
    return ["".join(parts).removesuffix("\n") for parts in texts], images


def settle(code: str) -> tuple[str, str] | None:
    """("python", cell) or ("bash", script) where that is clear, None where the kernel must say.

    Clear: a cell magic; explicit IPython syntax; a cell that parses here and does not begin with an
    expression that could be a command: a word, then white space, a shell's operator or the end.
    """
    text = code.lstrip()
    if magic := re.match(r"%%bash[ \t]*(?:\r?\n|\Z)", text):
        return "bash", text[magic.end() :]
    if text[:1] in ("%", "!", "?"):
        return "python", code
    try:
        tree = ast.parse(code)  # top-level `await` is left to the kernel
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    word = re.match(r"(?:\s|#.*\n)*(?!(?:await|not|None)\b)[A-Za-z_]\w*(?=[\s;|&<>]|\Z)", code)
    installs = re.search(r"(?m)^(pip|conda|mamba|uv)[ \t]+-{0,2}[a-z]", code)
    return None if installs or (word and isinstance(tree.body[0], ast.Expr)) else ("python", code)


# --- Jupyter server ------------------------------------------------------------------------------

NO_JUPYTER = "this is not a Jupyter server, or the URL lacks a path; check --jupyter-base-url"
# What stands in the cause of a failure, what kind of error that is, and the cure.
FAILURES: tuple[tuple[str, type[ServerError], str], ...] = (
    (r"^status (400|403|500).* PUT ", ServerError, "; can it write there? See --notebooks-folder"),
    (r"^(Handshake )?status 40[13]", ServerRefused, "; check the token and its rights"),
    (r"^status 404.*/kernelspecs$", NotFound, f"; {NO_JUPYTER}"),
    (r"^(Handshake )?status 404", NotFound, ""),
    (r"^status 500.* POST \S+/sessions$", ServerError, "; the kernel did not start"),
    (r"^status 3.* to \S*/hub/", ServerError, "; start this server in the hub, or check its name"),
    (r"^status 3.* to \S*login", ServerError, "; check the token and the path of the URL"),
    (r"^status 3", ServerError, "; give the final URL as --jupyter-base-url"),
    (r"^status 2", ServerError, f", but no JSON: {NO_JUPYTER}"),
    (r"^status", ServerError, ""),
    (r"ProxyError", ServerUnreachable, "; the proxy failed: check HTTPS_PROXY and NO_PROXY"),
    (r"SSL", ServerUnreachable, "; TLS failure: a private CA needs --ca-bundle FILE"),
    (r"NameResolution|Name or service", ServerUnreachable, "; unknown host: check the URL"),
    (r"refused", ServerUnreachable, "; is the server running, and is this its port?"),
    (r"Timeout", ServerUnreachable, "; no answer in time: overloaded, wrong URL, no HTTP(S) port"),
    (r"", ServerUnreachable, "; call again when the server is back"),
)


def failure(what: str, cause: Any) -> ServerError:
    """One sentence for a request that failed: what was asked for, the cause, the cure."""
    reason = cause.args[0] if isinstance(cause, requests.RequestException) and cause.args else cause
    text = str(getattr(reason, "reason", reason)).partition(" -+-+- ")[0]  # then headers and body
    text = re.sub(r"^(<.*?>|\w+\(.*?\)): |\s+", " ", text).strip()  # without the connection's repr
    signs = f"{text} {cause!r} {what}"
    kind, cure = next((kind, cure) for sign, kind, cure in FAILURES if re.search(sign, signs))
    return kind(f"{what} failed: {text}{cure}")


class RemoteJupyterClient:
    """A Jupyter server over HTTP. The one object that keeps the token.

    Args:
        base_url: http(s) URL, with a path if the server has one (https://hub/user/NAME/).
        token: Sent in the Authorization header only. Empty for a server without authentication.
        ca_bundle: File or folder with the certificates to trust, for HTTPS and WSS alike.
    Raises:
        ConfigError: The URL, the token or the bundle cannot be one.
    Source: jupyter_server/services/api/api.yaml.
    """

    def __init__(self, base_url: str, token: str = "", *, ca_bundle: str | None = None) -> None:
        pattern = r"https?://(\[[0-9a-fA-F:.]+\]|[^][\s/:?#@]+)(:\d+)?(/[^\s?#]*)?"
        if (match := re.fullmatch(pattern, base_url)) is None:
            # neither a password nor a token, which can have been mistaken for the URL
            shown = f" {base_url!r}" if re.fullmatch(r"[^@?]*[:/.][^@?]*", base_url) else ""
            raise ConfigError(f"Not a server's URL{shown}: give http(s)://HOST[:PORT][/PATH]")
        self.base_url, self.host = base_url.rstrip("/"), match[1].strip("[]")
        if not re.fullmatch(r"[!-~]*", token):
            raise ConfigError("The token holds white space or other characters that no token has")
        bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        self.ca_bundle = ca_bundle or bundle or requests.adapters.DEFAULT_CA_BUNDLE_PATH
        if not os.path.exists(self.ca_bundle):
            raise ConfigError(f"The CA bundle {self.ca_bundle!r} does not exist; check --ca-bundle")
        # A server without a token wants any equal pair, as a sign that we are no web page.
        no_token = {"X-XSRFToken": "x", "Cookie": "_xsrf=x"}
        self._auth = {"Authorization": f"token {token}"} if token else no_token
        # An adapter, not a session: no ~/.netrc in place of the token, no cookies, no redirects.
        self._http = requests.adapters.HTTPAdapter(pool_maxsize=100)
        self.drop_connections = self._http.close  # where one is dead, the others may be as dead
        proxies = requests.utils.get_environ_proxies(base_url)
        self._options: Any = {"verify": self.ca_bundle, "proxies": proxies}

    def request(self, verb: str, path: str, body: Any = None, max_s: float = HTTP_TIMEOUT_S) -> Any:
        """One request to /api/PATH; the decoded JSON of its answer.

        Args:
            body: bytes are sent as they are, anything else as JSON.
            max_s: Seconds of silence from the server.
        Raises:
            ServerError: One of its kinds, or itself for a status that has none.
        """
        url, limits = f"{self.base_url}/api/{path}", (CONNECT_TIMEOUT_S, max_s)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        headers, what = {**self._auth, "Content-Type": "application/json"}, f"{verb} {url}"
        prepared = requests.Request(verb, url, headers, data=data).prepare()
        try:
            response = self._http.send(prepared, timeout=limits, **self._options)
            status, answer, content = response.status_code, None, response.content
        except requests.RequestException as err:
            self.drop_connections()
            raise failure(what, err) from err
        log.debug("%s: %d", what, status)
        with contextlib.suppress(ValueError):
            answer = response.json() if content else {}
        detail = answer.get("message") if isinstance(answer, dict) else None
        if response.is_redirect:
            detail = f"redirect to {response.headers['Location'].partition('?')[0]}"
        elif response.ok and answer is not None:
            return answer
        raise failure(what, f"status {status} {detail or response.reason}")

    def kernelspecs(self) -> dict[str, Any]:
        """{"default": name, "kernelspecs": {name: ...}}: the cheapest request with a token."""
        answer = self.request("GET", "kernelspecs")
        if isinstance(answer, dict) and isinstance(answer.get("kernelspecs"), dict):
            return answer
        raise ServerError(f"{self.base_url} answers, but {NO_JUPYTER}")

    def open_session(self, path: str, kernel_name: str) -> dict[str, Any]:
        """The model of the kernel that is bound to a notebook's path; started if there is none."""
        body: dict[str, Any] = {"path": path, "name": posixpath.basename(path), "type": "notebook"}
        body["kernel"] = {"name": kernel_name or None}
        return dict(self.request("POST", "sessions", body, KERNEL_TIMEOUT_S)["kernel"])

    def find_kernel(self, path: str) -> str | None:
        """The id of the kernel that is bound to a notebook's path, if there is one."""
        sessions = self.request("GET", "sessions")
        return next((each["kernel"]["id"] for each in sessions if each.get("path") == path), None)

    def kernel(self, kernel_id: str) -> dict[str, Any]:
        """A kernel's model; NotFound if there is no such kernel."""
        return dict(self.request("GET", f"kernels/{kernel_id}", max_s=5.0))

    def command(self, kernel_id: str, name: str, max_s: float = 5.0) -> None:
        """Have the server "interrupt" or "restart" a kernel; the latter ends when it is up."""
        self.request("POST", f"kernels/{kernel_id}/{name}", max_s=max_s)

    def delete(self, kernel_id: str) -> None:
        self.request("DELETE", f"kernels/{kernel_id}", max_s=10.0)

    def modified(self, path: str) -> str | None:
        """When a file was last changed, in the server's notation; None without the file."""
        with contextlib.suppress(NotFound):
            url = f"contents/{quote(path)}?content=0"
            return str(self.request("GET", url, max_s=5.0)["last_modified"])
        return None

    def read(self, path: str) -> tuple[str, str]:
        """A text file and its last_modified."""
        model = self.request("GET", f"contents/{quote(path)}?type=file&format=text")
        return str(model["content"]), str(model["last_modified"])

    def write(self, path: str, escaped: list[bytes]) -> str:
        """Write a text file, given in pieces of the inside of a JSON string; its last_modified."""
        body = b'{"type":"file","format":"text","content":"' + b"".join(escaped) + b'"}'
        return str(self.request("PUT", f"contents/{quote(path)}", body)["last_modified"])

    def make_folder(self, folder: str) -> None:
        """Create a folder and those above it; one that exists stays as it is."""
        for part in re.finditer(r"[^/]+", folder):
            self.request("PUT", f"contents/{quote(folder[: part.end()])}", {"type": "directory"})

    def open_websocket(self, kernel_id: str, session: str, timeout_s: float) -> websocket.WebSocket:
        """A kernel's channels. No redirect is followed: the token goes to this server only.

        Raises:
            NotFound: No such kernel. ServerRefused: The token. ServerUnreachable: Anything else.
        """
        url = f"ws{self.base_url[4:]}/api/kernels/{kernel_id}/channels?session_id={session}"
        bundle = "ca_cert_path" if os.path.isdir(self.ca_bundle) else "ca_certs"
        # The proxy that `requests` uses; if none, a host that is never used: no environment then.
        via = requests.utils.select_proxy(self.base_url, self._options["proxies"]) or ""
        proxy, auth = urlsplit(via), requests.utils.get_auth_from_url(via)
        # The protocol is asked for as a plain header: websocket-client would refuse a server that
        # knows none, and a second handshake behind a gateway costs the replay.
        headers = {**self._auth, "Sec-WebSocket-Protocol": SUBPROTOCOL}
        try:
            return websocket.create_connection(
                url, timeout_s, header=headers, sslopt={bundle: self.ca_bundle}, redirect_limit=0,
                skip_utf8_validation=True, suppress_origin=True, http_proxy_port=proxy.port or 80,
                http_proxy_host=proxy.hostname or "-", http_proxy_auth=auth,
                http_no_proxy=[""] if proxy.hostname else ["*"],
            )
        except (websocket.WebSocketException, OSError) as err:
            raise failure(f"The websocket to the kernel at {url}", err) from err


# --- Kernel --------------------------------------------------------------------------------------


class Kernel:
    """One kernel over one websocket, of whose channels shell and iopub are used.

    One thread uses it; but any thread may write to `lost` why the kernel's state is gone. The
    websocket comes and goes. client_session_id stays, so the server replays what was said between.

    Args:
        on_output: Called with each IOPub message that requests of ours caused.
        tick: Called while waiting, at least every TICK_S; may raise.
    """

    def __init__(
        self, client: RemoteJupyterClient, kernel_id: str, on_output: Callable[[Message], None],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.client, self.kernel_id, self.language_info = client, kernel_id, dict[str, Any]()
        self._on_output, self._tick = on_output, tick
        # name: by which the server knows the websocket, and gives back what was said between
        self.client_session_id = self._name = f"{PROGRAM}-{secrets.token_hex(16)}"
        # has_helper: it is IPython; ready: connected, and in the state that its user expects
        self.has_helper, self.ready, self.lost = False, False, ""
        # patience: with its websocket, the first time
        self._execution_count, self._made_at, self._patience_s = 0, time.monotonic(), STARTS_S
        # ours: begins the client session ids whose output is ours
        self._ws, self._binary, self._ours = websocket.WebSocket(), False, self.client_session_id
        # heard: a message came, or was sent; asked: over REST; pieces: of a message in parts
        self._heard_at, self._asked_at, self._pieces = 0.0, 0.0, 0
        # missing: how many messages did not come; expected: the next number, by who gave it
        self.missing, self._expected = 0, dict[str, int]()
        self.requests: dict[str, Request] = {}  # that are not done

    def open(self, *, again: bool = False) -> None:
        """Connect; `again`: and go on trying. Raises KernelDied if it is gone, ServerError."""
        self.close()
        deadline, self._patience_s = time.monotonic() + self._patience_s, KERNEL_TIMEOUT_S
        while not self._ws.connected:
            left_s = max(1.0, deadline - time.monotonic())
            try:
                self._ws = self.client.open_websocket(self.kernel_id, self._name, left_s)
            except NotFound as err:
                raise KernelDied(KERNEL_GONE) from err
            except ServerUnreachable as err:
                if not again or time.monotonic() > deadline:
                    raise ServerUnreachable(f"{err}; what ran may go on") from err
                self._tick()
                time.sleep(TICK_S / 2)
        self._binary = (self._ws.getheaders() or {}).get("sec-websocket-protocol") == SUBPROTOCOL

    def drop(self) -> None:
        self.ready, self._expected = False, {}
        self._ws.shutdown()  # type: ignore[no-untyped-call]  # the library has no annotation for it

    def close(self) -> None:
        """Close so that nothing is on its way: send Close, then read to the server's Close."""
        self._transmit(b"\x03\xe8", websocket.ABNF.OPCODE_CLOSE)  # 1000: normal closure
        with contextlib.suppress(KernelError):
            while self._read(1.0):
                pass
        self.drop()

    def greet(self, mark: str) -> str:
        """Connect, learn the kernel's language and state; install the helper if it is IPython.

        States: "fresh" (nothing ran here; from now on it is `mark`), "used" (by somebody else),
        "restoring" (begun and not finished), "restored" (and nobody was told), "ready". Output that
        other processes of our kind caused is taken for ours meanwhile: they may have ended while
        their code goes on, and nobody else would collect it. Raises what `open` and `wait` do.
        """
        self.open()
        self._ours, self.language_info = PROGRAM, {}
        request = self.send({}, "kernel_info_request")
        request.idle = request.harmless = True  # it can say so before anybody listens
        info = self.wait(request)
        self.language_info = info.get("language_info") or {}
        self.has_helper = info.get("implementation") == "ipython"
        greeting = self.greeting(mark)
        self.wait(greeting)
        self._ours = self.client_session_id
        # other kernels tell no more than how much they ran
        return str(greeting.answer.get("state", "ready" if self._execution_count else "fresh"))

    def execute(self, code: str, *, silent: bool = False, store_history: bool = True) -> Request:
        """Send one execute_request. Source: Messaging in Jupyter, "Execute"."""
        content = {"code": code, "silent": silent, "store_history": store_history and not silent}
        return self.send({**content, "allow_stdin": False, "stop_on_error": False})

    def send(self, content: dict[str, Any], msg_type: str = "execute_request") -> Request:
        """Send one request on the shell channel: once, whatever happens."""
        request = Request()
        self.requests[request.msg_id] = request
        header = {"msg_id": request.msg_id, "msg_type": msg_type, "session": self.client_session_id}
        header |= {"username": "", "date": now(), "version": "5.3"}
        opcode = websocket.ABNF.OPCODE_BINARY if self._binary else websocket.ABNF.OPCODE_TEXT
        self._transmit(encode("shell", header, content, binary=self._binary), opcode)
        self._heard_at = time.monotonic()
        return request

    def wait(self, request: Request) -> dict[str, Any]:
        """Read until one request is done; the content of its reply.

        When the kernel is idle although the request is not done, or seems to be busy with something
        else: send a greeting behind it. When that is not answered, too, or the websocket breaks:
        connect again as the same client, then send a greeting. The kernel takes one request after
        the other, so once the greeting is answered, nothing more comes for those before it. A
        request that has its reply by then, but is not idle, lost some of its output: ZeroMQ drops
        what a server that is too busy does not take.

        Raises:
            KernelDied: Its state is gone. ConnectionLost: The reply was missed, or it never began.
            ServerUnreachable: The connection did not come back within KERNEL_TIMEOUT_S.
        Source: Messaging in Jupyter, "Execution results", "Kernel status".
        """
        greeting: Request | None = None
        while not request.done():
            self._tick()
            if self.lost:
                raise KernelDied(self.lost)
            if greeting is not None and greeting.done():
                self._judge(request, greeting)
                break
            try:
                if not self._read(TICK_S) and self._is_stuck(request, greeting):
                    if greeting is not None and greeting.idle:  # a kernel that gives no replies
                        greeting.reply = {"execution_count": self._execution_count}
                    elif greeting is not None:
                        # Connected again in vain: the server may have kept dead channels (of a
                        # websocket that it closed after a newer one), and give them out for ever.
                        self._name += "-" * (not self.ready)
                        raise ConnectionLost("The kernel does not answer")
                    greeting = greeting or self.greeting(None)
            except ConnectionLost:
                time.sleep(TICK_S / 2)  # a proxy may answer, and break the connection at once
                self.open(again=True)
                greeting = self.greeting(None)
        reply = request.reply or {}
        self._execution_count = reply.get("execution_count", self._execution_count)
        return reply

    def check(self) -> None:
        """Before code is sent: read what came meanwhile; is the kernel there? A laptop that slept
        has a dead websocket, and kernels of other languages do not tell that they were restarted.
        Raises ConnectionLost, KernelDied."""
        while self._read(0.0):
            pass
        if not self.has_helper or time.monotonic() - self._heard_at > FRESH_S:
            greeting = self.greeting(None)
            while not greeting.done() and self._read(SILENCE_S):
                pass
            self._judge(greeting, greeting)

    def greeting(self, mark: str | None) -> Request:
        """Send what tells the kernel's state, which then is `mark`; None leaves it as it is."""
        code = INSTALL + CALL % f"hello({mark!r})" if self.has_helper else ""
        request = self.execute(code, silent=True)
        request.harmless = True
        return request

    def _is_stuck(self, request: Request, greeting: Request | None) -> bool:
        """After silence, over REST: is there a kernel, and did it miss the request? Also said to be
        busy it may have: the server never learns that a kernel that died is not busy any more."""
        now_s = time.monotonic()
        if now_s - max(self._heard_at, self._asked_at) < SILENCE_S:
            return False
        self._asked_at = now_s
        try:
            state = self.client.kernel(self.kernel_id).get("execution_state")
        except NotFound as err:
            raise KernelDied(KERNEL_GONE) from err
        except ServerError as err:  # away for the moment; and some gateways never tell
            if isinstance(err, ServerUnreachable) and now_s - self._heard_at > KERNEL_TIMEOUT_S:
                raise
            return False
        hangs = not request.heard and now_s - self._made_at > KERNEL_TIMEOUT_S
        if state == "dead" or (state == "starting" and hangs):
            raise KernelDied("The kernel died and could not be restarted, or it hangs.")
        # Idle: 2 s. Busy, neither with the request nor asked by a greeting: 2 s; one of them: 10 s;
        # both: as long as it likes. Starting: the server calls it idle then, after a restart.
        waits = 0 if state == "idle" else (request.heard and not request.reply) + bool(greeting)
        enough_s = (SILENCE_S, LOST_S, 1e9)[waits] if self.language_info else STARTS_S
        return now_s - self._heard_at > enough_s

    def _judge(self, request: Request, greeting: Request) -> None:
        """Raise what a greeting's answer says: the kernel was restarted, or this request, which the
        greeting overtook, has no reply and will get none. Else only its output may be missing."""
        count = (greeting.reply or {}).get("execution_count", self._execution_count)
        if greeting.answer.get("state", "ready") != "ready" or count < self._execution_count:
            raise KernelDied("The kernel was restarted.")
        last = greeting.answer.get("last")
        request.heard |= count > self._execution_count or last == request.msg_id
        text = "the kernel had not taken the code. Call again"
        if request.heard:
            text = "the code has ended, but output is missing and whether it failed is not known"
        if request.reply is None:
            raise ConnectionLost(f"The connection broke: {text}")

    def _read(self, timeout_s: float) -> bool:
        """Take one message, if one comes in time."""
        try:
            self._ws.settimeout(timeout_s)
            opcode, frame = self._ws.recv_data()
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise ConnectionLost("closed by the server")
        except (websocket.WebSocketTimeoutException, BlockingIOError, ssl.SSLWantReadError):
            pieces = len(self._ws.frame_buffer.recv_buffer)
            # more of a large message came: that is no silence
            self._heard_at = time.monotonic() if pieces > self._pieces else self._heard_at
            self._pieces = pieces
            return False
        except (ConnectionLost, websocket.WebSocketException, OSError) as err:
            self.drop()
            raise ConnectionLost(f"The websocket broke ({err})") from err
        # The server leaves Nagle's algorithm on: each small frame waits until the one before it is
        # acknowledged, and a receiver delays a bare acknowledgement by 40 ms. Any frame we send
        # carries it at once; a Pong needs no answer (RFC 6455, section 5.5.3). A small call takes
        # 5 instead of 45 ms.
        self._transmit(b"", websocket.ABNF.OPCODE_PONG)
        self._heard_at = time.monotonic()
        self._take(decode(frame, binary=self._binary))
        return True

    def _transmit(self, frame: bytes, opcode: int) -> None:
        """Send one frame. If that fails, the next `_read` says so, and `wait` connects again."""
        with contextlib.suppress(websocket.WebSocketException, OSError):
            self._ws.settimeout(HTTP_TIMEOUT_S)
            self._ws.send(frame, opcode)
            return
        self.drop()  # never half a frame, then another

    def _take(self, message: Message) -> None:
        """Sort one message; nothing waits in here."""
        parent, state = message["parent_header"] or {}, message["content"].get("execution_state")
        if not parent and state in ("restarting", "dead"):
            raise KernelDied("The kernel died: it crashed, ran out of memory or was killed.")
        if message["header"]["msg_type"] == "shutdown_reply":
            raise KernelDied("The kernel was shut down or restarted by somebody.")
        if (request := self.requests.get(parent.get("msg_id", ""))) is not None:
            request.note(message)
            if request.done():
                del self.requests[request.msg_id]
        # ZeroMQ drops without a word what a server does not take in time; ipykernel numbers all
        # that it sends. Replies to others do not come here: one for each time it is busy for them.
        if self.has_helper and (at := re.fullmatch(r"(.+)_(\d+)", message["header"]["msg_id"])):
            number, theirs = int(at[2]), state == "busy" and request is None
            self.missing += number - self._expected.get(at[1], number) - theirs
            self._expected[at[1]] = number + 1
        # others' are skipped: a person may work here, too
        if message["channel"] == "iopub" and (parent.get("session") or "").startswith(self._ours):
            self._on_output(message)


# --- Notebook ------------------------------------------------------------------------------------


class Notebook:
    """One session's file on the server, kept as the text of its cells.

    A saved cell is kept the way it travels: its JSON text, escaped once more for the inside of the
    request's JSON. So only a new cell is encoded, the rest is joined. Source: nbformat, "The
    Notebook file format" (4.5).
    """

    def __init__(self, client: RemoteJupyterClient, path: str) -> None:
        self.client, self.path = client, path
        self.metadata: dict[str, Any] = {}
        self._rest: dict[str, Any] = {"nbformat": 4, "nbformat_minor": 5}
        self._cells: dict[str, bytes] = {}  # by id, in order
        self.unsaved: dict[str, bytes] = {}
        self._modified: str | None = None
        self._checked_at = 0.0  # when nobody else had changed the file

    def load(self) -> list[dict[str, Any]] | None:
        """Read the file; its cells, or None if there is none.

        Raises:
            NotebookError: It is no notebook of format 4. ServerError: It cannot be read now.
        """
        for pause_s in (0.2, 0):  # somebody's file can be caught while it is being written
            try:
                text, modified = self.client.read(self.path)
                notebook, kept = json.loads(text), dict[str, bytes]()
                cells, metadata = list(notebook.pop("cells")), dict(notebook.pop("metadata"))
                for cell in cells:
                    name = cell["cell_type"] and cell.setdefault("id", secrets.token_hex(6))
                    kept[secrets.token_hex(6) if name in kept else name] = json_inside(dump(cell))
                notebook["nbformat_minor"] = max(5, notebook["nbformat_minor"])
                if notebook["nbformat"] != 4:
                    raise ValueError(f"nbformat is {notebook['nbformat']!r}, not 4")
                self.metadata, self._rest, self._cells = metadata, notebook, kept
                self._modified = modified
                return cells
            except NotFound:
                return None
            except (ValueError, LookupError, TypeError, AttributeError, ServerError) as err:
                if isinstance(err, ServerUnreachable) or "status 50" in str(err):
                    raise  # it cannot be read now
                reason = f"{self.path} on the server is not readable as a notebook ({err!r})"
                time.sleep(pause_s)
        hint = "is left as it is; repair, move or delete it, or use another session_id"
        raise NotebookError(f"{reason} and {hint}")

    def check(self) -> None:
        """Look whether somebody else changed the file, and if so take their version."""
        self._checked_at = 0.0
        modified = self.client.modified(self.path)
        if modified is None:
            self.client.make_folder(posixpath.dirname(self.path))
        elif modified != self._modified:
            self.load()
        self._checked_at = time.monotonic()

    def save(self, cell: dict[str, Any]) -> None:
        """Append a cell, or replace the one with its id.

        Raises:
            NotebookError, ServerError: Not saved now; the cell is saved with the next one.
        """
        self.unsaved[cell["id"]] = json_inside(dump(cell))
        if time.monotonic() - self._checked_at > FRESH_S:
            self.check()
        self._cells |= self.unsaved
        rest = dump({"metadata": self.metadata, **self._rest})
        start, end = json_inside('{\n"cells": [\n'), json_inside("\n],\n" + rest[1:] + "\n")
        cells = b",\\n".join(self._cells.values())
        self._modified = self.client.write(self.path, [start, cells, end])
        self._checked_at = time.monotonic()
        self.unsaved.clear()


def dump(value: Any) -> str:
    """JSON in one line: indenting takes longer."""
    return json.dumps(value, ensure_ascii=False)


def json_inside(text: str) -> bytes:
    """Text as the inside of a JSON string; what UTF-8 cannot hold becomes "?"."""
    return dump(text)[1:-1].encode("utf-8", "replace")


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell.get("source", ""))  # a string or a list of strings


def was_run(cell: dict[str, Any]) -> bool:
    """Was this cell run, and did it not end in an error? Source: nbformat, "Code cells"."""
    ran = cell.get("execution_count") is not None or "execution" in cell.get("metadata", {})
    failed = any(output.get("output_type") == "error" for output in cell.get("outputs", []))
    return cell["cell_type"] == "code" and ran and not failed and bool(source_of(cell).strip())


# --- Session -------------------------------------------------------------------------------------

QUEUED = "waiting for the kernel"  # which somebody else keeps busy
BUSY = """The kernel was busy with code that this server process does not follow. What it \
printed before is in {} as far as it was saved, and whether it failed is not known"""
STATES = {
    "fresh": "The kernel of session {} was gone: it starts empty",
    "used": "The kernel of session {} was restarted and used by somebody: no cell ran again",
    "restored": "Another process restored session {}: its cells ran again",
}
RESTORED = "Session {} was restored (new kernel): {} cells of {} ran again in {:.1f} s; failed: {}"
KILLS_AGAIN = "; if its cells kill it again, edit {}, or use another session_id"
STILL = """Still running after {1:g} s (now {0}); nothing is lost. execute_code with code="" and \
session_id={2} waits for the rest, interrupt_execution with session_id={2} stops it"""
NOT_RUN = """Not run: earlier code was still running after {1:g} s. execute_code with code="" and \
session_id={2} waits for it, interrupt_execution with session_id={2} stops it; then send it again"""
STUBBORN = """The code did not stop within {:g} s, it may ignore interrupts: interrupt_execution \
with session_id={} and restart=True restarts the kernel and runs the session's cells again"""


class Run:
    """One call's code on its way: waiting for its turn, running, ended. It may outlive its call."""

    def __init__(self, code: str, path: str) -> None:
        self.code = code
        self.timing: dict[str, str] = {}
        # As the notebook shows it, but for the outputs.
        self.cell = dict[str, Any](cell_type="code", id=secrets.token_hex(6), source=code)
        self.cell |= {"execution_count": None, "metadata": {"execution": self.timing}}
        self.text_path = f"{path.removesuffix('.ipynb')}-{self.cell['id']}.txt"  # of long output
        self.stage = "waiting"  # "connecting", QUEUED, "restoring", "running", "saving"
        self.request: Request | None = None
        self.outputs = Outputs()
        self.notes, self.errors = list[str](), list[str]()  # notes: for the result, before output
        self.save_at = time.monotonic() + SAVE_EVERY_S
        # withdrawn: nobody wants it, so it is not run, or interrupted if it runs. abandoned: its
        # call returned before it ended, so the next call collects it.
        self.withdrawn = self.abandoned = self.not_run = False
        self.done: Future[None] = Future()


class Session:
    """One session: its notebook, its kernel, and the runs that wait for it.

    A thread takes one run after the other to its end: connect, restore, send, read, save. It lives
    while there is something to do, and IDLE_S longer. A call only waits for its run, while it may.
    """

    def __init__(self, owner: "Interpreter", session_id: int, *, is_new: bool) -> None:
        self.session_id, self.path = session_id, posixpath.join(owner.folder, f"{session_id}.ipynb")
        self.client, self.settings, self._owner = owner.client, owner.settings, owner
        self.kernel = Kernel(self.client, "", self._hear, self._tick)  # the last one; "": none yet
        self._is_new, self._had_kernel = is_new, False  # new: the id was made up for this call
        self._notebook = Notebook(self.client, self.path)
        # Guards what is below, and the outputs and errors of each run.
        self._changed = threading.Condition()
        self._runs: list[Run] = []  # waiting, current, or not yet collected; as the calls came
        self._works = False  # there is a thread

    # For callers: submit, wait for run.done, collect; or execute, which does all three.

    def submit(self, code: str, place: int = sys.maxsize) -> Run:
        """Queue code, at the end or at a place; returns at once. Empty code waits for its turn."""
        run = Run(code, self.path)
        with self._changed:
            self._runs.insert(place, run)
            if not self._works:
                threading.Thread(target=self._work, daemon=True).start()
                self._works = True
            self._changed.notify_all()
        return run

    def execute(self, code: str, timeout_s: float | None = None) -> Result:
        """Run one cell and wait for it.

        Args:
            timeout_s: Seconds to wait, None for the setting; the code may run on.
        """
        timeout_s = self.settings.timeout_s if timeout_s is None else timeout_s
        run = self.submit(code)
        wait([run.done], timeout_s)
        return self.collect(run, timeout_s)

    def collect(self, run: Run, timeout_s: float) -> Result:
        """What a call hands back: the rest of earlier runs, then what its own run has so far."""
        waits, limit = not run.code.strip(), self.settings.max_output
        texts, errors, images = list[str](), list[str](), list[tuple[str, str]]()
        with self._changed:
            run.abandoned, run.save_at = True, 0.0
            ahead = self._runs[: self._runs.index(run)]
            behind = run.stage == "waiting" and not all(each.done.done() for each in ahead)
            run.withdrawn = behind or (run.stage == QUEUED and timeout_s > 0)
            runs = [x for x in ahead if x.abandoned and (waits or not run.withdrawn)] + [run]
            for each in runs:
                mark = "" if waits or each is run else "[from earlier code] "
                shown, pictures = render(each.outputs.take_new(), IMAGES_SENT - len(images))
                texts += [*each.notes, *(mark + text for text in shown)]
                errors += [mark + clean(x) for x in (*each.errors, each.outputs.lost) if x]
                each.notes, each.errors, each.outputs.lost = [], [], ""
                images += pictures
            # A new list, because `current` reads the old one without the lock.
            self._runs = [each for each in self._runs if each not in runs or not each.done.done()]
            if not run.done.done():
                text = NOT_RUN if run.withdrawn and not waits else STILL
                errors += [text.format((self.current() or run).stage, timeout_s, self.session_id)]
        kept = self._cut(texts + errors, limit, runs)
        result = [new for old, new in zip(texts, kept, strict=False) if new or not old]
        error = [text for text in kept[len(texts) :] if text]
        return Result(result, error, self.session_id, images, run.not_run)

    def interrupt(self, *, restart: bool = False) -> Result:
        """Interrupt what runs, and hand back the rest of its output.

        Args:
            restart: If it does not stop, restart the kernel, and restore the session.
        """
        due = time.monotonic() + RESTART_S
        try:
            kernel_id = self.kernel.kernel_id or self.client.find_kernel(self.path)
            if not kernel_id:
                raise NotFound(f"Session {self.session_id} has no kernel: nothing runs")
            self.client.command(kernel_id, "interrupt")
            # Next in turn, it collects what the interrupted code leaves; and may restore.
            run = self.submit("\n", 1 + sum(each.done.done() for each in self._runs))
            if not wait([run.done], INTERRUPT_S).done and restart and not self._owner.closing:
                self.client.command(kernel_id, "restart", RESTART_S - INTERRUPT_S)
                self.kernel.lost = "The kernel was restarted as asked."
                wait([run.done], due - time.monotonic())
        except ServerError as err:
            return Result([], [str(err)], self.session_id, [], True)
        outcome = self.collect(run, RESTART_S if restart else INTERRUPT_S)
        if not restart and not run.done.done():
            outcome.error[-1] = STUBBORN.format(INTERRUPT_S, self.session_id)
        return outcome

    def current(self) -> Run | None:
        """The run that the thread takes to its end, or takes next: all before it have ended."""
        return next((run for run in self._runs if not run.done.done()), None)

    def _cut(self, texts: list[str], limit: int, runs: list[Run]) -> list[str]:
        """Texts of runs within a limit; the note in the middle tells where all of it is."""
        excess, most = sum(map(len, texts)) - limit, self.settings.max_output
        long = [x.text_path for x in runs if excess > 0 and x.outputs.size() > most]
        where = f"; the full text is in {' and '.join(long) or self.path} on the server"
        where *= self._owner.keeps_notebook  # else nothing is kept
        count = excess + sum(run.outputs.omitted for run in runs)
        return shorten(texts, limit, f"\n[... {count:,} characters left out{where} ...]\n")

    # What the thread does.

    def _work(self) -> None:
        """Until nothing comes for IDLE_S; then the websocket is closed, and the thread ends."""
        while not self._owner.closing:
            with self._changed:
                idle = not self._changed.wait_for(self.current, IDLE_S)
                run = self.current() or Run("", self.path)
                self._runs += [run] if idle else []
            with contextlib.suppress(Exception):  # a defect of ours must not wedge the session
                if idle:  # what it reads while it closes is handed over by the next call
                    run.abandoned = True
                    self.kernel.close()
                # "" asks first what became of earlier code: a kernel that died is told at once
                elif not run.withdrawn and (run.code or not any(x.errors for x in self._runs)):
                    self._perform(run)
            with self._changed:
                run.done.set_result(None)
                self._works = not idle or self.current() is not None
                if not self._works:
                    if not self._notebook.unsaved:  # it is read again anyway: let go of its cells
                        self._notebook = Notebook(self.client, self.path)
                    return

    def _perform(self, run: Run) -> None:
        """Take one run to its end. Every failure becomes a part of its result, here only."""
        try:
            try:
                self._connect(run)
            except (KernelError, ServerError) as err:  # nothing was sent: once more
                if isinstance(err, KernelDied):
                    self._forget()
                self._connect(run)
            with self._changed:  # from here on it counts as run
                if run.withdrawn or self._owner.closing or not run.code.strip():
                    return
                run.stage = "running"
            run.timing.update(dict.fromkeys(("iopub.status.busy", "iopub.execute_input"), now()))
            self._run_cell(run)
        except SystemExit:
            return self._save(run)
        except Exception as err:  # a defect of ours, too, must not wedge the session
            text, died = str(err) or repr(err), isinstance(err, KernelDied)
            if died:
                text += " Its variables are gone; the next call restores the session"
                text += KILLS_AGAIN.format(self.path) if run.stage == "restoring" else ""
                self._forget()
            elif not isinstance(err, InterpreterError):
                text = f"Internal error: {err!r}; stderr has more"
                log.exception("Session %d", self.session_id)
            heard = run.request is not None and run.request.heard
            run.not_run = run.request is None or (isinstance(err, ConnectionLost) and not heard)
            # native code that holds the GIL, or ends the kernel, can run without a word
            text += "" if heard or run.not_run else "; whether the code began is not known"
            text = f"Not run: {text}" if run.not_run else text
            self._fail(run, text, {"ename": "KernelDied", "evalue": text} if died else None)
        if not run.not_run:
            run.stage, run.timing["shell.execute_reply"] = "saving", now()
            self._save(run)

    def _fail(self, run: Run, text: str, error: dict[str, Any] | None = None) -> None:
        """error: for the notebook, too, so that restoring does not run the cell again."""
        with self._changed:
            run.errors.append(text)
            if error is not None:
                run.outputs.fail(error)

    def _hear(self, message: Message) -> None:
        """An IOPub message of ours: into the output of the current run."""
        if (run := self.current()) and run.stage != "restoring":
            with self._changed:
                run.outputs.add(message["header"]["msg_type"], message["content"])

    def _tick(self) -> None:
        """While the kernel is waited for: what others want of the thread that waits."""
        if self._owner.closing:
            raise SystemExit  # this process ends, and leaves the code running
        run = self.current()  # if its request is not heard it may yet not run
        if run and run.stage == "running" and run.request and run.request.heard:
            if run.withdrawn:
                with contextlib.suppress(ServerError):
                    self.client.command(self.kernel.kernel_id, "interrupt")
                    run.withdrawn = False
            if time.monotonic() > run.save_at:
                run.save_at = time.monotonic() + SAVE_EVERY_S
                self._save(run)

    def _forget(self) -> None:
        """Let go of a dead kernel. What it had not taken must not run in the kernel after it: that
        one is deleted before it is up, as soon as the server has begun it (until then it says 500).
        """
        if (kernel := self.kernel).kernel_id:
            kernel.lost = kernel.lost or KERNEL_GONE
            took_all = all(each.heard or each.harmless for each in kernel.requests.values())
            until = time.monotonic() + (0 if took_all else 3.0)
            while time.monotonic() < until:
                with contextlib.suppress(ServerError):
                    with contextlib.suppress(NotFound):  # somebody was faster
                        self.client.delete(kernel.kernel_id)
                    kernel.kernel_id = ""
                    break
                time.sleep(0.1)
            kernel.close()  # which reads what it said last, such as that it took the code

    def _connect(self, run: Run) -> None:
        """Make sure of a live kernel that has the session's state."""
        run.stage = "connecting"
        try:
            if self.kernel.ready and not self.kernel.lost:
                return self.kernel.check()
        except ConnectionLost:
            self.client.drop_connections()
        cells, run.notes = None, []
        with contextlib.suppress(NotebookError):  # `_save` reports it, after the code has run
            cells = self._notebook.load() if self._owner.keeps_notebook else []
            if cells is None and not self._is_new and not self._had_kernel:
                run.notes.append(f"Session {self.session_id} is new: there was no {self.path}")
        model = self._find_kernel()
        if self.kernel.kernel_id != model["id"] or self.kernel.lost:
            self._forget()
            self.kernel = Kernel(self.client, model["id"], self._hear, self._tick)
        run.stage = QUEUED if model.get("execution_state") == "busy" else run.stage
        mark = "restoring" if cells and self.settings.restore else "ready"
        state = self.kernel.greet(mark)
        if state == "restoring" and cells:  # it was cut short: once more, from nothing
            self.client.command(model["id"], "restart", KERNEL_TIMEOUT_S)
            state = self.kernel.greet(mark)
        spec = self._owner.specs.get(model["name"], {}).get("spec", {})
        names = {key: spec.get(key, "") for key in ("display_name", "language")}
        # As JupyterLab writes them; else Lab takes the notebook for changed as soon as it opens it.
        self._notebook.metadata.setdefault("kernelspec", {**names, "name": model["name"]})
        self._notebook.metadata.setdefault("language_info", self.kernel.language_info)
        if state == "fresh" and cells and self.settings.restore:
            self._restore(run, cells)
        elif state == "ready" and run.stage == QUEUED:
            run.notes.append(BUSY.format(self.path))
        elif state in STATES and (cells or self._had_kernel):
            run.notes.append(STATES[state].format(self.session_id))
        self.kernel.ready = self._had_kernel = True

    def _find_kernel(self) -> dict[str, Any]:
        """The model of this session's kernel: the last one, else the notebook's, else a new one."""
        model: dict[str, Any] = {}
        if self.kernel.kernel_id:  # a bare gateway gives a path's kernel once
            with contextlib.suppress(NotFound):
                model = self.client.kernel(self.kernel.kernel_id)
        if not model:
            wanted = self._notebook.metadata.get("kernelspec", {}).get("name")
            name = wanted if wanted in self._owner.specs else self.settings.kernel_name
            again = (self._had_kernel or self.kernel.lost) and not self._owner.keeps_notebook
            path = f"{self.path}-{secrets.token_hex(16)}" if again else self.path
            model = self.client.open_session(path, name)
        hangs = "starting" if self.kernel.kernel_id == model["id"] else ""  # it was tried in vain
        if model.get("execution_state") in ("dead", hangs):
            self.client.command(model["id"], "restart", KERNEL_TIMEOUT_S)
        return model

    def _restore(self, run: Run, cells: list[dict[str, Any]]) -> None:
        """Run a notebook's cells again. All are sent at once: so the kernel goes on to the last one
        even if this process is killed meanwhile, and whoever comes next waits behind it."""
        run.stage, started, kernel = "restoring", time.monotonic(), self.kernel
        again = {n: source_of(cell) for n, cell in enumerate(cells, 1) if was_run(cell)}
        requests = {n: self._send(source, ask=False)[0] for n, source in again.items()}
        kernel.execute(CALL % 'hello("restored")' if kernel.has_helper else "", silent=True)
        replies = {n: kernel.wait(request) for n, request in requests.items()}
        kernel.wait(kernel.greeting("ready"))  # else whoever comes next would tell of it again
        failed = ", ".join(str(n) for n in replies if replies[n].get("status") != "ok") or "none"
        took = time.monotonic() - started
        run.notes.append(RESTORED.format(self.session_id, len(again), self.path, took, failed))

    def _send(self, code: str, *, ask: bool) -> tuple[Request, str]:
        """Send a cell as itself; or to the helper a script, or what that shall decide if asked.
        With what the notebook shows, unless the helper says otherwise, at once."""
        settled = settle(code) if self.kernel.has_helper else ("python", code)
        language, text = settled or ("bash" if ask else "python", code)
        if language == "python":
            return self.kernel.execute(code), code
        call, shown = CALL % f"run({text!a}, {not settled})", code if settled else f"%%bash\n{code}"
        return self.kernel.execute(call, store_history=False), shown

    def _run_cell(self, run: Run) -> None:
        had, (run.request, run.cell["source"]) = self.kernel.missing, self._send(run.code, ask=True)
        if self._owner.keeps_notebook:  # the kernel works meanwhile, so this look costs no time
            with contextlib.suppress(NotebookError, ServerError):
                self._notebook.check()
        reply = self.kernel.wait(run.request)
        if cell := run.request.answer.get("cell"):
            run.cell["source"], run.request = cell, self.kernel.execute(cell)
            reply = self.kernel.wait(run.request)
        # what the helper answers has no number: the user's count goes on without it
        run.cell["execution_count"] = None if run.request.answer else reply.get("execution_count")
        # a few numbers can lack without a loss: hooks of display may drop what they were given
        if not run.request.idle or self.kernel.missing - had > 9:
            run.outputs.lost = run.outputs.lost or DROPPED.format("it was too busy, or broke.")
        if reply.get("status") != "ok":
            self._fail(run, item_text(error_output(reply)), reply)
        for payload in reply.get("payload") or ():
            if payload.get("source") == "page":  # help, as of `x?`: shown below the cell
                self._hear({"header": {"msg_type": "display_data"}, "content": payload})
            elif payload.get("source") == "ask_exit" and not payload.get("keepkernel"):
                with contextlib.suppress(ServerError):  # then it ends a moment later
                    self.client.command(self.kernel.kernel_id, "restart", KERNEL_TIMEOUT_S)
                raise KernelDied("The code ended its kernel, as by exit or quit.")

    def _save(self, run: Run) -> None:
        """The cell into the notebook; while it runs, with what there is."""
        if not self._owner.keeps_notebook or run.request is None:
            return
        with self._changed:
            items = run.outputs.items() + run.outputs.error
        texts, limit = [clean(item_text(item)) for item in items], self.settings.max_output
        try:
            if run.outputs.size() > limit:
                items = brief(items, self._cut(texts, min(limit, NOTEBOOK_TEXT), [run]))
                self.client.write(run.text_path, [json_inside("".join(texts))])
            self._notebook.save({**run.cell, "outputs": items})
        except Exception as err:  # the result is delivered, whatever it is
            if run.stage == "saving":
                self._fail(run, f"The cell is not saved: {err}. The next call tries again")


class Interpreter:
    """All sessions on one Jupyter server. Making one checks the server, token, kernel and folder.

    Raises:
        ConfigError: The kernel or the folder does not fit the server. ServerError: Anything else.
    """

    def __init__(self, client: RemoteJupyterClient, settings: Settings | None = None) -> None:
        self.client, self.settings = client, settings or Settings()
        self.specs: dict[str, Any] = client.kernelspecs()["kernelspecs"]
        self.closing = False
        self._sessions: dict[int, Session] = {}
        name, folder = self.settings.kernel_name, self.settings.folder
        if name and name not in self.specs:
            raise ConfigError(f"No kernel {name!r}; there are: {', '.join(sorted(self.specs))}")
        self.keeps_notebook = client.modified("") is not None
        path = posixpath.normpath(self._below_root(folder) if folder.startswith("/") else folder)
        self.folder = "" if path == "." else path
        if ".." in path.split("/"):
            raise ConfigError(f"The notebooks folder {folder!r} is not below the server's root")
        client.make_folder(self.folder if self.keeps_notebook else "")

    def session(self, session_id: int = 0) -> Session:
        """Session N, or for 0 a new one with a random 10-digit id. Nothing is sent yet."""
        number = session_id or 10**9 + secrets.randbelow(9 * 10**9)
        # atomic: of two callers one makes it
        return self._sessions.setdefault(number, Session(self, number, is_new=not session_id))

    def close(self) -> None:
        """Let go of all sessions; what runs goes on in the kernels."""
        self.closing = True
        running = [session.current() for session in list(self._sessions.values())]
        wait([run.done for run in running if run and run.request], EXIT_S)

    def _below_root(self, folder: str) -> str:
        """An absolute folder, relative to the server's root. Only a kernel knows where that is."""
        kernel_id = self.client.open_session(secrets.token_hex(9), self.settings.kernel_name)["id"]
        kernel = Kernel(self.client, kernel_id, lambda message: None)
        try:
            kernel.greet("ready")
            request = kernel.execute(CALL % f"relative({folder!a})", silent=True)
            kernel.wait(request)
            return str(request.answer.get("folder", ".."))
        finally:
            self.client.delete(kernel_id)


# --- Bash ----------------------------------------------------------------------------------------

HELPER_VERSION = 3  # raised with each change of HELPER: a newer helper replaces an older one

# Lives in the kernel as a module of its own, so nothing of it is in the user's namespace; runs on
# the kernel's Python, 3.8 or later. Its answers travel in the execute_reply's payload, which no
# other client sees. What commands print goes out as stream messages, whatever became of sys.stdout.
# PREFIX: what may stand before a script's first word: comments, > file, NAME=value, opening
# brackets. NOTE: at its end the shell notes where it is and what it exports, with nothing but
# builtins. A newer helper takes `state` and `last` over: it is executed in the older one's module.
# A child in the background may hold the pipe open for ever: what it prints after the call is sent
# by a thread, and comes with the next one. Output gathers for 0.05 s: the server takes 1,000
# messages a second, and less when it replays them.
HELPER = r'''
import ast, builtins, codecs, contextlib, keyword, os, re, select, shlex, shutil, signal
import subprocess, sys, tempfile, time, warnings
from threading import Thread  # now: the user may replace it
from IPython import get_ipython
PREFIX = re.compile(r"""(?:\s+|\#[^\n]*|[;&|(]|>>?[ \t]*[\w./~-]+(?=\s+\S)|\{(?=\s)|[A-Za-z_]\w*\+?=
    (?:\([^()]*\)|'[^']*'|"(?:\\.|[^"\\])*"|\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`|\\.
    |\$(?!\()|[^\s;&|<>()'"`\\$])*(?=[\s;&|]|\Z))*""", re.X)
PYTHON_ONLY = {"", "print", *keyword.kwlist} - {"for", "if", "while"}  # as first words
QUIET = dict(TERM="dumb", NO_COLOR="1", PAGER="cat", GIT_PAGER="cat", MANPAGER="cat", EDITOR="true",
    VISUAL="true", GIT_EDITOR="true", GIT_TERMINAL_PROMPT="0")
NOTE = ('{ status=$?; set +eux; } 2>/dev/null; { printf "%s\\0" "$PWD"; compgen -e | '
    'while IFS= read -r n; do printf "%s=%s\\0" "$n" "${!n-}"; done; } 2>/dev/null >| ')
state, last = globals().get("state"), globals().get("last")
def answer(**fields):
    get_ipython().payload_manager.write_payload(dict(fields, source=__name__))
def hello(mark):
    global state
    before = state or ("used" if get_ipython().execution_count > 1 else "fresh")
    answer(state=before, last=last)
    if mark:
        state = mark if before in ("fresh", "restoring") else "ready"
def relative(folder):
    answer(folder=os.path.relpath(os.path.realpath(folder), os.path.realpath(os.getcwd())))
def as_python(code, runs):  # the cell to run as Python, or None: it is bash
    shell, tree = get_ipython(), None
    names = {"pip", "conda", "mamba", "uv"} - {*shell.user_ns}
    magics = "|".join(filter(shell.find_line_magic, names)) or "(?!)"  # or what matches nothing
    for cell in (re.sub(r"(?m)^(?=(%s)[ \t]+-{0,2}[a-z])" % magics, "%", code), code):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            escaped = cell.lstrip()[:1] in "/,;"
            text = cell if escaped else shell.input_transformer_manager.transform_cell(cell)
            tree = ast.parse(text)
            if not re.search("^%", text, re.M):  # else a line within a string was taken for one
                break
    rest = code[PREFIX.match(code).end():]
    runs_always = re.match(r"[$>]|\.\.?/|~/|[\w.:-]+[ \t]*\([ \t]*\)", rest)  # $x, > f, ./f, f()
    word = ":" if runs_always else re.match(r"[^\s;|&<>()\0]*", rest)[0]
    python = word in PYTHON_ONLY or re.match(r"\S+[ \t]+=", rest)
    if tree is not None:  # then bash only if it begins with an expression's name, and that unknown
        first = re.match(r"(?:\s|#.*\n)*[A-Za-z_]\w*(?=[\s;|&<>]|\Z)", cell)
        python = python or not first or not isinstance(tree.body[0], ast.Expr)
        python = python or word in {*vars(builtins), *shell.user_ns}
    return cell if python or not runs(word) else None
def environment():
    env = {k: v for k, v in os.environ.items() if "CLICOLOR" not in k and k != "FORCE_COLOR"}
    here, path = os.path.dirname(sys.executable), env.get("PATH", os.defpath)
    path = path if here in path.split(os.pathsep) else here + os.pathsep + path
    return dict(env, PATH=path, **QUIET)  # with it, python and pip are the kernel's own
def run(code, ask):  # ask: if it is Python, answer with the cell instead
    global last
    shell, bash, env = get_ipython(), shutil.which("bash"), environment()
    session, socket, parent = shell.kernel.session, shell.kernel.iopub_socket, shell.get_parent()
    last = parent["header"]["msg_id"]
    script = code.replace("\r\n", "\n").replace("\0", "").encode("utf-8", "replace")
    def runs(word):  # can bash parse the script and run this word?
        test = [bash, "-c", '"$BASH" -n && type -- "$1"', "", os.path.expanduser(word.strip("\"'"))]
        done = bash and subprocess.run(test, env=env, input=script, capture_output=True)
        return done and done.returncode == 0
    def send(text):
        session.send(socket, "stream", {"name": "stdout", "text": text}, parent, b"stream.stdout")
    cell = as_python(code, runs) if ask else None
    if cell is not None:
        return answer(cell=cell)
    if not bash:
        return answer(error="There is no bash on the machine where the kernel runs: use Python")
    with tempfile.NamedTemporaryFile(buffering=0) as file:  # the script, later the shell's note
        file.write(script)
        answer(error=execute(bash, env, shlex.quote(file.name), send))
        file.seek(0)
        with contextlib.suppress(OSError, ValueError):  # it was killed, or its folder is gone
            hand_over(env, os.fsdecode(file.read()))
def execute(bash, env, path, send):  # to its end; the error, "" if all is well
    try:
        os.getcwd()
    except OSError:
        os.chdir(os.path.expanduser("~"))
        send("[the working directory was deleted; now in %s]\n" % os.getcwd())
    note = NOTE + path  # by a trap, too: the script may `exit`, or set a trap of its own
    command = 'trap %s EXIT; eval "$(<%s)"; %s; exit "$status"' % (shlex.quote(note), path, note)
    process = subprocess.Popen([bash, "-c", command, "bash"], bufsize=0, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        pump(process.stdout, send, lambda: process.poll() is None)
        status = process.wait()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGKILL):  # as Ctrl-C does, then for certain
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(1)
        pump(process.stdout, send, lambda: False)
        return "KeyboardInterrupt: the command was stopped, with its children"
    finally:  # a child in the background may hold the pipe open
        late = lambda: (pump(process.stdout, send, lambda: True), process.stdout.close())
        Thread(target=late, daemon=True).start()
    number = -status if status < 0 else status - 128
    with contextlib.suppress(ValueError):  # it is not the number of a signal
        return f"Command was killed by {signal.Signals(number).name} (exit status {128 + number})"
    return "Command exited with status %d" % status if status else ""
def pump(pipe, send, running):  # until its end, or until nothing is there and bash has ended
    decode, held, due = codecs.getincrementaldecoder("utf-8")("replace").decode, "", 0
    poll, done = select.poll(), False
    poll.register(pipe, select.POLLIN)
    while not done:
        alive = running()
        ready = poll.poll(50 if alive else 0)
        data = pipe.read(65536) if ready else b""
        done = not data and bool(ready or not alive)
        held += decode(data, done)
        if held and (not data or len(held) > 200000 or time.monotonic() > due):
            send(held)
            held, due = "", time.monotonic() + 0.05
def hand_over(before, note):  # the working directory of the shell and the exports it changed
    folder, *pairs = note.split("\0")[:-1]
    after = dict(pair.split("=", 1) for pair in pairs if not re.match("(_|SHLVL)=", pair))
    # An exported function is not listed; and a note can be cut short.
    for name in filter(str.isidentifier, before.keys() - after - {"_", "SHLVL"} if pairs else ()):
        os.environ.pop(name, None)
    os.environ.update(after.items() - before.items())
    os.chdir(folder)
'''

# Statements and `import` only: names like `exec` may be variables of the user here.
CALL = f"try:\n    import {HELPER_NAME}\n    {HELPER_NAME}.%s\nfinally:\n    del {HELPER_NAME}\n"
INSTALL = f"""class {HELPER_NAME}:
    import builtins, sys, types
    module = sys.modules.setdefault({HELPER_NAME!r}, types.ModuleType({HELPER_NAME!r}))
    if module.__dict__.get("version", 0) < {HELPER_VERSION}:
        builtins.exec(builtins.compile({HELPER!r}, {HELPER_NAME!r}, "exec"), module.__dict__)
        module.version = {HELPER_VERSION}
"""


# --- Tools ---------------------------------------------------------------------------------------


def serve(interpreter: Interpreter) -> None:
    """Serve MCP on stdin and stdout until stdin ends; with the SDK's 1.x and 2.x alike."""
    from inspect import getdoc

    from mcp.types import CallToolResult
    from pydantic import Field, create_model

    class Stdin(io.FileIO):
        """At its end the SDK cancels the running handlers as if somebody had pressed stop; but a
        client that went away leaves its code running: a closing interpreter stops nothing."""

        def readinto(self, buffer: Any) -> int:
            count = super().readinto(buffer) or 0
            interpreter.closing |= count == 0
            return count

    # a duplicate, or SDK 2.x would read past this object
    sys.stdin = io.TextIOWrapper(io.BufferedReader(Stdin(os.dup(0))), "utf-8", "replace")
    modern = importlib.util.find_spec("mcp.server.mcpserver") is not None
    sdk: Any = importlib.import_module("mcp.server.mcpserver" if modern else "mcp.server.fastmcp")
    server = (sdk.MCPServer if modern else sdk.FastMCP)(PROGRAM, log_level="WARNING")
    (server._lowlevel_server if modern else server._mcp_server).version = __version__
    # what `Result.as_dict` returns; no docstring: it would be sent with each list of tools
    fields: Any = {"result": (list[str], ...), "error": (list[str], ...), "session_id": (int, ...)}
    code_result = create_model("CodeResult", **fields)

    def tool_result(outcome: Result) -> CallToolResult:
        content = [{"type": "text", "text": dump(outcome.as_dict())}]
        content += [{"type": "image", "mimeType": m, "data": data} for m, data in outcome.images]
        whole = {"structuredContent": outcome.as_dict(), "isError": outcome.not_run}
        return CallToolResult.model_validate({"content": content, **whole})

    async def wait_for(session: Session, outcome: Any, max_s: float, ctx: Any) -> None:
        """Wait as long as the call may, and tell the client meanwhile."""
        started = time.monotonic()
        while not outcome.done() and (left_s := started + max_s - time.monotonic()) > 0:
            await asyncio.wait([outcome], timeout=min(left_s, PROGRESS_S))
            if not outcome.done() and (run := session.current()) is not None:
                said = run.outputs.last_line() or run.stage
                await ctx.report_progress(time.monotonic() - started, None, said)

    # The docstrings of the tools are what the model reads.

    async def execute_code(
        code: str, ctx: sdk.Context, session_id: Annotated[int, Field(ge=0, le=MAX_SESSION_ID)] = 0,
        timeout: Annotated[float, Field(ge=0)] | None = None,
    ) -> Annotated[CallToolResult, code_result]:
        """Run Python or bash on the remote Jupyter server; nothing runs on this machine.

        State lasts: pass the returned session_id to keep variables, imports, working directory and
        exported variables; 0 opens a new session. A session is a notebook on the server.
        Python is an IPython cell: the last expression's value is returned, plots come back as
        images, `%pip install` works. Bash is recognised (`ls -la`, `git status`, whole scripts);
        %%bash on the first line forces it. What could be either is Python. input() is not
        available.
        timeout: seconds this call waits, not how long the code may run; 0 starts it and returns at
        once. Then the code runs on: empty code with the same session_id waits for the rest,
        interrupt_execution stops it.
        error: empty if all went well, else the traceback, or what happened and what to do. If a
        kernel is lost, the next call runs the session's cells again.
        """
        timeout_s = interpreter.settings.timeout_s if timeout is None else timeout
        session = interpreter.session(session_id)
        run = session.submit(code)
        future = asyncio.wrap_future(run.done)
        try:
            await wait_for(session, future, timeout_s, ctx)
        except asyncio.CancelledError:  # nobody waits any more: not run, or interrupted if it runs
            run.abandoned = run.withdrawn = True
            raise
        return tool_result(session.collect(run, timeout_s))

    async def interrupt_execution(
        session_id: Annotated[int, Field(ge=1, le=MAX_SESSION_ID)], ctx: sdk.Context,
        restart: bool = False,
    ) -> Annotated[CallToolResult, code_result]:
        """Stop what runs in a session and return the rest of its output; variables stay.

        If the code ignores that, restart=True restarts the kernel and runs the session's cells
        again.
        """
        session = interpreter.session(session_id)
        outcome = asyncio.ensure_future(asyncio.to_thread(session.interrupt, restart=restart))
        await wait_for(session, outcome, HTTP_TIMEOUT_S, ctx)
        return tool_result(await outcome)

    for tool in (execute_code, interrupt_execution):
        server.add_tool(tool, description=getdoc(tool))
    server.run("stdio")


# --- Command line --------------------------------------------------------------------------------


def read_env_file() -> dict[str, str]:
    """NAME=value lines of .env; quotes around a value and `export` before a name may be there."""
    line = r"""^\s*(?:export )?(\w+)[ \t]*=[ \t]*(?:'(.*?)'|"(.*?)"|(.*?))[ \t]*(?:(?<=\s)#.*)?$"""
    with contextlib.suppress(OSError), open(".env", encoding="utf-8-sig", errors="replace") as file:
        return {m[1]: m[2] or m[3] or m[4] or "" for m in re.finditer(line, file.read(), re.M)}
    return {}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; what is not given comes from the environment, then from .env."""
    more = "Defaults: variables (JUPYTER_BASE_URL, JUPYTER_TOKEN, JUPYTER_INTERPRETER_...) and .env"
    cli = argparse.ArgumentParser(PROGRAM, None, __doc__.splitlines()[0], more, allow_abbrev=False)
    add = cli.add_argument
    add("--jupyter-base-url", metavar="URL", help="the server: http(s)://HOST[:PORT][/PATH]")
    add("--jupyter-token", metavar="TOKEN", default="", help="its token")
    add("--notebooks-folder", metavar="DIR", default="notebooks", help="on the server (notebooks)")
    add("--kernel-name", metavar="NAME", default="", help="kernel to start (default: the server's)")
    add("--timeout", metavar="SECONDS", type=float, default=50.0, help="a call's wait (50)")
    add("--max-output", metavar="CHARS", type=int, default=50_000, help="of a result (50000)")
    add("--no-restore", action="store_true", help="start empty when a session's kernel is gone")
    add("--ca-bundle", metavar="FILE", help="certificates to trust, for HTTPS and WSS")
    add("--local", metavar="DIR", nargs="?", const=".", help="start a server here, root DIR (.)")
    add("--execute", metavar="CODE", help="run one cell (- reads stdin), print its result and exit")
    add("--session-id", metavar="N", type=int, default=0, help="with --execute: its session")
    add("--verbose", action="store_true", help="log each request to stderr")
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    environment = {**read_env_file(), **os.environ}
    for action in cli._actions[1:-1]:  # without --help and --version
        plain = action.dest in ("jupyter_base_url", "jupyter_token", "notebooks_folder")
        if value := environment.get("JUPYTER_INTERPRETER_" * (not plain) + action.dest.upper()):
            on = value.lower() in ("1", "true", "yes", "on")
            action.default = on if action.nargs == 0 else value
    args, rest = cli.parse_known_args(argv)
    if rest:  # in short: what is no flag may be a token
        cli.error("unrecognized: " + re.sub(r"(?<!\S)(?!--\w)\S+|=\S*", "...", " ".join(rest)))
    limits = {"timeout": (0, 1e9), "max_output": (1, TEXT_KEPT), "session_id": (0, MAX_SESSION_ID)}
    for name, (least, most) in limits.items():
        if not least <= getattr(args, name) <= most:
            cli.error(f"--{name.replace('_', '-')} must be from {least} to {most:.0f}")
    if not args.jupyter_base_url and args.local is None:
        cli.error("--jupyter-base-url is missing (or JUPYTER_BASE_URL, or --local)")
    return args


# Ends with us, whatever ends us: its standard input is a pipe that then closes. Its first line of
# output is its URL, when it listens.
LOCAL_SERVER = """import os, sys, threading
from jupyter_server.serverapp import ServerApp
app = ServerApp.instance()
app.initialize(["--ip=127.0.0.1", "--port=0", "--allow-root", "--log-level=ERROR", *sys.argv[1:]])
del os.environ["JUPYTER_TOKEN"]  # the kernels need not know it
threading.Thread(target=lambda: (sys.stdin.read(), app.stop()), daemon=True).start()
app.io_loop.add_callback(print, app.connection_url, flush=True)
app.kernel_manager.context.rcvhwm = 0  # drops nothing: it has no rate limits either
app.io_loop.add_callback(os.dup2, 2, 1)  # nobody reads the pipe any more
app.start()"""


def local_server(folder: str, stack: contextlib.ExitStack) -> tuple[str, str]:
    """A Jupyter server on loopback with a random token; its URL and token. It ends with `stack`."""
    if not all(map(importlib.util.find_spec, ("jupyter_server", "ipykernel"))):
        raise ConfigError("--local needs jupyter-server and ipykernel: install the extra `local`")
    if not os.path.isdir(folder):
        raise ConfigError(f"--local: {folder!r} is not a folder")
    token, root = secrets.token_hex(24), f"--ServerApp.root_dir={os.path.realpath(folder)}"
    limits = [f"--ZMQChannelsWebsocketConnection.iopub_{x}_rate_limit=0" for x in ("data", "msg")]
    temp = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    env = dict(os.environ, JUPYTER_TOKEN=token, JUPYTER_RUNTIME_DIR=temp, JUPYTER_CONFIG_DIR=temp)
    command = [sys.executable, "-c", LOCAL_SERVER, "--no-browser", root, *limits]
    said, pipe = None if log.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL, subprocess.PIPE
    # when `stack` ends, its input closes, and it is waited for
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, env=env)
    if (out := stack.enter_context(process).stdout) and (url := out.readline().decode().strip()):
        return url, token
    raise ConfigError("The local Jupyter server did not start; --verbose shows why")


def main(argv: list[str] | None = None) -> int:
    """The console script. 0: served or ran; 1: the cause on stderr, a sentence; 2: wrong flags."""
    import signal

    args = parse_args(argv)
    # websocket-client reads in pieces of 16 kB: glibc would keep 50 MB of them after a large print.
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).mallopt(-3, 16_384)  # M_MMAP_THRESHOLD; other C libraries have none
    logging.basicConfig(format=f"{PROGRAM}: %(message)s")  # to stderr
    log.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    warnings.simplefilter("ignore", SyntaxWarning)  # of cells that are parsed here
    # no daemon: one that imports while the process ends can crash it
    load_sdk = threading.Thread(target=importlib.import_module, args=("mcp.server.stdio",))
    if args.execute is None:  # importing takes longer than the checks: side by side
        load_sdk.start()
    folder, kernel = args.notebooks_folder, args.kernel_name
    settings = Settings(folder, kernel, args.timeout, args.max_output, not args.no_restore)
    url, token, stack = args.jupyter_base_url, args.jupyter_token, contextlib.ExitStack()

    def leave(number: int, _: Any) -> None:  # without waiting for the thread that reads stdin
        stack.close()
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    try:
        with stack:
            if args.local is not None:
                url, token = local_server(args.local, stack)
                os.environ["no_proxy"] = "127.0.0.1"
            client = RemoteJupyterClient(url, token, ca_bundle=args.ca_bundle)
            if token and url[:5] == "http:" and not re.match(r"localhost$|127\.|::1$", client.host):
                log.warning("The token travels unencrypted to %s; use https", client.host)
            interpreter = Interpreter(client, settings)
            stack.callback(interpreter.close)  # saves what runs
            if not interpreter.keeps_notebook:
                log.warning("%s has no contents API: sessions leave no notebook", client.base_url)
            if args.execute is None:
                load_sdk.join()
                serve(interpreter)
                return 0
            code = sys.stdin.read() if args.execute == "-" else args.execute
            outcome = interpreter.session(args.session_id).execute(code)
            print(json.dumps(outcome.as_dict()), flush=True)  # ASCII: any terminal can show it
            return 1 if outcome.error else 0
    except (InterpreterError, ValueError) as err:  # the latter for what no URL can be
        sys.exit(f"{PROGRAM}: {err}")


if __name__ == "__main__":
    sys.exit(main())
