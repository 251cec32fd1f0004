#!/usr/bin/env python3
"""Give an agent a code interpreter on a remote Jupyter server, over MCP.

A session is a notebook on the Jupyter server, bound to a kernel there: an agent works
in it through one tool, and a person can open the notebook in JupyterLab and go on in
the same kernel. It does not serve HTTP, start containers, scale pictures or edit cells;
the README names what does.

The file reads from the ground up:

    Constants     numbers and names, each with its reason
    Errors        what can go wrong
    Wire          messages, requests, frames; parsing at the border
    Output        the output of one cell in bounded memory; as texts and pictures
    Language      is a cell Python or bash? And what runs in the kernel for that
    Server        REST, and the opening of websockets: the one place with the token
    Channel       one websocket to a kernel: it breaks, and comes back under its name
    Kernel        requests and replies; probes; whose state a kernel has
    Runs          one call's code on its way; how it ended
    Notebook      one session's file: read, merge, write, confirm; what a restore runs
    Worker        a session's thread: bring up the kernel, run, save
    Session       for callers: submit, collect, interrupt; all sessions
    Files         up and down
    Tools         the MCP side; every blocking call goes through a thread
    Command line  flags, variables, .env, --local, --execute

Who calls whom, and in which thread:

    MCP client -- stdio --> Tools --(a thread a call)--> Session --> Run <-- Worker
                                                                             |    |
                                       Channel (websocket) <-- Kernel <------'    |
                                                                                  |
                              RemoteJupyterClient (REST) <-- Notebook <-----------'

A run that outlives its call is carried by three objects: its `Run`, the `Session`
that keeps it in its queue (waiting, current, finished), and the `Worker`, whose thread
takes it to its end. After that its cell is in `Notebook._pending` until the file is
known to hold it.

Two threads touch a run and its session's queue: the worker fills, callers take, under
one lock, the session's. It guards queue, outputs, notes, errors, and the step from "not
begun" to "begun". Without it go only values that one assignment changes: of a run
`stage`, `step`, `must_interrupt`, `is_abandoned` and `save_at`; of a kernel its id,
`lost` and `was_asked_to_end`; `Worker.kernel`, `Interpreter.is_closing` and the counts
of a `Transfer`; and dictionaries that change by whole entries: the interpreter's
sessions and transfers, `Tools._runs`. Any thread may use the client.

Code reaches a kernel at most once: `Kernel.send` sends, and nothing sends again. It
runs a second time only in a restore (`plan_restore` says which cells). When the
websocket breaks after code was sent, `Kernel.wait` connects again under the same name,
for up to a minute, and the server hands over what was said. A probe is sent behind the
code; if the probe is answered and the code is not, `Kernel._judge` says what that
means: not taken ("Not run"), or unknown; what the caller is told of it is decided in
`Worker._tell_failure`.

Whether a kernel ended or was restarted is decided in one stretch of `Kernel`, under "Is
it still there?", which lists the signs and when each can be missed.

Somebody else's version of a notebook is always kept: `merge` adds our cells to it; what
vanishes within seconds of our own save is put back, what a person deletes later is not.

Under `--local` code runs on the user's machine, and a stranger may have written the
notebooks. So each cell is signed there with a secret of the user (`signature_of`), and
one whose signature does not hold runs again only when `%restore` asks for it.

In the user's kernel lives one module of ours, `KernelHelper`, whose source goes along
with each greeting. It has hooks before and after cells, observes the function by which
IPython runs `!`, handles SIGINT while a script runs, and puts the kernel's own folder
first on PATH. Nothing of it shows in the user's namespace.

Errors, all raised on purpose:

    InterpreterError
      ConfigError(ValueError)                a setting is missing or malformed
      ServerError                            the Jupyter server answered with a failure
        ServerUnreachable(ConnectionError)   no answer: refused, unknown host, TLS
        ServerRefused(PermissionError)       401 or 403: a wrong token, or no right
        NotFound(LookupError)                404
      NotebookError                          the session's file is left as it is
      ProtocolError(ValueError)              a message, file or answer is malformed
      TransferError                          a file cannot be copied
      KernelError
        KernelDied                           it ended or was restarted
          CannotStart                        and does not come up
        ConnectionLost(ConnectionError)      the websocket broke, or a reply was missed
          NotTaken                           and the kernel never took the request
      Withdrawn, Closing                     signals within the worker

Sources: "Messaging in Jupyter" (jupyter-client.readthedocs.io, messaging.html),
"WebSocket kernel wire protocols" (jupyter-server.readthedocs.io,
websocket-protocols.html), the server's REST API (jupyter_server/services/api/api.yaml),
the notebook format (nbformat.readthedocs.io), RFC 6455.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["mcp>=1.23,<3", "requests>=2.31,<3", "websocket-client>=1.9.1,<2"]
# ///
import argparse
import ast
import asyncio
import base64
import bisect
import builtins
import codecs
import contextlib
import ctypes
import enum
import functools
import hmac
import html
import importlib.util
import inspect
import io
import ipaddress
import json
import keyword
import logging
import math
import os
import posixpath
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from enum import Enum
from functools import partial
from importlib import import_module
from itertools import groupby, pairwise
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Annotated, Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

import requests
import websocket

__version__ = "1.0.0"

log = logging.getLogger("jupyter_interpreter_mcp")
T = TypeVar("T")


# --- Constants ------------------------------------------------------------------------

PROGRAM = (
    "jupyter-interpreter-mcp"  # Begins each client_session_id: we know our own kind.
)
HELPER_NAME = "_jupyter_interpreter_mcp"  # The module of ours in the kernel.
MAX_SESSION_ID = 2**53 - 1  # The largest integer that every JSON reader keeps exact.

# Seconds: how long we wait for a server or a kernel.
CONNECT_TIMEOUT_S = 10.0  # For a TCP connection.
HTTP_TIMEOUT_S = 30.0  # For the answer to a request.
STARTS_S = 330.0  # A kernel may take 5 minutes to start; then it hangs.
KERNEL_TIMEOUT_S = 60.0  # For a connection that was lost to come back.
SILENCE_S = (
    2.0  # Then the server is asked: a deleted kernel's websocket is just silent.
)
LOST_S = 10.0  # A kernel that does not even answer a probe: connect again.
FRESH_S = 1.0  # A kernel that spoke so recently is there.

# Seconds: the rhythm of the threads.
TICK_S = 0.25  # A waiting thread looks up this often: closing? stopped? time to save?
RETRY_S = 0.25  # Between two attempts to connect again.
IDLE_S = 30.0  # An unused websocket is closed; the server drops an unread one at 90 s.
SAVE_EVERY_S = 10.0  # A cell that runs on is saved so often, for whoever looks.
PROGRESS_S = 5.0  # Between two progress notifications.

# Seconds: promises to the caller.
INTERRUPT_S = 5.0  # An interrupt that takes longer is said not to work.
RESTART_S = 14.5  # For an interrupt, a restart and a restore together.
EXIT_S = 2.0  # For saving at exit; MCP clients kill a server that takes longer.

FRAME_BYTES = 9_500_000  # Servers close a websocket on messages of more than 10 MB.
ANSWER_BYTES = 500_000_000  # Of a file; a server that sends more is not read further.
LIST_BYTES = 20_000_000  # The same for any other answer.
PIECE_BYTES = 65_536  # Read from a socket at once.

# Characters of the output of one cell that are kept.
TEXT_KEPT = 15_000_000  # Of its text, from the beginning;
TAIL_KEPT = 1_000_000  # then of the end of it.
DATA_KEPT = 64_000_000  # Of pictures and other rich output.
ITEM_COST = 1_000  # What one more output costs, however short it is.
BLOCK = 250_000  # Worked on at once: other threads wait meanwhile.
ROWS_KEPT = 10_000  # At the end of text, that a program may rewrite.
NOTEBOOK_TEXT = 10_000  # Shown in the notebook of a text over --max-output.

# What clients take in one result.
IMAGES_SENT = 10
IMAGES_SIZE = 900_000  # Of base64; some refuse more than 1 MB.
PLAIN_LINES = 1_900  # One cuts plain text of more than 2,000.
SESSIONS_LISTED = 20
SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"  # Binary: 18 x faster for large text.


# --- Errors ---------------------------------------------------------------------------


class InterpreterError(Exception):
    """Every error that this module raises on purpose; its text says what to do next."""


class ConfigError(InterpreterError, ValueError):
    """A setting is missing, malformed or does not fit the server."""


class ServerError(InterpreterError):
    """The Jupyter server answered with a failure.

    Args:
        what: What was asked of it, and what it said.
        cure: What to do; by default that of the class.
        status: Of HTTP; None without an answer.
    """

    CURE = ""

    def __init__(
        self, what: str, *, cure: str | None = None, status: int | None = None
    ) -> None:
        if cure is None:
            cure = self.CURE
        super().__init__(what + cure)
        self.status = status


class ServerUnreachable(ServerError, ConnectionError):
    """No answer from the server: refused, unknown host, TLS, time-out."""

    CURE = "; call again when the server is back"


class ServerRefused(ServerError, PermissionError):
    """401 or 403: the token is wrong or lacks rights."""

    CURE = "; check the token and its rights"


class NotFound(ServerError, LookupError):
    """404: no such kernel, file or API on this server."""


class NotebookError(InterpreterError):
    """The session's file is no notebook that can be continued; it is left as it is."""


class ProtocolError(InterpreterError, ValueError):
    """A message, a file or an answer cannot be read."""


class KernelError(InterpreterError):
    """The kernel or the connection to it failed."""


class KernelDied(KernelError):
    """The kernel ended or was restarted; its variables are gone."""


class CannotStart(KernelDied):
    """The kernel does not come up, so another try makes no sense now."""


class ConnectionLost(KernelError, ConnectionError):
    """The websocket broke, or the reply that we wait for was missed."""


class NotTaken(ConnectionLost):
    """The websocket broke, and the kernel never took the request."""


class Withdrawn(InterpreterError):
    """Nobody wants the code any more: a signal within the worker, told to nobody."""


class Closing(InterpreterError):
    """This process ends and leaves what runs alone: a signal within the worker."""


# --- Wire -----------------------------------------------------------------------------


def now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def dump(value: Any) -> str:
    """Return JSON in one line: indenting takes longer."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Message:
    """A message of the kernel, as far as it is used.

    Source: Messaging in Jupyter, "General Message Format".
    """

    channel: str
    msg_type: str
    msg_id: str
    parent_msg_id: str  # Of the request that it answers; "" if there is none.
    parent_session: str  # The client session of that request, or "".
    content: dict[str, Any]

    @property
    def execution_state(self) -> str:
        """What a status message says: busy, idle, starting, restarting or dead."""
        if self.msg_type != "status":
            return ""
        return text_in(self.content, "execution_state")


def text_in(record: dict[str, Any], name: str) -> str:
    """Return a text of a record from outside; "" for null or nothing.

    Raises:
        ProtocolError: It is something else.
    """
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ProtocolError(f"{name} is no text but {value!r:.60}")

    return value


def encode(
    msg_type: str, msg_id: str, session: str, content: Any, *, is_binary: bool
) -> bytes:
    """Return a request on the shell channel as the payload of a websocket frame.

    Source: WebSocket kernel wire protocols.
    """
    parts_of = {
        "header": {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "session": session,
            "username": "",
            "date": now(),
            "version": "5.3",
        },
        "parent_header": {},
        "metadata": {},
        "content": content,
    }
    if not is_binary:
        whole = {"channel": "shell", **parts_of, "buffers": []}
        return dump(whole).encode("utf-8", "replace")

    parts = [b"shell"]
    for part in parts_of.values():
        parts.append(dump(part).encode("utf-8", "replace"))

    # First the number of offsets, then the offset of each part and of the end.
    offsets = [8 * 7]
    for part in parts:
        offsets.append(offsets[-1] + len(part))

    return struct.pack("<7Q", len(offsets), *offsets) + b"".join(parts)


# What reading something that is no message raises.
MALFORMED = (ValueError, LookupError, TypeError, RecursionError, struct.error)


def decode(frame: bytes, *, is_binary: bool) -> Message:
    """Return the message in a frame. Buffers, which only widgets have, are left out.

    Raises:
        ProtocolError: It is none.
    """
    try:
        if is_binary:
            channel, header, parent, content = split_binary(frame)
        else:
            channel, header, parent, content = split_json(frame)
    except MALFORMED as err:
        raise ProtocolError(f"A frame is no message: {err!r:.200}") from err

    if not isinstance(header, dict) or not isinstance(content, dict):
        raise ProtocolError("A message has no header or no content")
    if parent is None:
        parent = {}
    if not isinstance(parent, dict):
        raise ProtocolError(f"parent_header is {parent!r:.60}")

    return Message(
        channel=str(channel),
        msg_type=text_in(header, "msg_type"),
        msg_id=text_in(header, "msg_id"),
        parent_msg_id=text_in(parent, "msg_id"),
        parent_session=text_in(parent, "session"),
        content=content,
    )


def split_binary(frame: bytes) -> tuple[Any, Any, Any, Any]:
    """Return channel, header, parent_header and content of a binary frame."""
    ends = struct.unpack_from("<6Q", frame, 8)
    parts = []
    for start, end in pairwise(ends):
        # A kernel may send bytes that are no UTF-8.
        parts.append(frame[start:end].decode("utf-8", "replace"))
    channel, header, parent, _metadata, content = parts
    return channel, json.loads(header), json.loads(parent), json.loads(content)


def split_json(frame: bytes) -> tuple[Any, Any, Any, Any]:
    """Return channel, header, parent_header and content of a JSON frame."""
    if frame[:1] != b"{":
        # With buffers: their number, then the offset of each, in 4 bytes each.
        start, end = struct.unpack_from(">2I", frame, 4)
        frame = frame[start:end]

    msg = json.loads(frame.decode("utf-8", "replace"))
    return msg["channel"], msg["header"], msg.get("parent_header"), msg["content"]


@dataclass
class Reply:
    """The content of the reply to a request.

    Source: Messaging in Jupyter, "Execution results", "Kernel info", "Payloads".
    """

    status: str = "ok"  # Or "error", "aborted".
    execution_count: int | None = None
    error: "OutputEvent | None" = None
    answer: dict[str, Any] = field(default_factory=dict)  # Of the helper in the kernel.
    pages: tuple[dict[str, Any], ...] = ()  # Mime bundles of help texts, as of `x?`.
    ends_kernel: bool = False  # The code asked for it, as by `exit`.
    implementation: str = ""
    language_info: dict[str, Any] = field(default_factory=dict)


def parse_reply(content: dict[str, Any]) -> Reply:
    """Return what a reply says; what is malformed in it counts as not said."""
    reply = Reply(status=str(content.get("status", "ok")))
    reply.implementation = str(content.get("implementation"))
    reply.language_info = dict_in(content, "language_info")
    if isinstance(content.get("execution_count"), int):
        reply.execution_count = content["execution_count"]

    if reply.status != "ok":
        try:
            reply.error = parse_output("error", content)
        except ProtocolError as err:
            reply.error = error_event("Malformed", f"The reply is malformed: {err}")

    payload = content.get("payload")
    if not isinstance(payload, list):
        payload = []

    for part in payload:
        source = part.get("source") if isinstance(part, dict) else None
        if source == HELPER_NAME:
            reply.answer.update(part)
        elif source == "page" and isinstance(part.get("data"), dict):
            reply.pages += (part["data"],)
        elif source == "ask_exit":
            reply.ends_kernel = not part.get("keepkernel")

    if reply.answer.get("error"):
        reply.status = "error"  # Of a command: as if the reply said so.
        reply.error = error_event("BashError", str(reply.answer["error"]))

    return reply


def error_event(ename: str, evalue: str) -> "OutputEvent":
    """Return an error of ours, as a kernel would tell it."""
    return OutputEvent(
        "error", {"ename": ename, "evalue": evalue, "traceback": [evalue]}
    )


class Request:
    """One request on its way. It ends with its reply and its idle status, in any order.

    Attributes:
        was_heard: The kernel took it: a message names it as its parent.
        is_harmless: The kernel after the one that it was sent to may take it, too.
    """

    def __init__(self, *, is_harmless: bool = False) -> None:
        self.msg_id = secrets.token_hex(16)
        self.is_harmless = is_harmless
        self.was_heard = False
        self.is_idle = False
        self.reply: Reply | None = None

    @property
    def has_ended(self) -> bool:
        return self.reply is not None and self.is_idle

    @property
    def answer(self) -> dict[str, Any]:
        """What the helper in the kernel said in the reply."""
        if self.reply is None:
            return {}
        return self.reply.answer

    def note(self, message: Message) -> None:
        """Take a message that names this request as its parent."""
        self.was_heard = True
        if message.execution_state == "idle":
            self.is_idle = True
        if message.channel == "shell":
            self.reply = parse_reply(message.content)


# --- Output ---------------------------------------------------------------------------

# Sources: Messaging in Jupyter, "Messages on the IOPub (PUB/SUB) channel"; nbformat,
# "Code cell outputs"; ECMA-48, the escape sequences of terminals.


Output = dict[str, Any]  # as nbformat has it

DISPLAY = {"data": dict, "metadata": dict, "transient": dict}
# The messages that show something, and what we read of them.
FIELDS: dict[str, dict[str, Any]] = {
    "stream": {"name": str, "text": str},
    "display_data": DISPLAY,
    "update_display_data": DISPLAY,
    "execute_result": {**DISPLAY, "execution_count": int},
    "error": {"ename": str, "evalue": str, "traceback": list},
    "clear_output": {"wait": bool},
    "comm_msg": {"comm_id": str, "data": dict},
}
WRONG_TYPE = "{!r} is {!r:.50}"
JSON_MIME = re.compile(r"[/+]json\Z")
RATE_NOTICE = ("IOPub data rate exceeded", "IOPub message rate exceeded")


@dataclass(frozen=True)
class OutputEvent:
    """What one message shows."""

    msg_type: str
    content: Output
    # The display's, if it can be updated.
    display_id: str = ""
    size: int = 0
    # The server tells with it that it dropped output.
    is_rate_notice: bool = False


def parse_output(
    msg_type: str, content: Any, *, is_from_server: bool = False
) -> OutputEvent | None:
    """Return what an IOPub message shows, as text that UTF-8 can hold; None if nothing.

    A field that is missing, or null, is empty. The content of a reply that is not "ok"
    can be read as an "error".

    Args:
        is_from_server: The Jupyter server itself made the message, not the kernel.

    Raises:
        ProtocolError: The message is malformed.
    """
    if msg_type not in FIELDS:
        return None

    dumped = json.dumps(content, ensure_ascii=False)
    text = printable(dumped)
    if text != dumped or "NaN" in text or "Infinity" in text:
        # No notebook can hold NaN and Infinity.
        content = json.loads(text, parse_constant=lambda _: None)
    fields = parse_fields(content, FIELDS[msg_type])
    if "metadata" in fields:
        fields["data"] = parse_data(fields["data"])
    if "name" in fields and fields["name"] not in ("stdout", "stderr"):
        raise ProtocolError(f"There is no stream {fields['name']!r:.60}")
    if "traceback" in fields:
        fields["traceback"] = [str(line) for line in fields["traceback"]]

    transient = fields.pop("transient", {})
    display_id = parse_fields(transient, {"display_id": str})["display_id"]
    is_notice = is_from_server and fields.get("text", "").startswith(RATE_NOTICE)
    return OutputEvent(msg_type, fields, display_id, len(dumped), is_notice)


def parse_fields(content: Any, kinds: dict[str, Any]) -> Output:
    """Return the fields of a record, in their order, empty if they are missing.

    Raises:
        ProtocolError: It is none, or one has another type.
    """
    if not isinstance(content, dict):
        raise ProtocolError(WRONG_TYPE.format("content", content))

    fields = {}
    for name, kind in kinds.items():
        value = content.get(name) or kind()
        if not isinstance(value, kind):
            raise ProtocolError(WRONG_TYPE.format(name, value))

        fields[name] = value

    return fields


def parse_data(data: Output) -> Output:
    """Return a mime bundle as nbformat wants it; a text can be a list of lines."""
    parsed = {}
    for mime, value in data.items():
        if JSON_MIME.search(mime):
            parsed[mime] = value
        elif isinstance(value, list):
            parsed[mime] = "".join(str(line) for line in value)
        else:
            parsed[mime] = str(value)

    return parsed


def stream_output(name: str, texts: Iterable[str] = ()) -> Output:
    return {"output_type": "stream", "name": name, "text": list(texts)}


def printable(text: str) -> str:
    """Return text that UTF-8 can hold: half a surrogate pair becomes U+FFFD."""
    try:
        text.encode()
        return text  # As nearly always, and in a tenth of the time.
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# What a terminal obeys without showing it.
ESCAPE = re.compile(
    r"""
    \x9b [0-?]* [ -/]* [@-~]?                    # CSI in one character
    | \x1b (?: \[ [0-?]* [ -/]* [@-~]?           # CSI: a colour, a move, "\x1b[?25l"
      | [\]PX^_] [^\x07\x1b]* (?:\x07|\x1b\\)    # OSC, DCS: "\x1b]0;title\x07"
      | [ -/]* [0-~]? )                          # a character set: "\x1b(B"
    """,
    re.VERBOSE,
)
# A state of a progress bar that another one follows: "\r 50%" in "\r 50%\r100%".
OVERWRITTEN = re.compile(r"\r[^\r\n]*(?=\r[^\r\n])")


def clean(text: str) -> str:
    """Return what is left of a text on a terminal, without colours and moves.

    What follows a carriage return stands for its whole line.
    """
    if "\x1b" in text or "\x9b" in text:
        text = ESCAPE.sub("", text)
    if "\r" in text or "\b" in text:
        text = "\n".join(last_state(line) for line in text.split("\n"))
    return printable(text)


def parts_of(text: str) -> Iterator[str]:
    """Yield what is worked on at once of long text: whole lines, if there are any."""
    start = 0
    while start < len(text):
        end = start + BLOCK
        if end < len(text):
            line_end = text.rfind("\n", start, end) + 1
            if line_end > 0:
                end = line_end
        yield text[start:end]
        start = end


def last_state(line: str) -> str:
    """Return how a line ends in which a program went back."""
    line = line.rstrip("\r").rpartition("\r")[2]
    shown = ""
    for part in line.split("\b"):
        shown = shown[:-1] + part
    return shown


DROPPED = (
    "Output is missing, the Jupyter server dropped it: {} Print less per second, or "
    "write to a file and read parts of it; or start the server with higher limits, "
    "--ZMQChannelsWebsocketConnection.iopub_data_rate_limit=1e10 and "
    ".iopub_msg_rate_limit=1e10"
)
NOT_KEPT = "\n[... {:,} characters were not kept ...]\n"


@dataclass(eq=False)
class Item:
    """A display or an error of the cell, or a piece of a stream."""

    output: Output
    # The ipywidgets Output that captured it; "" is the cell itself.
    owner: str
    size: int
    display_id: str = ""
    was_seen: bool = False


class Outputs:
    """The output of one cell as its notebook shows it, in bounded memory.

    Not for several threads: the caller holds a lock, or is alone.
    """

    def __init__(self) -> None:
        # The error that ended the cell, told apart from its output.
        self.error: Output | None = None
        # What the server says of output that it dropped.
        self.lost = ""
        # Characters that were forgotten,
        self.not_kept = 0
        # behind so many items.
        self._first_kept = 0
        self._items: list[Item] = []
        self._size = 0
        # The Output widget that captures what comes; "" if none does.
        self._owner = ""
        self._waits_to_clear: set[str] = set()

    def add(self, event: OutputEvent) -> None:
        """Take what one message shows."""
        content = event.content
        if event.is_rate_notice:
            self.lost = DROPPED.format(content["text"])
        elif event.msg_type == "comm_msg":
            self._capture(content["comm_id"], content["data"].get("state"))
        elif event.msg_type == "clear_output":
            self._waits_to_clear.add(self._owner)
            if not content["wait"]:
                self._clear_if_due()
        else:
            self._clear_if_due()
            self._show(event)

    def items(self) -> list[Output]:
        """Return all that is kept, a stream as one output, and the cell's error."""
        outputs = [item.output for item in self._items]
        if self.not_kept:
            mark = stream_output("stdout", [NOT_KEPT.format(self.not_kept)])
            outputs.insert(self._first_kept, mark)
        if self.error is not None:
            outputs.append(self.error)

        whole: list[Output] = []
        name = None
        for output in outputs:
            if "name" in output and output["name"] == name:
                whole[-1]["text"] += output["text"]
            elif "name" in output:
                whole.append(stream_output(output["name"], output["text"]))
            else:
                whole.append(output)
            name = output.get("name")

        return whole

    def take_new(self, *, has_ended: bool) -> list[Output]:
        """Return what has not been handed over yet, but for the cell's own error.

        While the cell runs, errors wait: one can turn out to be the cell's.
        """
        taken = []
        for item in self._items:
            must_wait = "traceback" in item.output and not has_ended
            if not item.was_seen and not must_wait:
                item.was_seen = True
                taken.append(item.output)

        return taken

    def fail(self, event: OutputEvent) -> None:
        """Take the error that ended the cell, from its reply: messages can be lost."""
        error = {"output_type": "error", **event.content}
        if not error["ename"]:
            error["ename"] = "Aborted"
            error["evalue"] = "by an interrupt or another's error"

        self.error = error
        # It can have been shown more than once, each time with other frames. What it is
        # stands in the last line; IPython 8 does not always give the name.
        lines = error["traceback"]
        kept = []
        for item in self._items:
            shown = item.output.get("traceback")
            if shown is None or shown[-1:] != lines[-1:]:
                kept.append(item)
        self._items = kept
        if not lines:
            self._drop_printed(short_error(error))

    def _drop_printed(self, text: str) -> None:
        """Forget what IPython printed of an error without a traceback: a UsageError."""
        for item in self._items:
            printed = item.output.get("text", [""])[0]
            if item.output.get("name") == "stderr" and text in printed:
                item.output = stream_output(
                    "stderr", [printed.replace(text, "").lstrip()]
                )

    def is_long(self, limit: int) -> bool:
        """Return whether the text has more than `limit` characters."""
        size = 0
        for output in self.items():
            size += len(text_of(output))
        return size > limit

    def last_line(self) -> str:
        """Return the newest line of text, for progress notifications."""
        text = ""
        for item in self._items[-2:]:
            text += text_of(item.output)
        return last_line(text)

    def _capture(self, widget: str, state: Any) -> None:
        """Note whether an Output widget begins to capture what comes next, or ends."""
        if isinstance(state, dict) and "msg_id" in state:
            self._owner = widget if state["msg_id"] else ""

    def _clear_if_due(self) -> None:
        """Forget what a widget, or the cell with its widgets, has shown."""
        owner = self._owner
        if owner in self._waits_to_clear:
            self._waits_to_clear.remove(owner)
            items = self._items
            self._items = []
            self._size = 0
            self.not_kept = 0
            for item in items:
                if owner and item.owner != owner:
                    self._append(item)

    def _show(self, event: OutputEvent) -> None:
        if event.msg_type == "stream":
            for text in parts_of(event.content["text"]):
                self._add_text(event.content["name"], text)
            return

        # What is no text has DATA_KEPT where text has TEXT_KEPT.
        size = ITEM_COST + event.size * TEXT_KEPT // DATA_KEPT
        name = event.display_id
        shown = [item for item in self._items if name and item.display_id == name]
        if event.msg_type != "update_display_data" or not shown:
            msg_type = event.msg_type.removeprefix("update_")
            output = {"output_type": msg_type, **event.content}
            self._append(Item(output, self._owner, size, name))
            return

        for item in shown:
            self._size += size - item.size
            item.size = size
            item.was_seen = False
            # A new output, because a caller may be reading the old one.
            item.output = {**item.output, **event.content}

    def _add_text(self, name: str, text: str) -> None:
        """Add a piece of a stream, to the last one if that is short and was not seen.

        A progress bar in it keeps its last state.
        """
        if self._items:
            last = self._items[-1]
            is_same = last.output.get("name") == name
            is_open = last.size < ROWS_KEPT and not last.was_seen
            if is_same and is_open and last.owner == self._owner:
                self._items.pop()
                self._size -= last.size
                text = last.output["text"][0] + text

        text = OVERWRITTEN.sub("", text)
        output = stream_output(name, [text])
        size = max(ITEM_COST, len(text))
        self._append(Item(output, self._owner, size))

    def _append(self, item: Item) -> None:
        """Add an item; if there is too much, those in the middle are forgotten."""
        self._items.append(item)
        self._size += item.size
        if self._size <= TEXT_KEPT:
            self._first_kept = len(self._items)

        room = TEXT_KEPT + TAIL_KEPT
        while self._size > room and len(self._items) > self._first_kept:
            forgotten = self._items.pop(self._first_kept)
            self._size -= forgotten.size
            self.not_kept += forgotten.size


def short_error(error: Output) -> str:
    return f"{error['ename']}: {error['evalue']}"


def last_line(text: str) -> str:
    """Return the last line that is not empty, or its last characters."""
    lines = clean(text[-ITEM_COST:]).strip().split("\n")
    return lines[-1]


# A repr that says nothing: "<pandas.io.formats.style.Styler at 0x7f24>".
DEFAULT_REPR = re.compile(r"<[\w.]+( object)?( at 0x[0-9a-fA-F]+)?>\Z")
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_NOTE = "[a widget, as it was when it was made]"
# What gives a figure away in its mime types, or in a page with a script.
FIGURE_SIGNS = ("plotly", "vega-embed", "leaflet", "svg+xml", "/pdf", "+json")
FIGURE_NOTE = (
    "[an interactive, SVG or PDF figure, in the notebook; to see it here, draw it as "
    'a PNG, as with fig.show("png")]'
)
HTML_READ = 1_000_000  # characters
HIDDEN = re.compile(r"(?is)<(script|style)\b.*?(</\1\s*>|\Z)")
ROW_END = re.compile(r"</(tr|p|div|li|h\d|pre)\s*>|<br\b[^<>]*>", re.IGNORECASE)
TAG = re.compile(r"</?[a-z!][^<>]*>", re.IGNORECASE)


