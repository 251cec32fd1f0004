#!/usr/bin/env python3
"""Give an agent a code interpreter on a remote Jupyter server, over the Model Context Protocol.

A session is a notebook on the Jupyter server, bound to a kernel there: the agent works in it through
one tool, a person can open the same notebook in JupyterLab and go on in the same kernel. Nothing runs
on the machine of the MCP server. It does not serve HTTP, cull kernels, start containers or resize
pictures; the README names what does.

The file reads from top to bottom:

    Constants           numbers and names, each with its reason
    Errors and data     what can go wrong, what is handed over
    Protocol, pure      frames, the output of a cell, whose language a cell is in
    Jupyter server      REST
    Kernel              one kernel over one websocket
    Notebook            one session's file
    Session             one cell after the other; restoring, time, interrupting
    Bash                the helper inside the kernel
    Tools               the MCP side, the one place where threads and asyncio meet
    Command line        flags, variables, .env, --local, --execute

Errors, all raised on purpose:

    InterpreterError
      ConfigError(ValueError)            a setting is missing or malformed
      ServerError                        the Jupyter server answered with a failure
        ServerUnreachable(ConnectionError)   no answer: refused, unknown host, TLS, time-out
        ServerRefused(PermissionError)   401 or 403: the token is wrong or lacks rights
        NotFound(LookupError)            404
      NotebookError                      the session's file is not a notebook that can be continued
      KernelError
        KernelDied                       the kernel ended or restarted; its variables are gone
        ConnectionLost(ConnectionError)  the websocket broke, or lost what we wait for

Sources: "Messaging in Jupyter" (jupyter-client.readthedocs.io, messaging.html), "WebSocket kernel wire
protocols" (jupyter-server.readthedocs.io, websocket-protocols.html), the server's REST API
(jupyter_server/services/api/api.yaml), the notebook format (nbformat.readthedocs.io), RFC 6455.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["mcp>=1.23,<3", "requests>=2.31,<3", "websocket-client>=1.7,<2"]
# ///
import argparse
import ast
import asyncio
import contextlib
import importlib
import importlib.util
import io
import json
import keyword
import logging
import os
import posixpath
import re
import secrets
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict
from urllib.parse import quote, unquote, urlsplit

import requests
import urllib3
import websocket

__version__ = "0.3.0"
__all__ = [
    "InterpreterError", "Interpreter", "RemoteJupyterClient", "Result", "Session", "Settings", "main",
]

log = logging.getLogger("jupyter_interpreter_mcp")

# --- Constants ---------------------------------------------------------------------------------------

PROGRAM = "jupyter-interpreter-mcp"
MAX_SESSION_ID = 2**53 - 1  # the largest integer that every JSON reader keeps exact
CONNECT_TIMEOUT_S = 10.0  # for a TCP connection
HTTP_TIMEOUT_S = 30.0  # for an answer; starting a kernel on a busy server takes seconds
HANDSHAKE_TIMEOUT_S = 60.0  # the server answers the websocket handshake when the kernel is up
RECONNECT_S = 60.0  # how long a broken websocket is tried again
TICK_S = 0.5  # how often a waiting thread looks up: for closing, for a lost kernel, for saving
SILENCE_S = 2.0  # no message for so long: ask over REST, a deleted kernel's websocket stays silent
IDLE_S = 30.0  # an unused websocket is closed; the server drops one that is not read for 90 s
SAVE_EVERY_S = 10.0  # a cell that runs on is saved so often, for the person who opens the notebook
FRESH_S = 1.0  # how long "nobody else changed the file" is believed
SAVE_GRACE_S = 3.0  # a call waits so much longer if its code has ended and is being saved
PROGRESS_S = 5.0  # between two progress notifications
INTERRUPT_S = 5.0  # how long an interrupt may take before we say that it did not work
RESTART_S = 9.5  # the same for a restart, after the interrupt: 15 s in all
EXIT_S = 2.0  # for saving at exit; MCP clients kill a server that takes longer

TEXT_KEPT = 16_000_000  # characters of one cell's text that are kept; then the end of it only
TAIL_KEPT = 1_000_000  # characters of that end
DATA_KEPT = 64_000_000  # characters of pictures and other rich output of one cell
ITEMS_KEPT = 10_000  # separate outputs of one cell
IMAGES_SENT = 10  # pictures in one result
IMAGE_BYTES = 4_000_000  # larger pictures are named instead of sent; clients refuse them
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
# The server leaves Nagle's algorithm on: each small frame waits until the one before it is
# acknowledged, and the receiver delays a bare acknowledgement by 40 ms. Any frame we send carries the
# acknowledgement at once; a Pong needs no answer (RFC 6455, section 5.5.3). 5 instead of 45 ms a call.
PONG_BELOW = 128_000
SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"  # binary frames: 18 x faster for large text
CLIENT_PREFIX = f"{PROGRAM}-"  # begins each client_session_id, so that we know our own kind
HELPER_NAME = "_jupyter_interpreter_mcp"  # of the module in the kernel

# --- Errors and data ---------------------------------------------------------------------------------


class InterpreterError(Exception):
    """Every error that this module raises on purpose; its text says what to do next."""


class ConfigError(InterpreterError, ValueError):
    """A setting is missing, malformed or does not fit the server."""


class ServerError(InterpreterError):
    """The Jupyter server answered with a failure."""

    def __init__(self, message: str, url: str = "", status_code: int | None = None) -> None:
        super().__init__(message)
        self.url, self.status_code = url, status_code


class ServerUnreachable(ServerError, ConnectionError):
    """No answer from the server: refused, unknown host, TLS, time-out. Nothing was run."""


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


class Detached(Exception):
    """Not an error: this process ends and leaves the code running."""


@dataclass(frozen=True)
class Settings:
    """How an interpreter works. folder: relative to the server's root directory."""

    folder: str = "notebooks"
    kernel_name: str = ""
    timeout_s: float = 50.0
    max_output: int = 50_000
    restore: bool = True


class Result(NamedTuple):
    """What one call hands back. images: (mime type, base64) pairs; not_run: nothing could be run."""

    result: list[str]
    error: list[str]
    session_id: int
    images: list[tuple[str, str]]
    not_run: bool

    def as_dict(self) -> dict[str, Any]:
        return {"result": self.result, "error": self.error, "session_id": self.session_id}


class Message(NamedTuple):
    """A decoded message. Source: Messaging in Jupyter, "General message format"."""

    channel: str
    msg_type: str
    parent_header: dict[str, Any]
    content: dict[str, Any]


@dataclass
class Request:
    """One execute_request on its way. It is done when its reply *and* its idle status are here."""

    msg_id: str
    reply: dict[str, Any] | None = None
    idle: bool = False
    heard: bool = False  # the kernel took it: any message names it as parent

    @property
    def done(self) -> bool:
        return self.reply is not None and self.idle

    def note(self, message: Message) -> None:
        self.heard = True
        if message.msg_type == "execute_reply":
            self.reply = message.content
        elif message.msg_type == "status":
            self.idle = message.content.get("execution_state") == "idle"

    def answer(self) -> dict[str, Any]:
        """What the helper in the kernel said, from the reply's payload."""
        payload = (self.reply or {}).get("payload") or []
        return next((p for p in payload if p.get("source") == HELPER_NAME), {})


# --- Protocol, pure ----------------------------------------------------------------------------------


def encode(message: dict[str, Any], *, binary: bool) -> bytes | str:
    """A message as a websocket frame. Source: WebSocket kernel wire protocols."""
    if not binary:
        return json.dumps({**message, "buffers": []})
    parts = [message["channel"].encode()]
    parts += [json.dumps(message[k]).encode() for k in ("header", "parent_header", "metadata", "content")]
    offsets = [8 * (len(parts) + 2)]  # the count, one offset a part, and the end
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    return b"".join(n.to_bytes(8, "little") for n in [len(offsets), *offsets]) + b"".join(parts)


def decode(frame: bytes, *, binary: bool) -> Message:
    """A websocket frame as a message; buffers (only widgets have them) are left out."""
    if binary:
        count = int.from_bytes(frame[:8], "little")
        offsets = [int.from_bytes(frame[8 * i : 8 * i + 8], "little") for i in range(1, count + 1)]
        parts = [frame[a:b] for a, b in zip(offsets, offsets[1:])]
        channel, (header, parent, _, content) = parts[0].decode(), map(json.loads, parts[1:5])
        return Message(channel, header["msg_type"], parent, content)
    if frame[:1] != b"{":  # JSON with buffers: count and offsets, 4 bytes each, big endian
        start, end = int.from_bytes(frame[4:8], "big"), int.from_bytes(frame[8:12], "big")
        frame = frame[start:end]
    whole = json.loads(frame)
    return Message(
        whole["channel"], whole["header"]["msg_type"], whole["parent_header"], whole["content"]
    )


ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


def clean(text: str) -> str:
    """Text without ANSI codes, carriage returns and what UTF-8 cannot hold (lone surrogates)."""
    text = ANSI.sub("", text) if "\x1b" in text else text
    return text.replace("\r", "").encode("utf-8", "replace").decode()


def overwrite(text: str) -> str:
    r"""The final state of lines rewritten with "\r"; a "\r" at the very end waits for what follows."""
    lines = text.replace("\r\n", "\n").split("\n")
    for i, line in enumerate(lines):
        if "\r" in line:
            shown = [part for part in line.split("\r") if part]
            lines[i] = shown[-1] if shown else ""
    waits = text.endswith("\r")
    return "\n".join(lines) + "\r" * waits


