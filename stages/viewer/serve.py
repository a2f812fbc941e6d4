"""A server on this machine's loopback address for the rows of whole caches, read on demand."""

from __future__ import annotations

import functools
import hmac
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import cache
from cache.plain import plain
from stages.runtime import traces
from stages.runtime.errors import UserError
from stages.viewer import gather
from stages.viewer.rollouts import Rollout, payload, tops_of
from stages.viewer.tokens import Speller

HOST = "127.0.0.1"
MOST_ROWS = 100  # of an answer
MOST_CHARACTERS = 390  # of a message, which quotes what was asked
MEANS = {"rkl": "reverse_kl", "fkl": "forward_kl", "lambda": "gate"}
NUMBERS = ("tokens", "gap", "traced_at", *MEANS)
COLUMNS = (
    "row_id",
    "prompt_id",
    "finish_reason",
    "refresh_index",
    "policy_step",
    "prompt_text",
    "completion_text",
)
Found = dict[str, Any]


class NotFoundError(ValueError):
    """There is no such run or row."""


def _noted(text: str) -> None:
    """Nothing: the page's notes have it."""


class Rows:
    """All rows of one source: a table in memory without the tokens, which are read as they are asked for."""

    def __init__(self, source: gather.Source, say: Callable[[str], None]) -> None:
        self._source, self._say = source, say
        self.snapshot: cache.Snapshot | None = cache.open(source.root) if cache.exists(source.root) else None
        self._speller = Speller(None)
        self._head: Callable[[], Any] = lambda: None
        if self.snapshot is not None:
            self._speller = gather.speller_of(self.snapshot, _noted)
            self._head = functools.cache(self.snapshot.head)
        self._traces = traces.newest_by_row(source.folder, say) if source.folder else {}

    @cached_property
    def table(self) -> pa.Table:
        """One line per readable row, in row-id order, with the numbers and texts that a list needs."""
        from stages.viewer.sample import scan

        if self.snapshot is None:
            return pa.table({name: [] for name in ("position", *NUMBERS, *COLUMNS)})
        found = scan(self.snapshot, self._say, float("inf"))
        parts = []
        for place in self.snapshot.places():
            try:
                parts.append(self.snapshot.read_columns(place, COLUMNS))
            except cache.CacheError:  # `scan` has said it
                continue
        table = pa.concat_tables(parts).sort_by("row_id")
        row_ids = table["row_id"].to_pylist()
        numbers = {
            "position": found.positions,
            "tokens": found.lengths,
            "gap": -found.gaps / np.maximum(found.lengths, 1),
            **{name: self._traced(row_ids, scalar) for name, scalar in MEANS.items()},
            "traced_at": pa.array(
                [self._traces[r].step if r in self._traces else None for r in row_ids], pa.int64()
            ),
        }
        for name, values in numbers.items():
            table = table.append_column(name, pa.array(values, from_pandas=True))
        return table

    def _traced(self, row_ids: list[str], scalar: str) -> pa.Array:
        """Mean of a quantity over the tokens of each traced row; null for others."""
        known = (self._traces.get(row_id) for row_id in row_ids)
        means = [None if trace is None else float(trace.scalars[scalar].mean()) for trace in known]
        return pa.array(means, pa.float64())

    def listed(self, asked: dict[str, str]) -> Found:
        """The rows that match `asked`, from the `from`th on, with their tokens, and how many match."""
        table = self.table.filter(self._wanted(asked)) if len(self.table) else self.table
        sort = asked.get("sort", "")
        if sort:
            table = table.sort_by(
                [(_column(sort.lstrip("-")), "descending" if sort[0] == "-" else "ascending")]
            )
        first, count = _count(asked, "from", 0), min(_count(asked, "count", 100), MOST_ROWS)
        positions = table["position"].slice(first, count).to_pylist()
        return {"total": len(table), **payload([self._read(place) for place in positions], self._speller)}

    def _read(self, position: int) -> Rollout:
        """A row without the teacher's most likely tokens."""
        assert self.snapshot is not None
        record = self.snapshot[position]
        return Rollout(record, "cache", gather.trace_of(record, self._traces))

    def _wanted(self, asked: dict[str, str]) -> pa.Array:
        table = self.table
        wanted = pa.array(np.ones(len(table), bool))
        if query := asked.get("query"):
            texts = [
                pc.match_substring(table[n], query, ignore_case=True)
                for n in ("completion_text", "prompt_text")
            ]
            ids = [pc.starts_with(table[name], query) for name in ("row_id", "prompt_id")]
            wanted = pc.or_(pc.or_(*texts), pc.or_(*ids))
        for name in ("refresh", "step"):
            if name in asked:
                wanted = pc.and_(wanted, pc.equal(table[_column(name)], _count(asked, name, 0)))
        if "finish" in asked:
            reason = {"stop": "eos"}.get(asked["finish"], asked["finish"])
            wanted = pc.and_(wanted, pc.equal(table["finish_reason"], reason))
        if "prompt" in asked:
            wanted = pc.and_(wanted, pc.equal(table["prompt_id"], asked["prompt"]))
        if asked.get("traced"):
            wanted = pc.and_(wanted, pc.is_valid(table["traced_at"]))
        return wanted

    def row(self, row_id: str) -> Found:
        """One row with its tokens, in the shape of the page's `rollouts`; it is the first of its rows."""
        if self.snapshot is None:
            raise NotFoundError("There is no cache.")
        try:
            found = self._read(self.snapshot.position(row_id))
        except cache.CacheError as error:
            raise NotFoundError(str(error)) from error
        return payload([replace(found, top=tops_of([found.record], self._head)[0])], self._speller)