def text_of(output: Output) -> str:
    """Return the text of one output, as it came."""
    if "text" in output:
        return "".join(output["text"])
    if "data" in output:
        return display_text(output["data"])
    return "\n".join(output["traceback"]) or short_error(output)


def display_text(data: Output) -> str:
    """Return what stands for a mime bundle, beside its picture if it has one."""
    plain: str = data.get("text/plain", "")
    useful = "" if DEFAULT_REPR.match(plain) else plain
    signs = " ".join(data)
    if PICTURE.search(signs):
        return useful

    text = useful or rich_text(data)
    if WIDGET in data:
        return f"{text} {WIDGET_NOTE}".strip()

    page = data.get("text/html", "")
    if "<script" in page:  # A table may hold any word.
        signs += page
    if any(sign in signs for sign in FIGURE_SIGNS):
        return f"{text} {FIGURE_NOTE}".strip()

    return text or plain


def rich_text(data: Output) -> str:
    """Return a mime bundle's Markdown, LaTeX or JSON, or the text of its page."""
    for mime in ("text/markdown", "text/latex"):
        if mime in data:
            return str(data[mime])

    if "application/json" in data:
        return json.dumps(data["application/json"], ensure_ascii=False)

    # A line for a block or a row of a table.
    page = HIDDEN.sub("", data.get("text/html", "")[:HTML_READ])
    page = ROW_END.sub("\n", " ".join(page.split()))
    page = html.unescape(TAG.sub(" ", page))
    lines = [" ".join(line.split()) for line in page.split("\n")]
    return "\n".join(line for line in lines if line)


PICTURE = re.compile(r"image/(?!svg)")
# The first bytes of what clients show, in base64, and its type.
PICTURES = {"iVBORw0KG": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}
NO_PICTURE = "[this {} is no PNG, JPEG, GIF or WebP; it is in the notebook]"
NOT_SENT = (
    f"[a picture, {{}} of {{:,}} bytes, is in the notebook: one result has at most "
    f"{IMAGES_SENT} pictures and {IMAGES_SIZE:,} characters of base64. To see it: "
    "smaller figsize or dpi, or show it alone]"
)


@dataclass
class Shown:
    """Outputs as texts, which `compose` cleans and cuts, and as pictures."""

    texts: list[str] = field(default_factory=list)
    # Their mime types, and base64.
    images: list[tuple[str, str]] = field(default_factory=list)

    def add(self, outputs: Sequence[Output], mark: str = "") -> None:
        """Add what a person sees below the cell, each text behind a mark.

        Streams that follow each other are one text.
        """
        stream: list[str] = []
        for output in outputs:
            if "text" in output:
                stream += output["text"]
                continue

            self._add_text("".join(stream), mark)
            stream = []
            if "traceback" in output:
                self._add_text(error_text(output), mark)
            else:
                self._add_text(display_text(output["data"]), mark)
                self._add_text(self._add_picture(output["data"]), mark)

        self._add_text("".join(stream), mark)

    def _add_text(self, text: str, mark: str) -> None:
        if text:
            self.texts.append(mark + text.removesuffix("\n"))

    def _add_picture(self, data: Output) -> str:
        """Add the picture of a mime bundle; return why not, if it is not sent."""
        mimes = [mime for mime in data if PICTURE.match(mime)]
        if not mimes:
            return ""

        mime = mimes[0]
        encoded = "".join(data[mime].split())
        size = len(encoded)
        sent = sum(len(image) for _, image in self.images)
        is_full = len(self.images) == IMAGES_SENT
        if is_full or sent + size > IMAGES_SIZE:
            return NOT_SENT.format(mime, size * 3 // 4)

        kind = picture_kind(encoded)
        if kind is None:
            return NO_PICTURE.format(mime)

        self.images.append((f"image/{kind}", encoded))
        return ""


def picture_kind(encoded: str) -> str | None:
    """Return the type that the first bytes of base64 say; None if it is no picture."""
    try:
        base64.b64decode(encoded, validate=True)
    except ValueError:
        return None

    for first, kind in PICTURES.items():
        if encoded.startswith(first):
            return kind

    return None


# A frame in a library, as IPython tells it:
# "File /venv/lib/python3.11/site-packages/pandas/core/frame.py:4330, in f(self)".
LIBRARY = re.compile(
    r"""
    \s* File[ ]
    (?: [^\n]*[/\\] (?: (?:site|dist)-packages | lib[/\\]python3[.\d]*
          | Python3\d+[/\\]Lib ) [/\\]          # the last is Windows
      | (?=[^/\\~<][^\n]*\.p(?:yx|xi)\b) )  # Cython: "pandas/_libs/index.pyx"
    (?P<place> [^\n]+?:\d+ (?:,[ ]in[ ][^\n(]+)? )
    """,
    re.VERBOSE | re.IGNORECASE,
)
HEADING = re.compile(r"-{20,}\Z|[\w.]+ +Traceback \(most recent call last\)\Z")
FRAMES_SHOWN = 3  # of many in a row, at each end


def error_text(error: Output) -> str:
    """Return an error as it is told."""
    return short_traceback(error["traceback"]) or short_error(error)


def short_traceback(lines: Sequence[str]) -> str:
    """Return the frames of cells and the user's files whole, of libraries by one line.

    IPython sends one string a frame. Of many in a row, the ends stay.
    """
    texts = []
    for line in lines:
        text = clean(line).strip("\n")
        library = LIBRARY.match(text)
        if library is not None:
            text = "File " + library["place"]
        if not HEADING.match(text.strip()):
            texts.append(text)

    told: list[str] = []
    for _, group in groupby(texts, key=lambda text: text[:5]):  # "Cell ", "File "
        row = list(group)
        left_out = len(row) - 2 * FRAMES_SHOWN
        if left_out > 1:
            row[FRAMES_SHOWN:-FRAMES_SHOWN] = [f"[... {left_out:,} frames ...]"]
        told += row

    return "\n".join(told)


SEPARATOR = "\x1e"  # between texts that are cut as one; there is none in them
Measure = Callable[[str], int]  # what a text takes of the room there is


@dataclass(frozen=True)
class Note:
    """What stands where text was cut."""

    # Where all of it is: "; the full text is in FILE on the server".
    place: str = ""
    # Characters that were lost before.
    not_kept: int = 0

    def text(self, count: int) -> str:
        count += self.not_kept
        return f"\n[... {count:,} characters left out{self.place} ...]\n"


def shorten(
    texts: Sequence[str], room: int, note: Note, measure: Measure = len
) -> list[str]:
    """Return the texts clean; if they take more than `room`, their beginning and end.

    Those in the middle are left out. Only what can be shown is cleaned, because
    15 MB take a second.
    """
    text = SEPARATOR.join(text.replace(SEPARATOR, "") for text in texts)
    most = 8 * room  # There is more to colours and bars than what is shown.
    head = text[:most]
    tail = text[-most:]
    if len(text) <= 2 * most:
        text = clean_each(text)
        head = text
        tail = text

    size = len(text)
    if size > room or measure(text) > room:
        left = (room - measure(note.text(size))) // 2
        head = beginning(clean_each(head), left, measure)
        # From behind; what a text takes does not depend on its order.
        tail = clean_each(tail)[::-1]
        tail = beginning(tail, left, measure)[::-1]
        ends = head + tail
        head += note.text(size - len(ends))
        if text.count(SEPARATOR) > ends.count(SEPARATOR):
            head += SEPARATOR
        text = head + tail
        if left <= 0:  # Not even the note fits.
            text = ""

    return [text for text in text.split(SEPARATOR) if text]


def clean_each(text: str) -> str:
    return SEPARATOR.join(clean(each) for each in text.split(SEPARATOR))


def beginning(text: str, room: int, measure: Measure) -> str:
    """Return as much of a text as fits."""
    most = min(len(text), room)
    lengths = range(1, most + 1)

    def size_of(length: int) -> int:
        return measure(text[:length])

    count = bisect.bisect_right(lengths, room, key=size_of)
    return text[:count]


def share(
    error: list[str], result: list[str], room: int, note: Note, measure: Measure
) -> tuple[list[str], list[str]]:
    """Return error and result so that they fit together.

    The error has half the room, or what the result leaves of it.
    """
    for_error = room // 2
    if sum(len(text) for text in result) < room:
        for_error = max(for_error, room - measure(SEPARATOR.join(result)))
    errors = shorten(error, for_error, Note(note.place), measure)
    room -= measure(SEPARATOR.join(errors))
    return errors, shorten(result, room, note, measure)


def json_size(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False))


def compose(
    session_id: int, error: list[str], result: list[str], limit: int, note: Note
) -> str:
    """Return a result as JSON of at most `limit` characters, whatever is in it.

    The error comes first, because some clients cut the end.
    """
    shown: Output = {"session_id": session_id, "error": [], "result": []}
    room = limit - len(json.dumps(shown))
    errors, results = share(error, result, room, note, json_size)
    shown["error"] = errors
    shown["result"] = results
    return json.dumps(shown, ensure_ascii=False)