def shorten(texts: list[str], limit: int, note: str) -> list[str | None]:
    """Head and tail of texts, `limit` characters in all; `note` stands for the middle, None for a text
    that is wholly in it."""
    total, position, noted = sum(map(len, texts)), 0, False
    kept: list[str | None] = []
    for text in texts:
        left = max(0, limit // 2 - position)
        right = max(left, total - limit // 2 - position)
        position += len(text)
        if total <= limit or left >= len(text) or right <= 0:
            kept.append(text)
        elif not noted:
            kept.append(text[:left] + note + text[right:])
            noted = True
        else:
            kept.append(text[right:] or None)
    return kept


def mime_text(data: dict[str, Any]) -> str:
    """The text that stands for a mime bundle in a result."""
    for mime in ("text/plain", "text/markdown", "text/latex", "text/html", "application/json"):
        if mime in data:
            value = data[mime]
            value = "".join(value) if isinstance(value, list) else value
            return value if isinstance(value, str) else json.dumps(value)
    return f"[{', '.join(data)}]"


class Outputs:
    """The output of one cell as the notebook shows it, in bounded memory.

    items: nbformat outputs; those before `mark` have been handed to a caller. Source: Messaging in
    Jupyter, "Messages on the IOPub channel"; nbformat, "Code cell outputs".
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.mark = 0
        self.text_size = 0  # characters kept, and
        self.omitted = 0  # characters of the middle that were not
        self.data_size = 0
        self.rate_limits: list[str] = []
        self._clear_next = False
        self._displays: dict[str, dict[str, Any]] = {}

    def total(self) -> int:
        """Characters of text that the cell put out, those of the middle that were not kept included."""
        return sum(map(len, map(item_text, self.items))) + self.omitted

    def add(self, msg_type: str, content: dict[str, Any]) -> None:
        """Take the content of one IOPub message."""
        if msg_type == "clear_output":
            self._clear_next = True
            if not content.get("wait"):
                self._clear()
        elif msg_type == "stream":
            if re.match(r"IOPub (data|message) rate exceeded", content["text"]):
                self.rate_limits.append(content["text"])
            else:
                self._add_text(content["name"], content["text"])
        elif msg_type in ("display_data", "execute_result", "update_display_data"):
            self._add_data(msg_type, content)
        elif msg_type == "error":
            self._append({"output_type": "error", **{k: content[k] for k in ("ename", "evalue", "traceback")}})

    def take_error(self, reply: dict[str, Any]) -> dict[str, Any]:
        """The reply's error as an output; its copy among the items goes. The copy can be missing:
        the server's rate limit drops it, so the reply is what counts."""
        error = {
            "output_type": "error",
            "ename": reply.get("ename", "Error"),
            "evalue": reply.get("evalue", ""),
            "traceback": reply.get("traceback") or [],
        }
        last = self.items[-1] if len(self.items) > self.mark else {}
        if (last.get("ename"), last.get("evalue")) == (error["ename"], error["evalue"]):
            self.items.pop()
        return error

    def last_line(self) -> str:
        """The newest line of text, for progress notifications."""
        for item in reversed(self.items[-3:]):
            lines = clean("".join(item.get("text", [])[-2:])[-1000:]).strip().splitlines()
            if lines:
                return lines[-1]
        return ""

    def _append(self, item: dict[str, Any]) -> None:
        if self._clear_next:
            self._clear()
        self.items.append(item)

    def _clear(self) -> None:
        self.items.clear()
        self._displays.clear()
        self.mark = self.text_size = self.data_size = self.omitted = 0
        self._clear_next = False

    def _add_text(self, name: str, text: str) -> None:
        if self._clear_next:
            self._clear()
        full = self.text_size >= TEXT_KEPT
        last = self.items[-1] if len(self.items) > self.mark else {}
        if last.get("output_type") != "stream" or bool(last.get("tail")) != full or not (
            full or last["name"] == name or len(self.items) > ITEMS_KEPT
        ):
            last = {"output_type": "stream", "name": name, "text": [], **({"tail": True} if full else {})}
            self.items.append(last)
        chunks: list[str] = last["text"]
        if "\r" in text or (chunks and "\r" in chunks[-1]):
            line = chunks.pop() if chunks else ""
            self.text_size -= len(line)
            text = overwrite(line + text)
        if full:  # the end of endless output is one string that is cut from the front
            text = "".join(chunks) + text
            self.omitted += max(0, len(text) - TAIL_KEPT)
            chunks[:] = [text[-TAIL_KEPT:]]
            return
        room = TEXT_KEPT - self.text_size
        head, newline, line = text[:room].rpartition("\n")  # the open line is a chunk of its own
        chunks += [part for part in (head + newline, line) if part]
        self.text_size += len(text[:room])
        if text[room:]:
            self._add_text(name, text[room:])

    def _add_data(self, msg_type: str, content: dict[str, Any]) -> None:
        data, metadata = content["data"], content.get("metadata") or {}
        display_id = (content.get("transient") or {}).get("display_id")
        shown = self._displays.get(display_id) if display_id else None
        size = sum(len(v if isinstance(v, str) else json.dumps(v)) for v in data.values())
        if self.data_size + size > DATA_KEPT or len(self.items) > ITEMS_KEPT:
            self._add_text("stderr", f"[{', '.join(data)}: {size:,} characters, not kept]\n")
            return
        self.data_size += size
        if msg_type == "update_display_data" and shown is not None:
            shown.update(data=data, metadata=metadata)
            index = next(i for i, item in enumerate(self.items) if item is shown)
            if index < self.mark:  # the caller has an older state: hand it over again
                self.items.append(self.items.pop(index))
                self.mark -= 1
            return
        item = {"output_type": "display_data", "data": data, "metadata": metadata}
        if msg_type == "execute_result":
            item.update(output_type=msg_type, execution_count=content.get("execution_count"))
        self._append(item)
        if display_id:
            self._displays[display_id] = item


def item_text(item: dict[str, Any]) -> str:
    """The text of one output, as it counts towards the limit."""
    if item["output_type"] == "stream":
        return "".join(item["text"])
    return "\n".join(item["traceback"]) if item["output_type"] == "error" else mime_text(item["data"])


def notebook_outputs(items: list[dict[str, Any]], limit: int, note: str) -> list[dict[str, Any]]:
    """Outputs as the notebook file keeps them: the same, with the middle of long text left out."""
    texts = [item_text(item) for item in items]
    if sum(map(len, texts)) <= limit:
        return [{k: v for k, v in item.items() if k != "tail"} for item in items]
    rich = [item for item in items if item["output_type"] in ("display_data", "execute_result")]
    rich = [item for item in rich if any(mime in item["data"] for mime in IMAGE_TYPES)]
    text = "".join(t for t in shorten([clean(t) for t in texts], limit, note) if t)
    return [{"output_type": "stream", "name": "stdout", "text": text}, *rich]


def render(items: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, str]]]:
    """What a person sees below the cell, in order, as strings; and its pictures."""
    texts: list[str] = []
    images: list[tuple[str, str]] = []
    joins = False
    for item in items:
        text, stream = clean(item_text(item)), item["output_type"] == "stream"
        if joins and stream:
            texts[-1] += text
        else:
            texts.append(text)
        joins = stream
        data = item.get("data", {})
        for mime in [m for m in IMAGE_TYPES if m in data][:1]:
            size = len(data[mime]) * 3 // 4
            if size <= IMAGE_BYTES and len(images) < IMAGES_SENT:
                images.append((mime, "".join(data[mime].split())))
            else:
                limit = f"over {IMAGE_BYTES:,}" if size > IMAGE_BYTES else f"beyond the {IMAGES_SENT}th picture"
                texts[-1] += f"\n[{mime} of {size:,} bytes not sent: {limit}; it is in the notebook]"
    return [text[:-1] if text.endswith("\n") else text for text in texts], images


INSTALLER_LINE = re.compile(r"^(?=(?:pip|conda|mamba|uv)[ \t]+-{0,2}[a-z])", re.M)


