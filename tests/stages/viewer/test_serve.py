"""The loopback server: who is answered, and what is asked of a whole cache."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import cache
from stages import view
from stages.viewer import serve
from tests.stages.viewer.test_gather import write_cache
from tests.support.helpers import ROOT
from tests.support.viewing import ids_of, unpacked

COUNT = 120


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("served") / "cache", COUNT)


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[serve.Server]:
    with serve.Server("<html>page</html>", [serve.Rows(view.source(str(root)), pytest.fail)], 0) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def ask(
    server: serve.Server, path: str, host: str | None = None, token: str | None = None, method: str = "GET"
) -> tuple[int, Any, dict[str, str]]:
    connection = HTTPConnection(serve.HOST, server.server_port, timeout=20)
    own = server.token if token is None else token
    connection.request(method, f"/{own}/{path}", headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    is_json = answer.headers.get_content_type() == "application/json"
    found = json.loads(text) if is_json else text
    return answer.status, unpacked(found) if "packed" in found and is_json else found, dict(answer.headers)


def test_the_page_is_at_the_address_with_the_token(server: serve.Server) -> None:
    status, text, headers = ask(server, "")
    assert (status, text) == (200, "<html>page</html>")
    assert headers["Cache-Control"] == "no-store"
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1:1", "127.0.0.1"])
def test_a_name_that_was_rebound_is_refused(server: serve.Server, host: str) -> None:
    status, found, _ = ask(server, "rows", host.format(port=server.server_port))
    assert status == 403
    assert "loopback address alone" in found["error"]


def raw(server: serve.Server, request: str) -> bytes:
    """The answer to a request as it is, as no browser would send it."""
    with socket.create_connection((serve.HOST, server.server_port), timeout=20) as connection:
        connection.sendall(request.replace("HOST", f"127.0.0.1:{server.server_port}").encode())
        return connection.makefile("rb").readline()


@pytest.mark.parametrize(
    "request_",
    [
        "GET rows HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "GET * HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "GET http://[::1/ HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "GET http://evil.example/TOKEN/ HTTP/1.1\r\nHost: HOST\r\n\r\n",
        "GET /TOKEN/ HTTP/1.1\r\nHost: HOST\r\nHost: evil.example\r\n\r\n",
        "GET /TOKEN/ HTTP/1.1\r\n\r\n",
    ],
)
def test_requests_of_no_browser_are_refused(
    server: serve.Server, request_: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert raw(server, request_.replace("TOKEN", server.token)).startswith(b"HTTP/1.1 403 ")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("token", ["", "wrong", "é"])
def test_an_address_without_the_token_is_refused(server: serve.Server, token: str) -> None:
    assert ask(server, "", token=quote(token))[0] == 403
    assert ask(server, "rows", token=quote(token))[0] == 403


def test_nothing_but_get_is_answered(server: serve.Server) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(server, "rows", method=method)[0] == 501


def test_pages_of_rows_cover_the_cache_in_order(server: serve.Server, root: Path) -> None:
    found: list[str] = []
    for first in range(0, COUNT, 50):
        status, answer, _ = ask(server, f"rows?run=0&from={first}&count=50")
        assert (status, answer["total"]) == (200, COUNT)
        found += [row["id"] for row in answer["rows"]]
    assert found == cache.open(root).row_ids


def test_rows_are_searched_filtered_and_sorted(server: serve.Server, root: Path) -> None:
    records = [*cache.open(root)]
    by_id = {record.row_id: record for record in records}
    _, answer, _ = ask(server, "rows?query=" + quote("is 17 +"))
    assert [row["prompt_id"] for row in answer["rows"]] == ["p8"]
    _, answer, _ = ask(server, "rows?finish=length&sort=-tokens&count=500")
    cut = [record for record in records if record.finish_reason == "length"]
    assert answer["total"] == len(cut)
    lengths = [row["tokens"] for row in answer["rows"]]
    assert lengths == sorted((len(record.completion_ids) for record in cut), reverse=True)
    _, answer, _ = ask(server, "rows?sort=gap&count=1")
    gaps = {r.row_id: float((r.teacher_logprobs - r.behaviour_logprobs).mean()) for r in records}
    assert answer["rows"][0]["id"] == min(gaps, key=lambda row_id: gaps[row_id])
    assert answer["rows"][0]["gap"] == pytest.approx(min(gaps.values()), rel=1e-5)
    tokens = [answer["vocabulary"][place]["id"] for place in ids_of(answer, "token")]
    assert tokens == by_id[answer["rows"][0]["id"]].completion_ids.tolist()
    _, answer, _ = ask(server, "rows?refresh=3")
    assert answer["total"] == sum(record.refresh_index == 3 for record in records) > 0


def test_a_row_comes_with_its_tokens(server: serve.Server, root: Path) -> None:
    record = cache.open(root)[5]
    status, found, _ = ask(server, f"row?run=0&id={record.row_id}")
    assert status == 200
    entries = found["vocabulary"]
    assert [entries[p]["id"] for p in ids_of(found, "token")] == record.completion_ids.tolist()
    assert [(row["id"], row["offset"], row["prompt"]) for row in found["rows"]] == [(record.row_id, 0, 0)]
    assert found["prompts"][0]["text"] == record.prompt_text


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("row?id=nothing", 404, "no row nothing"),
        ("rows?run=3", 404, "run is 3"),
        ("../../etc/passwd", 404, "There are rows and row"),
        ("rows?sort=signal", 400, "sort is 'signal'"),
        ("rows?from=-1", 400, "from is '-1'"),
        ("rows?from=" + "9" * 5000, 400, "expected a count"),
        ("row?id=" + "A" * 60_000, 404, "no row AAAA"),
        ("row?id=%E2%80%AE%1b%00", 404, r"no row \u202e\x1b\x00"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(
    server: serve.Server, path: str, status: int, words: str
) -> None:
    found = ask(server, path)
    assert found[0] == status
    assert words in found[1]["error"]
    assert len(found[1]["error"]) < 400


def test_a_port_in_use_is_one_sentence(server: serve.Server) -> None:
    with pytest.raises(serve.UserError, match=r"port \d+ cannot be used .*--serve PORT"):
        serve.Server("", [], server.server_port)


def test_ctrl_c_ends_the_server_with_one_line(root: Path) -> None:
    command = [sys.executable, "-m", "stages.cli", "view", str(root), "--serve"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("Ctrl-C ends it" in line for line in lines)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=20)[0]
    assert (process.returncode, rest.strip()) == (0, "stopped; an open page can no longer read rows")