def compose_plain(
    session_id: int, error: list[str], result: list[str], limit: int, note: Note
) -> str:
    """Return a result as plain text, of at most `limit` characters and PLAIN_LINES.

    Its first line has the session's id, and the last line of an error.
    """

    def plain_size(text: str) -> int:
        lines = 1 + text.count("\n") + text.count(SEPARATOR)
        return 1 + max(len(text), lines * limit // PLAIN_LINES)

    title = f"[session_id {session_id}]"
    if error:
        said = last_line(error[-1])
        title += f" [error: {said[:200]}]"

    room = limit - plain_size(title)
    errors, results = share(error, result, room, note, plain_size)
    return "\n".join([title, *results, *errors])


def notebook_outputs(outputs: Sequence[Output], limit: int, note: Note) -> list[Output]:
    """Return outputs as the file keeps them: pictures, charts and pages whole.

    Of text with more than `limit` characters NOTEBOOK_TEXT are kept.
    """

    def cut(text: str) -> str:
        if len(text) <= limit:
            return text
        return "".join(shorten([text], NOTEBOOK_TEXT, note))

    kept = []
    for output in outputs:
        shown = {**output}
        if "text" in output:
            shown["text"] = cut(text_of(output))
        elif "traceback" in output:
            shown["evalue"] = cut(output["evalue"])
            shown["traceback"] = [cut(line) for line in output["traceback"]]
        elif "text/plain" in output["data"]:
            data = {**output["data"]}
            data["text/plain"] = cut(data["text/plain"])
            shown["data"] = data

        kept.append(shown)

    return kept


def full_text(outputs: Sequence[Output]) -> Iterator[str]:
    """Yield all text of a cell, clean, in parts."""
    for output in outputs:
        for text in parts_of(text_of(output)):
            yield clean(text)

        if output["output_type"] != "stream":
            yield "\n"


# --- Language -------------------------------------------------------------------------

# A newer helper replaces an older one in a living kernel: raise it with each change of
# KernelHelper or BashCommand.
HELPER_VERSION = 5
# Longer cells are not parsed in the MCP server: 4 MB take 19 s and 1.9 GB.
PARSED_HERE = 100_000

# ```bash, the cell, ```; languages other than Python and shells keep their fence.
FENCE = re.compile(r"\s*```(py\w*|\w*sh|)\s*\n(.*?)\s*```\s*", re.DOTALL)
PROMPT = re.compile(r"^\$ ", re.MULTILINE)
BASH_MAGIC = re.compile(r"%%bash[ \t]*(?:\r?\n|\Z)")


class Language(enum.Enum):
    """Whose cell it is."""

    PYTHON = "python"
    BASH = "bash"
    # The kernel must say: it knows the variables, and the commands that are there.
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Settled:
    """A cell without what only surrounded it (a fence, a prompt), and its language."""

    language: Language
    text: str


def settle(code: str) -> Settled:
    """Return the language of a cell where its text alone says it, else UNKNOWN."""
    text = code.lstrip("\ufeff")
    fence = FENCE.fullmatch(text)
    if fence:
        text = fence[2]

    cell = KernelHelper.COMMENTS.sub("", text, count=1)
    magic = BASH_MAGIC.match(cell)
    if magic:
        return Settled(Language.BASH, text.replace(magic[0], "", 1))
    if cell.startswith("%%"):
        # IPython knows a cell magic on the first line only.
        return Settled(Language.PYTHON, cell)
    if cell.startswith("$ ") or (fence and fence[1].endswith("sh")):
        return Settled(Language.BASH, PROMPT.sub("", text))

    if is_python(cell):
        return Settled(Language.PYTHON, text)
    return Settled(Language.UNKNOWN, text)


def is_python(cell: str) -> bool:
    """Return whether a cell can only be Python, as far as its text alone says.

    Top-level `await` parses, too. A line that could be `pip install x` is the kernel's.
    """
    if KernelHelper.INSTALLER.search(cell):
        return False
    if KernelHelper.first_word(cell) is None:
        return True
    if len(cell) > PARSED_HERE:
        return False
    may_be_command = KernelHelper.FIRST_NAME.match(cell)
    return not may_be_command and bool(KernelHelper.parse(cell))


# The two classes below are sent to the kernel as they stand here, behind these imports.
# They run on the kernel's Python, 3.8 or later, and use nothing else of this module.
# The names are taken when the helper comes, because the user may replace them later.
HELPER_IMPORTS = """\
from __future__ import annotations
import ast, builtins, codecs, contextlib, keyword, os, re, selectors, shutil, signal
import subprocess, sys, time, types, warnings
from threading import Thread
"""


class BashCommand:
    """One bash script while it runs, in a process group of its own.

    What passes between the two travels through pipes, never through files: the script,
    and at its end the note of bash: where it is and what it exports.
    """

    # Bash is started with no more than this on its command line, so that `pkill -f` of
    # the script does not find the shell itself.
    COMMAND = 'IFS= read -r _jim_frame; eval "$_jim_frame"'
    # Comes as one line, the script behind it, so that bash counts its lines from 1.
    # First the watcher: its pipe closes with the kernel, however that ends, because
    # nothing else holds it; a line from us ends it before. As the child of a child it
    # is none of the script's jobs, for which `wait` waits.
    # 200: the script may use those below. Each part of the note ends with a NUL, the
    # whole with one more. It comes twice if the script sets no trap of its own.
    FRAME = r"""
        ( (read -r _ <&{watch} || kill -KILL -- "-$$") & ) > /dev/null 2>&1 {note}>&-;
        exec 200>&{note} {note}>&- {watch}<&-;
        pip() {{ python3 -m pip "$@"; }};
        pip3() {{ pip "$@"; }};
        _jim_note() {{
            set +eux;
            printf '%s\0' "$PWD";
            compgen -e |
            while IFS= read -r n; do printf '%s=%s\0' "$n" "${{!n-}}"; done;
            printf '\0';
        }};
        trap '{{ _jim_note >&200; }} 2> /dev/null' EXIT;
        eval "$(</dev/stdin)" < /dev/null;
        {{ _jim_status=$?; _jim_note >&200; }} 2> /dev/null;
        exit "$_jim_status"
        """
    # After each message, output gathers in the pipe for this long, because the server
    # drops what exceeds 1,000 messages a second.
    GATHERED_S = 0.003
    # More than a pipe holds.
    READ = 1_000_000
    # Programs that would wait for a terminal for ever, but with options for scripts.
    WAITS = re.compile(r"""(?mx)
        (?: ^ | [;&|(] | \bsudo[ \t] ) [ \t]*
        (?: vim? | view | nvim | nano | pico | emacs | watch | htop ) (?![^\s;&|)])
        (?! [^\n;&|]* [ \t] (?: -[eE]s | -c | -batch | --\w+ ) \b )
        """)
    NO_TERMINAL = "This waits for a terminal, and there is none: write files by Python"

    def __init__(self, send: Callable[[str], None]) -> None:
        self.send = send
        # Set by SIGINT: no exception could end the stopping itself.
        self.is_interrupted = False
        self.was_stopped = False
        self.note = bytearray()
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def interrupt(self, *_: Any) -> None:
        """Take SIGINT."""
        self.is_interrupted = True

    @classmethod
    def waits(cls, script: str) -> bool:
        """Return whether it runs a program that needs a terminal."""
        return cls.WAITS.search(script.partition("<<")[0]) is not None

    def run(self, bash: str, script: str, environment: dict[str, str]) -> str:
        """Run a script to its end; the error, "" if all is well."""
        note_reader, note_writer = os.pipe()
        watch_reader, watch_writer = os.pipe()
        frame = self.FRAME.format(note=note_writer, watch=watch_reader)

        notes = os.fdopen(note_reader, "rb", buffering=0)
        with os.fdopen(watch_writer, "wb", buffering=0) as watch:
            try:
                self.process = subprocess.Popen(
                    [bash, "-c", self.COMMAND, "bash"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(note_writer, watch_reader),
                )
            except OSError as err:  # as when the environment is too large
                notes.close()
                return f"bash could not be started: {err}"
            finally:
                os.close(note_writer)
                os.close(watch_reader)

            text = f"{' '.join(frame.split())}\n{script}"
            Thread(target=self.feed, args=(text,), daemon=True).start()
            takers = {self.process.stdout: self.show, notes: self.note.extend}
            self.follow(takers, self.is_running)
            while self.is_running():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.05)
            with contextlib.suppress(OSError):  # The watcher may be stopped, too.
                watch.write(b"\n")

        # A child in the background may hold the pipes open for ever: what it prints
        # after the call comes with the next one.
        Thread(target=self.follow, args=(takers, lambda: True), daemon=True).start()
        self.hand_over(environment)
        return self.error()

    def feed(self, text: str) -> None:
        """Write the script: in a thread, because a pipe holds 64 kB."""
        pipe: Any = self.process.stdin
        with contextlib.suppress(OSError), pipe:
            pipe.write(text.encode("utf-8", "replace"))

    def is_running(self) -> bool:
        """Return whether bash runs; stop it and its children if that was asked for."""
        if self.is_interrupted and not self.was_stopped:
            self.was_stopped = True
            # As Ctrl-C does, then for certain.
            for number in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                    os.killpg(self.process.pid, number)
                    self.process.wait(1)
        if self.was_stopped:
            return False
        return self.process.poll() is None

    def follow(self, takers: dict[Any, Any], is_running: Callable[[], bool]) -> None:
        """Take what comes from pipes until they end, or what runs ends.

        Closes and removes those that ended.
        """
        with selectors.DefaultSelector() as selector:
            for each in takers:
                selector.register(each, selectors.EVENT_READ)

            # A child in the background may print without end: when bash has ended, all
            # that it wrote is in the pipes, and one more reading takes it.
            was_running = True
            while was_running and takers:
                was_running = is_running()
                for key, _ in selector.select(0.05):
                    pipe: Any = key.fileobj
                    data = os.read(key.fd, self.READ)
                    takers[pipe](data)
                    if not data:
                        selector.unregister(pipe)
                        del takers[pipe]
                        pipe.close()

    def show(self, data: bytes) -> None:
        """Send output, though not each line alone."""
        text = self.decode(data, not data)
        if text:
            self.send(text)
            time.sleep(self.GATHERED_S)

    def hand_over(self, before: dict[str, str]) -> None:
        """Go where the shell was, and take over the exports that it changed."""
        notes = bytes(self.note).split(b"\0\0")
        if len(notes) < 2:
            return  # It was killed.

        folder, *pairs = os.fsdecode(notes[-2]).split("\0")
        after = dict(pair.split("=", 1) for pair in pairs)

        for name in before.keys() | after.keys():
            # What bash sets by itself, and exported functions, which are not listed.
            if name in ("_", "SHLVL") or not name.isidentifier():
                continue
            if name not in after:
                os.environ.pop(name, None)
            elif before.get(name) != after[name]:
                os.environ[name] = after[name]

        with contextlib.suppress(OSError):
            os.chdir(folder)

    def error(self) -> str:
        """Return what the exit status means, "" if all is well."""
        if self.was_stopped:
            return "KeyboardInterrupt: the command was stopped, with its children"

        status = self.process.wait()
        if status < 0:
            status = 128 - status
        with contextlib.suppress(ValueError):  # It is not the number of a signal.
            name = signal.Signals(status - 128).name
            return f"Command was killed by {name} (exit status {status})"

        if status:
            return f"Command exited with status {status}"
        return ""


class KernelHelper(types.ModuleType):
    """The module that works for us in the user's kernel.

    Its answers travel in the payload of the execute_reply, which no other client sees.
    What commands print goes out as stream messages, whatever became of sys.stdout.
    """

    # A client_session_id that begins so is one of ours, and so is a PYTHONSAFEPATH of
    # this value: that of the kernels of --local.
    PROGRAM = "jupyter-interpreter-mcp"
    NO_BASH = "There is no bash on the machine where the kernel runs: use Python"
    FORCES = "%%bash on the first line makes it a bash cell"
    # For commands that would ask, page or colour.
    QUIET = """
        TERM=dumb NO_COLOR=1 PAGER=cat GIT_PAGER=cat MANPAGER=cat EDITOR=true
        VISUAL=true GIT_EDITOR=true GIT_TERMINAL_PROMPT=0
        """
    # What ipykernel sets for itself: colours, and a package that other Pythons lack.
    KERNELS_OWN = ("CLICOLOR", "CLICOLOR_FORCE", "FORCE_COLOR", "MPLBACKEND")

    # A longer beginning is no command, and bash would not take it as a word.
    LONGEST_BEGINNING = 100_000
    PYTHON_ONLY = {"", "print", *keyword.kwlist} - {"for", "if", "while"}
    COMMENTS = re.compile(r"(?:\s|#[^\n]*(?:\n|\Z))*")  # and blank lines
    # What may stand before a script's first word.
    PREFIX = re.compile(r"""(?x)
        (?: \s+ | \#[^\n]* | [;&|(] | \{(?=\s)  # comments, operators, opening brackets
          | [A-Za-z_]\w*\+?=                    # NAME=value; the value is any of these:
            (?: \([^()]*\)                      # (an array)
              | '[^']*' | "(?:\\.|[^"\\])*" | `[^`]*`
              | \$\((?:[^()]|\([^()]*\))*\)     # $(a command), brackets in it one deep
              | \\. | \$(?!\() | [^\s;&|<>()'"`\\$]
            )* (?=[\s;&|]|\Z)
        )*
        """)
    WORD_END = re.compile(r"[\s;|&<>()\0]")
    # A name that ends as a command does: not a call, an attribute, an item.
    FIRST_NAME = re.compile(r"([A-Za-z_]\w*)(?=[\s;|&<>]|-[a-z]|\Z)")
    # What is bash's to explain if it cannot run it: $x, > f, ./f, ../f, ~/f, f()
    ALWAYS_BASH = re.compile(r"[$>]|\.\.?/|~/|[\w.:-]+[ \t]*\([ \t]*\)")
    ASSIGNMENT = re.compile(r"""(?x)
        \S+ [ \t]+ (?: [,:] [ \t]* [A-Za-z_] [^\n=]* )?  # x , y = 1;  x : int = 1
        [-+*/%@&|^:<>]{0,2} = (?!==)                     # x = 1;  x += 1;  x := 1
        """)
    # A cell that is just this is rather a variable than a command.
    LONE_VARIABLE = re.compile(r"df\s*(?:#[^\n]*\s*)*")
    LOOP = re.compile(r"\b(?:do|then)\b")
    LIKE_COMMAND = re.compile(r"[a-z./~][a-z0-9.+/-]*(?=[\s;|&<>]|\Z)")
    # A line of its own with its continuations: pip install x
    INSTALLER = re.compile(r"^(pip|conda|mamba|uv) -*[a-z](?:\\\n|.)*", re.MULTILINE)
    # What is IPython's in a cell: %magic, !command, x = !command
    MAGIC = re.compile(r"^([ \t]*|[\w.,\[\] ]+=)[ \t]*[%!].*$", re.MULTILINE)
    # Prints what is wrong with a script that comes on stdin, or with its first word.
    CHECK = """
        pip() { :; }
        said="$(bash -n 2>&1)" || { echo "$said"; exit; }
        type -- "$1" > /dev/null 2>&1 || echo "bash: $1: command not found"
        """

    def __init__(self, name: str, version: int, shell: Any, older: Any) -> None:
        super().__init__(name)
        self.version = version
        self.shell = shell
        # What a newer helper takes over.
        self.state: str | None = getattr(older, "state", None)
        self.last: str | None = getattr(older, "last", None)
        # Of the cell that runs: its request, where it began, [command, status] of what
        # failed, and the traceback that was shown before.
        self.msg_id: str | None = None
        self.folder = ""
        self.statuses: list[list[Any]] = []
        self.shown: list[str] | None = None
        self.follow_cells(older)

        if os.environ.get("PYTHONSAFEPATH") == self.PROGRAM:
            del os.environ["PYTHONSAFEPATH"]
            sys.path.insert(0, "")  # From now on as in any kernel.

        # Makes `python` and `pip` the kernel's own, for bash, `!` and subprocesses;
        # once, because later the user may have activated another environment.
        if sys.executable and not hasattr(older, "hooks"):
            here = os.path.dirname(sys.executable)
            path = os.environ.get("PATH", os.defpath)
            os.environ["PATH"] = here + os.pathsep + path

    # What the MCP server calls.

    def hello(self, mark: str | None) -> None:
        """Answer what has run here; then the state is `mark` if a restore may begin."""
        before = self.state
        if before is None:
            before = "used" if self.shell.execution_count > 1 else "fresh"
        self.answer(state=before, last=self.last)

        if mark and before in ("fresh", "restoring"):
            self.state = mark
        elif mark:
            self.state = "ready"

    def relative(self, folder: str) -> None:
        """Answer a folder as seen from the working directory."""
        self.answer(folder=os.path.relpath(os.path.realpath(folder)))

    def enter(self, folder: str) -> None:
        """Go there; answer the error, "" if all is well."""
        error = ""
        try:
            os.chdir(folder)
        except (OSError, ValueError) as err:
            error = str(err)
        self.answer(error=error)

    def names(self) -> None:
        """Answer the names of the user's variables."""
        self.answer(names=self.variables()[:100])

    def run(self, code: str, ask: bool) -> None:
        """Run a script; if asked and it is Python, answer with the cell instead."""
        kernel = self.shell.kernel
        parent = self.shell.get_parent()
        self.last = self.header("msg_id")

        def send(text: str) -> None:
            content = {"name": "stdout", "text": text}
            socket = kernel.iopub_socket
            kernel.session.send(socket, "stream", content, parent, b"stream.stdout")

        command = BashCommand(send)
        previous = signal.signal(signal.SIGINT, command.interrupt)
        try:
            cell = self.python_cell(code) if ask else None
            if command.is_interrupted:
                self.answer(error="KeyboardInterrupt: before the command began")
            elif cell is not None:
                self.answer(**cell)
            else:
                self.answer(error=self.run_bash(command, code))
        finally:
            signal.signal(signal.SIGINT, previous or signal.default_int_handler)

    def run_bash(self, command: BashCommand, code: str) -> str:
        """Run a script; return the error, "" if all is well."""
        script = code.replace("\r\n", "\n").replace("\0", "")
        bash = self.find_bash()
        if bash is None:
            return self.NO_BASH
        if command.waits(script):
            return command.NO_TERMINAL

        if not self.folder:
            self.folder = os.path.expanduser("~")
            os.chdir(self.folder)
            command.send(f"[the working directory was deleted; now in {self.folder}]\n")
        return command.run(bash, script, self.environment())

    def answer(self, **fields: Any) -> None:
        """Put fields into the payload of the reply, behind those that are there."""
        fields["source"] = self.__name__
        self.shell.payload_manager.write_payload(fields, single=False)

    # Python or bash?

    @classmethod
    def first_word(cls, text: str) -> str | None:
        """Return what bash would run first; None if only Python begins so."""
        command = cls.PREFIX.sub("", text[: cls.LONGEST_BEGINNING], count=1)
        if cls.ALWAYS_BASH.match(command):
            return ":"

        word = cls.WORD_END.split(command, maxsplit=1)[0]
        if word in cls.PYTHON_ONLY or cls.ASSIGNMENT.match(command):
            return None
        return word.strip("\"'")

    def python_cell(self, code: str) -> dict[str, str] | None:
        """Return the cell to run as Python, with a hint; None if it is bash.

        Installers among Python's statements do not count: the others decide.
        """
        if self.find_bash() is None:
            return {"cell": code, "hint": ""}

        cell = self.with_installers(code)
        others = code
        if cell != code:
            others = self.INSTALLER.sub("", code)

        hint = self.python_hint(others)
        if hint is None:
            return None
        return {"cell": cell, "hint": hint}

    def with_installers(self, code: str) -> str:
        """Return a cell whose installers are `!commands`, if it is Python otherwise.

        Not if there is nothing else, and not if one is a line within a string. `pip` is
        that of the `python3` on the PATH, as in bash.
        """
        lines = self.INSTALLER.findall(code)
        if not lines or set(lines) & set(self.variables()):
            return code

        kinds = [type(each) for each in self.parse(self.INSTALLER.sub("pass", code))]
        if not kinds.count(ast.Pass) == len(lines) < len(kinds):
            return code

        cell = self.INSTALLER.sub(r"!\g<0>", code)
        return re.sub(r"^!pip ", "!python3 -m pip ", cell, flags=re.MULTILINE)

    def python_hint(self, code: str) -> str | None:
        """Return None if it is bash; else what to add if it fails as Python, or ""."""
        text = self.COMMENTS.sub("", code, count=1)
        word = self.first_word(text)
        # Modules are no data: after `import git`, `git status` is bash.
        is_module = isinstance(self.shell.user_ns.get(word), types.ModuleType)
        if word is None or (word in self.variables() and not is_module):
            return ""
        if self.LONE_VARIABLE.fullmatch(text):
            return self.FORCES

        said = self.problem(code, word)
        if said:
            command = self.PREFIX.sub("", text, count=1)
            is_script = word not in keyword.kwlist or self.LOOP.search(text)
            if is_script and self.LIKE_COMMAND.match(command):
                return f"{said}; {self.FORCES}"
            return ""

        # What begins with a name that Python does not know could only raise NameError.
        first = self.FIRST_NAME.match(text)
        known = {*vars(builtins), *self.shell.user_ns}
        is_unknown = first is not None and first[1] not in known
        return self.FORCES if self.parse(text) and not is_unknown else None

    def problem(self, text: str, word: str) -> str:
        """Return why bash cannot parse a script or run its first word, "" if it can."""
        script = text.replace("\r\n", "\n").replace("\0", "")
        try:
            done = subprocess.run(
                ["bash", "-c", self.CHECK, "bash", os.path.expanduser(word)],
                input=script.encode("utf-8", "replace"),
                capture_output=True,
                check=False,
            )
        except OSError:
            return ""  # `run` says why bash does not start.
        return done.stdout.decode("utf-8", "replace").partition("\n")[0]

    @classmethod
    def parse(cls, text: str) -> list[ast.stmt]:
        """Return the statements of a cell, magics taken as 0; none if it is broken.

        IPython's own transformation is quadratic in lines with % or !.
        """
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(cls.MAGIC.sub(r"\g<1>0", text)).body
        return []

    def variables(self) -> Any:
        """Return the sorted names of the user's own variables."""
        return self.shell.run_line_magic("who_ls", "")

    # The environment of commands

    @staticmethod
    def find_bash() -> str | None:
        """Return the path of bash; None if there is none, or no POSIX processes."""
        return shutil.which("bash") if os.name == "posix" else None

    def environment(self) -> dict[str, str]:
        """Return the environment of bash."""
        quiet = dict(each.split("=") for each in self.QUIET.split())
        result = {**os.environ, **quiet}
        for name in self.KERNELS_OWN:
            if result.get(name, "").startswith(("1", "module://")):
                del result[name]
        return result

    # What fails in a Python cell and raises nothing

    def follow_cells(self, older: Any) -> None:
        """Follow the user's cells and their commands, in place of an older helper."""
        events = self.shell.events
        for event, hook in getattr(older, "hooks", {}).items():
            with contextlib.suppress(ValueError):  # The user removed it.
                events.unregister(event, hook)

        self.hooks = {"pre_run_cell": self.begin_cell, "post_run_cell": self.end_cell}
        for event, hook in self.hooks.items():
            events.register(event, hook)

        # What IPython calls for `!command` and %pip; not the shell's own method, whose
        # place in the stack says which variables `{x}` means.
        zmqshell: Any = sys.modules.get("ipykernel.zmqshell")
        if zmqshell is not None:
            self.run_command = getattr(older, "run_command", zmqshell.system)
            zmqshell.system = self.system

    def system(self, command: str) -> Any:
        """Run `!command`, and keep a status that says failure."""
        if BashCommand.waits(command):
            command = f"echo {BashCommand.NO_TERMINAL!r}; exit 1"
        status = self.run_command(command)
        if status:
            self.statuses.append([command[:200], status])
        return status

    def begin_cell(self, _: Any) -> None:
        """Forget the cell before; a cell that the cell itself runs is a part of it."""
        msg_id = self.header("msg_id")
        if msg_id == self.msg_id:
            return

        self.msg_id = msg_id
        self.statuses = []
        self.shown = getattr(self.shell, "_last_traceback", None)
        self.folder = self.working_directory()

    def end_cell(self, result: Any) -> None:
        """Answer where the cell began and ended, and what failed and did not end it."""
        if not self.header("session").startswith(self.PROGRAM):
            return

        raised = ""
        shown = getattr(self.shell, "_last_traceback", None)
        if result.success and shown and shown is not self.shown:
            raised = str(shown[-1])
        self.answer(
            folder=self.folder,
            ended_in=self.working_directory(),
            statuses=self.statuses[:20],
            raised=raised,
        )

    @staticmethod
    def working_directory() -> str:
        """Return where the kernel is; "" if that was deleted."""
        with contextlib.suppress(OSError):
            return os.getcwd()
        return ""

    def header(self, name: str) -> str:
        """Return a field of the header of the request that is being answered."""
        parent = self.shell.get_parent() or {}
        return str(parent.get("header", {}).get(name, ""))


def source_of(kind: type) -> str:
    """Return the source of a class of this module.

    `inspect.getsource` parses the whole file to find it, which takes 0.1 s.
    """
    lines = inspect.getsource(sys.modules[kind.__module__]).splitlines(keepends=True)
    first = re.compile(rf"class {kind.__name__}\b")
    start = next(number for number, line in enumerate(lines) if first.match(line))
    return "".join(inspect.getblock(lines[start:]))


@functools.cache
def install_code() -> str:
    """Return statements that install the helper in a kernel, once in its life.

    Statements and `import` only: names like `exec` may be variables of the user there.
    """
    source = HELPER_IMPORTS + source_of(BashCommand) + source_of(KernelHelper)
    return f"""class {HELPER_NAME}:
    import builtins, sys
    from IPython import get_ipython
    older = sys.modules.get({HELPER_NAME!r})
    if builtins.getattr(older, "version", 0) < {HELPER_VERSION}:
        space = {{"__name__": {HELPER_NAME!r}}}
        builtins.exec(builtins.compile({source!r}, {HELPER_NAME!r}, "exec"), space)
        sys.modules[{HELPER_NAME!r}] = space["KernelHelper"](
            {HELPER_NAME!r}, {HELPER_VERSION}, get_ipython(), older
        )
"""


def call_code(expression: str) -> str:
    """Return statements that call the helper; nothing stays in the user's namespace."""
    return f"""try:
    import {HELPER_NAME}
    {HELPER_NAME}.{expression}
finally:
    del {HELPER_NAME}
"""


# --- Server ---------------------------------------------------------------------------

NO_JUPYTER = "this is not a Jupyter server, or the URL lacks a path"
NO_JUPYTER += "; check --jupyter-base-url"
CANNOT_WRITE = "; can it write there? See --notebooks-folder"
IS_JSON = {"Content-Type": "application/json"}

PROXY_ERRORS = (requests.exceptions.ProxyError, websocket.WebSocketProxyException)
TLS_ERRORS = (requests.exceptions.SSLError, ssl.SSLError)
NAME_ERRORS = (socket.gaierror, websocket.WebSocketAddressException)
TIME_ERRORS = (requests.Timeout, TimeoutError, websocket.WebSocketTimeoutException)
# Why a request has no answer, by the class of the exception or of one that caused it,
# most specific first: what it is, and the cure.
NO_ANSWER: tuple[tuple[Any, str], ...] = (
    (PROXY_ERRORS, "the proxy failed: check HTTPS_PROXY and NO_PROXY"),
    (TLS_ERRORS, "TLS failure: a private CA needs --ca-bundle FILE"),
    (NAME_ERRORS, "unknown host: check the URL"),
    (ConnectionRefusedError, "refused: is the server running, and is this its port?"),
    (TIME_ERRORS, "No answer in {:g} s: overloaded, a wrong URL, or no HTTP(S) port"),
)


def no_answer(what: str, err: BaseException, timeout_s: float) -> ServerUnreachable:
    """Return one sentence for a request without an answer: the cause, the cure."""
    causes = list(chain_of(err))
    for kinds, text in NO_ANSWER:
        if any(isinstance(cause, kinds) for cause in causes):
            return ServerUnreachable(f"{what} failed: {text.format(timeout_s)}")

    # The library's own words, without the representations of its objects and newlines.
    words = " ".join(re.sub(r"<[^<>]*>|\(.*", " ", str(causes[-1])).split())
    return ServerUnreachable(f"{what} failed: {words or type(err).__name__}")


def chain_of(err: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, and those that caused it."""
    while err is not None:
        yield err
        err = err.__cause__ or err.__context__


def status_error(
    what: str, status: int, detail: str, cure: str | None = None
) -> ServerError:
    """Return one sentence for a failure that was answered; its status is its kind."""
    kind = ServerError
    if status in (401, 403):
        kind = ServerRefused
    elif status == 404:
        kind = NotFound
    elif status in (502, 503, 504):
        kind = ServerUnreachable  # A proxy or a hub answers for it.

    detail = " ".join(detail.split())[:300]
    return kind(f"{what} failed: status {status} {detail}", cure=cure, status=status)


def redirect_error(what: str, status: int, target: str) -> ServerError:
    """Return one sentence for a redirect. None is followed: the token stays here."""
    target = re.split("[?#]", target)[0]
    if "/hub/" in target:
        cure = "; start this server in the hub, or check its name"
    elif "login" in target:
        cure = "; check the token and the path of the URL"
    else:
        cure = "; give the final URL as --jupyter-base-url"

    return status_error(what, status, f"redirect to {target}", cure)


def in_thread(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call in a thread of its own, which never keeps this process alive."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # Nobody cancels it.

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as err:  # noqa: BLE001  # It reaches whoever waits.
            future.set_exception(err)

    threading.Thread(target=work, daemon=True).start()
    return future


@dataclass(frozen=True)
class KernelModel:
    """A kernel as the server knows it."""

    kernel_id: str
    name: str
    # starting, idle, busy, restarting, dead; "unknown" of gateways
    execution_state: str


def parse_kernel(model: Any) -> KernelModel:
    """Return a kernel's model.

    Raises:
        ServerError: The answer is none.
    """
    kernel_id = model.get("id") if isinstance(model, dict) else None
    if not isinstance(kernel_id, str) or not re.fullmatch(r"[\w.-]+", kernel_id):
        raise ServerError(f"The server's answer is no kernel: {model!r:.80}")

    state = str(model.get("execution_state") or "unknown")
    return KernelModel(kernel_id, str(model.get("name")), state)


def record(answer: Any) -> dict[str, Any]:
    """Return an answer that is to be an object.

    Raises:
        ServerError: It is none.
    """
    if not isinstance(answer, dict):
        raise ServerError(f"The server's answer is no object: {answer!r:.80}")
    return answer


class RemoteJupyterClient:
    """A Jupyter server over HTTP. The one object that keeps the token.

    Any thread may use it. An answer is waited for no longer than its time, also if the
    server drips bytes for ever.

    Args:
        base_url: http(s) URL, with the path if there is one (https://hub/user/NAME/).
        token: Sent in the Authorization header only. Empty for a server without one.
        ca_bundle: File or folder with the certificates to trust, for HTTPS and WSS.
        is_direct: No proxy is used, whatever the environment says.

    Raises:
        ConfigError: The URL, the token or the bundle cannot be one.
    Source: jupyter_server/services/api/api.yaml.
    """

    def __init__(
        self,
        base_url: str,
        token: str = "",
        *,
        ca_bundle: str | None = None,
        is_direct: bool = False,
    ) -> None:
        self.base_url = check_url(base_url)
        check_token(token)
        self._token = token
        if token:
            self._auth = {"Authorization": f"token {token}"}
        else:
            # A server without a token wants any equal pair: a sign that we are no page.
            self._auth = {"X-XSRFToken": "x", "Cookie": "_xsrf=x"}

        self.ca_bundle = (
            ca_bundle
            or os.environ.get("REQUESTS_CA_BUNDLE")
            or os.environ.get("CURL_CA_BUNDLE")
            or requests.adapters.DEFAULT_CA_BUNDLE_PATH
        )
        if not os.path.exists(self.ca_bundle):
            raise ConfigError(
                f"The CA bundle {self.ca_bundle!r} does not exist; check --ca-bundle"
            )

        # An adapter, not a session: no ~/.netrc, no cookies, and no redirects.
        self._http = requests.adapters.HTTPAdapter(pool_maxsize=100)
        self.proxies: dict[str, str] = {}
        if not is_direct:
            self.proxies = requests.utils.get_environ_proxies(base_url)

    def drop_connections(self) -> None:
        """Forget the connections that are kept: where one is dead, others may be."""
        self._http.close()

    def send(
        self,
        verb: str,
        url_path: str,
        *,
        headers: Mapping[str, str] = IS_JSON,
        body: Any = None,
        timeout_s: float,
        cure: str | None = None,
    ) -> requests.Response:
        """Send one request, and return its answer, whose body is still to be read.

        Args:
            url_path: Below the base URL, quoted.
            timeout_s: Of silence from the server.
            cure: What to do if the answer is a failure; by default that of its kind.

        Raises:
            ServerError: One of its kinds, or itself for a status that has none.
        """
        url = f"{self.base_url}/{url_path}"
        what = f"{verb} {url}"
        request = requests.Request(verb, url, {**self._auth, **headers}, data=body)
        try:
            response = self._http.send(
                request.prepare(),
                stream=True,
                timeout=(CONNECT_TIMEOUT_S, timeout_s),
                verify=self.ca_bundle,
                proxies=self.proxies,
            )
        except requests.RequestException as err:
            self.drop_connections()
            raise no_answer(what, err, timeout_s) from err

        log.debug("%s: %d", what, response.status_code)
        if response.is_redirect:
            target = self._without_token(response.headers["Location"])
            response.close()
            raise redirect_error(what, response.status_code, target)

        if not response.ok:
            raise self._failure(what, response, cure)

        return response

    def _failure(
        self, what: str, response: requests.Response, cure: str | None
    ) -> ServerError:
        detail = response.reason or ""
        with contextlib.suppress(ServerError, ValueError, RecursionError):
            body = read_body(response, what, LIST_BYTES, HTTP_TIMEOUT_S)
            detail = text_in(record(json.loads(body)), "message") or detail

        detail = self._without_token(clean(detail))
        return status_error(what, response.status_code, detail, cure)

    def _without_token(self, text: str) -> str:
        """Return what a server said, without our token, which it may have repeated."""
        if not self._token:
            return text
        return text.replace(self._token, "***").replace(quote(self._token), "***")

    def request(
        self,
        verb: str,
        path: str,
        body: Any = None,
        *,
        max_s: float = HTTP_TIMEOUT_S,
        max_bytes: int = LIST_BYTES,
        cure: str | None = None,
    ) -> Any:
        """Make one request to /api/PATH, and return the decoded JSON of its answer.

        Args:
            body: bytes are sent as they are, anything else as JSON.
            max_s: Seconds for all of it.

        Raises:
            ServerError: As `send`, or the answer is no JSON.
        """
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body)

        what = f"{verb} {self.base_url}/api/{path}"

        def exchange() -> bytes:
            url = f"api/{path}"
            response = self.send(verb, url, body=body, timeout_s=max_s, cure=cure)
            return read_body(response, what, max_bytes, max_s)

        # In a thread: a server that drips its header would hold us for ever.
        try:
            content = in_thread(exchange).result(max_s + CONNECT_TIMEOUT_S)
        except FutureTimeout as err:
            raise no_answer(what, TimeoutError(), max_s) from err

        if not content:
            return {}

        try:
            return json.loads(content)
        except (ValueError, RecursionError) as err:
            raise ServerError(f"{what} failed: no JSON came; {NO_JUPYTER}") from err

    def kernelspecs(self) -> dict[str, dict[str, Any]]:
        """Return the kernelspecs, by name: the cheapest request with a token.

        Raises:
            ServerError: Among its causes: this is no Jupyter server.
        """
        try:
            answer = self.request("GET", "kernelspecs")
        except NotFound as err:
            raise NotFound(f"{err}; {NO_JUPYTER}", status=404) from err

        specs = answer.get("kernelspecs") if isinstance(answer, dict) else None
        if not isinstance(specs, dict):
            raise ServerError(f"{self.base_url} answers, but {NO_JUPYTER}")

        return {name: spec for name, spec in specs.items() if isinstance(spec, dict)}

    def open_session(self, path: str, kernel_name: str) -> KernelModel:
        """Return the kernel that is bound to a notebook's path, or start it.

        Source: api.yaml, POST /api/sessions, which is idempotent by path.
        """
        body = {
            "path": path,
            "name": posixpath.basename(path),
            "type": "notebook",
            "kernel": {"name": kernel_name or None},
        }
        try:
            answer = self.request("POST", "sessions", body, max_s=KERNEL_TIMEOUT_S)
        except ServerError as err:
            if err.status != 500:
                raise

            text = f"{err}; the kernel did not start, see the server's log"
            raise ServerError(text, status=500) from err

        return parse_kernel(record(answer).get("kernel"))

    def bound_kernels(self) -> dict[str, KernelModel]:
        """Return the kernels that are bound to a path, by that path; of two the first.

        That is the one which `open_session` returns from then on.
        """
        answer = self.request("GET", "sessions")
        kernels: dict[str, KernelModel] = {}
        for each in answer if isinstance(answer, list) else []:
            with contextlib.suppress(ServerError, AttributeError):
                # Gateways have the older form, a notebook with a path.
                path = each.get("path") or each.get("notebook", {}).get("path")
                kernels.setdefault(str(path), parse_kernel(each.get("kernel")))
        return kernels

    def kernel(self, kernel_id: str) -> KernelModel:
        """Return a kernel's model; NotFound if there is no such kernel."""
        return parse_kernel(self.request("GET", f"kernels/{kernel_id}", max_s=5.0))

    def command(self, kernel_id: str, name: str, max_s: float = 5.0) -> None:
        """Have the server "interrupt" or "restart" a kernel, and wait until it did."""
        self.request("POST", f"kernels/{kernel_id}/{name}", max_s=max_s)

    def delete(self, kernel_id: str) -> None:
        self.request("DELETE", f"kernels/{kernel_id}", max_s=10.0)

    def modified(self, path: str) -> str | None:
        """Return when a file was last changed, as the server says; None without it."""
        try:
            url = f"contents/{quote(path)}?content=0"
            model = record(self.request("GET", url, max_s=5.0))
            return str(model.get("last_modified"))
        except NotFound:
            return None

    def read(self, path: str) -> tuple[str, str]:
        """Return a text file and its last_modified."""
        url = f"contents/{quote(path)}?type=file&format=text"
        model = record(self.request("GET", url, max_bytes=ANSWER_BYTES))
        if not isinstance(model.get("content"), str):
            raise ServerError(f"GET {self.base_url}/api/{url} failed: it has no text")
        return model["content"], str(model.get("last_modified"))

    def write(self, path: str, escaped: Iterable[bytes]) -> tuple[str, int | None]:
        """Write a text file, given in pieces of the inside of a JSON string.

        Returns: last_modified and size of what is there afterwards.
        """
        start = b'{"type":"file","format":"text","content":"'
        body = b"".join([start, *escaped, b'"}'])
        url = f"contents/{quote(path)}"
        model = record(self.request("PUT", url, body, cure=CANNOT_WRITE))
        size = model.get("size")
        if not isinstance(size, int):
            size = None  # Older servers do not tell.

        return str(model.get("last_modified")), size

    def make_folder(self, folder: str) -> None:
        """Create a folder and those above it; one that exists stays as it is."""
        for part in re.finditer(r"[^/]+", folder):
            path = quote(folder[: part.end()])
            body = {"type": "directory"}
            try:
                self.request("PUT", f"contents/{path}", body, cure=CANNOT_WRITE)
            except ServerError as err:
                if err.status != 500:
                    raise
                # Somebody else created it at the same moment.
                self.request("PUT", f"contents/{path}", body, cure=CANNOT_WRITE)

    def list_folder(self, folder: str) -> list[dict[str, Any]]:
        """Return the models of what is in a folder: name, last_modified, type, size."""
        answer = self.request("GET", f"contents/{quote(folder)}?type=directory")
        content = record(answer).get("content")
        if not isinstance(content, list):
            return []
        return [model for model in content if isinstance(model, dict)]

    def open_websocket(
        self, kernel_id: str, name: str, timeout_s: float
    ) -> websocket.WebSocket:
        """Open a kernel's channels. No redirect is followed: the token stays here.

        Args:
            name: By which the server knows the websocket when it comes again.

        Raises:
            NotFound: No such kernel. ServerRefused: The token.
            ServerUnreachable: Anything else.
        """
        path = f"api/kernels/{kernel_id}/channels?session_id={name}"
        url = f"ws{self.base_url[4:]}/{path}"
        what = f"The websocket to the kernel at {url}"
        bundle = "ca_certs"
        if os.path.isdir(self.ca_bundle):
            bundle = "ca_cert_path"

        # The proxy that `requests` uses; if none, a host that is never used, so that
        # the library does not look into the environment by itself.
        via = requests.utils.select_proxy(self.base_url, self.proxies) or ""
        proxy = urlsplit(via)

        try:
            return websocket.create_connection(
                url,
                timeout_s,
                # The protocol as a plain header: the library would refuse a server that
                # knows none, and a second handshake behind a gateway costs the replay.
                header={**self._auth, "Sec-WebSocket-Protocol": SUBPROTOCOL},
                sslopt={bundle: self.ca_bundle},
                redirect_limit=0,
                skip_utf8_validation=True,
                suppress_origin=True,
                http_proxy_host=proxy.hostname or "-",
                http_proxy_port=proxy.port or 80,
                http_proxy_auth=requests.utils.get_auth_from_url(via),
                # What is reached without the proxy: every host if there is none, else
                # no host, as none is called like the proxy's URL.
                http_no_proxy=[via or "*"],
            )
        except websocket.WebSocketBadStatusException as err:
            raise status_error(what, err.status_code or 0, "in the handshake") from err
        except (websocket.WebSocketException, OSError) as err:
            raise no_answer(what, err, timeout_s) from err


def read_body(
    response: requests.Response, what: str, max_bytes: int, max_s: float
) -> bytes:
    """Read the body of an answer, which is neither larger nor slower than it may be.

    Raises:
        ServerError: It is. ServerUnreachable: It broke off.
    """
    deadline = time.monotonic() + max_s
    pieces = []
    size = 0
    try:
        with response:
            for piece in response.iter_content(PIECE_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > max_bytes:
                    text = f"{what} failed: its answer has no end; {NO_JUPYTER}"
                    raise ServerError(text)
                if time.monotonic() > deadline:
                    raise TimeoutError
    except (requests.RequestException, OSError) as err:
        raise no_answer(what, err, max_s) from err

    return b"".join(pieces)


# --- Channel --------------------------------------------------------------------------


TOO_LARGE = (
    "The code has {:,} bytes as it travels, and servers take up to {:,}: write data to "
    "a file in parts, or upload it"
)


AGAIN = "-again"  # Ends the client session of what a restore sends.


class Channel:
    """One websocket to a kernel. It breaks, and comes back under the same name.

    The server keeps what a kernel says while the websocket of a name is away, and gives
    it to the next one of that name: nothing is lost. One thread uses a channel.
    """

    def __init__(self, client: RemoteJupyterClient, kernel_id: str) -> None:
        self._client = client
        self._kernel_id = kernel_id
        # In the header of each request of ours,
        self.client_session_id = f"{PROGRAM}-{secrets.token_hex(16)}"
        # with AGAIN behind it during a restore, which other processes see by that.
        self.is_restoring = False
        # By which the server knows the websocket.
        self.name = self.client_session_id
        self._ws: websocket.WebSocket | None = None
        # Whether frames are binary, as the server chose.
        self.is_binary = False
        # When the last message came, or was sent.
        self.heard_at = time.monotonic()
        # How many pieces of an unfinished message are here.
        self._pieces = 0

    @property
    def is_open(self) -> bool:
        return self._ws is not None

    def rename(self) -> None:
        """Come back as somebody else: what the server keeps for us is given up.

        It may have kept the channels of a websocket that it closed after we had opened
        a newer one; they are dead, and it hands them out as long as we keep our name.
        """
        self.name += "-"

    def is_servers_own(self, message: Message) -> bool:
        """Return whether the server made a message: it numbers its own by our name."""
        return message.msg_id.startswith(f"{self.name}_")

    def connect(self, meanwhile: Callable[[], None], timeout_s: float) -> None:
        """Open the websocket. The server answers when the kernel is up.

        Args:
            meanwhile: Called at least every TICK_S; may raise.
            timeout_s: Of silence from the server.

        Raises:
            NotFound: No such kernel. ServerError: As `open_websocket`.
        """
        attempt = in_thread(
            self._client.open_websocket, self._kernel_id, self.name, timeout_s
        )
        deadline = time.monotonic() + timeout_s + CONNECT_TIMEOUT_S
        try:
            while not attempt.done() and time.monotonic() < deadline:
                meanwhile()
                wait([attempt], TICK_S)
            self._ws = attempt.result(0)
        except FutureTimeout as err:
            raise no_answer("The websocket", TimeoutError(), timeout_s) from err
        finally:
            if self._ws is None:
                attempt.add_done_callback(close_late)

        headers = self._ws.getheaders() or {}
        self.is_binary = headers.get("sec-websocket-protocol") == SUBPROTOCOL
        self.heard_at = time.monotonic()

    def send(self, msg_type: str, msg_id: str, content: Any) -> None:
        """Send a request on the shell channel; a failure is said by the next `read`.

        Raises:
            ProtocolError: It is larger than servers take.
        """
        session = self.client_session_id
        if self.is_restoring:
            session += AGAIN
        frame = encode(msg_type, msg_id, session, content, is_binary=self.is_binary)
        if len(frame) > FRAME_BYTES:
            raise ProtocolError(TOO_LARGE.format(len(frame), FRAME_BYTES))
        opcode = websocket.ABNF.OPCODE_TEXT
        if self.is_binary:
            opcode = websocket.ABNF.OPCODE_BINARY
        self._transmit(frame, opcode)
        self.heard_at = time.monotonic()

    def read(self, timeout_s: float) -> Message | None:
        """Read one message, if one comes in time.

        Raises:
            ConnectionLost: The websocket broke. ProtocolError: It is no message.
        """
        if self._ws is None:
            raise ConnectionLost("The websocket broke")

        try:
            self._ws.settimeout(timeout_s)
            opcode, frame = self._ws.recv_data()
        except (
            websocket.WebSocketTimeoutException,
            BlockingIOError,
            ssl.SSLWantReadError,
        ):
            # A large message which still comes is no silence.
            pieces = len(self._ws.frame_buffer.recv_buffer)
            if pieces > self._pieces:
                self.heard_at = time.monotonic()
            self._pieces = pieces
            return None
        except (websocket.WebSocketException, OSError) as err:
            self.drop()
            raise ConnectionLost(f"The websocket broke ({err})") from err

        if opcode == websocket.ABNF.OPCODE_CLOSE:
            self.drop()
            raise ConnectionLost("The websocket was closed by the server")

        # The server leaves Nagle's algorithm on: each small frame waits until the one
        # before it is acknowledged, and a receiver delays a bare acknowledgement by 40
        # ms. Any frame of ours carries it at once; a Pong needs no answer (RFC 6455,
        # section 5.5.3). A small call takes 5 instead of 45 ms.
        self._transmit(b"", websocket.ABNF.OPCODE_PONG, is_needed=False)
        self.heard_at = time.monotonic()
        self._pieces = 0
        return decode(frame, is_binary=self.is_binary)

    def _transmit(self, frame: bytes, opcode: int, *, is_needed: bool = True) -> None:
        if self._ws is None:
            return
        try:
            self._ws.settimeout(HTTP_TIMEOUT_S)
            self._ws.send(frame, opcode)
        except (websocket.WebSocketException, OSError) as err:
            # What came before the break can still be read. But never half a frame, then
            # another.
            is_half = isinstance(err, websocket.WebSocketTimeoutException)
            if is_needed or is_half:
                self.drop()

    def close(self) -> list[Message]:
        """Close so that nothing is lost: send Close, then read to the server's Close.

        Returns: What came last.
        """
        # 1000: normal closure.
        self._transmit(b"\x03\xe8", websocket.ABNF.OPCODE_CLOSE)
        messages = []
        deadline = time.monotonic() + SILENCE_S
        with contextlib.suppress(ConnectionLost):
            while self.is_open and time.monotonic() < deadline:
                with contextlib.suppress(ProtocolError):
                    message = self.read(FRESH_S)
                    if message is None:
                        break

                    messages.append(message)

        self.drop()
        return messages

    def drop(self) -> None:
        """Let go of the websocket as it is."""
        if self._ws is not None:
            self._ws.shutdown()  # type: ignore[no-untyped-call]  # It has no types.
        self._ws = None


def give_memory_back() -> None:
    """Have glibc give large pieces of memory back: it keeps 50 MB after a large print.

    websocket-client reads in pieces of 16 kB. Other C libraries have no such option.
    """
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).mallopt(-3, 16_384)  # M_MMAP_THRESHOLD


def close_late(attempt: Future[websocket.WebSocket]) -> None:
    """Close a websocket that opened after nobody waited for it any more."""
    if attempt.exception() is None:
        attempt.result().shutdown()  # type: ignore[no-untyped-call]  # It has no types.


# --- Kernel ---------------------------------------------------------------------------

ENDED_AS_ASKED = "The kernel was ended as asked."
ENDED_BY_SOMEBODY = "The kernel was shut down or restarted by somebody."
DIED = "The kernel died: it crashed, ran out of memory or was killed."
CANNOT_START = (
    "The kernel does not start, the server gave it up. Call again: that starts another "
    "one; if that fails, too, see the server's log: the command of its kernelspec may "
    "lack its package (ipykernel)"
)
KERNEL_GONE = "The kernel is gone: it was shut down, or culled when it was idle."
# ipykernel's msg_id: KERNEL-SESSION_PID_NUMBER
NUMBERED = re.compile(r"(.+)_(\d{1,18})")


class KernelState(str, Enum):
    """What a kernel holds of its session; the helper in the kernel keeps it."""

    FRESH = "fresh"  # Nothing ran here.
    USED = "used"  # Somebody else ran something here first.
    RESTORING = "restoring"  # A restore was begun here, and is not finished.
    RESTORED = "restored"  # It is finished, and perhaps nobody was told.
    READY = "ready"  # As the session's user expects it.


# Takes an output, and whether it is late: of code that is not waited for any more.
Hear = Callable[[OutputEvent, bool], None]


def ignore(event: OutputEvent, is_late: bool) -> None:
    """Hear nothing: what a restore prints has been seen before."""


class Gaps:
    """Counts the messages that ZeroMQ dropped on their way to a busy server.

    ipykernel numbers all that it sends. What it answers to others does not come here;
    but one "busy" for each request of theirs does.
    """

    def __init__(self) -> None:
        self.missing = 0
        # The number that comes next, by who gave it.
        self._expected: dict[str, int] = {}

    def restart(self) -> None:
        """Begin anew, on a new connection."""
        self._expected = {}

    def note(self, message: Message, *, is_ours: bool) -> None:
        match = NUMBERED.fullmatch(message.msg_id)
        if match is None:
            return

        sender = match[1]
        number = int(match[2])
        self.missing += number - self._expected.get(sender, number)
        if message.execution_state == "busy" and not is_ours:
            self.missing -= 1

        self._expected[sender] = number + 1


class Kernel:
    """One kernel over one channel. One thread uses it.

    Requests are sent once, whatever happens. The kernel takes one after the other, so
    when a request seems to be lost, a *probe* is sent behind it, a harmless one: once
    the probe is answered, nothing more comes for the request before it.

    Args:
        tick: Called while waiting, at least every TICK_S; may raise.
    """

    def __init__(
        self, client: RemoteJupyterClient, kernel_id: str, tick: Callable[[], None]
    ) -> None:
        self.client = client
        self.kernel_id = kernel_id
        self.channel = Channel(client, kernel_id)
        self._tick = tick
        self._made_at = time.monotonic()
        # Why its state is gone; "" while it is not. Any thread may write it.
        self.lost = ""
        # A caller asked for its end. Any thread may write it.
        self.was_asked_to_end = False
        # It is IPython, so the helper runs in it.
        self.has_helper = False
        self.language_info: dict[str, Any] = {}
        # It answered once: it does not start any more.
        self.has_greeted = False
        # Connected, and in the state that its user expects.
        self.is_ready = False
        # Nothing answered a request of ours since we connected again.
        self._is_deaf = False
        # What the server last said that it does, and when it was asked.
        self._server_state = ""
        self._asked_at = 0.0
        # Since when it does not answer; None: it does.
        self._away_since: float | None = None
        self._execution_count = 0
        # How the client sessions begin whose output is ours.
        self._ours = self.channel.client_session_id
        # When another process was last heard to restore the session here.
        self._other_restored_at = -math.inf
        self.gaps = Gaps()
        # Those that have not ended, by msg_id.
        self.requests: dict[str, Request] = {}

    # Connecting

    def _open(self, *, again: bool = False) -> None:
        """Connect; `again`: and go on trying.

        Raises:
            KernelDied: It is gone, or does not start. ServerError: No connection.
        """
        self.gaps.restart()
        # The server answers when the kernel is up. One that is up answers at once.
        timeout_s = LOST_S if self.has_greeted else STARTS_S
        deadline = time.monotonic() + max(timeout_s, KERNEL_TIMEOUT_S)
        while not self.channel.is_open:
            begun = time.monotonic()
            try:
                self.channel.connect(self._while_connecting, timeout_s)
            except NotFound as err:
                raise self._gone(KERNEL_GONE) from err
            except ServerUnreachable as err:
                is_late = time.monotonic() - begun > timeout_s
                may_retry = again or (is_late and self.has_greeted)
                if not may_retry or time.monotonic() > deadline:
                    text = f"{err}; what ran may go on"
                    raise ServerUnreachable(text, cure="") from err

                if is_late and self._may_rename():
                    self.channel.rename()
                self._look_up()
                time.sleep(RETRY_S)

    def _while_connecting(self) -> None:
        self._look_up()
        self._ask_server()

    def _reconnect(self, request: Request, hear: Hear) -> Request:
        """Connect again as the same client, and send a probe."""
        self._hear_last(request, hear)
        # The server has to notice, to keep what is said; and a proxy may accept, and
        # break the connection at once.
        time.sleep(RETRY_S)
        self._open(again=True)
        self._is_deaf = True
        return self.probe()

    def _may_rename(self) -> bool:
        """Return whether nothing that is kept for us would be lost by another name."""
        is_waited_for = any(not each.is_harmless for each in self.requests.values())
        return self._server_state == "idle" or not is_waited_for

    def _hear_last(self, request: Request | None, hear: Hear) -> None:
        """Close the channel; what came last on it is heard."""
        for message in self.channel.close():
            with contextlib.suppress(ProtocolError):
                self._take(message, request, hear)

    def close(self, hear: Hear) -> None:
        """Close the channel; what comes last is heard."""
        self.is_ready = False
        for message in self.channel.close():
            with contextlib.suppress(KernelDied, ProtocolError):
                self._take(message, None, hear)

    def greet(self, mark: KernelState, hear: Hear) -> KernelState:
        """Connect, and learn language and state; install the helper if it is IPython.

        Output that other processes of our kind caused is heard meanwhile: they may have
        ended while their code goes on, and nobody else would collect it.

        Args:
            mark: What the state of a fresh kernel is from now on.
        Returns: The state before.

        Raises:
            What `_open` and `wait` do.
        """
        self.is_ready = False
        self._ours = PROGRAM
        self._hear_last(None, hear)
        self._open()
        info = self.send("kernel_info_request", {}, is_harmless=True)
        info.is_idle = True  # It can say so before anybody listens.
        reply = self.wait(info, hear)
        self.language_info = reply.language_info
        self.has_helper = reply.implementation == "ipython"
        self.has_greeted = True

        state = self.ask_state(mark, hear)
        self._ours = self.channel.client_session_id
        return state

    def ask_state(self, mark: KernelState, hear: Hear) -> KernelState:
        """Return the state, which then is `mark` if nothing of ours was there."""
        greeting = self.probe(mark)
        self.wait(greeting, hear)
        if not self.has_helper and not self._execution_count:
            return KernelState.FRESH  # Others tell no more than how much they ran.

        with contextlib.suppress(ValueError):
            return KernelState(greeting.answer.get("state"))
        return KernelState.READY  # A helper newer than this file.

    def is_restored_by_another(self, hear: Hear) -> bool:
        """Return whether another process goes on with a restore that it began."""
        asked_at = time.monotonic()
        while self._other_restored_at < asked_at:
            self._look_up()
            self._read(TICK_S, None, hear)
            if time.monotonic() - asked_at > SILENCE_S:
                return False
        return True

    # Sending

    def send(self, msg_type: str, content: Any, *, is_harmless: bool) -> Request:
        """Send one request on the shell channel: once, whatever happens."""
        request = Request(is_harmless=is_harmless)
        self.channel.send(msg_type, request.msg_id, content)
        self.requests[request.msg_id] = request
        return request

    def execute(
        self, code: str, *, store_history: bool = True, is_harmless: bool = False
    ) -> Request:
        """Send one execute_request, a harmless one as a silent one.

        Source: Messaging in Jupyter, "Execute".
        """
        content = {
            "code": code,
            "silent": is_harmless,
            "store_history": store_history and not is_harmless,
            "allow_stdin": False,
            "stop_on_error": False,
        }
        return self.send("execute_request", content, is_harmless=is_harmless)

    def probe(self, mark: KernelState | None = None) -> Request:
        """Send what tells the kernel's state, which then is `mark`, if one is given."""
        code = ""
        if self.has_helper:
            value = mark.value if mark is not None else None
            code = install_code() + call_code(f"hello({value!r})")
        return self.execute(code, is_harmless=True)

    def ask(self, expression: str) -> dict[str, Any]:
        """Call the helper in the kernel, without a trace, and return its answer."""
        request = self.execute(call_code(expression), is_harmless=True)
        self.wait(request, ignore)
        return request.answer

    # Waiting

    def wait(self, request: Request, hear: Hear) -> Reply:
        """Read until a request has ended, and return its reply.

        A request that has its reply by then, but is not idle, lost some of its output:
        ZeroMQ drops what a server that is too busy does not take.

        Args:
            hear: Takes the output that comes; of other requests of ours as late.

        Raises:
            KernelDied: Its state is gone. ConnectionLost: The reply was missed.
            NotTaken: The request never began.
            ServerUnreachable: No connection within KERNEL_TIMEOUT_S.
        Source: Messaging in Jupyter, "Execution results", "Kernel status".
        """
        probe: Request | None = None
        while not request.has_ended:
            self._look_up()
            if probe is not None and probe.has_ended:
                self._judge(request, probe)
                break

            try:
                came = self._read(TICK_S, request, hear)
                if not came and self._is_silent_too_long(request, probe):
                    probe = self._next_probe(probe)
            except ConnectionLost:
                probe = self._reconnect(request, hear)

        reply = request.reply or Reply()
        if reply.execution_count is not None:
            self._execution_count = reply.execution_count

        return reply

    def _next_probe(self, probe: Request | None) -> Request:
        """Ask a kernel that was silent for too long.

        Raises:
            ConnectionLost: It was asked, and does not answer: connect again.
        """
        if probe is None:
            return self.probe()

        if probe.is_idle:
            # A kernel that never replies: that it is idle must do.
            probe.reply = Reply(execution_count=self._execution_count)
            return probe

        if self._is_deaf and self._may_rename():
            self.channel.rename()
        raise ConnectionLost("The kernel does not answer")

    def _read(self, timeout_s: float, request: Request | None, hear: Hear) -> bool:
        """Take one message, if one comes in time; a malformed one is just logged."""
        try:
            message = self.channel.read(timeout_s)
            if message is None:
                return False
            self._take(message, request, hear)
        except ProtocolError as err:
            log.warning("Kernel %s: left out: %s", self.kernel_id, err)
        return True

    def _take(self, message: Message, request: Request | None, hear: Hear) -> None:
        """Sort one message; nothing waits in here.

        Raises:
            KernelDied: It says so.
        """
        self._raise_if_it_ends(message)
        answered = self.requests.get(message.parent_msg_id)
        if answered is not None:
            self._is_deaf = False
            answered.note(message)
            if answered.has_ended:
                del self.requests[answered.msg_id]

        if self.has_helper:
            self.gaps.note(message, is_ours=answered is not None)

        # A person may work here, too: what they caused is not ours.
        if message.channel != "iopub":
            return
        session = message.parent_session
        is_own = session.startswith(self.channel.client_session_id)
        if session.endswith(AGAIN) and not is_own:
            # Another process restores: what that prints has been seen before.
            self._other_restored_at = time.monotonic()
            return
        if not session.startswith(self._ours):
            return
        if answered is not None and answered.is_harmless:
            return  # Of a probe: it says nothing, but for its own interrupt.

        is_servers_own = self.channel.is_servers_own(message)
        event = parse_output(
            message.msg_type, message.content, is_from_server=is_servers_own
        )
        if event is not None:
            is_late = request is None or message.parent_msg_id != request.msg_id
            hear(event, is_late)

    # Is it still there?
    #
    # From here to the end of the class stands all that decides whether the kernel, with
    # its variables, is still there. It raises KernelDied; `Worker._forget` then lets go
    # of the kernel. The signs:
    #
    #   a caller had it ended                   `lost`, in `_look_up`
    #   it says so, or the server               a message, in `_raise_if_it_ends`
    #   the server has it no more, gave it      a question after a silence, in
    #   up, or has it starting for too long     `_ask_server`, `_is_silent_too_long`;
    #                                           a handshake, in `_open`
    #   its state is lost, its count fell back  the answer to a probe, in `_judge`
    #
    # The worker has two more: `Worker._end_kernel` (its code asked for its end) and
    # `Worker._take_kernel` (the session has another kernel now).
    #
    # What can be missed, and when:
    #
    #   The message: while no websocket is open, or if the kernel cannot send it, as a
    #   hung one that a restart kills. The server goes on with the same id, so only a
    #   probe tells. `check` sends one before each cell, unless an IPython kernel spoke
    #   within FRESH_S. Code that is sent after such a restart without a probe runs in
    #   the new kernel, and only the next probe tells.
    #   The server's word: where a gateway forbids to ask. No silence is too long there.
    #   The state: if another process of our kind brought the new kernel up; kernels of
    #   other languages have none. Then the count decides.
    #   The count: if as much or more has run in the new kernel since.
    #
    # What a caller is told when the websocket breaks after a request was sent: nothing
    # of it, if `wait` can connect again and the server kept what was said. If it cannot
    # connect within KERNEL_TIMEOUT_S, that what ran may go on. Else what `_judge` says:
    # that the code has ended, that it is not known whether it began, or that the kernel
    # had not taken it ("Not run").
    #
    # Only the last invites to send the code again, so code runs twice if it is wrong:
    # if all that the kernel said of the code is lost, and the kernel did not count the
    # code (some never count; none counts a script that the helper runs), and does not
    # name it as the last script (another process of our kind ran one since). Apart from
    # that code runs again in a restore only (`plan_restore`).

    def check(self, hear: Hear) -> None:
        """Before code is sent: hear what came meanwhile; is the kernel there?

        A laptop that slept has a dead websocket, and kernels of other languages do not
        tell that they were restarted.

        Raises:
            ConnectionLost, KernelDied.
        """
        while self._read(0.0, None, hear):
            pass

        silent_s = time.monotonic() - self.channel.heard_at
        if self.has_helper and silent_s < FRESH_S:
            return

        probe = self.probe()
        while not probe.has_ended and self._read(SILENCE_S, None, hear):
            pass

        self._judge(probe, probe)

    def _look_up(self) -> None:
        self._tick()
        if self.lost:
            raise KernelDied(self.lost)

    def _raise_if_it_ends(self, message: Message) -> None:
        """Raise KernelDied if a message says that the kernel ends, or has ended."""
        state = message.execution_state
        if not message.parent_msg_id and state in ("restarting", "dead"):
            raise KernelDied(DIED)

        if message.msg_type != "shutdown_reply":
            return
        if self.was_asked_to_end:
            raise KernelDied(ENDED_AS_ASKED)
        raise KernelDied(ENDED_BY_SOMEBODY)

    def _ask_server(self) -> bool:
        """After a silence, ask the server what the kernel does; return if it said so.

        Raises:
            KernelDied: There is no such kernel, or the server gave it up.
            ServerUnreachable: No answer for KERNEL_TIMEOUT_S.
        """
        now_s = time.monotonic()
        if now_s - self.channel.heard_at < SILENCE_S:
            self._away_since = None
            return False
        if now_s - self._asked_at < SILENCE_S:
            return False

        try:
            self._server_state = self.client.kernel(self.kernel_id).execution_state
        except NotFound as err:
            raise self._gone(KERNEL_GONE) from err
        except ServerUnreachable:
            self._away_since = self._away_since or now_s
            if now_s - self._away_since > KERNEL_TIMEOUT_S:
                raise

            return False  # It is away for the moment.
        except ServerError:
            return False  # Some gateways never tell.
        finally:
            self._asked_at = time.monotonic()

        self._away_since = None
        if self._server_state == "dead":
            raise self._gone("The kernel died and could not be restarted.")
        return True

    def _gone(self, why: str) -> KernelDied:
        """Return that the server has the kernel no more, and `why`, if it was up."""
        if self.has_greeted:
            return KernelDied(why)
        return CannotStart(CANNOT_START)

    def _is_silent_too_long(self, request: Request, probe: Request | None) -> bool:
        """Return whether the kernel was silent for longer than is normal.

        Raises:
            KernelDied: There is no such kernel, or it does not start.
            ServerUnreachable: No answer for KERNEL_TIMEOUT_S.
        """
        if not self._ask_server():
            return False

        now_s = time.monotonic()
        is_overdue = now_s - self._made_at > STARTS_S
        if self._server_state == "starting" and not request.was_heard and is_overdue:
            if self.has_greeted:
                raise KernelDied("The kernel was restarted.")
            raise KernelDied("The kernel hangs: it did not start in 5 minutes.")

        silent_s = now_s - self.channel.heard_at
        return silent_s > self._patience_s(request, probe)

    def _patience_s(self, request: Request, probe: Request | None) -> float:
        """Return how many seconds of silence are normal, after what the server says."""
        if not self.has_greeted:
            return STARTS_S  # It starts; after a restart the server calls it idle.
        if self._server_state == "idle":
            return SILENCE_S

        # The server never learns that a kernel that died is not busy any more, so
        # "busy" counts only as far as the kernel itself said so, or was asked.
        runs_ours = request.was_heard and request.reply is None
        was_asked = probe is not None
        if runs_ours and was_asked:
            return math.inf
        if runs_ours or was_asked:
            return LOST_S

        return SILENCE_S

    def _judge(self, request: Request, probe: Request) -> None:
        """Raise what the answer to a probe says of the request that was sent before it.

        Raises:
            KernelDied: The kernel was restarted.
            NotTaken: The request never began. ConnectionLost: Its reply was missed.
        """
        count = self._execution_count
        if probe.reply is not None and probe.reply.execution_count is not None:
            count = probe.reply.execution_count

        is_new = probe.answer.get("state") in (KernelState.FRESH, KernelState.USED)
        if is_new or count < self._execution_count:
            raise KernelDied("The kernel was restarted.")

        somebody_ran = count > self._execution_count
        self._execution_count = count
        if request.reply is not None:
            return  # Only output is missing.
        # Nothing comes for it any more.
        self.requests.pop(request.msg_id, None)
        if probe.answer.get("last") == request.msg_id:
            request.was_heard = True

        if request.was_heard:
            raise ConnectionLost(
                "The connection broke: the code has ended, but output is missing and "
                "whether it failed is not known"
            )

        if somebody_ran:
            raise ConnectionLost(
                "The connection broke: whether the code began is not known, output may "
                "be missing; look at what it should have done before it is sent again"
            )

        raise NotTaken(
            "The connection broke: the kernel had not taken the code. Call again"
        )


# --- Runs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hints:
    """What can be done next, in words that are true for the one who reads them."""

    wait: str
    stop: str
    restart: str = "restarting its kernel in JupyterLab stops it"


TOOL_HINTS = Hints(
    wait='execute_code with code="" and session_id={session_id} waits for the rest',
    stop="interrupt_execution with session_id={session_id} stops it",
    restart="interrupt_execution with session_id={session_id} and restart=True "
    "restarts the kernel and restores the session",
)


@dataclass(frozen=True)
class Settings:
    """How an interpreter works.

    Attributes:
        folder: Of the notebooks, on the server: relative to its root, or absolute.
        kernel_name: Of new sessions; "" is the server's default.
        max_output: Characters of the text of one result, as it is encoded.
        restore_limit_s: Of the cells that run again by themselves; 0 is none.
        files_dir: On this machine, for uploads and downloads; None: there are none.
        is_one_shot: A person at a terminal runs one cell (--execute), not a model.
        hints: In the messages, what to do next.
        signing_key: Of the cells, under --local; None: they are not signed.
    """

    folder: str = "notebooks"
    kernel_name: str = ""
    timeout_s: float = 50.0
    max_output: int = 20_000
    restore_limit_s: float = 60.0
    is_plain: bool = False
    files_dir: Path | None = None
    is_local: bool = False
    is_one_shot: bool = False
    hints: Hints = TOOL_HINTS
    signing_key: bytes | None = field(default=None, repr=False)


class Stage(str, Enum):
    """Where a run is; the values are what users read.

    WAITING -> CONNECTING -> STARTING | QUEUED -> RESTORING -> RUNNING -> SAVING
    -> ENDED; each may be left out, and a run that nobody wants ends at once.
    """

    WAITING = "waiting for its turn"
    CONNECTING = "connecting to the kernel"
    STARTING = "the kernel is starting"
    QUEUED = "waiting for the kernel, which other code keeps busy"
    RESTORING = "restoring the session"
    RUNNING = "running"
    SAVING = "saving"
    ENDED = "ended"


BEFORE_RUNNING = frozenset(
    {Stage.WAITING, Stage.CONNECTING, Stage.STARTING, Stage.QUEUED}
)


class Outcome(str, Enum):
    """How a run ended; the value stands in the metadata of its cell."""

    ENDED_WELL = "ended well"
    FAILED = "failed"  # it raised, or ended with an exit status
    KILLED = "killed its kernel"
    UNKNOWN = "outcome unknown"  # whether it began, or how it ended
    NEVER_RAN = "never ran"


def outcome_of_failure(err: Exception, request: Request | None) -> Outcome:
    """Return how a run ended that was cut short by an exception of ours."""
    if request is None or isinstance(err, NotTaken):
        return Outcome.NEVER_RAN
    if isinstance(err, KernelDied) and request.was_heard:
        return Outcome.KILLED
    return Outcome.UNKNOWN


class Run:
    """One call's code on its way. It may outlive its call.

    The worker's thread fills it, callers take from it. `lock`, the session's, guards
    outputs, notes, errors and how it ends.
    """

    def __init__(self, code: str, lock: threading.Condition) -> None:
        self.code = code
        self.lock = lock
        self.stage = Stage.WAITING
        # More about the stage: which cell a restore is at.
        self.step = ""
        self.outcome: Outcome | None = None
        # The newest request that carries the code; None: nothing was sent.
        self.request: Request | None = None
        # What the code said, and what earlier code said meanwhile.
        self.outputs = Outputs()
        self.late = Outputs()
        # For the result: before the output, and as errors.
        self.notes: list[str] = []
        self.errors: list[str] = []
        # Nobody wants it: it is not begun, or interrupted if it runs.
        self.is_withdrawn = False
        # Nor does anybody want to know.
        self.is_unwanted = False
        # The worker interrupts the kernel as soon as it has taken the code.
        self.must_interrupt = False
        # Its call returned before it ended: the next call collects it.
        self.is_abandoned = False
        # It ended, and all of it was taken.
        self.is_collected = False
        # That the cell failed was told in `error`.
        self.error_was_told = False
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # Nobody cancels it.

        # The cell in the notebook.
        self.cell_id = secrets.token_hex(6)
        self.source = code
        self.execution_count: int | None = None
        # The working directories in which it began and ended.
        self.folder = ""
        self.ended_in = ""
        self.timing: dict[str, str] = {}
        self.save_at = time.monotonic() + SAVE_EVERY_S

    @property
    def only_waits(self) -> bool:
        """Without code: it waits for what runs, and takes the rest of its output."""
        return not self.code.strip()

    @property
    def words(self) -> str:
        """Where it is, for users."""
        if self.step:
            return f"{self.stage.value}, {self.step}"
        return self.stage.value

    def hear(self, event: OutputEvent, is_late: bool) -> None:
        """Take an output; late ones are of code that ran before."""
        with self.lock:
            if is_late:
                self.late.add(event)
            else:
                self.outputs.add(event)

    def take_errors(self) -> list[str]:
        """Return what is for `error` and was not told yet; the lock is held."""
        errors = self.errors
        self.errors = []
        error = self.outputs.error
        if error is not None and not self.error_was_told:
            errors.insert(0, error_text(error))
            self.error_was_told = True

        if self.outputs.lost:
            errors.append(self.outputs.lost)
            self.outputs.lost = ""

        return errors

    def note(self, text: str) -> None:
        with self.lock:
            self.notes.append(text)

    def note_loss(self, text: str) -> None:
        """Note that output is missing, unless the server said so and why."""
        with self.lock:
            self.outputs.lost = self.outputs.lost or text

    def fail(self, text: str) -> None:
        with self.lock:
            self.errors.append(text)

    def finish(self, outcome: Outcome) -> None:
        """Say how it ended, once; whoever waits goes on."""
        with self.lock:
            self.stage = Stage.ENDED
            if self.outcome is None:
                self.outcome = outcome
            if not self.ended.done():
                self.ended.set_result(None)

    def withdraw(self, text: str | None) -> bool:
        """Nobody wants it any more: it never begins, or is interrupted.

        Args:
            text: What its call is told if it never begins; None: nobody waits.
        Returns: Whether it ended so, and never runs.
        """
        with self.lock:
            self.is_withdrawn = True
            self.is_unwanted = text is None
            if self.stage not in BEFORE_RUNNING:
                self.must_interrupt = True
                return False

            if text is not None and self.outcome is None:
                self.errors.append(text)
            self.outcome = Outcome.NEVER_RAN
            if self.only_waits:
                self.outcome = Outcome.ENDED_WELL  # There is no code that did not run.
            if not self.ended.done():
                self.ended.set_result(None)
            return True

    def newest_line(self) -> str:
        """The newest line of output, or where it is; for progress."""
        with self.lock:
            return self.outputs.last_line() or self.words


STILL = "Still running after {:g} s (now {}); nothing is lost. {}, {}"
NOT_RUN = (
    "Not run: earlier code was still running after {:g} s. {}, {}; then send it again"
)
TOO_LATE = "Not run: {:g} s were over before the code could begin (then: {})"


@dataclass(frozen=True)
class Taken:
    """What a call takes of one run; it is rendered later, outside the lock."""

    mark: str  # Before each text: "" for the call's own run.
    notes: list[str]
    late: list[dict[str, Any]]
    items: list[dict[str, Any]]
    errors: list[str]
    not_kept: int = 0  # Characters that were printed, and are nowhere.
    text_path: str = ""  # Where the full text is, if it is long.


@dataclass(frozen=True)
class Result:
    """What one call hands back.

    Attributes:
        text: The JSON object {"session_id", "error", "result"}, or plain text.
        images: (mime type, base64).
        error: The texts of `error`; empty when all went well.
        could_not_run: The code could not be run at all.
    """

    text: str
    images: list[tuple[str, str]]
    error: list[str]
    could_not_run: bool


# --- Notebook -------------------------------------------------------------------------

MARK = "jupyter_interpreter_mcp"  # in a notebook's metadata and in a cell's: it is ours
LOOK_S = 0.05  # a save believes a look that is not older: another one costs 1.5 ms
CONFIRM_S = 1.0  # from a save to the look that confirms it, and to the next one
# What vanishes so soon after a save of ours was overwritten: nobody saves a version
# that is older, as JupyterLab asks first and another server looks before. And what is
# garbled so soon after it can be our text mixed with another's.
SETTLED_S = 3.0
# Somebody who saved so recently may do so again: we look right before each save.
SHARED_S = 60.0
# Between two tries to read a file that is being written. Chance is added, so that two
# writers who collided do not collide again.
PAUSES_S = (0.01, 0.03, 0.06, 0.2)
WRITES = 5  # tries of one save beside other writers; then `confirm` goes on
LEFT_ALONE = """{} on the server is not readable as a notebook ({}) and is left as it \
is; repair, move or delete it, or use another session_id"""
ADOPTED = "{} is a person's own notebook: its cells were not run. %restore runs them."

Cell = dict[str, Any]  # as it stands in the file


class Saved(Enum):
    """What became of a cell that was to be saved, and what is told of it."""

    WELL = ""
    ANEW = "The notebook {} was deleted: it begins anew with this cell"
    STAYS_DELETED = "{} was deleted while the cell ran, and stays deleted"
    CELL_DELETED = (
        "Somebody deleted the cell from {} while it ran: it is not added again"
    )


SAID: dict[Any, Outcome] = {outcome.value: outcome for outcome in Outcome}
EXITS = ("", "0", "None")  # given to sys.exit by a cell that ended well


@dataclass(frozen=True)
class SavedCell:
    """What a restore wants to know of a cell in the file."""

    number: int  # from 1, as a person counts them
    cell_id: str
    source: str
    outcome: Outcome
    folder: str = ""  # where it began; "": not known
    ended_in: str = ""  # where it left the kernel; "": not known
    duration_s: float = 0.0
    is_ours: bool = True  # it has a mark of ours; with a signing key: one that holds
    is_tagged: bool = False  # as one that is not to be run


@dataclass(frozen=True)
class Content:
    """A notebook that was read. Every field that we use has the type it should have."""

    cells: list[Cell]
    metadata: dict[str, Any]
    rest: dict[str, Any]
    is_mixture: bool  # Does the end of another text stand behind it?


class Piece(NamedTuple):
    """A part of the file as it travels: escaped for the inside of a JSON string."""

    escaped: bytes
    size: int  # bytes in the file


@dataclass
class Pending:
    """A cell of ours that the file is not known to hold for good."""

    cell: Cell
    saved_at: float
    may_return: bool  # False if it was confirmed before: who deletes it then means it


class GarbledError(NotebookError):
    """The text is no JSON: somebody is writing it, or two wrote at the same time."""


class Notebook:
    """One session's file on the server, kept as the text of its cells.

    Its worker calls `load` when it connects, and for each cell `begin` when the code
    was sent, `save` when it ended or goes on for long, and `confirm` now and then.

    The contents API cannot lock. So a cell is pending from a save until the file is
    seen to hold it SETTLED_S later. What is missing before that was overwritten, and
    is put back; what is missing after that was deleted by a person.

    Source: nbformat, "The Notebook file format" (4.5).
    """

    def __init__(
        self,
        client: RemoteJupyterClient,
        path: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        signing_key: bytes | None = None,
    ) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        # What `metadata` gets where it has none: kernelspec, language_info.
        self.defaults: dict[str, Any] = {}
        # Ours in `metadata`. adopted: is it a person's own? left: ids for `%restore`.
        self.mark: dict[str, Any] = {"adopted": False, "left": []}
        self._client = client
        self._clock = clock
        self._signing_key = signing_key
        self._rest: dict[str, Any] = {"nbformat": 4, "nbformat_minor": 5}
        self._cells: dict[str, Piece] = {}  # by id, in order
        self._pending: dict[str, Pending] = {}
        # The last cell that was to be saved.
        self._last_id = ""
        # Was the file there, and readable, when it was last seen?
        self._exists = False
        # Did somebody delete it? Until a cell begins it anew.
        self._was_deleted = False
        # Was that known when the last cell began? Else it stays deleted.
        self._may_begin_anew = False
        # The server's time of the version that is known; None: it must be read.
        self.last_modified: str | None = None
        # Is it that version beyond doubt? Of two texts that were written at one moment
        # both writers are told the same time, and the same size if they are as long.
        self._is_certain = False
        self._looked_at = -math.inf
        self._written_at = -math.inf
        # When `confirm` last read the file.
        self._confirmed_at = -math.inf
        # When somebody else was last seen to have saved.
        self._shared_at = -math.inf

    @property
    def is_confirmed(self) -> bool:
        """Return whether the file is known to hold all cells of ours."""
        return not self._pending

    @property
    def is_contended(self) -> bool:
        """Return whether somebody saved a moment ago, and may overwrite what is new."""
        is_recent = self._clock() - self._shared_at < CONFIRM_S
        return is_recent and not self.is_confirmed

    def load(self) -> list[SavedCell] | None:
        """Read the file; return its cells, or None if there is none.

        Raises:
            NotebookError: It is no notebook of format 4. ServerError: Not read now.
        """
        self._reread()
        if not self._exists:
            return None

        self.mark.update(mark_in(self.metadata))
        key = self._signing_key
        cells = map(cell_of, self._cells.values())
        return [parse_cell(number, cell, key) for number, cell in enumerate(cells, 1)]

    def release(self) -> None:
        """Let go of the cells, if they can be read again when they are wanted."""
        if self.is_confirmed:
            self._cells.clear()
            self.last_modified = None

    def begin(self) -> None:
        """Look at the file when a new cell begins; the kernel works meanwhile.

        Raises:
            NotebookError, ServerError: It cannot be read now; `save` tries again.
        """
        try:
            self._look()
            self._looked_at = self._clock()
        finally:
            self._may_begin_anew = self._was_deleted

    def save(self, cell: Cell) -> Saved:
        """Append a cell, or renew the outputs of the one with its id.

        Raises:
            NotebookError, ServerError: Not saved now; it is saved with the next cell.
        """
        if self._signing_key is not None:
            signature = signature_of(cell, self._signing_key)
            cell["metadata"][MARK]["signature"] = signature
        cell_id = cell["id"]
        was_confirmed = cell_id == self._last_id and cell_id not in self._pending
        self._last_id = cell_id
        self._pending[cell_id] = Pending(cell, self._clock(), not was_confirmed)
        if cell_id in self._cells:
            whole = combine(cell_of(self._cells[cell_id]), cell)
            self._cells[cell_id] = piece_of(dump(whole))

        now = self._clock()
        if now - self._looked_at > LOOK_S or now - self._shared_at < SHARED_S:
            self._look()
        if self._was_deleted and not self._may_begin_anew:
            self._pending.clear()
            return Saved.STAYS_DELETED

        for new_id, pending in self._pending.items():
            if new_id not in self._cells and pending.may_return:
                self._cells[new_id] = piece_of(dump(pending.cell))
        if cell_id not in self._cells:
            self._pending.pop(cell_id, None)
            return Saved.CELL_DELETED

        self._write()
        if not self._was_deleted:
            return Saved.WELL
        self._was_deleted = False
        return Saved.ANEW

    def confirm(self, *, is_last: bool = False) -> None:
        """Read the file once more, and put back what others have overwritten.

        Does nothing if that is not needed, or too early; `is_last` says now or never.

        Raises:
            NotebookError, ServerError: Not confirmed now.
        """
        now = self._clock()
        is_early = now - max(self._written_at, self._confirmed_at) < CONFIRM_S
        if self.is_confirmed or (is_early and not is_last):
            return

        self._confirmed_at = now
        if self._look():
            self._write()

    def _look(self) -> bool:
        """Take the version of somebody else who changed the file meanwhile.

        Returns: Does it lack something of ours?
        """
        is_behind = False
        modified = self._client.modified(self.path)
        if modified is None:
            self._note_absence()
        elif modified == self.last_modified and self._is_certain:
            self._settle()  # Our last save stands, and with it what older ones brought.
        else:
            if self.last_modified not in (None, modified):
                self._shared_at = self._clock()
            is_behind = self._reread()
        return is_behind

    def _note_absence(self) -> None:
        """Forget a file that somebody deleted."""
        if self._exists:
            self._cells.clear()
            self._pending.clear()
            self.metadata = {}
            self.mark = {"adopted": False, "left": []}
            self._was_deleted = True
        self._exists = False
        self.last_modified = None

    def _reread(self) -> bool:
        """Read the file and merge; return whether it lacks something of ours."""
        text = ""
        error: NotebookError | None = None
        # No pause behind the last try: what is written then is from memory, and lacks
        # what others wrote meanwhile.
        for pause_s in (0.0, *PAUSES_S):
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            try:
                text, modified = self._client.read(self.path)
                return self._take(parse_notebook(text, self.path), modified)
            except NotFound:
                self._note_absence()
                return False
            except ServerError as err:
                if err.status != 400:  # 400: it is no text, or a folder
                    raise
                raise NotebookError(LEFT_ALONE.format(self.path, err)) from err
            except RecursionError as err:  # barely flat enough to be read
                raise NotebookError(LEFT_ALONE.format(self.path, err)) from err
            except GarbledError as err:
                error = err

        # A full disk leaves an empty file, which holds nothing that could be lost.
        if error is not None and text.strip() and not self._may_have_mixed():
            raise error
        self._exists = True
        return True

    def _may_have_mixed(self) -> bool:
        """Return whether what is unreadable can be our text mixed with another."""
        return self._clock() - self._written_at < SETTLED_S

    def _take(self, content: Content, modified: str) -> bool:
        """Merge a version that was read; return whether it lacks something of ours."""
        if content.is_mixture and not self._may_have_mixed():
            raise GarbledError(LEFT_ALONE.format(self.path, "two texts in one"))

        if not self._exists:
            is_a_persons = bool(content.cells) and MARK not in content.metadata
            self.mark["adopted"] = is_a_persons
            self.mark.update(mark_in(content.metadata))

        merged = merge(content.cells, list(self._cells), self._pending)
        self._exists = True
        self.last_modified = modified
        self._is_certain = True
        self.metadata = content.metadata
        self._rest = content.rest
        self._cells = {cell["id"]: piece_of(dump(cell)) for cell in merged}

        there = {cell["id"]: piece_of(dump(cell)) for cell in content.cells}
        is_behind = content.is_mixture
        for cell_id, pending in list(self._pending.items()):
            if cell_id not in self._cells:
                del self._pending[cell_id]  # A person deleted it.
            elif self._cells[cell_id] != there.get(cell_id):
                pending.saved_at = self._clock()  # It is saved once more.
                is_behind = True
        self._settle()
        return is_behind

    def _settle(self) -> None:
        """Take the cells for confirmed that the file still holds SETTLED_S later."""
        for cell_id, pending in list(self._pending.items()):
            if self._clock() - pending.saved_at >= SETTLED_S:
                del self._pending[cell_id]

    def _write(self) -> None:
        """Write all cells, again if somebody else wrote at the same time."""
        for _ in range(WRITES):
            pieces = self._pieces()
            if not self._exists:
                self._client.make_folder(posixpath.dirname(self.path))
            self.last_modified = None  # It is not known until the server has answered.
            self._written_at = self._clock()
            modified, size = self._client.write(self.path, [p.escaped for p in pieces])

            self._exists = True
            self._written_at = self._clock()
            self._looked_at = self._written_at
            if size is None or size == sum(piece.size for piece in pieces):
                self.last_modified = modified
                self._is_certain = self._written_at - self._shared_at > SHARED_S
                return

            # Something else is there than what we wrote.
            self._shared_at = self._written_at
            time.sleep(random.uniform(0, PAUSES_S[0]))
            if not self._reread():
                return

    def _pieces(self) -> list[Piece]:
        """Return the whole file."""
        self.metadata = {**self.defaults, **self.metadata, MARK: self.mark}
        rest = dump({"metadata": self.metadata, **self._rest})
        comma = piece_of(",\n")
        cells = [part for piece in self._cells.values() for part in (comma, piece)]
        start = piece_of('{\n"cells": [\n')
        end = piece_of("\n],\n" + rest[1:] + "\n")
        return [start, *cells[1:], end]


def piece_of(text: str) -> Piece:
    """Escape a text for a JSON string; half of a surrogate pair becomes "?"."""
    escaped = dump(text)[1:-1].encode("utf-8", "replace")
    return Piece(escaped, len(text.encode("utf-8", "replace")))


def cell_of(piece: Piece) -> Cell:
    """Return the cell that was escaped."""
    cell: Cell = json.loads(json.loads(b'"%b"' % piece.escaped))
    return cell


def merge(
    theirs: Sequence[Cell], order: Sequence[str], pending: Mapping[str, Pending]
) -> list[Cell]:
    """Return the cells that somebody else wrote, with those of ours that are pending.

    One that is missing comes behind the one before it in `order`, that of the file as
    we knew it; if that is not there, and if it is new, at the end.
    """
    cells = {cell["id"]: cell for cell in theirs}
    for cell_id, ours in pending.items():
        if cell_id in cells:
            cells[cell_id] = combine(cells[cell_id], ours.cell)

    ids = list(cells)
    before = dict(zip(order, ["", *order], strict=False))
    for cell_id in [*order, *pending]:
        missing = pending.get(cell_id)
        if missing is None or cell_id in ids or not missing.may_return:
            continue

        place = len(ids)
        if before.get(cell_id) in ids:
            place = ids.index(before[cell_id]) + 1
        ids.insert(place, cell_id)
        cells[cell_id] = missing.cell
    return [cells[cell_id] for cell_id in ids]


def combine(theirs: Cell, ours: Cell) -> Cell:
    """Return a cell as a person left it, with what came of our run."""
    if theirs["cell_type"] != "code":
        return theirs  # They made a text of it, which has no outputs.

    cell = {**theirs, "metadata": {**theirs["metadata"], **ours["metadata"]}}
    cell["outputs"] = ours["outputs"]
    cell["execution_count"] = ours["execution_count"]
    return cell


def parse_notebook(text: str, path: str) -> Content:
    """Read a notebook; what is null counts as empty.

    Raises:
        GarbledError: It is no JSON. NotebookError: It is no notebook of format 4.
    """
    try:
        rest, end = json.JSONDecoder().raw_decode(text.strip())
        content = repair_notebook(rest, is_mixture=bool(text.strip()[end:]))
    except json.JSONDecodeError as err:
        raise GarbledError(LEFT_ALONE.format(path, err)) from err
    except (LookupError, TypeError, ValueError, RecursionError) as err:
        raise NotebookError(LEFT_ALONE.format(path, repr(err))) from err
    return content


def repair_notebook(rest: dict[str, Any], *, is_mixture: bool) -> Content:
    """Fill in what a notebook lacks, and take what is malformed and harmless away.

    Raises:
        LookupError, TypeError, ValueError: It is no notebook.
    """
    if rest["nbformat"] != 4:
        raise ValueError(f"nbformat is {rest['nbformat']!r}, not 4")
    rest["nbformat_minor"] = max(5, rest["nbformat_minor"])

    metadata = dict(rest.pop("metadata") or {})
    if not isinstance(dict_in(metadata, "kernelspec").get("name"), str):
        metadata.pop("kernelspec", None)  # The worker knows the right one.

    cells = [dict(cell) for cell in rest.pop("cells")]
    ids: set[str] = set()
    for cell in cells:
        repair_cell(cell, ids)
    return Content(cells, metadata, rest, is_mixture)


def repair_cell(cell: Cell, ids: set[str]) -> None:
    """Fill in what a cell lacks, and renew an id that cannot be one or is there twice.

    Raises:
        LookupError, TypeError, ValueError: It is no cell.
    """
    if cell["cell_type"] not in ("code", "markdown", "raw"):
        raise ValueError(f"cell_type is {cell['cell_type']!r}")
    cell["metadata"] = dict(cell.get("metadata") or {})
    cell["source"] = "".join(cell.get("source") or "")
    if cell["cell_type"] == "code":
        cell["outputs"] = [dict(output) for output in cell.get("outputs") or ()]
        cell.setdefault("execution_count", None)

    # Source: nbformat, "Cell ids".
    cell_id = str(cell.get("id"))
    if cell_id in ids or not re.fullmatch(r"[\w-]{1,64}", cell_id, re.ASCII):
        cell_id = secrets.token_hex(6)
    cell["id"] = cell_id
    ids.add(cell_id)


def dict_in(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the dict that stands under a name, or an empty one."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def mark_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the mark in a notebook's metadata says, as far as it has one."""
    mark = dict_in(metadata, MARK)
    known = {"adopted": bool, "left": list}
    return {key: mark[key] for key in known if isinstance(mark.get(key), known[key])}


def signature_of(cell: Cell, key: bytes) -> str:
    """Return the signature of what a restore relies on in a cell of ours."""
    mark = dict_in(cell["metadata"], MARK)
    relied_on = [cell["source"]]
    relied_on += [mark.get(name) for name in ("outcome", "folder", "ended_in")]
    # As JSON no two lists are the same text; as bytes it is what stands in the file.
    text = dump([MARK, *relied_on]).encode("utf-8", "replace")
    return hmac.new(key, text, "sha256").hexdigest()


def is_signed(cell: Cell, key: bytes) -> bool:
    """Return whether a cell stands in the file as a holder of the key saved it."""
    given = str(dict_in(cell["metadata"], MARK).get("signature"))
    expected = signature_of(cell, key)
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def parse_cell(number: int, cell: Cell, key: bytes | None = None) -> SavedCell:
    """Return what a restore wants to know of a cell of a notebook that was read."""
    metadata = cell["metadata"]
    mark = dict_in(metadata, MARK)
    times = dict_in(metadata, "execution")
    return SavedCell(
        number,
        cell["id"],
        cell["source"],
        outcome_of(cell, mark, times),
        str(mark.get("folder") or ""),
        str(mark.get("ended_in") or ""),
        duration_of(times),
        bool(mark) and (key is None or is_signed(cell, key)),
        "skip-execution" in str(metadata.get("tags")),
    )


def outcome_of(cell: Cell, mark: dict[str, Any], times: dict[str, Any]) -> Outcome:
    """Return how a cell ended when it last ran, as far as the file tells.

    A person can have run it since, and older versions left no mark: outputs and times
    tell, too. Source: nbformat, "Code cells".
    """
    if cell["cell_type"] != "code":
        return Outcome.NEVER_RAN

    outcome = Outcome.NEVER_RAN
    if "shell.execute_reply" in times:
        outcome = Outcome.ENDED_WELL
    elif times:
        outcome = Outcome.UNKNOWN  # It was saved while it ran.
    elif cell["execution_count"] is not None:
        outcome = Outcome.ENDED_WELL
    if mark:
        outcome = SAID.get(str(mark.get("outcome")), Outcome.UNKNOWN)

    for output in cell["outputs"]:
        is_exit = output.get("ename") == "SystemExit" and output.get("evalue") in EXITS
        is_error = output.get("output_type") == "error" and not is_exit
        if is_error and outcome is Outcome.ENDED_WELL:
            return Outcome.FAILED
    return outcome


def duration_of(times: dict[str, Any]) -> float:
    """Return how many seconds a run took; 0 if its times do not tell."""
    try:
        # Python 3.10 does not know the letter Z for UTC.
        begun = times["iopub.execute_input"].replace("Z", "+00:00")
        ended = times["shell.execute_reply"].replace("Z", "+00:00")
        taken = datetime.fromisoformat(ended) - datetime.fromisoformat(begun)
        return max(0.0, taken.total_seconds())
    except (AttributeError, LookupError, TypeError, ValueError):
        return 0.0


# --- Restoring ------------------------------------------------------------------------

# A step of a bash script. What is none of these, such as | & > ( ` and an open quote,
# does more than change the state of the shell.
BASH_STEP = re.compile(
    r"""
    (?P<end> \n | ; | && | \|\| )
  | [ \t\r]+ | \\\n | \#[^\n]*                # a comment only where a word could begin
  | (?P<word> (?: [^\s;&|<>()'"`\\$] | \\. | '[^']*'
      | " (?: [^"\\`$] | \\. | \$(?!\() )* "  # in quotes, but without $(command)
      | \$ (?! [('"] )                        # $NAME, ${NAME}
    )+ )
    """,
    re.VERBOSE | re.DOTALL,
)
STATE_COMMANDS = ("cd", "export", "unset", "source", ".")
# What only calls the shell: !make, %pip install x, files = !ls. What looks like it in a
# string or comment is matched as part of that.
SHELL_LINE = re.compile(
    r"""
    (?P<long> '{3} | "{3} ) (?: \\. | [^\\] )*? (?P=long)
  | ' (?: \\. | [^'\\\n] )* ' | " (?: \\. | [^"\\\n] )* "
  | \#[^\n]*
  | ^ (?P<indent> [ \t]* ) (?![ \t])
    (?: (?: [\w.,:*()\ \t] | \[ [^]\n]* \] )* = [ \t]* )?    # x = , d["a"] =
    (?P<shell> ! (?!=)
      | %(?:pip|conda|mamba|uv|system|sx|ls|cat|cp|mv|rm|mkdir|rmdir)\b
      | (?:pip|conda|mamba|uv)[ ]+(?:install|uninstall|add|remove|sync)\b )
    (?: \\\n | [^\n] )*
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
NO_CODE = re.compile(r"(?:\s+|pass\b|\#[^\n]*)*")
# Their body is Python.
PYTHON_MAGICS = re.compile(r"\A(?:%%(?:time|capture|prun)\b[^\n]*\n)+")

# Why a cell was not run again, beside its outcome.
NOT_OURS = "a person's own"
NOT_SIGNED = (
    "not known to have run here as they are: read them before a cell that is just "
    "%restore, which runs them"
)
TAGGED = "tagged skip-execution"
BASH_WORKS = "bash that may work on files"
ONLY_SHELL = "only call the shell"
# What became of a step that did not end well.
FOLDER_GONE = "the working directory is gone"
STOPPED = "interrupted"
NOW_FAILS = "now fails: {}"

REPORT_SIZE = 1_000  # characters
PART_SIZE = 120  # of a list of cells or an error in it


@dataclass
class RestorePlan:
    """What a restore does, and what it leaves out."""

    steps: list[SavedCell] = field(default_factory=list)  # what of them runs again
    skipped: dict[int, str] = field(default_factory=dict)  # reasons by number
    left: list[SavedCell] = field(default_factory=list)  # over the limit
    last_folder: str = ""  # to go to at the end; "": nowhere else


def plan_restore(
    cells: Iterable[SavedCell],
    limit_s: float,
    *,
    is_python: bool = True,
    not_ours: str = "",
) -> RestorePlan:
    """Choose the cells that bring variables back and do not repeat work on files.

    Stops before the cell with whose recorded time it would pass `limit_s`; 0 runs none.
    Cells of other kernels than Python's run again as they are. `not_ours` says why
    cells that are not ours do not run; "": they do.
    """
    plan = RestorePlan()
    total_s = 0.0
    for cell in cells:
        if cell.outcome is Outcome.NEVER_RAN or not cell.source.strip():
            continue
        if not_ours and not cell.is_ours:
            plan.skipped[cell.number] = not_ours
            continue  # Nor is its folder believed.

        plan.last_folder = cell.ended_in or cell.folder or plan.last_folder
        reason = reason_against(cell)
        source = cell.source
        if is_python and not reason:
            source, reason = source_again(source)
        if reason:
            plan.skipped[cell.number] = reason
            continue

        total_s += cell.duration_s
        if plan.left or total_s > limit_s or limit_s == 0:
            plan.left.append(cell)
            continue
        plan.steps.append(replace(cell, source=source))
        plan.last_folder = cell.ended_in
    return plan


def reason_against(cell: SavedCell) -> str:
    """Return why a cell does not run again whatever is in it, or ""."""
    if cell.is_tagged:
        return TAGGED
    if cell.outcome is not Outcome.ENDED_WELL:
        return str(cell.outcome.value)
    return ""


def source_again(source: str) -> tuple[str, str]:
    """Return what of a cell runs again, or else why it does not."""
    body = source.lstrip()
    header, _, script = body.partition("\n")
    if header.rstrip() == "%%bash":
        if changes_only_state(script):
            return source, ""
        return "", BASH_WORKS

    body = PYTHON_MAGICS.sub("", body)
    magics = source.lstrip().removesuffix(body)
    if body.startswith("%%"):
        return "", body.split(maxsplit=1)[0]

    body = SHELL_LINE.sub(as_pass, body)
    if NO_CODE.fullmatch(body):
        return "", ONLY_SHELL
    return magics + body, ""


def changes_only_state(script: str) -> bool:
    """Return whether a script only changes where the shell is and what it exports."""
    position = 0
    has_command = False
    while position < len(script):
        step = BASH_STEP.match(script, position)
        if step is None:
            return False

        position = step.end()
        if step["end"]:
            has_command = False
        elif step["word"] and not has_command:
            has_command = step["word"] in STATE_COMMANDS
            if not has_command and not re.match(r"[A-Za-z_]\w*\+?=", step["word"]):
                return False
    return True


def as_pass(line: re.Match[str]) -> str:
    """Return `pass` for what only calls the shell; else what was matched."""
    if line["shell"]:
        return f"{line['indent']}pass"
    return line.group()


def restore_report(
    head: str,
    plan: RestorePlan,
    took_s: float,
    failures: Mapping[int, str],
    names: Sequence[str],
) -> str:
    """Return what a restore did, in at most REPORT_SIZE characters.

    `head` says that the session is restored, and why. `failures` says what became of
    the steps that did not end well: FOLDER_GONE, STOPPED, or NOW_FAILS with the last
    line of the error. `names` are the variables that are there.
    """
    well = [step.number for step in plan.steps if step.number not in failures]
    parts = [f"{head}: {cells_text(well)} ran again in {took_s:.1f} s."]

    reasons: dict[str, list[int]] = {}
    for number, reason in sorted([*plan.skipped.items(), *failures.items()]):
        reasons.setdefault(cut(reason, PART_SIZE), []).append(number)
    if reasons:
        groups = [f"{cells_text(reasons[why])} ({why})" for why in reasons]
        parts.append(f"Did not run again, or not to the end: {'; '.join(groups)}.")

    if plan.left:
        left_s = sum(cell.duration_s for cell in plan.left)
        left = cells_text([cell.number for cell in plan.left])
        parts.append(
            f"Left, as they took {left_s:.0f} s: {left}; a cell that is just %restore "
            "runs them."
        )

    text = cut(" ".join(parts), REPORT_SIZE - PART_SIZE)
    return cut(f"{text} Variables: {', '.join(names) or 'none'}", REPORT_SIZE)


def cells_text(numbers: Sequence[int]) -> str:
    """Return "4 cells (1-3, 6)" for numbers in ascending order."""
    if not numbers:
        return "no cells"
    if len(numbers) == 1:
        return f"1 cell ({numbers[0]})"

    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])

    text = ", ".join("-".join(map(str, ends)) for ends in ranges)
    return cut(f"{len(numbers)} cells ({text})", PART_SIZE)


def cut(text: str, size: int) -> str:
    """Return a text that is too long with its end replaced by dots."""
    if len(text) <= size:
        return text
    return text[: size - 3] + "..."


def summary(text: str, path: str) -> tuple[int, str]:
    """Return the number of cells of a notebook and the first line of the first.

    Raises:
        NotebookError: It cannot be read.
    """
    cells = parse_notebook(text, path).cells
    for cell in cells:
        source = cell["source"].removeprefix("%%bash").strip()
        if source:
            return len(cells), cut(source.splitlines()[0], PART_SIZE)
    return len(cells), ""


# --- Worker ---------------------------------------------------------------------------

CONTINUING = "Continuing session {}: {} cells, last used {}."
NEW = "Session {} is new: there was no {}"
BUSY = (
    "The kernel was busy with code that this server process does not follow. What it "
    "printed before is in {} as far as it was saved, and whether it failed is not known"
)
STARTS_EMPTY = "The kernel of session {} was gone: it starts empty"
USED_BY_SOMEBODY = (
    "The kernel of session {} was restarted and used by somebody: no cell ran again"
)
RESTORED_ELSEWHERE = "Another process restored session {}: its variables are there"
RESTORED = "{} Session {} was restored in a new one"
FULL_TEXT = "; the full text is in {} on the server"
EARLIER = "[from earlier code] "
KILLS_AGAIN = "; if its cells kill it again, edit {}, or use another session_id"
DROPPED_ON_THE_WAY = "Output is missing: the server was too busy for it, or broke."
ABORTED = "The kernel left it out, because a cell before it failed. Call again"
ENDED_ITSELF = "The code ended its kernel, as by exit or quit."
RESTORE_REST = "%restore"


class BringUp(Enum):
    """What is done before a cell, with a kernel in a state."""

    GO_ON = "go on"
    RESTORE = "restore"
    RESTORE_AFRESH = "restart, then restore"
    START_EMPTY = "say that it starts empty"
    LEAVE_USED = "say that somebody used it"
    SAY_RESTORED = "say that another process restored it"


def plan_bring_up(state: KernelState, *, has_cells: bool, may_restore: bool) -> BringUp:
    """Decide what a kernel's state asks for.

    state       without cells   with cells, may restore   with cells, may not
    fresh       go on           restore                   start empty
    used        go on           leave used                leave used
    restoring   go on           restart, then restore     start empty
    restored    go on           say restored              say restored
    ready       go on           go on                     go on
    """
    if not has_cells or state is KernelState.READY:
        return BringUp.GO_ON
    if state is KernelState.USED:
        return BringUp.LEAVE_USED
    if state is KernelState.RESTORED:
        return BringUp.SAY_RESTORED
    if not may_restore:
        return BringUp.START_EMPTY
    if state is KernelState.RESTORING:
        return BringUp.RESTORE_AFRESH

    return BringUp.RESTORE


class Worker:
    """A session's thread: it takes one run after the other to its end.

    It connects, brings the kernel up, sends the code, hears what it says and saves the
    cell; a run outlives its call with no further mechanism. Only this thread uses the
    kernel and the notebook, but for `Kernel.lost` and `Kernel.was_asked_to_end`.
    """

    def __init__(self, session: "Session", *, is_new: bool) -> None:
        self._session = session
        self._owner = session.owner
        self._client = session.owner.client
        self._settings = session.owner.settings
        self._path = session.path
        self._run: Run | None = None
        # The last kernel; its id is "" as long as there was none.
        self.kernel = Kernel(self._client, "", self._tick)
        key = self._settings.signing_key
        self._notebook = Notebook(self._client, self._path, signing_key=key)
        # The session's id was made up for this call, so there is nothing to look for.
        self._is_new = is_new
        # This process has brought it up before.
        self._is_known = False
        # What carries user's code now: the run's own, or that of a restore.
        self._sent: Request | None = None
        # Its kernel was busy with code that no run of ours carries.
        self._was_busy = False
        # Why the last kernel was lost.
        self._why_lost = "The kernel was gone."
        # A restore ended, and its report is not yet delivered.
        self._has_restored = False

    def work(self) -> None:
        """Take runs until none came for IDLE_S, or this process ends."""
        last_at = time.monotonic()
        while not self._owner.is_closing:
            try:
                run = self._session.begin_next(CONFIRM_S)
                if run is not None:
                    self._take_to_its_end(run)
                    last_at = time.monotonic()
                    continue

                self._confirm()
                if time.monotonic() - last_at > IDLE_S:
                    self._rest()
                    if self._session.may_end():
                        return
            except Exception:  # The session must not be without a worker.
                log.exception("Session %d", self._session.session_id)

        self._confirm_last()
        self._session.give_up_waiting()

    def _take_to_its_end(self, run: Run) -> None:
        self._run = run
        self._sent = None
        outcome = Outcome.UNKNOWN
        try:
            outcome = self._perform(run)
        except Exception as err:  # It must be told.
            log.exception("Session %d", self._session.session_id)
            run.fail(f"Internal error: {err!r}; stderr has more")
        finally:
            self._run = None
            self._session.end_current(run, outcome)

    def _confirm(self, *, is_last: bool = False) -> None:
        """See to it that nobody overwrote what was saved; the next cell tries again."""
        if self._notebook.is_confirmed:
            return
        with contextlib.suppress(NotebookError, ServerError):
            self._notebook.confirm(is_last=is_last)

    def _confirm_last(self) -> None:
        """Confirm before this process ends; beside another writer until that pauses.

        What it puts back can be overwritten once more, and nobody would look then.
        """
        deadline = time.monotonic() + CONFIRM_S
        self._confirm(is_last=True)
        while self._notebook.is_contended and time.monotonic() < deadline:
            time.sleep(RETRY_S * random.uniform(0.5, 1.5))
            self._confirm(is_last=True)

    def _rest(self) -> None:
        """Close the websocket; what comes meanwhile is handed over by the next call."""
        last = Run("", self._session.lock)
        self.kernel.close(last.hear)
        self._session.keep(last)
        self._notebook.release()

    def _tick(self) -> None:
        """While something is waited for: what others want of this thread."""
        run = self._run
        if run is not None:
            if run.is_withdrawn and run.stage in BEFORE_RUNNING:
                raise Withdrawn
            self._interrupt_if_wanted(run)
            if run.stage is Stage.RUNNING and time.monotonic() > run.save_at:
                run.save_at = time.monotonic() + SAVE_EVERY_S
                self._save_progress(run)
            elif run.stage is Stage.RUNNING:
                self._confirm()

        if self._owner.is_closing and not self._has_to_act(run):
            raise Closing

    def _has_to_act(self, run: Run | None) -> bool:
        """Return whether something is still done for a run although this process ends.

        A stop that came a moment before is carried out. Code that a call left behind
        ("still running") is begun: `Interpreter.close` waits EXIT_S for that.
        """
        if run is None:
            return False
        if self._sent is not None:
            return run.must_interrupt
        return run.stage in BEFORE_RUNNING and not run.only_waits

    def _interrupt_if_wanted(self, run: Run) -> None:
        """Interrupt the kernel, once it has taken the code; try again if that fails."""
        if not run.must_interrupt or self._sent is None or not self._sent.was_heard:
            return
        run.must_interrupt = False
        try:
            self._client.command(self.kernel.kernel_id, "interrupt")
        except ServerError:
            run.must_interrupt = True

    # One run, from its turn to its end

    def _perform(self, run: Run) -> Outcome:
        """Take a run to its end, and return how it ended.

        Every failure becomes a part of its result here, and only here.
        """
        try:
            outcome = self._carry_out(run)
        except Closing:
            # This process ends; the code goes on.
            run.fail("The MCP server ends; what ran goes on")
            self._save_progress(run)
            return Outcome.UNKNOWN
        except Withdrawn:
            if run.outcome is None and not run.only_waits and not run.is_unwanted:
                run.fail(WITHDRAWN)
            return Outcome.NEVER_RAN
        except Exception as err:  # noqa: BLE001  # A defect must not wedge the session.
            outcome = self._tell_failure(run, err)

        if run.request is not None and outcome is not Outcome.NEVER_RAN:
            run.stage = Stage.SAVING
            run.timing["shell.execute_reply"] = now()
            self._save(run, outcome)

        self._settle_restore()
        return outcome

    def _carry_out(self, run: Run) -> Outcome:
        was_asked = self.kernel.was_asked_to_end
        if run.only_waits and not was_asked and self._session.has_errors_to_tell():
            return Outcome.ENDED_WELL  # That a kernel died is told at once.
        self._connect(run)
        if run.code.strip() == RESTORE_REST:
            return self._restore_left(run)

        with run.lock:
            if run.is_withdrawn:
                raise Withdrawn
            if run.only_waits:
                return Outcome.ENDED_WELL

            run.stage = Stage.RUNNING
            run.step = ""

        return self._run_cell(run)

    def _connect(self, run: Run) -> None:
        """Make sure of a live kernel that has the session's state; try twice.

        Nothing of the run was sent, so a second try does no harm, but for a restore: it
        is begun once in a call.
        """
        try:
            self._bring_up(run)
        except (KernelError, ServerError) as err:
            if run.stage is Stage.RESTORING or isinstance(err, CannotStart):
                raise
            if isinstance(err, KernelDied):
                self._forget(str(err))

            self._bring_up(run)

    def _tell_failure(self, run: Run, err: Exception) -> Outcome:
        """Put what went wrong, and whether the code ran, into the result."""
        text = str(err) or repr(err)
        if isinstance(err, KernelDied):
            if not isinstance(err, CannotStart):
                text += " Its variables are gone"
            will_restore = self._owner.may_restore and not isinstance(err, CannotStart)
            if will_restore and not self.kernel.was_asked_to_end:
                text += "; the next call restores the session"
            if run.stage is Stage.RESTORING:
                text += KILLS_AGAIN.format(self._path)

            # Before the outcome is decided: this reads what the kernel said last.
            self._forget(str(err))
        elif not isinstance(err, InterpreterError):
            text = f"Internal error: {err!r}; stderr has more"
            log.exception("Session %d", self._session.session_id)

        outcome = outcome_of_failure(err, run.request)
        if outcome is Outcome.NEVER_RAN:
            text = f"Not run: {text}"
        elif run.request is not None and not run.request.was_heard:
            # Native code that holds the GIL, or ends the kernel, runs without a word.
            text += "; whether the code began is not known"

        with run.lock:
            run.errors.append(text)
            if outcome is not Outcome.NEVER_RAN:
                run.outputs.fail(error_event(type(err).__name__, text))
                run.error_was_told = True

        return outcome

    # Bringing the kernel up

    def _bring_up(self, run: Run) -> None:
        """Connect to the session's kernel, or to a new one, and give it its state."""
        run.stage = Stage.CONNECTING
        if self._is_still_there(run):
            return

        with run.lock:
            run.notes = []
        cells = self._load(run)
        model = self._take_kernel(run)
        asked_for = run.code.strip() == RESTORE_REST
        may_restore = bool(cells) and (asked_for or self._settings.restore_limit_s > 0)
        mark = KernelState.RESTORING if may_restore else KernelState.READY
        state = self.kernel.greet(mark, run.hear)
        restoring = KernelState.RESTORING
        while state is restoring and self.kernel.is_restored_by_another(run.hear):
            state = self.kernel.ask_state(mark, run.hear)
        if not self.kernel.channel.is_binary:
            self._owner.has_gateway = True
        self._describe_kernel(model)

        # Where an id was given and no notebook is kept, something should be there.
        is_blind = not self._owner.keeps_notebook and not self._is_new
        has_state = bool(cells) or self._is_known or is_blind
        action = plan_bring_up(state, has_cells=has_state, may_restore=may_restore)
        self._tell_state(run, action, cells)
        if action is BringUp.RESTORE_AFRESH:
            # It was cut short: once more, from nothing.
            self._client.command(model.kernel_id, "restart", KERNEL_TIMEOUT_S)
            self.kernel.lost = KERNEL_GONE
            self._take_kernel(run)
            self.kernel.greet(mark, run.hear)
        if action in (BringUp.RESTORE, BringUp.RESTORE_AFRESH):
            self._restore(run, cells)
        elif action is BringUp.START_EMPTY:
            self._note_left(cells, [])

        self.kernel.is_ready = True
        self._is_known = True
        self._is_new = False

    def _is_still_there(self, run: Run) -> bool:
        """Return whether the kernel of the last cell is connected and as it was.

        Raises:
            KernelDied: It was restarted.
        """
        if not self.kernel.is_ready or self.kernel.lost:
            return False
        try:
            self.kernel.check(run.hear)
        except ConnectionLost:
            self._client.drop_connections()
            return False
        return True

    def _take_kernel(self, run: Run) -> KernelModel:
        """Take the session's kernel into use, and say what is waited for."""
        if self.kernel.lost:
            self._forget()
        model = self._find_kernel(run)
        if self.kernel.kernel_id != model.kernel_id or self.kernel.lost:
            if self.kernel.kernel_id and not self.kernel.lost:
                self._why_lost = KERNEL_GONE
            self.kernel.close(run.hear)
            self.kernel = Kernel(self._client, model.kernel_id, self._tick)

        if model.execution_state == "busy":
            run.stage = Stage.QUEUED
            self._was_busy = True
        elif not self.kernel.has_greeted:
            run.stage = Stage.STARTING
        return model

    def _load(self, run: Run) -> list[SavedCell]:
        """Read the notebook; a defect in it is told when the cell is saved."""
        if not self._owner.keeps_notebook or self._is_new:
            return []

        cells = None
        with contextlib.suppress(NotebookError):
            cells = self._notebook.load()
            if cells is None and not self._is_known:
                run.note(NEW.format(self._session.session_id, self._path))

        return cells or []

    def _find_kernel(self, run: Run) -> KernelModel:
        """Return the last kernel, else the notebook's, else a new one."""
        model = None
        if self.kernel.kernel_id and not self.kernel.lost:
            # A bare gateway gives the kernel of a path once.
            with contextlib.suppress(NotFound):
                model = self._client.kernel(self.kernel.kernel_id)

        if model is None and not self._is_new:
            model = self._bound_kernel()

        if model is None:
            run.stage = Stage.STARTING
            model = self._agree_on(self._start_kernel())

        was_tried_in_vain = (
            self.kernel.kernel_id == model.kernel_id and not self.kernel.has_greeted
        )
        hangs = was_tried_in_vain and model.execution_state == "starting"
        if model.execution_state == "dead" or hangs:
            self._client.command(model.kernel_id, "restart", KERNEL_TIMEOUT_S)

        return model

    def _agree_on(self, started: KernelModel) -> KernelModel:
        """Return the kernel that all take who start one for the session at one moment.

        The server gives each of them one of its own.
        """
        if self._is_new or not self._owner.keeps_notebook:
            return started

        first = self._bound_kernel() or started
        if (
            first.kernel_id != started.kernel_id
            and started.execution_state == "starting"
        ):
            with contextlib.suppress(ServerError):
                self._client.delete(started.kernel_id)
        return first

    def _bound_kernel(self) -> KernelModel | None:
        """Return the kernel that is bound to the notebook; gateways may not tell."""
        try:
            return self._client.bound_kernels().get(self._path)
        except ServerRefused:
            return None

    def _start_kernel(self) -> KernelModel:
        name = self._session.kernel_name
        wanted = dict_in(self._notebook.metadata, "kernelspec").get("name")
        if wanted in self._owner.specs:
            name = wanted

        path = self._path
        if self.kernel.kernel_id and not self._owner.keeps_notebook:
            path = f"{path}-{secrets.token_hex(16)}"  # A gateway: a path serves once.

        try:
            return self._client.open_session(path, name)
        except ServerError as err:
            if err.status != 500 or self._owner.keeps_notebook:
                raise

            # Of a gateway that does not list its kernels: the path is in use.
            return self._client.open_session(f"{path}-{secrets.token_hex(16)}", name)

    def _describe_kernel(self, model: KernelModel) -> None:
        """Write the kernel into the notebook as JupyterLab does.

        Else Lab takes the notebook for changed as soon as it opens it.
        """
        spec = self._owner.specs.get(model.name, {}).get("spec", {})
        kernelspec = {
            "display_name": spec.get("display_name", model.name),
            "language": spec.get("language", ""),
            "name": model.name,
        }
        self._notebook.defaults = {
            "kernelspec": kernelspec,
            "language_info": self.kernel.language_info,
        }

    def _tell_state(self, run: Run, action: BringUp, cells: list[SavedCell]) -> None:
        """Say what the caller must know of the kernel and the notebook."""
        session_id = self._session.session_id
        is_adopted = self._notebook.mark["adopted"] and not self._is_known
        if is_adopted and action is not BringUp.GO_ON:
            run.note(ADOPTED.format(self._path))
        elif action is BringUp.START_EMPTY:
            run.note(STARTS_EMPTY.format(session_id))
        elif action is BringUp.LEAVE_USED:
            run.note(USED_BY_SOMEBODY.format(session_id))
        elif action is BringUp.SAY_RESTORED:
            run.note(RESTORED_ELSEWHERE.format(session_id))
        elif cells and not self._is_known and action is BringUp.GO_ON:
            last_used = short_time(self._notebook.last_modified)
            run.note(CONTINUING.format(session_id, len(cells), last_used))

        if self._was_busy and action is BringUp.GO_ON:
            run.note(BUSY.format(self._path))
        self._was_busy = False

    def _restore(self, run: Run, cells: list[SavedCell]) -> None:
        """Run the cells of a notebook again, up to the limit, and say which."""
        limit_s = self._settings.restore_limit_s
        is_adopted = self._notebook.mark["adopted"]
        not_ours = ""
        if self._settings.signing_key is not None:
            not_ours = NOT_SIGNED
        elif is_adopted:
            not_ours = NOT_OURS
        if run.code.strip() == RESTORE_REST:
            limit_s = math.inf
            is_adopted = False
            not_ours = ""

        is_python = self.kernel.has_helper
        plan = plan_restore(cells, limit_s, is_python=is_python, not_ours=not_ours)
        self._note_left(cells, plan.steps)
        if plan.steps or not is_adopted:
            head = RESTORED.format(self._why_lost, self._session.session_id)
            self._run_again(run, plan, len(cells), head)
        else:
            self.kernel.probe(KernelState.READY)  # Nothing can be cut short here.

    def _note_left(self, cells: list[SavedCell], steps: list[SavedCell]) -> None:
        """Note in the notebook which cells `%restore` would run."""
        is_python = self.kernel.has_helper
        whole = plan_restore(cells, math.inf, is_python=is_python)
        may_run = {step.number for step in whole.steps}
        may_run -= {step.number for step in steps}
        left = [cell.cell_id for cell in cells if cell.number in may_run]
        self._notebook.mark["left"] = left

    def _restore_left(self, run: Run) -> Outcome:
        """Run what the last restore left: the cell `%restore`, which is not saved."""
        left = self._notebook.mark["left"]
        cells = [cell for cell in self._load(run) if cell.cell_id in left]
        plan = plan_restore(cells, math.inf, is_python=self.kernel.has_helper)
        if plan.steps:
            self._run_again(run, plan, cells[-1].number, "As asked")
        elif not run.notes:
            run.note("No cells are left to run again")

        self._notebook.mark["left"] = []
        return Outcome.ENDED_WELL

    def _run_again(self, run: Run, plan: RestorePlan, count: int, head: str) -> None:
        """Run the steps of a restore, each once, and put a report into the result."""
        run.stage = Stage.RESTORING
        started = time.monotonic()
        self.kernel.channel.is_restoring = True
        try:
            failures = self._run_steps(run, plan, count)
            self._enter(plan.last_folder)
            names = self._end_restore()
        finally:
            self.kernel.channel.is_restoring = False

        took_s = time.monotonic() - started
        run.note(restore_report(head, plan, took_s, failures, names))
        run.step = ""

    def _end_restore(self) -> list[str]:
        """Mark the kernel as restored; return the names of the variables there."""
        if not self.kernel.has_helper:
            return []

        names = self.kernel.ask("names()").get("names")
        self.kernel.wait(self.kernel.probe(KernelState.RESTORED), ignore)
        self._has_restored = True
        if not isinstance(names, list):
            return []
        return [str(name) for name in names]

    def _run_steps(self, run: Run, plan: RestorePlan, count: int) -> dict[int, str]:
        """Run the steps of a restore; return what became of those that did not work."""
        failures: dict[int, str] = {}
        for step in plan.steps:
            if run.is_withdrawn:
                raise Withdrawn

            run.step = f"cell {step.number} of {count}"
            if not self._enter(step.folder):
                failures[step.number] = FOLDER_GONE
                continue

            error = self._run_step(step.source)
            if error is None:
                continue
            if error.content["ename"] == "KeyboardInterrupt":
                failures[step.number] = STOPPED
            else:
                failures[step.number] = NOW_FAILS.format(short_error(error.content))
        return failures

    def _enter(self, folder: str) -> bool:
        """Go to a working directory; return whether it is there."""
        if not self.kernel.has_helper or not folder:
            return True
        return not self.kernel.ask(f"enter({folder!r})").get("error")

    def _run_step(self, source: str) -> OutputEvent | None:
        """Run one cell again, and return how it failed, if it did."""
        if self.kernel.has_helper and source.lstrip().startswith("%%bash"):
            request = self._send(source)[0]
        else:
            request = self.kernel.execute(source)
        self._sent = request
        return self.kernel.wait(request, ignore).error

    def _settle_restore(self) -> None:
        """Note in the kernel that the report of a restore is about to be delivered."""
        if not self._has_restored or not self.kernel.is_ready or self.kernel.lost:
            return
        self._has_restored = False
        self.kernel.probe(KernelState.READY)

    def _forget(self, why: str = KERNEL_GONE) -> None:
        """Let go of a kernel whose state is gone.

        What it had not taken must not run in the kernel after it: that one is deleted
        before it is up, as soon as the server has begun it (until then it says 500).
        """
        kernel = self.kernel
        if not kernel.kernel_id:
            return

        kernel.lost = kernel.lost or why
        self._why_lost = kernel.lost
        if not all(r.was_heard or r.is_harmless for r in kernel.requests.values()):
            self._delete_before_it_is_up(kernel)

        # This reads what it said last, such as that it took the code.
        kernel.close(self._run.hear if self._run is not None else ignore)

    def _delete_before_it_is_up(self, kernel: Kernel) -> None:
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline:
            try:
                self._client.delete(kernel.kernel_id)
                break
            except NotFound:
                break  # Somebody was faster.
            except ServerError:
                time.sleep(0.1)

        kernel.kernel_id = ""

    # The cell

    def _run_cell(self, run: Run) -> Outcome:
        """Send a cell, hear what it says, and return how it ended."""
        began = now()
        run.timing["iopub.status.busy"] = began
        run.timing["iopub.execute_input"] = began
        missing = self.kernel.gaps.missing
        run.request, run.source, was_asked = self._send(run.code)
        self._sent = run.request
        if self._owner.keeps_notebook:
            # The kernel works meanwhile, so this look costs no time.
            with contextlib.suppress(NotebookError, ServerError):
                self._notebook.begin()

        reply = self.kernel.wait(run.request, run.hear)
        hint = str(reply.answer.get("hint") or "")
        if was_asked and isinstance(reply.answer.get("cell"), str):
            if run.is_withdrawn:
                raise Withdrawn
            # It is Python: as itself, so that nothing of ours shows.
            run.source = reply.answer["cell"]
            run.request = self.kernel.execute(run.source)
            self._sent = run.request
            reply = self.kernel.wait(run.request, run.hear)
        if reply.status == "aborted":
            raise NotTaken(ABORTED)

        # What the helper answers has no number: the user's count goes on without it.
        run.folder = str(reply.answer.get("folder") or "")
        run.ended_in = str(reply.answer.get("ended_in") or "")
        if "error" not in reply.answer:
            run.execution_count = reply.execution_count

        # A few numbers may lack without a loss: hooks may drop what they were given.
        lost_some = self.kernel.gaps.missing - missing > 9
        if not run.request.is_idle or lost_some:
            run.note_loss(DROPPED_ON_THE_WAY)

        for page in reply.pages:
            with contextlib.suppress(ProtocolError):
                event = parse_output("display_data", {"data": page})
                if event is not None:
                    run.hear(event, False)

        if reply.ends_kernel:
            self._end_kernel()

        return self._outcome_of(run, reply, hint)

    def _send(self, code: str) -> tuple[Request, str, bool]:
        """Send a cell as itself, or to the helper a script, or what it shall decide.

        Returns: The request, what the notebook shows, and if the helper is to decide.
        """
        settled = Settled(Language.PYTHON, code)
        if self.kernel.has_helper:
            settled = settle(code)
        if settled.language is Language.PYTHON:
            return self.kernel.execute(settled.text), settled.text, False

        is_asked = settled.language is Language.UNKNOWN
        call = call_code(f"run({settled.text!r}, {is_asked})")
        request = self.kernel.execute(call, store_history=False)
        return request, f"%%bash\n{settled.text}", is_asked

    def _end_kernel(self) -> None:
        """Have the kernel restarted whose code asked for its end, as by `exit`."""
        with contextlib.suppress(ServerError):
            self._client.command(self.kernel.kernel_id, "restart", KERNEL_TIMEOUT_S)
        raise KernelDied(ENDED_ITSELF)

    def _outcome_of(self, run: Run, reply: Reply, hint: str) -> Outcome:
        if reply.error is not None:
            with run.lock:
                run.outputs.fail(reply.error)
                error = run.outputs.error or {}
                if error.get("ename") == "SystemExit" and error["evalue"] in EXITS:
                    run.outputs.error = None
                    return Outcome.ENDED_WELL
                if hint and error.get("ename") in ("NameError", "SyntaxError"):
                    error["traceback"] = [*error["traceback"], hint]
            return Outcome.FAILED

        if reply.answer.get("raised"):
            self._fail_as_shown(run, str(reply.answer["raised"]))
            return Outcome.FAILED

        statuses = reply.answer.get("statuses") or []
        for command, status in statuses:
            run.fail(f"Command exited with status {status}: {command}")
        if statuses:
            return Outcome.FAILED
        return Outcome.ENDED_WELL

    def _fail_as_shown(self, run: Run, last_line: str) -> None:
        """Take for the cell's error the one that was shown, as by `%run`."""
        with run.lock:
            for output in run.outputs.items():
                if output["output_type"] == "error":
                    run.outputs.fail(OutputEvent("error", output))
                    return
            run.outputs.fail(error_event("Error", last_line))

    # Saving

    def _save_progress(self, run: Run) -> None:
        """Save a cell that runs on with what there is; a failure is told at its end."""
        if self._owner.keeps_notebook and run.request is not None:
            with contextlib.suppress(NotebookError, ServerError):
                self._write(run, None)

    def _save(self, run: Run, outcome: Outcome) -> None:
        """Save a cell that ended. The result is delivered, whatever happens here."""
        if not self._owner.keeps_notebook:
            return

        try:
            saved = self._write(run, outcome)
        except InterpreterError as err:
            run.fail(f"The cell is not saved: {err}. The next call tries again")
        except Exception as err:  # A defect of ours must not lose the result.
            log.exception("Session %d", self._session.session_id)
            run.fail(f"The cell is not saved: {err!r}; stderr has more")
        else:
            self._tell_saved(run, saved)

    def _tell_saved(self, run: Run, saved: Saved) -> None:
        text = saved.value.format(self._path)
        if saved is Saved.ANEW:
            run.note(text)
        elif saved is not Saved.WELL:
            run.fail(text)

    def _write(self, run: Run, outcome: Outcome | None) -> Saved:
        """Write the cell, and its full text beside the notebook if that is long."""
        limit = self._settings.max_output
        with run.lock:
            outputs = run.late.items() + run.outputs.items()
            has_late = bool(run.late.items())
            is_long = run.outputs.is_long(limit)

        if has_late:
            outputs.insert(0, stream_output("stdout", [EARLIER + "\n"]))

        note = Note("", run.outputs.not_kept)
        if is_long:
            text_path = self._session.text_path(run)
            pieces = [piece_of(text).escaped for text in full_text(outputs)]
            with contextlib.suppress(ServerError):  # The cell is saved all the same.
                self._client.write(text_path, pieces)
                note = Note(FULL_TEXT.format(text_path), run.outputs.not_kept)

        ours = {"folder": run.folder, "ended_in": run.ended_in}
        if outcome is not None:
            ours["outcome"] = outcome.value

        cell = {
            "cell_type": "code",
            "id": run.cell_id,
            "source": run.source,
            "execution_count": run.execution_count,
            "metadata": {"execution": run.timing, MARK: ours},
            "outputs": notebook_outputs(outputs, limit, note),
        }
        return self._notebook.save(cell)


# --- Session --------------------------------------------------------------------------

STUBBORN = "The code did not stop within {:g} s, it may ignore interrupts: {}"
NOTHING_RAN = "Nothing ran in session {}"
NO_KERNEL = "Session {} has no kernel: nothing runs"
ENDING = "Not run: the MCP server ends"
ENDS_WAIT = "Waits no longer: the kernel is ended as asked"
WITHDRAWN = "Not run: it was withdrawn before it began"
STILL_SAVED = "The code has ended; its cell is still being saved"
SKIPPED = "The restore goes on without {}"
GOES_TO_ITS_CALL = "Stopped; the call that waits for the code returns its output"
IS_SHUT_DOWN = (
    "The kernel of session {} is shut down: its variables are gone, its notebook stays"
)
RESTARTED = "The kernel of session {} was restarted"
ONE_OF_THEM = "Nothing was done: give restart or shutdown, not both"


class Session:
    """One session, for its callers: submit, wait for `run.ended`, collect.

    The queue is *waiting*, *current* and *finished*; it changes only in `submit`,
    `begin_next`, `end_current` and `_take`, under the lock, which the runs share. The
    worker's thread lives while there is something to do, and IDLE_S longer.
    """

    def __init__(
        self,
        owner: "Interpreter",
        session_id: int,
        *,
        is_new: bool,
        kernel_name: str = "",
    ) -> None:
        self.owner = owner
        self.session_id = session_id
        self.kernel_name = kernel_name or owner.settings.kernel_name
        self.path = posixpath.join(owner.folder, f"{session_id}.ipynb")
        self.lock = threading.Condition()
        self._waiting: list[Run] = []
        self._current: Run | None = None
        # Not yet collected, in the order in which they ended.
        self._finished: list[Run] = []
        # Nothing begins while a kernel is ended that a caller wants to be ended.
        self._is_held = False
        self._thread: threading.Thread | None = None
        self.worker = Worker(self, is_new=is_new)

    # The queue

    def submit(self, code: str, *, is_first: bool = False) -> Run:
        """Queue code, as the last or the first that waits; returns at once."""
        run = Run(code, self.lock)
        with self.lock:
            if self.owner.is_closing:
                run.withdraw(ENDING)
                return run

            if self._thread is None:
                thread = threading.Thread(target=self.worker.work, daemon=True)
                thread.start()
                self._thread = thread

            if is_first:
                self._waiting.insert(0, run)
            else:
                self._waiting.append(run)
            self.lock.notify_all()

        return run

    def begin_next(self, timeout_s: float) -> Run | None:
        """Return the run whose turn it is, if one comes in time. For the worker."""
        with self.lock:
            self.lock.wait_for(
                lambda: (self._waiting and not self._is_held) or self.owner.is_closing,
                timeout_s,
            )
            while self._waiting and not self._is_held and not self.owner.is_closing:
                run = self._waiting.pop(0)
                if not run.is_withdrawn:
                    self._current = run
                    return run

        return None

    def end_current(self, run: Run, outcome: Outcome) -> None:
        """Note that a run ended, and how. For the worker."""
        with self.lock:
            run.finish(outcome)
            self._current = None
            self._finished.append(run)
            self.lock.notify_all()

    def _take(self, own: Run | None, timeout_s: float) -> list[Taken]:
        """Take what no call has seen yet: of earlier runs, then of the call's own.

        Args:
            own: The call's run; None: an interrupt, which takes what was left.
            timeout_s: How long the call waited.
        """
        with self.lock:
            ahead = self._ahead_of(own)
            takes_earlier = True
            if own is not None:
                takes_earlier = self._leave(own, ahead, timeout_s)

            taken = []
            for run in ahead:
                if run.is_abandoned and takes_earlier:
                    is_marked = own is not None and not own.only_waits
                    taken.append(self._taken_of(run, EARLIER if is_marked else ""))

            if own is not None:
                taken.append(self._taken_of(own, ""))

            self._finished = [run for run in self._finished if not run.is_collected]

        return taken

    def _ahead_of(self, own: Run | None) -> list[Run]:
        """Return the runs that came before one, in order."""
        runs = list(self._finished)
        if self._current is not None:
            runs.append(self._current)
        if own in runs:
            return runs[: runs.index(own)]
        return runs

    def _leave(self, own: Run, ahead: list[Run], timeout_s: float) -> bool:
        """Note that the call of a run returns, and say what becomes of the run.

        Returns: Whether the call takes the rest of earlier runs.
        """
        own.is_abandoned = True
        own.save_at = 0.0  # The notebook shows what this call shows.
        if own.ended.done():
            return True

        settings = self.owner.settings
        wait_words = settings.hints.wait.format(session_id=self.session_id)
        stop_words = settings.hints.stop.format(session_id=self.session_id)
        is_behind = own.stage is Stage.WAITING and any(
            not run.ended.done() for run in ahead
        )
        if is_behind or (own.stage is Stage.QUEUED and timeout_s > 0):
            if own.only_waits:
                at_work = self._current or own
                text = STILL.format(timeout_s, at_work.words, wait_words, stop_words)
                own.errors.append(text)
                own.is_withdrawn = True
                return True

            own.withdraw(NOT_RUN.format(timeout_s, wait_words, stop_words))
            return False

        if settings.is_one_shot and own.stage in BEFORE_RUNNING:
            own.withdraw(TOO_LATE.format(timeout_s, own.words))
            return False

        own.errors.append(STILL.format(timeout_s, own.words, wait_words, stop_words))
        return True

    def _taken_of(self, run: Run, mark: str) -> Taken:
        late = run.late.take_new(has_ended=True)
        late_errors = [EARLIER + error_text(o) for o in late if "traceback" in o]
        taken = Taken(
            mark=mark,
            notes=run.notes,
            late=[output for output in late if "traceback" not in output],
            items=run.outputs.take_new(has_ended=run.ended.done()),
            errors=late_errors + run.take_errors(),
            not_kept=run.outputs.not_kept,
            text_path=self.text_path(run) if run.outputs.is_long(self.limit) else "",
        )
        run.notes = []
        run.is_collected = run.ended.done()
        return taken

    def keep(self, run: Run) -> None:
        """Keep what was heard between two calls for the next one."""
        run.is_abandoned = True
        run.finish(Outcome.ENDED_WELL)
        with self.lock:
            if run.late.items():
                self._finished.append(run)

    def give_up_waiting(self) -> None:
        """End what waits: this process ends. For the worker."""
        with self.lock:
            for run in self._waiting:
                run.withdraw(ENDING)
            self._waiting = []

    def has_errors_to_tell(self) -> bool:
        """Return whether earlier code ended with an error that no call has seen."""
        with self.lock:
            return any(run.errors for run in self._finished if run.is_abandoned)

    def may_end(self) -> bool:
        """Return whether the worker's thread may end, which then is no more."""
        with self.lock:
            if self._waiting:
                return False
            self._thread = None
            return True

    def close(self, deadline: float) -> None:
        """Wait until the worker has let go of what runs, and saved it."""
        with self.lock:
            self.lock.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))

    # Calls

    @property
    def limit(self) -> int:
        return self.owner.settings.max_output

    def text_path(self, run: Run) -> str:
        """Where on the server the full text of a long output is."""
        return f"{self.path.removesuffix('.ipynb')}-{run.cell_id}.txt"

    def execute(self, code: str, timeout_s: float | None = None) -> Result:
        """Run one cell and wait for it.

        Args:
            timeout_s: Seconds to wait; None waits for the end.
        """
        run = self.submit(code)
        try:
            wait([run.ended], timeout_s)
        except KeyboardInterrupt:
            run.is_abandoned = True  # `interrupt` hands its output back.
            raise
        return self.collect(run, timeout_s or 0.0)

    def collect(self, run: Run, timeout_s: float) -> Result:
        """Return what a call hands back: the rest of earlier runs, then its own."""
        taken = self._take(run, timeout_s)
        could_not_run = run.outcome is Outcome.NEVER_RAN
        return self._render(taken, could_not_run=could_not_run)

    def current(self) -> Run | None:
        """Return the run that the worker takes to its end now."""
        with self.lock:
            return self._current

    def newest_line(self) -> str:
        """The newest line of what runs, for progress."""
        run = self.current()
        if run is None:
            return Stage.WAITING.value
        return run.newest_line()

    def interrupt(self, *, restart: bool = False, shutdown: bool = False) -> Result:
        """Stop what runs, and hand back the rest of its output.

        Args:
            restart: Restart the kernel, too, and restore the session.
            shutdown: End the kernel, too.
        """
        if restart and shutdown:
            return self._render([message_taken([], [ONE_OF_THEM])], could_not_run=True)

        try:
            if restart or shutdown:
                return self._end_kernel(restart=restart)
            return self._stop()
        except (ServerError, KernelError) as err:
            return self._render([message_taken([], [str(err)])], could_not_run=True)

    def _stop(self) -> Result:
        with self.lock:
            # What was withdrawn before it began is current until the worker looks up.
            self.lock.wait_for(self._is_withdrawn_no_more, INTERRUPT_S)
            run = self._current
        notes: list[str] = []
        errors: list[str] = []
        if run is None or (run.stage is Stage.QUEUED and run.only_waits):
            notes, errors = self._stop_foreign()
        elif run.stage is Stage.RESTORING:
            notes.append(SKIPPED.format(run.step))
            run.must_interrupt = True
        elif run.withdraw(WITHDRAWN):
            notes.append(WITHDRAWN)
        elif not self._has_stopped(run):
            is_saving = run.stage is Stage.SAVING
            errors.append(STILL_SAVED if is_saving else self._stubborn())
        elif not run.is_abandoned:
            notes.append(GOES_TO_ITS_CALL)

        taken = self._take(None, 0.0)
        return self._render([*taken, message_taken(notes, errors)], could_not_run=False)

    def _is_withdrawn_no_more(self) -> bool:
        run = self._current
        return run is None or not run.is_withdrawn or run.stage not in BEFORE_RUNNING

    def _has_stopped(self, run: Run) -> bool:
        """Wait until a run that is to be interrupted ended; return whether it did."""
        wait([run.ended], INTERRUPT_S)
        return run.ended.done()

    def _stubborn(self) -> str:
        restart = self.owner.settings.hints.restart
        return STUBBORN.format(INTERRUPT_S, restart.format(session_id=self.session_id))

    def _stop_foreign(self) -> tuple[list[str], list[str]]:
        """Interrupt what runs in the kernel although no run of ours does.

        Returns: Notes and errors.
        """
        client = self.owner.client
        kernel_id = self.kernel_id()
        model = None
        if kernel_id:
            with contextlib.suppress(NotFound):
                model = client.kernel(kernel_id)

        if model is None:
            return [NO_KERNEL.format(self.session_id)], []
        if model.execution_state != "busy":
            return [NOTHING_RAN.format(self.session_id)], []

        client.command(kernel_id, "interrupt")
        run = self.current() or self.submit("", is_first=True)
        run.is_abandoned = True
        if self._has_stopped(run):
            return [], []
        return [], [self._stubborn()]

    def kernel_id(self) -> str:
        """Return the id of the session's kernel, "" without one."""
        if self.worker.kernel.kernel_id and not self.worker.kernel.lost:
            return self.worker.kernel.kernel_id
        try:
            model = self.owner.client.bound_kernels().get(self.path)
        except ServerRefused:
            return ""  # Gateways may not tell.
        return model.kernel_id if model is not None else ""

    def _end_kernel(self, *, restart: bool) -> Result:
        """Interrupt what runs, then restart the kernel or shut it down.

        Meanwhile nothing begins that waits; it runs in the kernel that comes after.
        """
        deadline = time.monotonic() + RESTART_S
        with self.lock:
            self._is_held = True
            current = self._current
        try:
            if current is not None:
                current.withdraw(ENDS_WAIT if current.only_waits else WITHDRAWN)
                with self.lock:
                    self.lock.wait_for(lambda: self._current is None, INTERRUPT_S)
            kernel_id = self.kernel_id()
            if not kernel_id:
                note = message_taken([NO_KERNEL.format(self.session_id)], [])
                return self._render([note], could_not_run=False)
            self._end_now(kernel_id, restart=restart)
            # Before all that waits: its call tells of the restore.
            own = self.submit("", is_first=True) if restart else None
        finally:
            with self.lock:
                self._is_held = False
                self.lock.notify_all()

        if own is None:
            text = IS_SHUT_DOWN.format(self.session_id)
            if self.owner.may_restore:
                text += "; the next call restores the session"
            note = message_taken([text], [])
            if current is not None:
                wait([current.ended], INTERRUPT_S)
            return self._render([*self._take(None, 0.0), note], could_not_run=False)

        wait([own.ended], max(0.0, deadline - time.monotonic()))
        note = message_taken([RESTARTED.format(self.session_id)], [])
        taken = self._take(own, RESTART_S)
        return self._render([note, *taken], could_not_run=False)

    def _end_now(self, kernel_id: str, *, restart: bool) -> None:
        """Have the server end the kernel; whoever waits for it learns of it."""
        kernel = self.worker.kernel
        kernel.was_asked_to_end = True
        try:
            if restart:
                self.owner.client.command(kernel_id, "restart", RESTART_S)
            else:
                self.owner.client.delete(kernel_id)
        except NotFound:
            pass  # Somebody was faster.
        except ServerError:
            kernel.was_asked_to_end = False
            raise
        kernel.lost = ENDED_AS_ASKED

    def _render(self, taken: list[Taken], *, could_not_run: bool) -> Result:
        """Make a result of what was taken; here nothing is locked."""
        report = Report(self.owner.settings)
        for each in taken:
            try:
                report.add(each)
            except Exception:  # A defect must not lose the rest.
                log.exception("Session %d", self.session_id)
                report.errors.append(NOT_SHOWN)
        where = ""
        if self.owner.keeps_notebook:
            where = self.path
        return report.finish(self.session_id, where, could_not_run=could_not_run)


def message_taken(notes: list[str], errors: list[str]) -> Taken:
    """Return what a call has to say without a run."""
    return Taken("", notes, [], [], errors)


def short_time(last_modified: str | None) -> str:
    """Return the server's time as people read it: 2026-11-25 10:03 UTC."""
    try:
        text = str(last_modified).replace("Z", "+00:00")
        moment = datetime.fromisoformat(text).astimezone(timezone.utc)
    except ValueError:
        return "at an unknown time"
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def session_line(
    path: str, text: str, modified: str, kernel: KernelModel | None
) -> str:
    """Return what `list_sessions` says of one session."""
    name = posixpath.basename(path).removesuffix(".ipynb")
    state = "no kernel"
    if kernel is not None:
        state = f"kernel {kernel.name} {kernel.execution_state}"
    try:
        count, first_line = summary(text, path)
    except NotebookError:
        return f"{name}: {short_time(modified)}, not readable as a notebook, {state}"
    return f"{name}: {short_time(modified)}, {count} cells, {state}: {first_line}"


NOT_SHOWN = "An output could not be shown (internal error); it is in the notebook"


class Report:
    """What one call hands back, of all runs that it collects."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.errors: list[str] = []
        self._shown = Shown()
        self._files: list[str] = []
        self._not_kept = 0

    def add(self, taken: Taken) -> None:
        """Render what was taken of a run, each text behind its mark."""
        self._shown.texts += taken.notes
        self._shown.add(taken.late, EARLIER)
        self._shown.add(taken.items, taken.mark)
        for text in taken.errors:
            self.errors.append(taken.mark + text)

        self._not_kept += taken.not_kept
        if taken.text_path:
            self._files.append(taken.text_path)

    def finish(self, session_id: int, notebook: str, *, could_not_run: bool) -> Result:
        """Make the result, which is cut to its limit here, once."""
        place = " and ".join(self._files) or notebook
        if place:
            place = FULL_TEXT.format(place)

        make = compose
        if self._settings.is_plain:
            make = compose_plain

        text = make(
            session_id,
            self.errors,
            self._shown.texts,
            self._settings.max_output,
            Note(place, self._not_kept),
        )
        return Result(text, self._shown.images, self.errors, could_not_run)


class Interpreter:
    """All sessions on one Jupyter server. Making one checks server, token and folder.

    Raises:
        ConfigError: The kernel or the folder does not fit the server.
        ServerError: Anything else.
    """

    def __init__(
        self, client: RemoteJupyterClient, settings: Settings | None = None
    ) -> None:
        self.client = client
        self.settings = settings or Settings()
        in_thread(install_code)  # Made while the server answers: it takes 0.1 s.
        self.specs = client.kernelspecs()
        # This process ends: nobody stops what runs any more.
        self.is_closing = False
        # A lost session can be restored from its notebook.
        self.may_restore = False
        self._sessions: dict[int, Session] = {}
        # Its kernels may run on another machine: a gateway's speak no binary frames.
        self.has_gateway = False
        # The files on their way, and what cancels each.
        self.transfers: dict[Future[Any], threading.Event] = {}
        self.check_kernel_name(self.settings.kernel_name)

        # Bare gateways have no contents API.
        self.keeps_notebook = client.modified("") is not None
        self.folder = self._folder_below_root(self.settings.folder)
        if self.keeps_notebook:
            client.make_folder(self.folder)
            self.may_restore = self.settings.restore_limit_s > 0

    def check_kernel_name(self, name: str) -> None:
        """Raise ConfigError if the server has no such kernel; "" is its default."""
        if name and name not in self.specs:
            there_are = ", ".join(sorted(self.specs))
            raise ConfigError(f"No kernel {name!r}; there are: {there_are}")

    def session(self, session_id: int = 0, kernel_name: str = "") -> Session:
        """Return session N, or for 0 a new one; nothing is sent yet.

        Raises:
            ConfigError: The server has no such kernel.
        """
        self.check_kernel_name(kernel_name)
        is_new = session_id == 0
        if is_new:
            session_id = 10**9 + secrets.randbelow(9 * 10**9)

        made = Session(self, session_id, is_new=is_new, kernel_name=kernel_name)
        # Atomic: of two callers one makes it.
        return self._sessions.setdefault(session_id, made)

    def list_sessions(self) -> list[str]:
        """Return a line for each of the sessions last used, newest first."""
        if not self.keeps_notebook:
            return ["This server keeps no notebooks: sessions are known by id only"]

        models = []
        for model in self.client.list_folder(self.folder):
            if re.fullmatch(r"[1-9]\d*\.ipynb", str(model.get("name"))):
                models.append(model)

        models.sort(key=lambda model: str(model.get("last_modified")), reverse=True)

        kernels = self.client.bound_kernels()
        lines = []
        for model in models[:SESSIONS_LISTED]:
            path = posixpath.join(self.folder, model["name"])
            with contextlib.suppress(ServerError):
                text, modified = self.client.read(path)
                lines.append(session_line(path, text, modified, kernels.get(path)))

        return lines or ["There are no sessions yet"]

    def close(self) -> None:
        """Let go of all sessions; what runs goes on in the kernels.

        What was stopped a moment ago is stopped, and what runs is saved, for EXIT_S.
        """
        self.is_closing = True
        deadline = time.monotonic() + EXIT_S
        for session in list(self._sessions.values()):
            session.close(deadline)

        for is_cancelled in list(self.transfers.values()):
            is_cancelled.set()
        wait(list(self.transfers), max(0.0, deadline - time.monotonic()))

    def _folder_below_root(self, folder: str) -> str:
        """Return the notebooks folder relative to the server's root.

        Raises:
            ConfigError: It is not below the root.
        """
        path = folder
        if folder.startswith("/"):
            path = self._relative_to_root(folder)

        path = posixpath.normpath(path)
        if ".." in path.split("/"):
            raise ConfigError(
                f"The notebooks folder {folder!r} is not below the server's root"
            )

        return "" if path == "." else path

    def _relative_to_root(self, folder: str) -> str:
        """Ask a kernel, which is ended then: nothing else knows where the root is."""
        name = self.settings.kernel_name
        model = self.client.open_session(secrets.token_hex(9), name)
        kernel = Kernel(self.client, model.kernel_id, lambda: None)
        try:
            kernel.greet(KernelState.READY, ignore)
            return str(kernel.ask(f"relative({folder!a})").get("folder", ".."))
        finally:
            kernel.channel.drop()
            self.client.delete(model.kernel_id)


# --- Files ----------------------------------------------------------------------------

CHUNK_BYTES = 750_000  # Just below 1 MiB as base64, which is all that nginx lets pass.
WHOLE_BYTES = 32_000_000  # Without /files/ a download is held in memory.
STALL_S = 10.0  # A download that is silent for so long is taken up again.
TIDY_S = 5.0  # For tidying up over a connection that may be broken.
PARTIAL_CONTENT = 206
NAME_TAKEN = 409  # Of a renaming.
CHUNK_BODY = b'{"type":"file","format":"base64",%s"content":"%s"}'
# A link is not followed, a FIFO is not waited for. Windows has neither.
SAFE_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
FOLDER_FLAGS = SAFE_FLAGS | getattr(os, "O_DIRECTORY", 0)
LEFT = f"; {PROGRAM}-*.part (new) and .old may be left beside the file"
NOT_PLAIN = "it is no plain file; tar packs a folder"


class TransferError(InterpreterError):
    """A file cannot be copied; the text names its path and what to do."""


class TransferCancelled(InterpreterError):
    """Nobody wants the file any more: a signal within the transfer."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of the server; it is unchanged as long as this is equal."""

    size: int
    last_modified: str


@dataclass
class Transfer:
    """One file on its way between this host and the server.

    A thread copies; whoever waits for it may read how far it is, and cancel it.

    Args:
        root: The folder of this host below which files are read and written.
        folder: The notebooks folder, from the server's root.
        patience_s: How long a broken connection may stay broken.
    """

    client: RemoteJupyterClient
    root: Path
    folder: str
    patience_s: float = KERNEL_TIMEOUT_S
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    done_bytes: int = 0
    total_bytes: int = 0
    # Of the server, as it was when the copy was begun.
    seen: RemoteFile | None = None

    def words(self) -> str:
        """How far it is, for progress."""
        return f"{self.done_bytes:,} of {self.total_bytes:,} bytes"

    def upload(self, host_path: str, remote_path: str, *, overwrite: bool) -> str:
        """Copy a file of this host to the server, and return a sentence about it.

        The server renames over no file. So an old one is renamed before, and goes when
        the new one has the name: both are on the disk all the time.

        Raises:
            TransferError: Why it cannot be. ServerError: The server's reason.
            TransferCancelled: As wanted; nothing is left of the file.
        """
        target = remote_target(self.folder, remote_path)
        temporary = beside(target, "part")
        aside = beside(target, "old")
        tidy = Transfer(self.client, self.root, self.folder, TIDY_S)
        with host_source(self.root, host_path) as source, explained(target):
            with contextlib.suppress(NotFound):
                self._look(target)
                if not overwrite:
                    raise TransferError(f"{target} exists; overwrite=true replaces it")

            folder = posixpath.dirname(target)
            self._insist(lambda _: self.client.make_folder(folder))

            with contextlib.ExitStack() as undo:
                undo.callback(tidy._remove, temporary)
                self._store(source, temporary, host_path)
                if overwrite:
                    undo.callback(tidy._give_back, aside, target)
                    self._rename(target, aside)
                if not self._rename(temporary, target):
                    # It is there, or the error says that it is not.
                    self._insist(lambda _: self._look(target))
                if overwrite:
                    self._remove(aside)
                undo.pop_all()
        return f"uploaded {host_path} ({self.total_bytes:,} bytes) to {target}"

    def download(self, remote_path: str, host_path: str, *, overwrite: bool) -> str:
        """Copy a file of the server to this host, and return a sentence about it.

        The errors are those of `upload`.
        """
        source = remote_target(self.folder, remote_path)
        with explained(source):
            self._look(source)
            with host_replacement(self.root, host_path, overwrite) as file:
                self._insist(lambda _: self._fetch(source, file))
        return f"downloaded {source} ({self.total_bytes:,} bytes) to {host_path}"

    def _insist(self, action: Callable[[bool], T]) -> T:
        """Call `action(was_tried)` until the server answers, and return what it does.

        A request without an answer may have been carried out all the same: then the
        action looks what became of it before it makes the request again.
        """
        deadline = math.inf
        done_bytes = -1
        was_tried = False
        while True:
            self._check()
            try:
                return action(was_tried)
            except ServerUnreachable:
                if self.done_bytes != done_bytes:
                    deadline = time.monotonic() + self.patience_s
                if time.monotonic() > deadline:
                    raise
            done_bytes = self.done_bytes
            was_tried = True
            self.is_cancelled.wait(RETRY_S)

    def _check(self) -> None:
        if self.is_cancelled.is_set():
            raise TransferCancelled("The transfer was cancelled.")

    def _look(self, path: str) -> RemoteFile:
        """Return what the server says of a file; NotFound if there is none."""
        model = self.client.request("GET", f"contents/{quote(path)}?content=0")
        return parse_remote_file(path, model)

    def _store(self, source: BinaryIO, path: str, host_path: str) -> None:
        """Copy an open file to a new file of the server, chunk by chunk."""
        before = os.fstat(source.fileno())
        self.total_bytes = before.st_size
        is_last = False
        while not is_last:
            chunk = source.read(CHUNK_BYTES)
            is_last = not chunk or self.done_bytes + len(chunk) >= self.total_bytes
            self._append(path, chunk, is_last)
            self.done_bytes += len(chunk)

        if os.fstat(source.fileno()).st_mtime_ns != before.st_mtime_ns:
            raise changed(host_path)

    def _append(self, path: str, chunk: bytes, is_last: bool) -> None:
        """Send one chunk; -1 is the number of the last one, if there are several.

        Source: api.yaml, PUT /api/contents; jupyter_server, largefilemanager.py.
        """
        offset = self.done_bytes
        number = offset // CHUNK_BYTES + 1
        if is_last:
            number = -1
        name = b""
        if self.total_bytes > CHUNK_BYTES:
            name = b'"chunk":%d,' % number
        body = CHUNK_BODY % (name, base64.b64encode(chunk))

        def put(was_tried: bool) -> RemoteFile:
            # The first chunk begins the file, so it may come twice; others may not.
            if was_tried and offset:
                found = self._look(path)
                if found.size != offset:
                    return found
            model = self.client.request("PUT", f"contents/{quote(path)}", body)
            return parse_remote_file(path, model)

        size = self._insist(put).size
        expected = offset + len(chunk)
        if size != expected:
            text = f"{path} has {size:,} bytes on the server in place of {expected:,}"
            raise TransferError(f"{text}: upload it again")

    def _rename(self, old: str, new: str) -> bool:
        """Rename a file, if it is there; the server refuses a name that is taken.

        Returns: Whether the server says so. What has the name a moment later says
            nothing: another upload may have set ours aside by then.
        """

        def patch(_: bool) -> None:
            # It is not there any more if a first try was carried out.
            self._look(old)
            self.client.request("PATCH", url, {"path": new}, cure=LEFT)

        url = f"contents/{quote(old)}"
        try:
            self._insist(patch)
            return True
        except NotFound:
            return False

    def _give_back(self, aside: str, target: str) -> None:
        """Give a file its name back; it goes if the name is taken by another one.

        Two uploads to one name, or an upload and a person, can each put a file there
        while the other's is set aside. Who sets a file aside gives it back or puts
        another in its place: so the name is never without one in the end.
        """
        try:
            self._rename(aside, target)
        except ServerError as err:
            if err.status != NAME_TAKEN:
                raise
            self._remove(aside)

    def _remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        url = f"contents/{quote(path)}"
        with contextlib.suppress(NotFound):
            self._insist(lambda _: self.client.request("DELETE", url, cure=LEFT))

    def _fetch(self, path: str, file: BinaryIO) -> None:
        """Copy a file of the server to an open file, from where the copy ends.

        /files/ tells to the second when a file was changed, the contents API exactly:
        that is asked before and after. A file that changes at a break is begun anew.
        """
        found = self._look(path)
        if found != self.seen:
            file.seek(0)
        self.seen = found
        self.total_bytes = found.size

        try:
            if file.tell() < found.size:
                self._read_on(path, file)
        except ServerUnreachable:
            raise
        except ServerError:
            # The server, or a proxy before it, does not serve /files/.
            self._read_whole(path, file)

        file.truncate()
        if file.tell() != found.size or self._look(path) != found:
            raise changed(path)

    def _read_on(self, path: str, file: BinaryIO) -> None:
        """Read a file by /files/, which gives parts, too.

        Raises:
            ServerUnreachable: It broke off; what came is in the copy.
        """
        url = f"files/{quote(path)}"
        # To its present end: of a file that grows the server would send ever more.
        span = f"bytes={file.tell()}-{self.total_bytes - 1}"
        headers = {"Accept-Encoding": "identity", "Range": span}
        response = self.client.send("GET", url, headers=headers, timeout_s=STALL_S)
        with response:
            if response.status_code != PARTIAL_CONTENT:
                file.seek(0)
            try:
                for piece in response.iter_content(PIECE_BYTES):
                    self._check()
                    file.write(piece)
                    self.done_bytes = file.tell()
                    if self.done_bytes > self.total_bytes:
                        raise changed(path)
            except requests.RequestException as err:
                raise no_answer(f"GET {url}", err, STALL_S) from err

    def _read_whole(self, path: str, file: BinaryIO) -> None:
        """Read a file by the contents API, which gives it in one piece."""
        if self.total_bytes > WHOLE_BYTES:
            text = f"{path} has {self.total_bytes:,} bytes; this server does not serve "
            text += f"/files/, without which {WHOLE_BYTES:,} can pass"
            raise TransferError(text)

        url = f"contents/{quote(path)}?type=file&format=base64"
        model = self.client.request("GET", url, max_bytes=2 * WHOLE_BYTES)
        try:
            content = base64.b64decode(model["content"])
        except (TypeError, KeyError, ValueError) as err:
            raise malformed(path) from err
        file.seek(0)
        file.write(content)


def changed(path: str) -> TransferError:
    return TransferError(f"{path} was changed while it was copied; copy it again")


def malformed(path: str) -> ProtocolError:
    return ProtocolError(f"The server's answer about {path} is malformed")


def parse_remote_file(path: str, model: Any) -> RemoteFile:
    """Return what the contents API says of a file.

    Raises:
        TransferError: It is a folder. ProtocolError: The answer is malformed.
    """
    try:
        if model["type"] == "directory":
            raise TransferError(f"{path} is a folder: name a file; tar packs a folder")
        return RemoteFile(int(model["size"]), str(model["last_modified"]))
    except (TypeError, KeyError, ValueError, OverflowError) as err:
        raise malformed(path) from err


def remote_target(folder: str, remote_path: str) -> str:
    """Return a path from the server's root, given one from the notebooks folder."""
    path = posixpath.normpath(posixpath.join(folder, remote_path))
    if re.search(r"[\x00-\x1f]", remote_path):
        raise TransferError(f"{remote_path!r} is no path: it has control characters")
    if remote_path.startswith("/") or path.split("/")[0] == "..":
        text = f"{remote_path} is not below the server's root; give a path relative to "
        raise TransferError(f"{text}the notebooks folder")
    return path.lstrip("/")


def beside(path: str, kind: str) -> str:
    """Return an unused name in the same folder, short whatever the file's name is."""
    name = f"{PROGRAM}-{secrets.token_hex(4)}.{kind}"
    return posixpath.join(posixpath.dirname(path), name)


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Tell why a server refuses a hidden file, or has no file."""
    try:
        yield
    except ServerError as err:
        if "/." in f"/{path}" and err.status in (400, 403, 404):
            text = f"{path} is hidden (a dot), and servers refuse that; use another "
            text += "name, or start the server with --ContentsManager.allow_hidden=True"
        elif isinstance(err, NotFound):
            text = f"The server has no {path}; paths are relative to the notebooks "
            text += "folder (a kernel gateway has no files at all)"
        else:
            raise
        raise TransferError(text) from err


@contextlib.contextmanager
def host_source(root: Path, host_path: str) -> Iterator[BinaryIO]:
    """Open a file of this host to read it."""
    with host_place(root, host_path) as place, place.open(place.name, "rb") as file:
        yield file


@contextlib.contextmanager
def host_replacement(root: Path, host_path: str, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a new file, which takes its place when it was written without error."""
    with host_place(root, host_path, is_made=True) as place:
        place.check_free(overwrite)

        temporary = os.path.join(os.path.dirname(place.name), beside("", "part"))
        folders = {"src_dir_fd": place.folder, "dst_dir_fd": place.folder}
        try:
            with place.open(temporary, "xb") as file:
                yield file
            place.check_free(overwrite)
            os.replace(temporary, place.name, **folders)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=place.folder)


@dataclass(frozen=True)
class HostPlace:
    """A name in a folder that is held open, so that no swapped link leads elsewhere.

    Args:
        folder: Its descriptor; None on Windows, where `name` is a whole path.
    """

    folder: int | None
    name: str

    def open(self, name: str, mode: str) -> BinaryIO:
        """Open a plain file in this folder; anything else is an OSError."""

        def opener(name: str, flags: int) -> int:
            descriptor = os.open(name, flags | SAFE_FLAGS, 0o666, dir_fd=self.folder)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(NOT_PLAIN)
            return descriptor

        return cast(BinaryIO, open(name, mode, opener=opener))

    def check_free(self, overwrite: bool) -> None:
        """Raise OSError if no file may be put here."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(NOT_PLAIN)
            if not overwrite:
                raise OSError("it exists; overwrite=true replaces it")


@contextlib.contextmanager
def host_place(
    root: Path, host_path: str, *, is_made: bool = False
) -> Iterator[HostPlace]:
    """Hold the folder of a file below `root` open; tell what goes wrong with the file.

    Links are resolved first, and may lead anywhere below `root`; then the folders are
    opened one in another, and a link that was put there meanwhile is not followed.

    Args:
        is_made: Missing folders are created.
    """
    base = Path(os.path.realpath(root))
    try:
        path = Path(os.path.realpath(base / host_path))
        if base not in path.parents:
            raise TransferError(f"{host_path} is not below {root}, see --files-dir")

        with contextlib.ExitStack() as stack:
            if os.open not in os.supports_dir_fd:
                if is_made:
                    path.parent.mkdir(parents=True, exist_ok=True)
                yield HostPlace(None, str(path))
                return

            folder = None
            for part in (str(base), *path.relative_to(base).parts[:-1]):
                if is_made:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=folder)
                folder = os.open(part, FOLDER_FLAGS, dir_fd=folder)
                stack.callback(os.close, folder)
            yield HostPlace(folder, path.name)
    except InterpreterError:
        # Some errors of the server are OSErrors, too.
        raise
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or err
        raise TransferError(f"{host_path} on this host: {reason}") from err


# --- Tools ----------------------------------------------------------------------------

# What the model reads. An order, because some clients show only the first line.
ELSEWHERE = "; the file is where the notebooks are, perhaps not where the kernel runs"
REMOTE_PATH = "relative to the notebooks folder, where cells start"
UPLOAD_FILE = (
    "Copy a file of this machine, below {}, to the Jupyter server; its bytes do not "
    f"pass through you. remote_path: {REMOTE_PATH}. Many small files: tar first."
)
DOWNLOAD_FILE = (
    "Copy a file of the Jupyter server to this machine, below {}. remote_path: "
    f"{REMOTE_PATH}. Many small files: tar first."
)
FIRST_LINE = (
    "Run Python and bash {where}, in sessions that keep their state; plots come back "
    "as pictures, and sessions outlive this conversation and this server."
)
INSTRUCTIONS = """{first_line}

Call execute_code; keep the session_id it returns and pass it to go on with the same \
variables, imports, working directory and exported variables. list_sessions finds \
earlier work.
Several things at once: start each in a session of its own with timeout=0, then \
collect with code="" and its session_id.
Long work: a call returns after its timeout, the code runs on; code="" waits for the \
rest, interrupt_execution stops it.
Session N is the notebook {folder}N.ipynb on the server. A person can open it at \
{base_url}/lab/tree/{folder}N.ipynb and go on in the same kernel.
{kernels}"""
EXECUTE_CODE = """Run Python or bash {where}.

Returns JSON {{"session_id", "error", "result"}}, then a picture for each plot. error \
is empty if all went well. State lasts: pass the returned session_id to go on.
Python is an IPython cell: the last value is returned, `%pip install` works. Bash is \
recognised (`ls -la`, whole scripts); %%bash on the first line forces it. input() is \
not available."""
INTERRUPT_EXECUTION = """Stop what runs in a session and return the rest of its output.

Variables stay. What has not begun is withdrawn."""
CODE_FIELD = "Python or bash; empty waits for what runs"
TIMEOUT_FIELD = "Seconds this call waits; the code runs on; 0 returns at once"
LIST_SESSIONS = """List the sessions last used: id, when, cells, kernel, first line.

Use it to find earlier work, or when the session_id was lost."""

TIMED_OUT = re.compile(r"time[d ]*-?out|-32001", re.IGNORECASE)  # A client's reason.
HALF_CHARACTER = re.compile(rb"\\ud[89a-f]", re.IGNORECASE)  # An escaped surrogate.


class Stdin:
    """Standard input for the SDK, line by line; what it would lose is seen here first.

    At the end of stdin the SDK cancels the handlers as if somebody had pressed stop. A
    cancellation can say that the client's time is over. And the SDK drops a line with
    half a surrogate pair without an answer.
    """

    def __init__(
        self, on_end: Callable[[], None], on_stop: Callable[[str], None]
    ) -> None:
        self._file = open(os.dup(0), "rb")  # noqa: SIM115  # Open to the end.
        self._on_end = on_end
        # Takes the id of a request that a user stopped: none whose time was over, and
        # none that the SDK cancels at the end of stdin. Clients that are stopped end
        # this process a moment later, so it does not wait for the SDK.
        self._on_stop = on_stop

    def readline(self) -> str:
        line = self._file.readline()
        if not line:
            self._on_end()

        if HALF_CHARACTER.search(line):
            with contextlib.suppress(ValueError, RecursionError):
                line = dump(json.loads(line)).encode("utf-8", "replace") + b"\n"

        if b"cancelled" in line:
            self._note_reason(line)

        return line.decode("utf-8", "replace")

    def _note_reason(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            note = json.loads(line)
            params = note.get("params") or {}
            is_stop = not TIMED_OUT.search(str(params.get("reason")))
            if is_stop and note.get("method") == "notifications/cancelled":
                self._on_stop(str(params.get("requestId")))


class Stdout(io.FileIO):
    """A pipe that takes everything when nobody reads it: the end of stdin follows."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def serve(interpreter: Interpreter) -> None:
    """Serve MCP on stdin and stdout until stdin ends, with the SDK's 1.x or 2.x."""
    import anyio
    from mcp.server.stdio import stdio_server

    def client_left() -> None:
        interpreter.is_closing = True  # It leaves its code running: nothing is stopped.

    pipe = io.BufferedWriter(Stdout(os.dup(1), "wb"))
    stdout = io.TextIOWrapper(pipe, "utf-8")
    os.dup2(2, 1)  # What is printed past the SDK must not reach the client.
    sdk, server, lowlevel = make_server(interpreter)
    tools = Tools(interpreter, server)
    add_tools(tools, sdk)
    if interpreter.settings.files_dir is not None:
        add_file_tools(tools, sdk)
    stdin = Stdin(client_left, tools.stop)

    async def run() -> None:
        source: Any = anyio.wrap_file(cast("Any", stdin))
        target = anyio.wrap_file(stdout)
        async with stdio_server(source, target) as (incoming, outgoing):
            options = lowlevel.create_initialization_options()
            await lowlevel.run(incoming, outgoing, options)

    anyio.run(run)


def make_server(interpreter: Interpreter) -> tuple[Any, Any, Any]:
    """Return the SDK, its server, and the lower level of that, with tools only."""
    is_modern = importlib.util.find_spec("mcp.server.mcpserver") is not None
    instructions = instructions_for(interpreter)
    if is_modern:
        sdk: Any = importlib.import_module("mcp.server.mcpserver")
        server = sdk.MCPServer(PROGRAM, instructions=instructions, log_level="WARNING")
        lowlevel = server._lowlevel_server
        handlers = lowlevel._request_handlers
    else:
        sdk = importlib.import_module("mcp.server.fastmcp")
        server = sdk.FastMCP(PROGRAM, instructions=instructions, log_level="WARNING")
        lowlevel = server._mcp_server
        handlers = lowlevel.request_handlers

    lowlevel.version = __version__

    # No empty prompts and resources: clients would ask for them. 2.x names handlers by
    # method, 1.x by the class of the request.
    for method in list(handlers):
        name = method if isinstance(method, str) else method.__name__
        if re.search("prompts?|resources?", name, re.IGNORECASE):
            del handlers[method]

    return sdk, server, lowlevel


def where_code_runs(settings: Settings) -> str:
    if settings.is_local:
        return "on this machine"
    return "on a remote Jupyter server, not on this machine"


def instructions_for(interpreter: Interpreter) -> str:
    """Return what a model reads before it sees a tool; at most 1,500 characters."""
    kernels = ""
    if len(interpreter.specs) > 1:
        names = ", ".join(sorted(interpreter.specs))[:300]
        kernels = f"Kernels (kernel_name of a new session): {names}."

    folder = f"{interpreter.folder}/" if interpreter.folder else ""
    text = INSTRUCTIONS.format(
        first_line=FIRST_LINE.format(where=where_code_runs(interpreter.settings)),
        folder=folder,
        base_url=interpreter.client.base_url,
        kernels=kernels,
    )
    return text.strip()[:1500]


def none_is(default: Any) -> Any:
    """Return a validator that takes null as the default: some clients send it."""
    from pydantic import BeforeValidator

    return BeforeValidator(lambda value: default if value is None else value)


def add_tools(tools: "Tools", sdk: Any) -> None:
    """Register the tools that run code.

    The annotations of the functions in here become the schema that clients are sent.
    """
    from pydantic import Field

    interpreter = tools.interpreter
    settings = interpreter.settings
    kernels = ", ".join(sorted(interpreter.specs))[:400]
    code_field = Annotated[str, Field(description=CODE_FIELD)]
    open_field = Annotated[
        int,
        none_is(0),
        Field(ge=0, le=MAX_SESSION_ID, description="0 opens a new session"),
    ]
    session_field = Annotated[int, Field(ge=1, le=MAX_SESSION_ID)]
    seconds_field = Annotated[
        float, none_is(settings.timeout_s), Field(ge=0, description=TIMEOUT_FIELD)
    ]
    kernel_field = Annotated[
        str, none_is(""), Field(description=f"Of a new session: {kernels}")
    ]
    switch_field = Annotated[bool, none_is(False)]

    async def execute_code(
        code: code_field,
        ctx: sdk.Context,
        session_id: open_field = 0,
        timeout: seconds_field = settings.timeout_s,
    ) -> Any:
        return await tools.run_code(code, session_id, timeout, "", ctx)

    async def execute_code_(
        code: code_field,
        ctx: sdk.Context,
        session_id: open_field = 0,
        timeout: seconds_field = settings.timeout_s,
        kernel_name: kernel_field = settings.kernel_name,
    ) -> Any:
        return await tools.run_code(code, session_id, timeout, kernel_name, ctx)

    async def interrupt_execution(
        session_id: session_field,
        ctx: sdk.Context,
        restart: switch_field = False,
        shutdown: switch_field = False,
    ) -> Any:
        session = interpreter.session(session_id)
        stop = partial(session.interrupt, restart=restart, shutdown=shutdown)
        stopped = in_thread(stop)
        await tools.wait(stopped, HTTP_TIMEOUT_S, ctx, session.newest_line)
        return tools.result(stopped, session_id)

    async def list_sessions(ctx: sdk.Context) -> Any:
        def work() -> Result:
            return tools.report(interpreter.list_sessions())

        listed = in_thread(work)
        await tools.wait(listed, HTTP_TIMEOUT_S, ctx, lambda: "listing")
        return tools.result(listed)

    # Where there is one kernel only, there is nothing to choose.
    run_code = execute_code_ if len(interpreter.specs) > 1 else execute_code
    description = EXECUTE_CODE.format(where=where_code_runs(settings))
    tools.add(run_code, "Run code", description)
    tools.add(interrupt_execution, "Stop code", INTERRUPT_EXECUTION)
    tools.add(list_sessions, "List sessions", LIST_SESSIONS, readOnlyHint=True)


def add_file_tools(tools: "Tools", sdk: Any) -> None:
    """Register the tools that copy files, below --files-dir."""
    from pydantic import Field

    files_dir = tools.interpreter.settings.files_dir
    switch_field = Annotated[
        bool, none_is(False), Field(description="replace a file that exists")
    ]

    async def upload_file(
        host_path: str,
        remote_path: str,
        ctx: sdk.Context,
        overwrite: switch_field = False,
    ) -> Any:
        copy = partial(Transfer.upload, host_path=host_path, remote_path=remote_path)
        return await tools.copy_file(copy, overwrite, ctx)

    async def download_file(
        remote_path: str,
        host_path: str,
        ctx: sdk.Context,
        overwrite: switch_field = False,
    ) -> Any:
        copy = partial(Transfer.download, remote_path=remote_path, host_path=host_path)
        return await tools.copy_file(copy, overwrite, ctx)

    tools.add(upload_file, "Upload a file", UPLOAD_FILE.format(files_dir))
    tools.add(download_file, "Download a file", DOWNLOAD_FILE.format(files_dir))


class Tools:
    """The tools' handlers: they wait, and all that blocks goes through a thread."""

    def __init__(self, interpreter: Interpreter, server: Any) -> None:
        self.interpreter = interpreter
        self._server = server
        # The runs whose calls wait, by the id of the request.
        self._runs: dict[str, Run] = {}

    def add(self, function: Any, title: str, description: str, **hints: bool) -> None:
        """Add one tool, with what the model reads of it."""
        from mcp.types import ToolAnnotations

        size = int(self.interpreter.settings.max_output * 1.2) + 2_000
        self._server.add_tool(
            function,
            name=function.__name__.removesuffix("_"),
            title=title,
            description=description,
            annotations=ToolAnnotations.model_validate({"title": title, **hints}),
            meta={"anthropic/maxResultSizeChars": size},
            structured_output=False,
        )

    def stop(self, request_id: str) -> None:
        """Withdraw the run of a request that a user stopped. From any thread."""
        run = self._runs.get(request_id)
        if run is not None:
            run.is_abandoned = True
            run.withdraw(None)

    async def run_code(
        self, code: str, session_id: int, timeout_s: float, kernel_name: str, ctx: Any
    ) -> Any:
        """Run one cell. Cancelled by a user it is stopped, by a time-out it runs on."""
        try:
            session = self.interpreter.session(session_id, kernel_name)
        except ConfigError as err:
            return tool_result(self.report([], [str(err)], session_id))

        run = session.submit(code)
        self._runs[str(ctx.request_id)] = run
        try:
            await self.wait(run.ended, timeout_s, ctx, session.newest_line)
            await until_cancelled(run)
            collected = in_thread(session.collect, run, timeout_s)
            result = await asyncio.wrap_future(collected)
            await until_cancelled(run)
        except asyncio.CancelledError:
            run.is_abandoned = True  # `stop` was called before if a user wanted it.
            raise
        finally:
            self._runs.pop(str(ctx.request_id), None)
        return tool_result(result)

    async def copy_file(
        self, copy: Callable[..., str], overwrite: bool, ctx: Any
    ) -> Any:
        """Upload or download a file; cancelled, it is stopped and leaves nothing."""
        interpreter = self.interpreter
        root = cast(Path, interpreter.settings.files_dir)  # Else there is no such tool.
        transfer = Transfer(interpreter.client, root, interpreter.folder)

        def work() -> Result:
            text = copy(transfer, overwrite=overwrite)
            if interpreter.has_gateway:
                text += ELSEWHERE
            return self.report([text])

        copied = in_thread(work)
        interpreter.transfers[copied] = transfer.is_cancelled
        copied.add_done_callback(interpreter.transfers.pop)
        try:
            await self.wait(copied, math.inf, ctx, transfer.words)
        except asyncio.CancelledError:
            transfer.is_cancelled.set()
            raise
        return self.result(copied)

    async def wait(
        self, future: Future[Any], max_s: float, ctx: Any, newest: Callable[[], str]
    ) -> None:
        """Wait as long as the call may, and tell the client what goes on meanwhile."""
        started = time.monotonic()
        waiter = asyncio.wrap_future(future)
        # The handler looks at `future`; asyncio would log what nobody asks `waiter`.
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
        passed_s = 0.0
        while not waiter.done() and passed_s < max_s:
            await asyncio.wait([waiter], timeout=min(max_s - passed_s, PROGRESS_S))
            passed_s = time.monotonic() - started
            if waiter.done():
                break

            try:
                await ctx.report_progress(passed_s, None, newest())
            except Exception as err:  # noqa: BLE001  # It must not lose the result.
                log.warning("Progress was not reported: %r", err)

    def result(self, future: Future[Result], session_id: int = 0) -> Any:
        """Return the SDK's result of what a thread did, or why it has none."""
        try:
            return tool_result(future.result(0))
        except (InterpreterError, FutureTimeout) as err:
            text = str(err) or "The Jupyter server does not answer"
            return tool_result(self.report([], [text], session_id))

    def report(
        self, texts: list[str], errors: Sequence[str] = (), session_id: int = 0
    ) -> Result:
        """Return what a call hands back that ran no code."""
        report = Report(self.interpreter.settings)
        report.add(message_taken(texts, list(errors)))
        return report.finish(session_id, "", could_not_run=bool(errors))


async def until_cancelled(run: Run) -> None:
    """Wait, if a user stopped the run, for the SDK to cancel its handler.

    The SDK reads the same line a moment later; its 1.x breaks if the request is
    answered meanwhile.
    """
    if run.is_unwanted:
        await asyncio.sleep(HTTP_TIMEOUT_S)


def tool_result(result: Result) -> Any:
    """Return the SDK's result: one text, then the pictures, and nothing structured."""
    from mcp.types import CallToolResult

    content: list[dict[str, Any]] = [{"type": "text", "text": result.text}]
    for mime, data in result.images:
        content.append({"type": "image", "mimeType": mime, "data": data})
    whole = {"content": content, "isError": result.could_not_run}
    return CallToolResult.model_validate(whole)


# --- Command line ---------------------------------------------------------------------

# MCP clients start servers in folders that strangers wrote, so only these names are
# read from variables and from .env: nothing there may run, start or reach more.
VARIABLES = ("JUPYTER_BASE_URL", "JUPYTER_TOKEN", "NOTEBOOKS_FOLDER")
EPILOG = (
    "JUPYTER_BASE_URL, JUPYTER_TOKEN and NOTEBOOKS_FOLDER are variables for the first "
    "three flags. A .env in the working directory may hold them; it counts only when "
    "neither flag nor variable gives URL or token. Everything else is flags only. To "
    "open the server of --local in a browser, while it runs, see what "
    "`uvx --from jupyter-server jupyter-server list` prints."
)
# The least and the most that a flag takes.
LIMITS = {
    "timeout_s": (0, 1e9),
    "max_output": (1, TEXT_KEPT),
    "restore_limit_s": (0, 1e9),
    "session_id": (0, MAX_SESSION_ID),
}
# Of the server of --local. It has no rate limits: we read all that it sends. An idle
# kernel ends after a day; its session is restored.
LOCAL_FLAGS = """
    --ip=127.0.0.1 --port=0 --allow-root --no-browser --log-level=ERROR
    --ZMQChannelsWebsocketConnection.iopub_data_rate_limit=0
    --ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=0
    --MappingKernelManager.cull_idle_timeout=86400
    --MappingKernelManager.cull_interval=3600
"""
# A person at a terminal has flags, and no tools.
FLAG_HINTS = Hints(
    wait="--execute '' --session-id {session_id} waits for the rest",
    stop="Ctrl-C stops the code that is waited for so",
)
# http://localhost:8888, https://hub/user/me@example.com/
SERVER_URL = re.compile(r"https?://[^\s/?#@\\]+(/[^\s?#\\]*)?")
# /lab, /tree/folder: where a browser is when a person copies its address.
BROWSER_PAGE = re.compile(r"/(lab|tree|notebooks|login)(/.*)?$")
# NAME=value, export NAME = "value"  # a comment
ENV_LINE = re.compile(r"\s*(?:export\s+)?(\w+)\s*=(.*)")


def check_url(text: str) -> str:
    """Return a server's URL without the last slash.

    Raises:
        ConfigError: It is none. The text is not repeated: it can be or hold a token.
    """
    address, _, query = text.partition("?")
    if "token=" in unquote(address):
        raise ConfigError("A URL holds no token: that goes to --jupyter-token")
    try:
        requests.Request("GET", address).prepare()
        (urlsplit(address).hostname or "").encode("idna")
        is_well_formed = SERVER_URL.fullmatch(address) is not None
    except (requests.RequestException, ValueError):
        is_well_formed = False

    if not is_well_formed:
        raise ConfigError("Not a server's URL: give http(s)://HOST[:PORT][/PATH]")
    if query:
        server = BROWSER_PAGE.sub("", address).rstrip("/")
        raise ConfigError(
            f"This is a browser's address: give {server} as --jupyter-base-url and "
            "what stands behind `token=` as --jupyter-token"
        )
    return text.rstrip("/?")


def check_token(text: str) -> str:
    """Return a token.

    Raises:
        ConfigError: It cannot be one. The text is not repeated.
    """
    if not re.fullmatch(r"[!-~]*", text):
        raise ConfigError("The token holds white space or what else no token has")
    return text


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name. 127.evil.example.com is one like any other.
        return host == "localhost"


def clear_text_warning(url: str, token: str) -> str | None:
    """Return a sentence if somebody can read the token on its way to a server."""
    if not token or url.startswith("https:"):
        return None

    host = urlsplit(url).hostname or ""
    proxies = requests.utils.get_environ_proxies(url)
    if requests.utils.select_proxy(url, proxies) is not None:
        return f"HTTP_PROXY can read the token; use https, or set NO_PROXY={host}"
    if not is_loopback(host):
        return f"The token travels unencrypted to {host}; use https"
    return None


def decode_text(data: bytes) -> str:
    """Return text of a file or pipe: UTF-8, or UTF-16 if its first two bytes say so."""
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    return data.decode(encoding, "replace").replace("\r\n", "\n")


def read_env_file(path: Path) -> dict[str, str]:
    """Return what the lines of a .env file assign; nothing if there is no file.

    Raises:
        ConfigError: It cannot be read.
    """
    if not path.is_file():
        return {}  # A virtual environment may have this name, too.

    try:
        text = decode_text(path.read_bytes())
    except OSError as err:
        raise ConfigError(f"{path} cannot be read: {err.strerror}") from err

    values: dict[str, str] = {}
    for line in text.splitlines():
        match = ENV_LINE.fullmatch(line)
        if match is not None:
            value = re.split(r"\s#", match[2])[0]
            values[match[1]] = value.strip().strip("\"'")
    return values


def existing_folder(text: str) -> Path:
    """Return a folder on this machine. MCP clients start no shell, so ~ is ours."""
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder on this machine")
    return path.resolve()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(PROGRAM, epilog=EPILOG, allow_abbrev=False)
    parser.description = "Give an agent a code interpreter on a Jupyter server, by MCP."
    add = parser.add_argument
    add("--jupyter-base-url", help="the server: http(s)://HOST[:PORT][/PATH]")
    add("--jupyter-token", help="its token")
    add("--notebooks-folder", help="on the server, below its root (notebooks)")
    add("--kernel-name", help="kernel of new sessions (the server's default)")
    add("--timeout", dest="timeout_s", type=float, help="how long a call waits (50)")
    add("--max-output", type=int, help="characters of one result (20000)")
    add("--restore-limit", dest="restore_limit_s", type=float, help="of a restore (60)")
    add("--no-restore", action="store_true", help="start empty when a kernel is gone")
    add("--plain", dest="is_plain", action="store_true", help="text instead of JSON")
    add("--files-dir", type=existing_folder, help="tools copy files from and to it")
    add("--ca-bundle", help="file of certificates to trust, for HTTPS and WSS")
    add("--local", type=existing_folder, nargs="?", const=".", help="serve it here (.)")
    add("--execute", metavar="CODE", help="run one cell (- reads stdin) to its end")
    add("--session-id", type=int, default=0, help="with --execute: continue it")
    add("--verbose", action="store_true", help="log each request to stderr")
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return what flags, variables and .env ask for; exit with 2 if it cannot be.

    Raises:
        ConfigError: The .env file cannot be read.
    """
    parser = make_parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        # What is no flag may be a token: it is not shown.
        flags = re.findall(r"(?<!\S)--[a-z-]+(?![^\s=])", " ".join(unknown))
        parser.error(" ".join(["unrecognized:", *flags, "..."]))

    fill_in(options, os.environ)
    given = (options.jupyter_base_url, options.jupyter_token, options.local)
    if given == (None, None, None):
        # As a whole: no token from elsewhere goes to a URL from the file.
        fill_in(options, read_env_file(Path(".env")))
    check_options(parser, options)
    return options


def fill_in(options: argparse.Namespace, values: Mapping[str, str]) -> None:
    """Give the first three flags the values of variables, where they have none yet."""
    for name in VARIABLES:
        flag = name.lower()
        if getattr(options, flag) is None and values.get(name):
            setattr(options, flag, values[name])


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with 2 if a value cannot be, or does not go with another one."""
    for name, (least, most) in LIMITS.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            flag = name.removesuffix("_s").replace("_", "-")
            parser.error(f"--{flag} must be from {least} to {most:.0f}")

    if options.session_id and options.execute is None:
        parser.error("--session-id goes with --execute: tools name their sessions")

    folder = options.notebooks_folder or ""
    if folder != folder.encode("utf-8", "replace").decode():
        parser.error("--notebooks-folder is no UTF-8")
    if folder.startswith("~"):
        parser.error("--notebooks-folder: only the server knows its ~, write it out")
    if (options.local is None) == (options.jupyter_base_url is None):
        servers = "--jupyter-base-url (or its variable, or .env) and --local"
        parser.error(f"give exactly one of {servers}")


def run_local_server() -> None:
    """Run a Jupyter server until standard input ends.

    Sent as source to a Python of its own, so it uses nothing of this module. The first
    line on standard output is the URL, written once the server listens, and a key: the
    user's secret for signing notebooks, which no project's folder can hold.
    """
    import contextlib
    import os
    import socket
    import sys
    import threading
    import uuid

    import ipykernel  # noqa: F401  # Missing, it would be missed too late.
    from jupyter_core.paths import jupyter_runtime_dir
    from jupyter_server.serverapp import ServerApp

    # What an extension prints goes to stderr.
    wire = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    class Server(ServerApp):
        async def cleanup_kernels(self) -> None:
            # It fails for a kernel that is being restarted, and the server would never
            # end. Kernels end without it, when their parent is gone.
            with contextlib.suppress(Exception):
                await super().cleanup_kernels()

    def stop_at_end_of_input() -> None:
        # The pipe closes, whatever ends the process at its other end.
        sys.stdin.read()
        app.stop()

    def tell_url() -> None:
        key = b""
        with contextlib.suppress(Exception):  # There may be no place to keep it.
            key = app.contents_manager.notary.secret
        # Without one no signature of today holds tomorrow.
        key = key or os.urandom(32)

        # Who started this may have ended already.
        with contextlib.suppress(OSError):
            print(app.connection_url, key.hex(), file=wire, flush=True)

    flags = sys.argv[1:]
    # A port that was chosen for a kernel can be taken before the kernel is there, which
    # then dies, again and again: it gets the same port each time. Sockets with a path
    # have no such race, where the system has them, and room for the path.
    folder = jupyter_runtime_dir()
    longest = os.path.join(folder, f"kernel-{uuid.uuid4()}-ipc-1")
    with contextlib.suppress(OSError, AttributeError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(longest)
        os.unlink(longest)
        flags.append("--KernelManager.transport=ipc")

    app = Server.instance()
    app.initialize(flags)
    # What is for this server is not for what runs in its kernels.
    del os.environ["JUPYTER_TOKEN"]
    del os.environ["JUPYTER_CONFIG_DIR"]
    # ZeroMQ is not to drop what the rate limits would have let through.
    app.kernel_manager.context.rcvhwm = 0
    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    # It listens when its loop runs, not before.
    app.io_loop.add_callback(tell_url)
    app.start()
    # A worker thread of a request that was cut off would keep the process for ever.
    os._exit(0)


@contextlib.contextmanager
def local_server(root: Path) -> Iterator[tuple[str, str, bytes]]:
    """Start a Jupyter server on loopback; it ends with us.

    Yields: Its URL, its token, and the key with which its user's cells are signed.

    Raises:
        ConfigError: Its packages are missing, or it did not start.
    """
    token = secrets.token_hex(24)
    program = inspect.getsource(run_local_server) + "\nrun_local_server()"
    command = [sys.executable, "-c", program, f"--ServerApp.root_dir={root}"]
    errors = None if log.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        # The user's own settings (a port, a password) are for other servers.
        settings = {"JUPYTER_TOKEN": token, "JUPYTER_CONFIG_DIR": empty}
        # Nor is an ipykernel_launcher.py of a project run as the kernel (Python 3.11
        # and newer); the helper takes this away for what the kernel starts.
        settings["PYTHONSAFEPATH"] = KernelHelper.PROGRAM
        process = subprocess.Popen(
            [*command, *LOCAL_FLAGS.split()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **settings},
            # Python looks for modules in the working directory first: a tornado.py
            # of a project must not become the server's.
            cwd=empty,
            # Ctrl-C is for us, who end it.
            start_new_session=True,
        )
        # Leaving closes its standard input, and waits for its end. While it starts,
        # nothing runs in it yet: a signal need not wait.
        with process, contextlib.ExitStack() as starting:
            starting.callback(process.kill)
            assert process.stdout is not None
            url, _, key = process.stdout.readline().decode().strip().partition(" ")
            if not url:
                raise ConfigError(
                    "--local started no server; see --verbose. It needs the extra "
                    "`local` (uv tool install 'FOLDER[local]', FOLDER being the clone) "
                    f"or jupyter-server, ipykernel and pip for {sys.executable}"
                )
            starting.pop_all()
            yield url, token, bytes.fromhex(key)


def run_cell(interpreter: Interpreter, options: argparse.Namespace) -> int:
    """Run the cell of --execute and print its result; 1 if it has an error."""
    code = options.execute or ""
    if code == "-":
        code = decode_text(sys.stdin.buffer.read())

    signal.signal(signal.SIGINT, signal.default_int_handler)
    session = interpreter.session(options.session_id)
    try:
        result = session.execute(code, options.timeout_s)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, raise_exit)
        result = session.interrupt()

    # JSON is UTF-8, whatever a terminal speaks.
    sys.stdout.buffer.write(result.text.encode("utf-8", "replace") + b"\n")
    sys.stdout.buffer.flush()
    return 1 if result.error else 0


def advice(err: ServerError, url: str, token: str) -> str:
    """Return what the failed start of a server has to do with its URL and token."""
    if isinstance(err, ServerUnreachable):
        return ""

    page = BROWSER_PAGE.search(url)
    if page is not None:
        server = url[: page.start()]
        return f"; {page[0]} is a page for browsers, try --jupyter-base-url {server}"
    if isinstance(err, ServerRefused) and not token:
        return "; no token was given, see --jupyter-token"
    return ""


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings that were given; what was not has its default."""
    names = [field.name for field in fields(Settings)]
    given = {k: v for k, v in vars(options).items() if k in names and v is not None}
    if options.notebooks_folder:
        given["folder"] = options.notebooks_folder
    if options.execute is not None:
        given["hints"] = FLAG_HINTS
        given["is_one_shot"] = True
    if options.no_restore:
        given["restore_limit_s"] = 0.0
    return Settings(**given, is_local=options.local is not None)


def connect(options: argparse.Namespace, stack: contextlib.ExitStack) -> Interpreter:
    """Return an interpreter on a server that was checked; `stack` closes it."""
    url = options.jupyter_base_url or ""
    token = options.jupyter_token or ""
    is_local = options.local is not None
    settings = settings_of(options)
    if is_local:
        url, token, key = stack.enter_context(local_server(options.local))
        settings = replace(settings, signing_key=key)

    bundle = options.ca_bundle
    client = RemoteJupyterClient(url, token, ca_bundle=bundle, is_direct=is_local)
    warning = clear_text_warning(url, token)
    if warning is not None and not is_local:
        log.warning("%s", warning)

    try:
        interpreter = Interpreter(client, settings)
    except ServerError as err:
        raise InterpreterError(f"{err}{advice(err, url, token)}") from err
    stack.callback(interpreter.close)  # It saves what runs.
    if not interpreter.keeps_notebook:
        log.warning("%s has no contents API: sessions leave no notebook", url)
    return interpreter


def raise_exit(number: int, _: FrameType | None) -> None:
    """Handle a signal: leave every block on the way, and exit."""
    raise SystemExit(128 + number)


def leave_on_signals(stack: contextlib.ExitStack) -> None:
    """Have SIGINT and SIGTERM close `stack` and end the process at once.

    The SDK's thread that reads standard input cannot be woken, so a process that serves
    does not end by unwinding. What runs is saved in a thread of its own: a signal may
    come while the main thread holds a lock. Clients send one signal after the other:
    only the first counts.
    """

    def leave(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        closing = threading.Thread(target=stack.close, daemon=True)
        closing.start()
        closing.join(2 * EXIT_S)
        os._exit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, leave)


def run(options: argparse.Namespace) -> int:
    """Check the server, then serve or run a cell; return the status to exit with."""
    with contextlib.ExitStack() as stack:
        if options.execute is not None:
            return run_cell(connect(options, stack), options)

        # Importing the SDK takes longer than the checks: side by side.
        load_sdk = threading.Thread(target=import_module, args=["mcp.server.stdio"])
        load_sdk.start()
        interpreter = connect(options, stack)
        load_sdk.join()
        leave_on_signals(stack)
        serve(interpreter)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Serve MCP or run a cell. 0: well; 1: the cause is on stderr; 2: wrong flags."""
    give_memory_back()
    logging.basicConfig(format=f"{PROGRAM}: %(message)s")  # To stderr.
    warnings.simplefilter("ignore", SyntaxWarning)  # Of cells that are parsed here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, raise_exit)

    try:
        options = parse_args(argv)
        log.setLevel(logging.DEBUG if options.verbose else logging.WARNING)
        return run(options)
    except InterpreterError as err:
        log.error("%s", err)  # noqa: TRY400  # One sentence, no traceback.
    except BrokenPipeError:
        # Nobody reads what --execute prints. Python would fail once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1


if __name__ == "__main__":
    sys.exit(main())