def settle(code: str) -> tuple[str, str] | None:
    """("python", cell) or ("bash", script) where that is clear, None where the kernel must say.

    Clear: a cell magic; explicit IPython syntax; a cell that parses here and does not begin with an
    expression that could be a command: a word and then white space, an operator of the shell or the end.
    """
    text = code.lstrip()
    if magic := re.match(r"%%bash[ \t]*(?:\r?\n|\Z)", text):
        return "bash", text[magic.end() :]
    if text[:1] in ("%", "!", "?"):
        return "python", code
    try:
        flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile(code, "<cell>", "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if INSTALLER_LINE.search(code):
        return None
    if not tree.body or not isinstance(tree.body[0], ast.Expr):
        return "python", code
    first = code.splitlines()[tree.body[0].lineno - 1].lstrip()
    word = re.match(r"([A-Za-z_]\w*)(?=[\s;|&<>]|\Z)", first)
    return None if word and not keyword.iskeyword(word[1]) else ("python", code)


# --- Jupyter server ----------------------------------------------------------------------------------


class RemoteJupyterClient:
    """A Jupyter server over HTTP. Holds the token; nothing else in this file does.

    Args:
        base_url: http(s) URL, with a path if the server has one (https://hub/user/NAME/).
        token: Sent in the Authorization header only. Empty for a server without authentication.
        ca_bundle: File or folder with the certificates to trust, for HTTPS and WSS alike.
    Raises:
        ConfigError: The URL or the token cannot be one.
    Source: jupyter_server/services/api/api.yaml.
    """

    def __init__(self, base_url: str, token: str = "", *, ca_bundle: str | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            shown = f"{parts.scheme}://{parts.hostname}{parts.path}" if parts.hostname else base_url
            raise ConfigError(
                f"{shown!r} is not a server's URL: give http(s)://HOST[:PORT][/PATH], without user, query "
                "or token"
            )
        if not re.fullmatch(r"[!-~]*", token):
            raise ConfigError("The token holds white space or other characters that a token cannot have")
        self.base_url, self.host = base_url.rstrip("/"), parts.hostname
        self._token = token
        self.http = requests.Session()
        # Worked out once instead of for each request; and no ~/.netrc that replaces the token.
        self.http.trust_env = False
        self.http.proxies.update(requests.utils.get_environ_proxies(base_url))
        environment = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        self.ca_bundle = ca_bundle or environment or requests.certs.where()
        if not os.path.exists(self.ca_bundle):
            raise ConfigError(f"The CA bundle {self.ca_bundle!r} does not exist")
        self.http.verify = self.ca_bundle
        self.http.mount(base_url, requests.adapters.HTTPAdapter(pool_maxsize=100))
        self.http.headers["Content-Type"] = "application/json"
        if token:
            self.http.headers["Authorization"] = f"token {token}"
        else:  # without authentication the server wants proof that we are no web page: any equal pair
            xsrf = uuid.uuid4().hex
            self.http.headers["X-XSRFToken"] = xsrf
            self.http.cookies.set("_xsrf", xsrf)

    def request(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = HTTP_TIMEOUT_S
    ) -> Any:
        """One request to /api/PATH; the decoded JSON of its answer.

        Args:
            body: bytes are sent as they are, anything else as JSON.
            timeout_s: Seconds of silence from the server.
        Raises:
            ServerError: One of its kinds, or itself for statuses that have none.
        """
        url = f"{self.base_url}/api/{path}"
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        started = time.monotonic()
        try:
            response = self.http.request(
                method, url, data=data, timeout=(CONNECT_TIMEOUT_S, timeout_s), allow_redirects=False
            )
        except requests.RequestException as err:
            raise ServerUnreachable(self._why(err, timeout_s), url) from err
        log.debug("%s %s: %s, %.0f ms", method, url, response.status_code, 1e3 * (time.monotonic() - started))
        if response.is_redirect:
            raise self._redirected(url, response.headers["Location"], response.status_code)
        if not response.ok:
            raise self._failed(method, url, response)
        if response.status_code == 204:
            return None
        try:
            return response.json()
        except ValueError as err:
            raise ServerError(
                f"{url} answered {response.headers.get('Content-Type', 'something')} instead of JSON: this is "
                "not a Jupyter server, or its URL lacks a path; check --jupyter-base-url", url, 200
            ) from err

    def _why(self, err: requests.RequestException, timeout_s: float) -> str:
        """One sentence for a request without an answer."""
        cause: Any = err.args[0] if err.args else err
        cause = getattr(cause, "reason", cause)
        at = f"the Jupyter server at {self.base_url}"
        if isinstance(err, requests.exceptions.ProxyError):
            return f"The proxy on the way to {at} failed ({cause}); check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
        if isinstance(err, requests.exceptions.SSLError):
            return f"TLS failure with {at} ({cause}); if it has a private CA, give its file with --ca-bundle"
        if isinstance(err, requests.exceptions.ConnectTimeout):
            return f"No connection to {at} within {CONNECT_TIMEOUT_S:g} s; check the host and the network"
        if isinstance(err, requests.exceptions.Timeout) or "timed out" in str(cause):
            return f"No answer from {at} within {timeout_s:g} s; is it overloaded or stuck?"
        if isinstance(cause, urllib3.exceptions.NameResolutionError):
            return f"Unknown host {self.host!r}: check --jupyter-base-url ({self.base_url})"
        if "refused" in str(cause):
            return f"Connection refused by {at}; is it running, and is this its port?"
        return f"The connection to {at} failed ({cause}); call again when it is back"

    def _redirected(self, url: str, target: str, status_code: int) -> ServerError:
        hint = "give the final URL as --jupyter-base-url"
        if "/hub/" in target:
            hint = "the JupyterHub server is not running or its name is wrong; start it in the hub"
        elif "/login" in target:
            hint = "the server wants a login: check the token and the path in --jupyter-base-url"
        return ServerError(f"{url} redirects to {target.split('?')[0]}: {hint}", url, status_code)

    @staticmethod
    def _failed(method: str, url: str, response: requests.Response) -> ServerError:
        status = response.status_code
        if status in (401, 403):
            text = f"The Jupyter server refused {method} {url} ({status}): check the token and its rights"
            return ServerRefused(text, url, status)
        try:
            detail = str(response.json().get("message") or response.reason)
        except (ValueError, AttributeError):
            detail = str(response.reason)
        kind = NotFound if status == 404 else ServerError
        return kind(f"{method} {url} failed: {status} {detail}", url, status)

    def kernelspecs(self) -> dict[str, Any]:
        """{"default": name, "kernelspecs": {name: {...}}}. The cheapest request that needs the token."""
        specs = self.request("GET", "kernelspecs")
        if not isinstance(specs, dict) or "kernelspecs" not in specs:
            raise ServerError(f"{self.base_url} is not a Jupyter server: no kernelspecs; check the URL")
        return specs

    def open_session(self, path: str, kernel_name: str) -> dict[str, Any]:
        """The kernel model bound to a notebook's path; started if there is none (idempotent)."""
        kernel = {"name": kernel_name} if kernel_name else {}
        body = {"path": path, "name": posixpath.basename(path), "type": "notebook", "kernel": kernel}
        model: dict[str, Any] = self.request("POST", "sessions", body, timeout_s=HANDSHAKE_TIMEOUT_S)["kernel"]
        return model

    def find_kernel(self, path: str) -> str | None:
        """The id of the kernel bound to a notebook's path, if one runs."""
        sessions = self.request("GET", "sessions")
        return next((s["kernel"]["id"] for s in sessions if s.get("path") == path and s.get("kernel")), None)

    def kernel_state(self, kernel_id: str) -> str:
        """execution_state: "starting", "idle", "busy", "dead", ... NotFound if there is no such kernel."""
        return str(self.request("GET", f"kernels/{kernel_id}", timeout_s=5.0).get("execution_state"))

    def interrupt(self, kernel_id: str) -> None:
        self.request("POST", f"kernels/{kernel_id}/interrupt", timeout_s=5.0)

    def restart(self, kernel_id: str) -> None:
        self.request("POST", f"kernels/{kernel_id}/restart")

    def modified(self, path: str) -> str | None:
        """When a file on the server was last changed (its own notation), None without the file."""
        try:
            return str(self.request("GET", f"contents/{quote(path)}?content=0")["last_modified"])
        except NotFound:
            return None

    def read(self, path: str) -> tuple[str, str]:
        """A text file and its last_modified."""
        model = self.request("GET", f"contents/{quote(path)}?type=file&format=text&content=1")
        return str(model["content"]), str(model["last_modified"])

    def write(self, path: str, escaped: list[bytes]) -> str:
        """Write a text file from pieces that are already the inside of a JSON string; last_modified."""
        body = b'{"type":"file","format":"text","content":"' + b"".join(escaped) + b'"}'
        return str(self.request("PUT", f"contents/{quote(path)}", body)["last_modified"])

    def make_folder(self, folder: str) -> None:
        """Create a folder and those above it; one that exists stays as it is."""
        for end in [m.end() for m in re.finditer(r"[^/]+", folder)]:
            self.request("PUT", f"contents/{quote(folder[:end])}", {"type": "directory"})

    def open_websocket(self, kernel_id: str, client_session_id: str, timeout_s: float) -> websocket.WebSocket:
        """A kernel's channels. Nothing follows redirects: the token goes to this server only.

        Raises:
            NotFound: No such kernel. ServerRefused: The token. ServerUnreachable: Anything else.
        """
        path = f"/api/kernels/{kernel_id}/channels?session_id={client_session_id}"
        url = "ws" + self.base_url.removeprefix("http") + path
        headers = [f"{k}: {v}" for k, v in self.http.headers.items() if k in ("Authorization", "X-XSRFToken")]
        is_folder = os.path.isdir(self.ca_bundle)
        options: dict[str, Any] = {
            "header": headers,
            "cookie": "; ".join(f"{c.name}={c.value}" for c in self.http.cookies),
            "sslopt": {"ca_cert_path" if is_folder else "ca_certs": self.ca_bundle},
            "timeout": timeout_s,
            "redirect_limit": 0,
            "suppress_origin": True,
            **self._websocket_proxy(),
        }
        try:
            try:
                return self._dial(url, subprotocols=[SUBPROTOCOL], **options)
            except websocket.WebSocketException as err:
                if str(err) != "Invalid WebSocket Header":
                    raise
                return self._dial(url, **options)  # a server that knows no subprotocol
        except websocket.WebSocketBadStatusException as err:
            kinds = {404: NotFound, 401: ServerRefused, 403: ServerRefused}
            kind = kinds.get(err.status_code, ServerUnreachable)
            raise kind(f"The server refused the kernel's websocket ({err.status_code})", url) from err
        except (websocket.WebSocketException, OSError) as err:
            reason = "the server redirects it" if "Redirect" in str(err) else err
            raise ServerUnreachable(f"No websocket to the kernel at {self.base_url}: {reason}", url) from err

    @staticmethod
    def _dial(url: str, **options: Any) -> websocket.WebSocket:
        # One thread uses it, and the text in its frames is validated by the JSON reader.
        ws = websocket.WebSocket(
            sslopt=options.pop("sslopt"), enable_multithread=False, skip_utf8_validation=True
        )
        ws.connect(url, **options)
        return ws

    def _websocket_proxy(self) -> dict[str, Any]:
        """The proxy that requests uses for this server, in websocket-client's words."""
        proxies = self.http.proxies
        proxy = urlsplit(proxies.get(urlsplit(self.base_url).scheme) or proxies.get("all") or "")
        if not proxy.hostname:
            return {"http_no_proxy": ["*"]}
        options: dict[str, Any] = {
            "http_proxy_host": proxy.hostname, "http_proxy_port": proxy.port or 80, "http_no_proxy": [""],
            "proxy_type": proxy.scheme.replace("https", "http"),
        }
        if proxy.username:
            options["http_proxy_auth"] = (unquote(proxy.username), unquote(proxy.password or ""))
        return options


# --- Kernel ------------------------------------------------------------------------------------------


class Kernel:
    """One kernel over one websocket, which carries the channels shell, iopub, stdin and control.

    Used by one thread at a time, except `lost`: any thread may write there why the kernel's state is
    gone, and the waiting thread raises it. The websocket comes and goes; client_session_id stays, so
    the server replays what the kernel said in between.
    """

    def __init__(self, client: RemoteJupyterClient, kernel_id: str, *, has_helper: bool) -> None:
        self.client, self.kernel_id, self.has_helper = client, kernel_id, has_helper
        self.client_session_id = CLIENT_PREFIX + uuid.uuid4().hex
        self.execution_count = 0
        self.lost = ""
        self._ws: websocket.WebSocket | None = None
        self._binary = False
        self._requests: dict[str, Request] = {}
        self._on_output: Callable[[Message], None] = lambda message: None
        self._adopt = False

    @property
    def is_open(self) -> bool:
        return self._ws is not None

    def open(self, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> None:
        """Connect. Raises KernelDied if there is no such kernel, else ServerError."""
        self.drop()
        try:
            self._ws = self.client.open_websocket(self.kernel_id, self.client_session_id, timeout_s)
        except NotFound as err:
            raise KernelDied("The kernel is gone: somebody shut it down, or it was idle and culled.") from err
        self._binary = self._ws.getsubprotocol() == SUBPROTOCOL

    def drop(self) -> None:
        if self._ws is not None:
            self._ws.shutdown()
            self._ws = None

    def close(self) -> None:
        """Close so that nothing is on its way: send Close, then read to the server's Close."""
        if self._ws is None:
            return
        with contextlib.suppress(websocket.WebSocketException, OSError, KernelError):
            self._ws.send_close()
            deadline = time.monotonic() + 1.0
            while time.monotonic() < deadline:
                self._read(0.2)
        self.drop()

    def send(self, code: str, *, silent: bool = False, store_history: bool = True) -> Request:
        """Send one execute_request; once, whatever happens. Source: Messaging in Jupyter, "Execute"."""
        request = Request(uuid.uuid4().hex)
        header = {
            "msg_id": request.msg_id, "msg_type": "execute_request", "version": "5.3",
            "session": self.client_session_id, "username": "", "date": now(),
        }
        content = {
            "code": code, "silent": silent, "store_history": store_history and not silent,
            "user_expressions": {}, "allow_stdin": False, "stop_on_error": False,
        }
        message = {
            "channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content,
        }
        frame = encode(message, binary=self._binary)
        self._requests[request.msg_id] = request
        if self._ws is None:
            return request  # `wait` connects, and finds out that nobody took it
        try:
            self._ws.settimeout(HTTP_TIMEOUT_S)
            self._ws.send(frame, websocket.ABNF.OPCODE_BINARY if self._binary else websocket.ABNF.OPCODE_TEXT)
        except (websocket.WebSocketException, OSError):
            self.drop()
        return request

    def wait(
        self, request: Request, on_output: Callable[[Message], None], tick: Callable[[], None]
    ) -> dict[str, Any]:
        """Read until one request is done; its execute_reply.

        If the websocket breaks, or the kernel is idle although the request is not done, connect again
        with the same client_session_id and send a greeting behind the request: when the greeting is
        answered and the request is not, nothing more will come.

        Args:
            on_output: Called for each IOPub message that our requests caused.
            tick: Called at least every TICK_S; may raise.
        Raises:
            KernelDied: Its state is gone. ConnectionLost: The end was missed, or it never began.
            ServerUnreachable: The connection did not come back within RECONNECT_S.
        Source: Messaging in Jupyter, "Execution results", "Kernel status".
        """
        self._on_output = on_output
        greeting: Request | None = None
        heard_at = asked_at = time.monotonic()
        while not request.done:
            tick()
            if self.lost:
                raise KernelDied(self.lost)
            try:
                if self._ws is None:
                    raise ConnectionLost("closed")
                if self._read(TICK_S):
                    heard_at = asked_at = time.monotonic()
                elif time.monotonic() - asked_at > SILENCE_S:
                    self._check(heard_at, busy_expected=greeting is None)
                    asked_at = time.monotonic()
            except ConnectionLost:
                self._reopen(tick)
                greeting = self.send(greeting_code(None) if self.has_helper else "", silent=True)
                heard_at = asked_at = time.monotonic()
            if greeting is not None and greeting.done and not request.done:
                raise self._missed(request, greeting)
        del self._requests[request.msg_id]
        assert request.reply is not None
        if request.reply.get("execution_count") is not None:
            self.execution_count = request.reply["execution_count"]
        return request.reply

    def drain(self, on_output: Callable[[Message], None]) -> None:
        """Read what came between two cells, without waiting. Raises what `wait` does."""
        self._on_output = on_output
        while self._read(0):
            pass

    def greet(
        self, on_output: Callable[[Message], None], tick: Callable[[], None], *, mark: str
    ) -> tuple[str, int]:
        """Install or find the helper; what it said of the kernel's state, and of how many cells.

        States: "fresh" (nothing ran here; it is `mark` from now on), "used" (only somebody else's
        code), "restoring" (that was cut short), "restored" (and nobody told yet), "ready".

        Output that other processes of our kind caused counts as ours here: they may have ended while
        their code goes on, and who else would collect it?
        """
        self._adopt = True
        try:
            request = self.send(greeting_code(mark) if self.has_helper else "", silent=True)
            reply = self.wait(request, on_output, tick)
        finally:
            self._adopt = False
        answer = request.answer()
        if self.has_helper and not answer:  # Python, but not IPython: cells go unchanged
            log.info("The kernel does not take the helper (%s)", reply.get("evalue"))
            self.has_helper = False
        if self.has_helper:
            return str(answer["state"]), int(answer["cells"])
        return ("ready" if self.execution_count else "fresh"), 0

    def _reopen(self, tick: Callable[[], None]) -> None:
        deadline, pause = time.monotonic() + RECONNECT_S, 0.1
        while True:
            tick()
            try:
                return self.open(max(1.0, deadline - time.monotonic()))
            except ServerUnreachable as err:
                if time.monotonic() + pause > deadline:
                    raise ServerUnreachable(
                        f"The connection was lost and did not come back within {RECONNECT_S:g} s ({err}). The "
                        "code may still run; call again when the server is back", err.url
                    ) from err
                log.info("Connecting again: %s", err)
            time.sleep(pause)
            pause = min(2 * pause, TICK_S)

    def _check(self, heard_at: float, *, busy_expected: bool) -> None:
        """After silence: is there still a kernel, and does it still work on our request?"""
        try:
            state = self.client.kernel_state(self.kernel_id)
        except NotFound as err:
            raise KernelDied("The kernel is gone: somebody shut it down, or it was idle and culled.") from err
        except ServerUnreachable:
            if time.monotonic() - heard_at > RECONNECT_S:
                raise
            return
        except ServerError as err:  # some gateways do not tell
            log.debug("No kernel state: %s", err)
            return
        if state == "dead":
            raise KernelDied("The kernel died and could not be restarted.")
        if state == "idle" and busy_expected:
            raise ConnectionLost("The kernel is idle, but the end of the code was not heard")

    def _missed(self, request: Request, greeting: Request) -> KernelError:
        answer, count = greeting.answer(), (greeting.reply or {}).get("execution_count") or 0
        if answer.get("state", "ready") != "ready" or count < self.execution_count:
            return KernelDied("The kernel was restarted; its variables are gone.")
        ran = count > self.execution_count or answer.get("last") == request.msg_id
        if request.heard or ran:
            return ConnectionLost(
                "The connection broke while the code ran, and the server did not keep everything that was said "
                "meanwhile. The code has ended; output is missing, and whether it failed is not known."
            )
        return ConnectionLost("The connection broke before the kernel took the code: it was not run. Call again.")

    def _read(self, wait_s: float) -> bool:
        """Take one message, if there is one within wait_s."""
        assert self._ws is not None
        try:
            self._ws.settimeout(wait_s)
            opcode, frame = self._ws.recv_data()
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise ConnectionLost("The server closed the websocket")
            if len(frame) < PONG_BELOW:
                self._ws.settimeout(HTTP_TIMEOUT_S)
                self._ws.pong()
        except (websocket.WebSocketTimeoutException, BlockingIOError, ssl.SSLWantReadError):
            return False
        except (ConnectionLost, websocket.WebSocketException, OSError, AttributeError) as err:
            # AttributeError: websocket-client, when its socket was closed in the middle of a call.
            self.drop()
            raise ConnectionLost(f"The websocket broke ({err})") from err
        self._take(decode(frame, binary=self._binary))
        return True

    def _take(self, message: Message) -> None:
        """Sort one message; wait for nothing."""
        parent = message.parent_header.get("msg_id")
        state = message.content.get("execution_state")
        if message.msg_type == "status" and not parent and state in ("restarting", "dead"):
            raise KernelDied(
                "The kernel died: it ran out of memory, crashed or was killed. Its variables are gone."
            )
        if message.msg_type == "shutdown_reply":
            raise KernelDied("The kernel was shut down or restarted by somebody; its variables are gone.")
        if parent in self._requests:
            self._requests[parent].note(message)
        session = message.parent_header.get("session") or ""
        ours = session == self.client_session_id or (self._adopt and session.startswith(CLIENT_PREFIX))
        # Others' messages are skipped: a person in JupyterLab works in the same kernel.
        if ours and message.channel == "iopub":
            self._on_output(message)


def now() -> str:
    return datetime.now(timezone.utc).isoformat()


# --- Notebook ----------------------------------------------------------------------------------------


class Notebook:
    """One session's file on the server, kept as the text of its cells.

    A saved cell is kept the way it travels: its JSON text, escaped once more to stand inside the JSON
    body of the request. So saving joins pieces; nothing but the new cell is encoded again. Source:
    nbformat, "The Notebook file format" (4.5).
    """

    def __init__(self, client: RemoteJupyterClient, path: str) -> None:
        self.client, self.path = client, path
        self._rest: dict[str, Any] = {"metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        self._cells: list[bytes] = []
        self._places: dict[str, int] = {}  # cell id -> index
        self._modified: str | None = None
        self._checked_at = 0.0
        self._unsaved: dict[str, dict[str, Any]] = {}

    def load(self) -> list[dict[str, Any]] | None:
        """Read the file; its cells, or None if there is none.

        Raises:
            NotebookError: It is there, but is not a notebook of format 4. ServerError: Not readable.
        """
        for attempt in range(3):  # another writer's file can be caught while it is empty
            try:
                text, modified = self.client.read(self.path)
                notebook = json.loads(text)
                break
            except NotFound:
                self._checked_at = time.monotonic()
                return None
            except (ValueError, ServerError) as err:
                reason = str(err)
                if isinstance(err, ServerUnreachable):
                    raise
            time.sleep(0.1 * attempt)
        else:
            raise NotebookError(self._unreadable(reason))
        cells = notebook.get("cells") if isinstance(notebook, dict) else None
        if not isinstance(cells, list) or notebook.get("nbformat") != 4 or not all(
            isinstance(cell, dict) and "cell_type" in cell and "source" in cell for cell in cells
        ):
            raise NotebookError(self._unreadable("it is not a notebook of format 4"))
        for cell in cells:
            cell.setdefault("id", uuid.uuid4().hex[:12])
        self._rest = {k: v for k, v in notebook.items() if k != "cells"}
        self._rest["nbformat_minor"] = max(5, self._rest.get("nbformat_minor", 0))
        self._cells = [self._escape(cell) for cell in cells]
        self._places = {cell["id"]: i for i, cell in enumerate(cells)}
        self._modified, self._checked_at = modified, time.monotonic()
        return cells

    @property
    def kernel_name(self) -> str:
        return str(self._rest["metadata"].get("kernelspec", {}).get("name", ""))

    def check(self) -> None:
        """Look whether somebody else changed the file, and if so take their version."""
        self._checked_at = 0.0
        modified = self.client.modified(self.path)
        if modified is not None and modified != self._modified:
            self.load()
        self._checked_at = time.monotonic()

    def describe(self, kernel_name: str, spec: dict[str, Any]) -> None:
        """Note the kernel in the metadata, unless they name one."""
        language = spec.get("language", "")
        display_name = spec.get("display_name", kernel_name)
        kernelspec = {"name": kernel_name, "display_name": display_name, "language": language}
        self._rest["metadata"].setdefault("kernelspec", kernelspec)
        self._rest["metadata"].setdefault("language_info", {"name": language})

    def save(self, cell: dict[str, Any]) -> None:
        """Add a cell or replace the one with its id; with those that could not be saved before.

        Raises:
            NotebookError, ServerError: Not saved; the cell is kept for the next time.
        """
        self._unsaved[cell["id"]] = cell
        if time.monotonic() - self._checked_at > FRESH_S:
            self.check()
        for cell_id, unsaved in self._unsaved.items():
            place = self._places.setdefault(cell_id, len(self._cells))
            self._cells[place : place + 1] = [self._escape(unsaved)]
        rest = json.dumps(json.dumps(self._rest, ensure_ascii=False, indent=1)[1:])[1:-1].encode()
        pieces = [b'{\\n \\"cells\\": [\\n']
        for escaped in self._cells:
            pieces += [escaped, b",\\n"]
        pieces[-1:] = [b"\\n ],", rest, b"\\n"] if self._cells else [b" ],", rest, b"\\n"]
        try:
            self._modified = self.client.write(self.path, pieces)
        except ServerError as err:  # somebody may have removed the folder
            if err.status_code not in (404, 500):
                raise
            self.client.make_folder(posixpath.dirname(self.path))
            self._modified = self.client.write(self.path, pieces)
        self._checked_at = time.monotonic()
        self._unsaved.clear()

    def write_beside(self, path: str, text: str) -> None:
        """A text file in the notebook's folder."""
        self.client.write(path, [json.dumps(text)[1:-1].encode()])

    @staticmethod
    def _escape(cell: dict[str, Any]) -> bytes:
        text = json.dumps(cell, ensure_ascii=False, indent=1).encode("utf-8", "replace").decode()
        return json.dumps(text)[1:-1].encode()

    def _unreadable(self, reason: str) -> str:
        return (
            f"{self.path} on the server is not readable as a notebook ({reason}) and was left as it is; repair, "
            "move or delete it, or use another session_id"
        )


# --- Session -----------------------------------------------------------------------------------------


class Run:
    """One call's code on its way: waiting for its turn, running, ended. It may outlive its call."""

    def __init__(self, code: str) -> None:
        self.code = self.source = code  # source: as the notebook shows it
        self.cell_id = uuid.uuid4().hex[:12]
        self.done: Future[None] = Future()
        self.stage = "waiting"  # then "connecting", "waiting for the kernel", "restoring ...",
        # "running", "saving"
        self.request: Request | None = None
        self.outputs = Outputs()
        self.notes: list[str] = []  # for the result only, before the output
        self.errors: list[str] = []
        self.last_error: dict[str, Any] | None = None  # as the notebook's last output
        self.execution_count: int | None = None
        self.timing: dict[str, str] = {}
        self.save_at = time.monotonic() + SAVE_EVERY_S
        self.withdrawn = False  # shall not be run
        self.abandoned = False  # its call returned before it ended: the next call collects it
        self.not_run = False
        self.lock = threading.Lock()  # outputs, notes and errors: written here, collected there

    def take(self, message: Message) -> None:
        """One IOPub message, into the output."""
        with self.lock:
            if message.msg_type == "execute_input":
                self.timing.setdefault("iopub.execute_input", now())
            self.outputs.add(message.msg_type, message.content)

    def fail(self, text: str, ename: str = "") -> None:
        """ename: also an error in the notebook, so that the cell is not run again when restoring."""
        with self.lock:
            self.errors.append(text)
            if ename:
                self.last_error = {
                    "output_type": "error", "ename": ename, "evalue": text, "traceback": [text]
                }

    def all_items(self) -> list[dict[str, Any]]:
        with self.lock:
            return self.outputs.items + ([self.last_error] if self.last_error else [])


class Session:
    """One session: its notebook, its kernel, and the runs that wait for it.

    A thread takes one run after the other to its end: connect, restore, send, read, save. It lives
    while there is something to do, and IDLE_S longer. A call only waits for its run, while it may.
    """

    def __init__(self, owner: "Interpreter", session_id: int, *, is_new: bool) -> None:
        self.client, self.settings, self.session_id = owner.client, owner.settings, session_id
        self.path = posixpath.join(owner.folder, f"{session_id}.ipynb")
        self.kernel: Kernel | None = None
        self._owner = owner
        self._is_new = is_new  # the id was made up for this call
        self._notebook = Notebook(self.client, self.path)
        self._deadly: set[str] = set()  # cells that killed the kernel when they were run again
        self._changed = threading.Condition()
        self._queue: list[Run] = []  # the first one is with the thread
        self._uncollected: list[Run] = []  # in the order of the calls
        self._thread: threading.Thread | None = None
        self._closing = False

    # For callers: submit, wait for run.done, collect; or execute, which does all three.

    def submit(self, code: str) -> Run:
        """Queue code; returns at once. Empty code waits for what runs before it."""
        run = Run(code)
        with self._changed:
            self._uncollected.append(run)
            self._queue.append(run)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self.path, daemon=True)
                self._thread.start()
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
        if run.stage == "saving":
            wait([run.done], SAVE_GRACE_S)
        return self.collect(run, timeout_s)

    def collect(self, run: Run, timeout_s: float) -> Result:
        """What a call hands back: the rest of earlier runs, then what its own run has so far."""
        with self._changed:
            run.abandoned = True
            behind = run in self._queue[1:]
            if behind or (run.stage == "waiting for the kernel" and timeout_s > 0):
                run.withdrawn = True
            if behind:
                self._queue.remove(run)
            handed = [run]
            if not (run.withdrawn and run.code.strip()):
                before = self._uncollected[: self._uncollected.index(run)]
                handed = [*(r for r in before if r.abandoned), run]
            gone = [r for r in handed if r.done.done() or (r is run and behind)]
            self._uncollected = [r for r in self._uncollected if r not in gone]
        texts: list[str] = []
        errors: list[str] = []
        images: list[tuple[str, str]] = []
        for each in handed:
            mark = "" if each is run or not run.code.strip() else "[from earlier code] "
            self._hand_over(each, mark, texts, errors, images)
        if not run.done.done():
            errors.append(self._unfinished(run, timeout_s))
        return self._fit(handed, texts, errors, images)

    def cancel(self, run: Run) -> None:
        """Nobody waits any more: withdraw the run, or interrupt it. Returns at once."""
        with self._changed:
            run.abandoned = True
            if run.stage == "running":
                threading.Thread(target=self._stop, args=(run,), daemon=True).start()
                return
            run.withdrawn = True
            if run in self._queue[1:]:
                self._queue.remove(run)
                self._uncollected.remove(run)

    def interrupt(self) -> bool:
        """Interrupt what runs in this session's kernel. False if there is no kernel."""
        kernel_id = self.kernel.kernel_id if self.kernel else self.client.find_kernel(self.path)
        if kernel_id is not None:
            self.client.interrupt(kernel_id)
        return kernel_id is not None

    def restart(self) -> None:
        """Restart the kernel; the next run restores the session."""
        if (kernel := self.kernel) is not None:
            self.client.restart(kernel.kernel_id)
            kernel.lost = "The kernel was restarted as asked; its variables are gone."

    def say(self, text: str, *, failed: bool = False) -> Result:
        """A result without a run."""
        return Result([] if failed else [text], [text] if failed else [], self.session_id, [], failed)

    def progress(self) -> str:
        """For somebody who waits: the newest line of output, or what is being done."""
        with self._changed:
            run = self._queue[0] if self._queue else None
        return (run.outputs.last_line() or run.stage) if run else ""

    def close(self, deadline: float) -> None:
        """Save what runs and leave it running. Waits until `deadline` (monotonic)."""
        with self._changed:
            self._closing, thread = True, self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))

    # The words of a result.

    def _hand_over(
        self, run: Run, mark: str, texts: list[str], errors: list[str], images: list[tuple[str, str]]
    ) -> None:
        with run.lock:
            outputs = run.outputs
            shown, pictures = render(outputs.items[outputs.mark :])
            outputs.mark = len(outputs.items)
            notes, run.notes = run.notes, []
            limits, outputs.rate_limits = outputs.rate_limits, []
            told, run.errors = run.errors, []
        for limit in limits[:1]:
            option = "iopub_data_rate_limit" if "data rate" in limit else "iopub_msg_rate_limit"
            told.append(
                f"Output is missing: the Jupyter server dropped some of it ({limit.splitlines()[0]} The limit is "
                f"{option}). Print less per second, or write to a file and read parts of it; or start the "
                f"server with --ZMQChannelsWebsocketConnection.{option}=1e10"
            )
        texts += [*notes, *(mark + text for text in shown)]
        errors += [mark + clean(text) for text in told]
        images += pictures

    def _unfinished(self, run: Run, timeout_s: float) -> str:
        on = (
            f'execute_code with code="" and session_id={self.session_id} waits for the rest, '
            f"interrupt_execution with session_id={self.session_id} stops it"
        )
        if run.withdrawn and run.code.strip():
            return (
                f"Not run: session {self.session_id} was still busy with earlier code after {timeout_s:g} s. {on}; "
                "then send this code again"
            )
        if run.stage.startswith(("connecting", "restoring")):
            return f"Not started yet after {timeout_s:g} s ({run.stage}); it will start by itself. {on}"
        if run.stage == "saving":
            return f"The code has ended, but saving {self.path} takes long; the next call tells how it went"
        return f"Still running after {timeout_s:g} s; nothing is lost. {on}"

    def _fit(
        self, runs: list[Run], texts: list[str], errors: list[str], images: list[tuple[str, str]]
    ) -> Result:
        """Cut a result to max_output characters; the whole text of each long run lies in a file."""
        limit = self.settings.max_output
        omitted = sum(run.outputs.omitted for run in runs)
        excess = sum(map(len, texts + errors)) - limit
        if excess > 0:
            files = [self._text_path(run) for run in runs if run.outputs.total() > limit] or [self.path]
            where = f"; the full text is in {' and '.join(files)}" if self._owner.keeps_notebook else ""
            note = f"\n[... {excess + omitted:,} characters left out{where} ...]\n"
            cut = shorten(texts + errors, limit, note)
            texts, errors = ([t for t in part if t is not None] for part in (cut[: len(texts)], cut[len(texts) :]))
            errors = errors or (["The error is in the part that was left out"] if errors else [])
        return Result(texts, errors, self.session_id, images[:IMAGES_SENT], runs[-1].not_run)

    def _text_path(self, run: Run) -> str:
        return f"{self.path.removesuffix('.ipynb')}-{run.cell_id}.txt"

    # What the thread does.

    def _work(self) -> None:
        while (run := self._next()) is not None:
            try:
                self._perform(run)
            except Detached:
                if run.stage == "running":
                    self._save(run)
            finally:
                with self._changed:
                    self._queue.remove(run)
                run.done.set_result(None)

    def _next(self) -> Run | None:
        """The next run; None, with the websocket closed, when there is none for IDLE_S."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing, timeout=IDLE_S)
            if self._queue and not self._closing:
                return self._queue[0]
        if self.kernel is not None:
            self.kernel.close()
        with self._changed:
            if self._queue and not self._closing:
                return self._queue[0]
            self._thread = None
            return None

    def _perform(self, run: Run) -> None:
        """Take one run to its end. Every failure becomes a part of its result, here and nowhere else."""
        try:
            self._connect(run)
            with self._changed:  # from here on it counts as run
                if run.withdrawn or not run.code.strip():
                    return
                run.stage = "running"
            run.timing["iopub.status.busy"] = now()
            self._run_cell(run)
        except KernelDied as err:
            self.kernel = None
            if run.request is None or not run.request.heard:
                run.not_run = True
                return run.fail(f"{err} The code was not run; call again.")
            run.fail(f"{err} `result` has the output so far; the next call restores the session.", "KernelDied")
        except InterpreterError as err:
            run.not_run = run.request is None or not run.request.heard
            run.fail(str(err))
            if run.not_run:
                return None
        run.stage = "saving"
        run.timing["shell.execute_reply"] = now()
        self._save(run)

    def _connect(self, run: Run) -> None:
        """Make sure of a live kernel that has the session's state."""
        run.stage = "connecting"
        if self.kernel is not None and self.kernel.is_open:
            try:
                return self.kernel.drain(run.take)
            except ConnectionLost as err:
                log.info("Session %s: %s", self.session_id, err)
            except KernelDied as err:
                log.info("Session %s: %s", self.session_id, err)
                self.kernel = None
        while True:
            deadly = len(self._deadly)
            try:
                return self._attach(run)
            except KernelDied:
                self.kernel = None
                if len(self._deadly) == deadly:  # not because of a cell that can be left out
                    raise

    def _attach(self, run: Run) -> None:
        keeps, cells = self._owner.keeps_notebook, None
        if keeps:
            try:
                cells = self._notebook.load()
            except NotebookError as err:  # `_save` reports it, after the code has run
                log.warning("%s", err)
                cells = []
        if self._is_new and cells is not None and self.kernel is None:
            raise InterpreterError(f"The new session id {self.session_id} is taken; call again")
        if cells is None and keeps and not self._is_new and self.kernel is None:
            run.notes.append(f"Session {self.session_id} is new: there was no {self.path}")
        self._is_new = False
        name = self._owner.kernel_name(self._notebook.kernel_name)
        model = self.client.open_session(self.path, name)
        if model.get("execution_state") == "dead":
            self.client.restart(model["id"])
        spec = self._owner.spec(model["name"])
        self._notebook.describe(model["name"], spec)
        if self.kernel is None or self.kernel.kernel_id != model["id"]:
            self.kernel = Kernel(self.client, model["id"], has_helper=spec.get("language") == "python")
        again = [(i, c) for i, c in enumerate(cells or [], 1) if was_run(c) and c["id"] not in self._deadly]
        busy = model.get("execution_state") == "busy"
        run.stage = "waiting for the kernel" if busy else "connecting"
        self._welcome(run, again if self.settings.restore else [], len(again), busy=busy)

    def _welcome(self, run: Run, again: list[tuple[int, Any]], cells: int, *, busy: bool) -> None:
        """Connect, find out what the kernel knows, and restore the session if it is nothing."""
        assert self.kernel is not None
        mark = "restoring" if again else "ready"
        self.kernel.open()
        state, count = self.kernel.greet(run.take, lambda: self._tick(run), mark=mark)
        if state == "restoring" and again:  # cut short: begin once more, from nothing
            self.client.restart(self.kernel.kernel_id)
            self.kernel.open()
            state, count = self.kernel.greet(run.take, lambda: self._tick(run), mark=mark)
        if busy:
            run.notes.append(
                "The kernel was busy with code that this server process did not start; what that printed before "
                f"is in {self.path} as far as it was saved, and whether it failed is not known"
            )
        if state == "restored":
            run.notes.append(f"Session {self.session_id} was restored by another process: {count} cells ran again")
        elif state == "used" and cells:
            run.notes.append("Somebody else's code already ran in the restarted kernel: nothing was run again")
        elif state in ("fresh", "restoring") and again:
            self._restore(run, again)
        elif state == "fresh" and cells:
            run.notes.append(f"The kernel of session {self.session_id} was gone: it starts empty (--no-restore)")

    def _restore(self, run: Run, again: list[tuple[int, Any]]) -> None:
        """Run the notebook's cells again. All are sent at once: so the kernel goes on to the last one
        even if this process is killed meanwhile, and whoever comes next waits behind it."""
        kernel = self.kernel
        assert kernel is not None
        started, failed = time.monotonic(), []
        requests = []
        for _, cell in again:
            settled = settle(source_of(cell)) if kernel.has_helper else None
            is_bash = settled is not None and settled[0] == "bash"
            code = helper_code(f"run({ascii(settled[1])}, False)") if settled and is_bash else source_of(cell)
            requests.append(kernel.send(code, store_history=not is_bash))
        end = kernel.send(helper_code(f"restored({len(again)})") if kernel.has_helper else "", silent=True)
        for done, ((number, cell), request) in enumerate(zip(again, requests)):
            run.stage = f"restoring, {done} of {len(again)} cells done"
            try:
                reply = kernel.wait(request, lambda message: None, lambda: self._tick(run))
            except KernelDied:
                if request.heard:
                    self._deadly.add(cell["id"])
                raise
            if reply.get("status") != "ok" or request.answer().get("error"):
                failed.append(str(number))
        kernel.wait(end, lambda message: None, lambda: self._tick(run))
        took = f"{time.monotonic() - started:.1f} s"
        bad = f"failed: cell {', '.join(failed)}" if failed else "none failed"
        bad += f"; left out because the kernel died in them: {len(self._deadly)}" if self._deadly else ""
        run.notes.append(
            f"Session {self.session_id} was restored: its kernel was gone, {len(again)} cells of {self.path} ran "
            f"again in {took}; {bad}"
        )

    def _run_cell(self, run: Run) -> None:
        kernel = self.kernel
        assert kernel is not None
        settled = settle(run.code) if kernel.has_helper else ("python", run.code)
        if settled is not None and settled[0] == "python":
            run.request = kernel.send(run.code)
        else:
            script = settled[1] if settled else run.code
            run.source = f"%%bash\n{script}"
            call = helper_code(f"run({ascii(script)}, {settled is None})")
            run.request = kernel.send(call, store_history=False)
        if self._owner.keeps_notebook:  # the kernel works meanwhile, so this look costs no time
            with contextlib.suppress(InterpreterError):
                self._notebook.check()
        reply = kernel.wait(run.request, run.take, lambda: self._tick(run))
        answer = run.request.answer()
        if "cell" in answer:
            run.source = answer["cell"]
            run.request = kernel.send(run.source)
            reply, answer = kernel.wait(run.request, run.take, lambda: self._tick(run)), {}
        if not run.source.startswith("%%bash\n"):
            run.execution_count = reply.get("execution_count")
        if answer.get("error"):
            run.fail(answer["error"], "CommandFailed")
        elif reply.get("status") == "error":
            with run.lock:
                run.last_error = run.outputs.take_error(reply)
                text = "\n".join(run.last_error["traceback"])
                run.errors.append(text or f"{run.last_error['ename']}: {run.last_error['evalue']}")
        elif reply.get("status") != "ok":
            run.fail(
                "Not run: the kernel threw away what was waiting because somebody else's code failed; call again",
                "Aborted",
            )

    def _tick(self, run: Run) -> None:
        """Looked at while waiting for the kernel, at least every TICK_S."""
        if self._closing:
            raise Detached
        if run.stage == "running" and time.monotonic() > run.save_at:
            self._save(run)
            run.save_at = time.monotonic() + SAVE_EVERY_S

    def _save(self, run: Run) -> None:
        if not self._owner.keeps_notebook:
            return
        items, limit = run.all_items(), self.settings.max_output
        try:
            size = sum(map(len, map(item_text, items))) + run.outputs.omitted
            note = f"\n[... {size - limit:,} characters left out; the full text is in {self._text_path(run)} ...]\n"
            if size > limit:
                text = "".join(clean(item_text(item)) for item in items)
                self._notebook.write_beside(self._text_path(run), text)
            self._notebook.save({
                "cell_type": "code",
                "execution_count": run.execution_count,
                "id": run.cell_id,
                "metadata": {"execution": run.timing},
                "outputs": notebook_outputs(items, limit, note),
                "source": run.source,
            })
        except (NotebookError, ServerError) as err:
            if run.stage != "running":
                run.fail(f"The code has ended, but its cell is not saved ({err}); the next call tries again")

    def _stop(self, run: Run) -> None:
        """Interrupt until the run ends; twice, for the first may come before the kernel took the code."""
        for _ in range(2):
            with contextlib.suppress(ServerError):
                self.interrupt()
            wait([run.done], SILENCE_S)
            if run.done.done():
                return


def source_of(cell: dict[str, Any]) -> str:
    source = cell["source"]
    return "".join(source) if isinstance(source, list) else str(source)


def was_run(cell: dict[str, Any]) -> bool:
    """Was this cell run, and did it not end in an error? Source: nbformat, "Code cells"."""
    metadata, outputs = cell.get("metadata") or {}, cell.get("outputs") or []
    ran = cell.get("execution_count") is not None or bool(metadata.get("execution"))
    failed = any(output.get("output_type") == "error" for output in outputs)
    return cell["cell_type"] == "code" and ran and not failed and bool(source_of(cell).strip())


class Interpreter:
    """All sessions on one Jupyter server. Making one checks the server, token, kernel and folder.

    Raises:
        ConfigError: The kernel or the folder does not fit the server. ServerError: Anything else.
    """

    def __init__(self, client: RemoteJupyterClient, settings: Settings | None = None) -> None:
        self.client, self.settings = client, settings or Settings()
        self._specs = client.kernelspecs()
        self._sessions: dict[int, Session] = {}
        self._lock = threading.Lock()
        name, names = self.settings.kernel_name, sorted(self._specs["kernelspecs"])
        if name and name not in names:
            raise ConfigError(f"No kernel {name!r} on {client.base_url}; --kernel-name can be {', '.join(names)}")
        self.keeps_notebook = client.modified("") is not None
        self.folder = self._relative(self.settings.folder)
        if self.keeps_notebook:
            try:
                client.make_folder(self.folder)
            except ServerUnreachable:
                raise
            except ServerError as err:
                raise ConfigError(
                    f"The server has no notebooks folder {self.settings.folder!r} and does not create it ({err}); "
                    "choose another --notebooks-folder"
                ) from err

    def session(self, session_id: int = 0) -> Session:
        """Session N, or a new one with a random 10-digit id for 0. Nothing is sent yet."""
        with self._lock:
            new_id = session_id or 10**9 + secrets.randbelow(9 * 10**9)
            if new_id not in self._sessions:
                self._sessions[new_id] = Session(self, new_id, is_new=not session_id)
            return self._sessions[new_id]

    def known(self, session_id: int) -> bool:
        return session_id in self._sessions

    def close(self) -> None:
        """Let go of all sessions; what runs goes on in the kernels."""
        deadline = time.monotonic() + EXIT_S
        for session in self._sessions.values():
            session.close(time.monotonic())
        for session in self._sessions.values():
            session.close(deadline)

    def kernel_name(self, wanted: str) -> str:
        """The kernel for a notebook that wants one: that, if the server has it."""
        return wanted if wanted in self._specs["kernelspecs"] else self.settings.kernel_name

    def spec(self, name: str) -> dict[str, Any]:
        spec: dict[str, Any] = self._specs["kernelspecs"].get(name, {}).get("spec", {})
        return spec

    def _relative(self, folder: str) -> str:
        """The folder relative to the server's root. Only a kernel knows where the root is."""
        if folder.startswith("/"):
            model = self.client.request("POST", "kernels", {"path": "", "name": self.settings.kernel_name or None})
            kernel = Kernel(self.client, model["id"], has_helper=True)
            try:
                kernel.open()
                kernel.greet(lambda message: None, lambda: None, mark="ready")
                request = kernel.send(helper_code(f"relative({ascii(folder)})"), silent=True)
                kernel.wait(request, lambda message: None, lambda: None)
                answer = request.answer()
                root, folder = answer.get("root", "unknown"), answer.get("folder", "..")
            except KernelError as err:
                raise ConfigError(f"Cannot find out where {folder!r} is ({err}); give it relative to the root") from err
            finally:
                kernel.drop()
                self.client.request("DELETE", f"kernels/{model['id']}")
            if folder.split("/")[0] == "..":
                raise ConfigError(
                    f"The notebooks folder {self.settings.folder!r} is not below the Jupyter server's root directory "
                    f"({root}); choose one that is"
                )
        path = posixpath.normpath(folder)
        if path.split("/")[0] == "..":
            raise ConfigError(f"The notebooks folder {folder!r} is not below the Jupyter server's root directory")
        return "" if path == "." else path


# --- Bash --------------------------------------------------------------------------------------------

HELPER_VERSION = 1  # raised with each change of HELPER; a newer helper replaces an older one

# Lives in the kernel as a module of its own; nothing of it is in the user's namespace. It runs on the
# kernel's Python (3.6 or later). Its answers travel in the payload of the execute_reply, which no
# other client sees; what commands print goes out as stream messages, whatever became of sys.stdout.
HELPER = r'''
import ast, builtins, codecs, contextlib, keyword, os, re, selectors, shlex, shutil, signal, subprocess
import sys, tempfile, threading, time, warnings
from IPython import get_ipython

state, cells, last = None, 0, None  # last: msg_id of the newest call of run

INSTALLERS = re.compile(r"^(?=(?:pip|conda|mamba|uv)[ \t]+-{0,2}[a-z])", re.M)
COMMENTS = re.compile(r"(?:\s+|#[^\n]*)*")
# What may stand before the first word of a script: comments, NAME=value, opening brackets.
PREFIX = re.compile(
    r"(?:\s+|\#[^\n]*|[;&|(]|\{(?=\s)|[A-Za-z_]\w*\+?="
    r"(?:\([^()]*\)|'[^']*'|\"(?:\\.|[^\"\\])*\"|\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`|\\.|[^\s;&|<>()'\"`\\])*"
    r"(?=[\s;&|]|\Z))*"
)
QUIET = dict(TERM="dumb", NO_COLOR="1", PAGER="cat", GIT_PAGER="cat", MANPAGER="cat", EDITOR="true", VISUAL="true",
             GIT_EDITOR="true", GIT_TERMINAL_PROMPT="0")


def answer(**fields):
    get_ipython().payload_manager.write_payload(dict(fields, source=__name__))


def hello(mark):
    global state
    before = state or ("used" if get_ipython().execution_count > 1 else "fresh")
    answer(state=before, cells=cells, last=last)
    if mark:
        state = mark if before in ("fresh", "restoring") else "ready"


def restored(count):
    global state, cells
    state, cells = "restored", count


def relative(folder):
    root = os.path.realpath(os.getcwd())
    answer(root=root, folder=os.path.relpath(os.path.realpath(folder), root))


def as_python(shell, code, runs):
    """The cell to run as Python, or None: it is bash."""
    magic = INSTALLERS.sub(lambda m: "%" if find_installer(shell, code[m.start():]) else "", code)
    for cell in [magic, code] if magic != code else [code]:
        try:
            text = cell if cell.lstrip()[:1] in "/,;" else shell.input_transformer_manager.transform_cell(cell)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                flags = ast.PyCF_ONLY_AST | getattr(ast, "PyCF_ALLOW_TOP_LEVEL_AWAIT", 0)
                tree = compile(text, "<cell>", "exec", flags, True)
            break
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            tree = None
    if tree is not None:
        word = re.match(r"([A-Za-z_]\w*)(?=[\s;|&<>]|\Z)", code[COMMENTS.match(code).end():])
        if cell != code or not word or not isinstance(tree.body[0], ast.Expr):
            return cell
        if word[1] in shell.user_ns or hasattr(builtins, word[1]) or keyword.iskeyword(word[1]):
            return cell
        return None if runs(word[1]) else cell
    rest = code[PREFIX.match(code).end():]
    word = re.match(r"[^\s;|&<>()]+", rest)
    if not word or word[0] == "print" or re.match(r"\S+[ \t]+=", rest):
        return code
    if keyword.iskeyword(word[0]) and word[0] not in ("if", "for", "while"):
        return code
    function = re.match(r"[\w.:-]+[ \t]*\([ \t]*\)", rest)
    return None if runs("" if function or word[0][0] == "$" else word[0]) else code


def find_installer(shell, line):
    name = line.split()[0]
    return name not in shell.user_ns and shell.find_line_magic(name)


def environment():
    env = dict(os.environ, **QUIET)
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "CLICOLOR"):
        env.pop(name, None)
    here = os.path.dirname(sys.executable)  # so that python and pip are the kernel's own
    if here not in env.get("PATH", "").split(os.pathsep):
        env["PATH"] = here + os.pathsep + env.get("PATH", os.defpath)
    return env


def pump(pipe, send, running):
    """Pass on what comes through the pipe, until its end or until nothing is there and bash has ended."""
    decoder, held, sent_at = codecs.getincrementaldecoder("utf-8")("replace"), "", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            alive = running()
            ready = selector.select(0.05 if alive else 0)
            data = os.read(pipe.fileno(), 65536) if ready else b""
            ended = bool(ready) and not data
            held += decoder.decode(data, ended or not alive and not ready)
            # few messages: the server's limit is 1,000 in a second
            if held and (not ready or ended or len(held) > 200000 or time.monotonic() > sent_at + 0.05):
                send(held)
                held, sent_at = "", time.monotonic()
            if ended or not (ready or alive):
                return ended


def stop(process):
    """End a command and its children: as Ctrl-C does, then for certain."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(code, ask):
    """Run a script, or with `ask` answer with the cell that it is if it is Python."""
    global last
    shell = get_ipython()
    kernel = shell.kernel
    parent = kernel.get_parent("shell") if hasattr(kernel, "get_parent") else kernel._parent_header
    last = parent["header"]["msg_id"]
    bash, folder = shutil.which("bash"), tempfile.mkdtemp()
    script, after = os.path.join(folder, "script"), os.path.join(folder, "after")
    try:
        with open(script, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(code.replace("\r\n", "\n"))
        env = environment()

        def runs(word):  # can bash parse the script and run its first word?
            word = os.path.expanduser(word.strip("\"'"))
            test = [bash, "-c", 'bash -n "$1" && { [ -z "$2" ] || type -- "$2"; }', "bash", script, word]
            quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return bash and subprocess.call(test, env=env, **quiet) == 0

        cell = as_python(shell, code, runs) if ask else None
        if cell is not None:
            answer(cell=cell)
        elif not bash:
            answer(error="There is no bash on the machine where the kernel runs: use Python")
        else:
            execute(kernel, parent, bash, env, script, after)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def execute(kernel, parent, bash, env, script, after):
    def send(text):
        kernel.session.send(kernel.iopub_socket, "stream", dict(name="stdout", text=text), parent=parent,
                            ident=b"stream.stdout")

    try:
        os.getcwd()
    except OSError:
        os.chdir(os.path.expanduser("~"))
        send("[the working directory was deleted; now in %s]\n" % os.getcwd())
    # At its end the shell writes down where it is and what it exports, with nothing but builtins.
    trap = ('{ set +eux; } 2>/dev/null; { printf "%%s\\0" "$PWD"; compgen -e | while IFS= read -r name; do '
            'printf "%%s=%%s\\0" "$name" "${!name-}"; done; } 2>/dev/null >| %s' % shlex.quote(after))
    command = 'trap %s EXIT; eval "$(<%s)"' % (shlex.quote(trap), shlex.quote(script))
    process = subprocess.Popen([bash, "-c", command, "bash"], env=env, stdin=subprocess.DEVNULL, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    error = ""
    try:
        ended = pump(process.stdout, send, lambda: process.poll() is None)
        status = process.wait()
        if status:
            error = "Command exited with status %d" % status
        number = -status if status < 0 else status - 128
        if number in [s.value for s in signal.Signals]:
            error = "Command was killed by %s" % signal.Signals(number).name
            error += "" if status < 0 else " (exit status %d)" % status
    except KeyboardInterrupt:
        stop(process)
        error = "KeyboardInterrupt: the command was stopped, with its children"
        ended = pump(process.stdout, send, lambda: False)
    if ended:
        process.stdout.close()
    else:  # a child in the background: what it prints comes with the next call
        threading.Thread(target=pump, args=(process.stdout, send, lambda: True), daemon=True).start()
    hand_over(env, after)
    answer(error=error)


def hand_over(before, path):
    """Take the working directory and the changed exports of the shell over."""
    with contextlib.suppress(OSError):
        with open(path, "rb") as file:
            folder, *pairs = os.fsdecode(file.read()).split("\0")[:-1]
        now = dict(pair.split("=", 1) for pair in pairs)
        for name in (set(before) | set(now)) - {"_", "SHLVL"}:
            if name not in now:
                os.environ.pop(name, None)
            elif now[name] != before.get(name):
                os.environ[name] = now[name]
        os.chdir(folder)
'''

INSTALL = f"""def {HELPER_NAME}():
    import builtins, sys, types
    old = sys.modules.get({HELPER_NAME!r})
    if old is None or old.version < {HELPER_VERSION}:
        new = types.ModuleType({HELPER_NAME!r})
        builtins.exec(builtins.compile({HELPER!r}, {HELPER_NAME!r}, "exec"), new.__dict__)
        new.version = {HELPER_VERSION}
        if old is not None:
            new.state, new.cells, new.last = old.state, old.cells, old.last
        sys.modules[{HELPER_NAME!r}] = new
    sys.modules[{HELPER_NAME!r}].hello(%s)
try:
    {HELPER_NAME}()
finally:
    del {HELPER_NAME}
"""


def greeting_code(mark: str | None) -> str:
    """Code that installs the helper if it is missing or old, and lets it tell the kernel's state.

    Statements and `import` only: names like `exec` may be the user's variables here."""
    return INSTALL.replace("%s)\ntry", f"{mark!r})\ntry")


def helper_code(call: str) -> str:
    """Code that calls a function of the helper."""
    return f"try:\n    import {HELPER_NAME}\n    {HELPER_NAME}.{call}\nfinally:\n    del {HELPER_NAME}\n"


# --- Tools -------------------------------------------------------------------------------------------

EXECUTE_TEXT = """Run Python or bash on the remote Jupyter server; nothing runs on this machine.

State lasts: pass the returned session_id to go on with the same variables, imports, working directory \
and exported variables. 0 opens a new session. Each session is a notebook on the server.
Python is an IPython cell: the last expression's value is returned, plots come back as images, \
`%pip install` works. Bash is recognised by itself (`ls -la`, `git status`, scripts); %%bash on the first \
line forces it. A cell that could be both is Python. No input(): commands read nothing.
`timeout`: seconds this call waits, not how long the code may run; 0 starts it and returns. When it is \
over, the code keeps running: send empty code with the same session_id to wait for the rest, or use \
interrupt_execution.
`error` is empty if all went well; otherwise it has the traceback or what happened and what to do. If a \
kernel is lost, the next call runs the notebook's cells again."""

INTERRUPT_TEXT = """Stop what runs in a session and return the rest of its output; variables stay. If the \
code ignores that, restart=True restarts the kernel and restores the session from its notebook."""


class CodeResult(TypedDict):
    """What a tool returns; as structured content and as the first text block."""

    result: list[str]
    error: list[str]
    session_id: int


class Stdin(io.FileIO):
    """Standard input that remembers its end. At the end the SDK cancels the running handlers as if
    somebody had pressed stop; but a client that went away leaves its code running."""

    ended = False

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self.ended = self.ended or count == 0
        return count


def make_server(interpreter: Interpreter, stdin: Stdin) -> Any:
    """The MCP server with its tools, for the SDK's 1.x and 2.x alike."""
    from mcp.types import CallToolResult
    from pydantic import Field

    server: Any
    try:
        from mcp.server.mcpserver import Context, MCPServer

        server = MCPServer(PROGRAM, version=__version__, log_level="WARNING")
    except ImportError:  # SDK 1.x
        from mcp.server.fastmcp import Context, FastMCP

        server = FastMCP(PROGRAM, log_level="WARNING")
        server._mcp_server.version = __version__

    def tool_result(outcome: Result) -> Any:
        structure = outcome.as_dict()
        content = [{"type": "text", "text": json.dumps(structure, ensure_ascii=False)}]
        content += [{"type": "image", "data": data, "mimeType": mime} for mime, data in outcome.images]
        return CallToolResult.model_validate(
            {"content": content, "structuredContent": structure, "isError": outcome.not_run}
        )

    async def wait_for(session: Session, run: Run, timeout_s: float, ctx: Any) -> None:
        """Wait for a run as long as the call may, and tell the client meanwhile."""
        future = asyncio.wrap_future(run.done)
        started = time.monotonic()
        try:
            while not future.done() and (left := started + timeout_s - time.monotonic()) > 0:
                await asyncio.wait([future], timeout=min(left, PROGRESS_S))
                if not future.done():
                    await ctx.report_progress(time.monotonic() - started, None, session.progress())
            if run.stage == "saving":
                await asyncio.wait([future], timeout=SAVE_GRACE_S)
        except asyncio.CancelledError:
            if not stdin.ended:
                session.cancel(run)
            raise

    async def execute_code(
        code: str,
        ctx: Context,  # type: ignore[type-arg]
        session_id: Annotated[int, Field(ge=0, le=MAX_SESSION_ID)] = 0,
        timeout: Annotated[float, Field(ge=0)] | None = None,
    ) -> Annotated[CallToolResult, CodeResult]:
        timeout_s = interpreter.settings.timeout_s if timeout is None else timeout
        session = interpreter.session(session_id)
        run = session.submit(code)
        await wait_for(session, run, timeout_s, ctx)
        return tool_result(session.collect(run, timeout_s))

    async def interrupt_execution(
        session_id: Annotated[int, Field(ge=1, le=MAX_SESSION_ID)],
        ctx: Context,  # type: ignore[type-arg]
        restart: bool = False,
    ) -> Annotated[CallToolResult, CodeResult]:
        session = interpreter.session(session_id)
        try:
            if not await asyncio.to_thread(session.interrupt):
                return tool_result(session.say(f"Session {session_id} has no kernel: nothing runs"))
            run = session.submit("")  # collects what the interrupted code leaves
            await wait_for(session, run, INTERRUPT_S, ctx)
            if not run.done.done() and restart:
                deadline = time.monotonic() + RESTART_S
                await asyncio.to_thread(session.restart)
                await wait_for(session, run, deadline - time.monotonic(), ctx)
        except ServerError as err:
            return tool_result(session.say(str(err), failed=True))
        outcome = session.collect(run, INTERRUPT_S)
        if not run.done.done():
            outcome.error[-1] = (
                f"The kernel is being restarted; call execute_code with code=\"\" and session_id={session_id}"
                if restart
                else f"The code did not stop within {INTERRUPT_S:g} s, it may ignore interrupts: call "
                f"interrupt_execution with session_id={session_id} and restart=True to restart the kernel; "
                "the session's cells are then run again"
            )
        return tool_result(outcome)

    server.add_tool(execute_code, description=EXECUTE_TEXT)
    server.add_tool(interrupt_execution, description=INTERRUPT_TEXT)
    return server


def serve(interpreter: Interpreter) -> None:
    """Serve MCP on stdin and stdout until stdin ends or a signal comes; then save what runs."""
    stdin = Stdin(os.dup(0))
    sys.stdin = io.TextIOWrapper(io.BufferedReader(stdin), encoding="utf-8", errors="replace")

    def leave(signum: int, frame: Any) -> None:
        stdin.ended = True
        raise SystemExit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, leave)
    try:
        make_server(interpreter, stdin).run("stdio")
    finally:
        interpreter.close()