def _column(name: str) -> str:
    names = {"id": "row_id", "step": "policy_step", "refresh": "refresh_index", "finish": "finish_reason"}
    names |= {own: own for own in ("prompt_id", *NUMBERS)}
    if name not in names:
        raise ValueError(
            f"sort is {name[:40]!r}; expected one of {', '.join(names)}, with - for falling order."
        )
    return names[name]


def _count(asked: dict[str, str], name: str, default: int) -> int:
    text = asked.get(name, str(default))
    if not text.isdecimal() or len(text) > 18:
        raise ValueError(f"{name} is {text[:40]!r}; expected a count.")
    return int(text)


class Server(ThreadingHTTPServer):
    """Serves one page and its rows at `address`, which holds a random token."""

    daemon_threads = True

    def __init__(self, html: str, sources: Sequence[Rows], port: int) -> None:
        self.page, self.sources = html.encode(), sources
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used ({error.strerror}); give another: --serve PORT."
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a browser that went away
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "dualkl"
    sys_version = ""
    timeout = 60
    FIXED: ClassVar = {
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        empty, _, rest = path.partition("/")
        token, _, what = rest.partition("/")
        names = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        hosts = self.headers.get_all("Host", [])
        if empty or len(hosts) != 1 or hosts[0] not in names:
            return self._fail(403, "This server answers to its loopback address alone.")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return self._fail(403, "The address lacks the token that `dualkl view --serve` printed.")
        if rest == f"{token}/":
            return self._send(200, "text/html; charset=utf-8", self.server.page)
        asked = {name: values[-1] for name, values in parse_qs(query).items()}
        try:
            self._json(200, self._answer(what, asked))
        except NotFoundError as error:
            self._fail(404, str(error))
        except (ValueError, OSError) as error:
            self._fail(400, str(error))
        return None

    def _answer(self, what: str, asked: dict[str, str]) -> Found:
        run = _count(asked, "run", 0)
        if run >= len(self.server.sources):
            raise NotFoundError(f"run is {run}; there are {len(self.server.sources)}, from 0 on.")
        rows = self.server.sources[run]
        if what == "rows":
            return rows.listed(asked)
        if what == "row":
            return rows.row(asked.get("id", ""))
        raise NotFoundError("There are rows and row.")

    def _json(self, code: int, value: Found) -> None:
        self._send(code, "application/json", json.dumps(value, allow_nan=False).encode())

    def _fail(self, code: int, text: str) -> None:
        self.close_connection = True
        self._json(code, {"error": plain(text)[:MOST_CHARACTERS]})

    def _send(self, code: int, kind: str, data: bytes) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **self.FIXED}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # the base class's name
        """Nothing: the address holds the token."""
