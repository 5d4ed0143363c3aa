"""A server in the threads of a process that has other things to do."""

import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from launcher.http_server import HttpServer, Request, Response


def echo(request: Request) -> Response:
    return Response(f"{request.path}?{request.query} {request.headers.get('x-token')}".encode())


def broken(request: Request) -> Response:
    raise ZeroDivisionError("a secret")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    server = HttpServer("127.0.0.1", 0, {"/echo": echo, "/broken": broken})
    yield server
    server.close()


def ask(server: HttpServer, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_a_path_is_answered_by_its_function(server: HttpServer) -> None:
    response, body = ask(server, "/echo?a=1", **{"X-Token": "t"})
    assert (response.status, body) == (200, b"/echo?a=1 t")
    assert response.headers["X-Content-Type-Options"] == "nosniff" and "Python" not in response.headers["Server"]
    assert ask(server, "/echo/", "GET")[0].status == 404
    response, body = ask(server, "/echo", "HEAD")
    assert (response.status, body, response.headers["Content-Length"]) == (200, b"", "11")
    assert ask(server, "/echo", "POST")[0].status == 501


def test_a_question_that_cannot_be_answered_costs_no_other(server: HttpServer) -> None:
    response, body = ask(server, "/broken")
    assert response.status == 500 and body == b"ZeroDivisionError\n"
    assert ask(server, "/echo")[0].status == 200


def test_one_who_is_slow_to_ask_holds_nobody_up(server: HttpServer) -> None:
    with socket.create_connection((server.host, server.port)) as slow:
        slow.sendall(b"GET /ec")
        assert ask(server, "/echo")[0].status == 200


def test_many_ask_at_once(server: HttpServer) -> None:
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(server, "/echo")[0].status)) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 30


def test_a_port_that_is_taken_gives_way_to_a_free_one(server: HttpServer) -> None:
    other = HttpServer("127.0.0.1", server.port, {"/echo": echo})
    assert other.port != server.port and ask(other, "/echo")[0].status == 200
    other.close()


def test_after_its_end_nobody_listens(server: HttpServer) -> None:
    other = HttpServer("127.0.0.1", 0, {})
    other.close()
    with pytest.raises(ConnectionRefusedError):
        ask(other, "/echo")


def test_where_it_cannot_listen_it_says_so() -> None:
    with pytest.raises(OSError, match="assign"):
        HttpServer("203.0.113.7", 0, {})