# --- Command line ------------------------------------------------------------------------------------

VARIABLES = {"jupyter_base_url": "JUPYTER_BASE_URL", "jupyter_token": "JUPYTER_TOKEN",
             "notebooks_folder": "NOTEBOOKS_FOLDER"}  # the others begin with JUPYTER_INTERPRETER_


def read_env_file(path: str = ".env") -> dict[str, str]:
    """NAME=value lines of a file; quotes around a value and `export` before a name may be there."""
    values = {}
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines():
            if found := re.match(r"""\s*(?:export\s+)?(\w+)\s*=\s*(?:'([^']*)'|"([^"]*)"|(.*?))\s*(?:\s#.*)?$""", line):
                values[found[1]] = next((v for v in found.groups()[1:] if v is not None), "")
    return values


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError
    return value


def positive(text: str) -> int:
    value = int(text)
    if not 0 < value <= MAX_SESSION_ID:
        raise ValueError
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; what is not given comes from the environment, then from .env."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="MCP server: Python and bash on a remote Jupyter server, over stdio.",
        epilog="Each setting takes its default from an environment variable, and that from .env: "
        "JUPYTER_BASE_URL, JUPYTER_TOKEN, NOTEBOOKS_FOLDER, the others as JUPYTER_INTERPRETER_NAME.",
    )
    add = parser.add_argument
    add("--jupyter-base-url", metavar="URL", help="the Jupyter server, for example http://127.0.0.1:8888")
    add("--jupyter-token", metavar="TOKEN", default="", help="its token")
    add("--notebooks-folder", metavar="DIR", default="notebooks", help="folder on the server for the sessions' notebooks: "
        "relative to its root directory, or absolute and below it (default: notebooks)")
    add("--kernel-name", metavar="NAME", default="", help="kernel to start (default: the server's default)")
    add("--timeout", metavar="SECONDS", type=seconds, default=50.0, help="how long a call waits by default (50)")
    add("--max-output", metavar="CHARS", type=positive, default=50_000, help="characters in one result (50000)")
    add("--no-restore", action="store_true", help="start empty when a session's kernel is gone")
    add("--ca-bundle", metavar="FILE", help="certificates to trust, for HTTPS and WSS")
    add("--local", metavar="DIR", nargs="?", const=".", help="start a Jupyter server of its own on this machine, "
        "with DIR (default: .) as its root directory; needs the extra `local`")
    add("--execute", metavar="CODE", help="run one cell (- reads stdin), print the result as JSON and exit")
    add("--session-id", metavar="N", type=positive, default=0, help="with --execute: continue session N")
    add("--verbose", action="store_true", help="log each request to stderr")
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    environment = {**read_env_file(), **os.environ}
    for action in parser._actions:
        name = VARIABLES.get(action.dest, f"JUPYTER_INTERPRETER_{action.dest.upper()}")
        value = environment.get(name)
        if not value or action.dest in ("help", "version", "execute", "session_id"):
            continue
        flag = action.nargs == 0
        action.default = value.lower() in ("1", "true", "yes", "on") if flag else value
    args = parser.parse_args(argv)
    if not args.jupyter_base_url and args.local is None:
        parser.error("--jupyter-base-url is missing (or JUPYTER_BASE_URL, or --local for a server on this machine)")
    return args


# Ends with us, whatever ends us: its standard input is a pipe that then closes.
LOCAL_SERVER = """import os, signal, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
from jupyter_server.serverapp import main
main()"""


@contextlib.contextmanager
def local_server(folder: str) -> Iterator[tuple[str, str]]:
    """A Jupyter server on loopback with a random token; its URL and token. Stopped at the end."""
    missing = [name for name in ("jupyter_server", "ipykernel") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--local needs {' and '.join(missing)}: install {PROGRAM}[local]")
    if not os.path.isdir(folder):
        raise ConfigError(f"--local: {folder!r} is not a folder")
    token, limits = secrets.token_hex(24), "--ZMQChannelsWebsocketConnection.iopub"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as runtime:
        server_log = Path(runtime, "server.log")
        command = [
            sys.executable, "-c", LOCAL_SERVER, "--ip=127.0.0.1", "--port=0", "--no-browser", "--allow-root",
            f"--ServerApp.root_dir={os.path.abspath(folder)}", f"{limits}_data_rate_limit=0",
            f"{limits}_msg_rate_limit=0",
        ]
        ours = {"JUPYTER_TOKEN": token, "JUPYTER_RUNTIME_DIR": runtime, "JUPYTER_CONFIG_DIR": runtime}
        with open(server_log, "wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**os.environ, **ours}
            )
        assert process.stdin is not None
        try:
            deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S
            while not (found := list(Path(runtime).glob("jpserver-*.json"))):
                if process.poll() is not None or time.monotonic() > deadline:
                    text = server_log.read_text(errors="replace").replace(token, "...")
                    raise ConfigError(f"The local Jupyter server did not start: {text[-1000:].strip()}")
                time.sleep(0.02)
            yield json.loads(found[0].read_text())["url"], token
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def run_once(interpreter: Interpreter, code: str, session_id: int) -> int:
    """--execute: one cell, its result as JSON on stdout."""
    outcome = interpreter.session(session_id).execute(sys.stdin.read() if code == "-" else code)
    print(json.dumps(outcome.as_dict(), ensure_ascii=False))
    interpreter.close()
    return 1 if outcome.error else 0


def main(argv: list[str] | None = None) -> int:
    """The console script. 0: served or ran; 1: a cause in one sentence on stderr; 2: wrong flags."""
    args = parse_args(argv)
    logging.basicConfig(stream=sys.stderr, format=f"{PROGRAM}: %(message)s")
    log.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    warnings.simplefilter("ignore", SyntaxWarning)  # of cells that are parsed here
    if args.execute is None:  # importing the SDK takes longer than the checks: side by side
        threading.Thread(target=lambda: importlib.import_module("mcp.server"), daemon=True).start()
    try:
        with contextlib.ExitStack() as stack:
            url, token = args.jupyter_base_url, args.jupyter_token
            if args.local is not None:
                url, token = stack.enter_context(local_server(args.local))
            client = RemoteJupyterClient(url, token, ca_bundle=args.ca_bundle)
            if token and url.startswith("http:") and not re.match(r"localhost$|127\.|::1$", client.host):
                log.warning("The token travels unencrypted to %s: use https, or an SSH tunnel", client.host)
            interpreter = Interpreter(client, Settings(
                folder=args.notebooks_folder, kernel_name=args.kernel_name, timeout_s=args.timeout,
                max_output=args.max_output, restore=not args.no_restore,
            ))
            if not interpreter.keeps_notebook:
                log.warning("%s has no contents API: sessions work, but leave no notebook", client.base_url)
            if args.execute is not None:
                return run_once(interpreter, args.execute, args.session_id)
            serve(interpreter)
    except InterpreterError as err:
        print(f"{PROGRAM}: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
