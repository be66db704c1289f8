"""A server on loopback, in front of a real Keystone or Glance, that breaks as servers break."""

import contextlib
import datetime
import http.client
import ipaddress
import json
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_NOT_FORWARDED = {"connection", "content-length", "keep-alive", "transfer-encoding"}
_HANG_SECONDS = 60.0


@dataclass(frozen=True)
class Answer:
    """What the server sends in place of the real answer.

    With ``missing`` it promises so many more bytes than it sends. With ``hang`` the connection then
    stays open. With status 0 it sends nothing: it hangs up, or with ``hang`` stays silent. With
    ``again`` it repeats the body until nobody reads it any more, with so many seconds in between.
    With ``head`` it sends that in place of the status line and the headers.
    """

    status: int = 200
    body: bytes = b""
    content_type: str | None = "application/json"
    missing: int = 0
    hang: bool = False
    again: float | None = None
    head: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Any) -> Self:
        """Return a good answer with a JSON document."""
        return cls(body=json.dumps(document).encode())

    @classmethod
    def redirect(cls, url: str, status: int = 302) -> Self:
        """Return an answer that redirects to ``url``."""
        return cls(status=status, headers={"Location": url})


# Takes the path of a request, and returns the path to request upstream, or an answer of its own.
Rule = Callable[[str], str | Answer]


class Faulty(ThreadingHTTPServer):
    """A server that forwards to ``upstream`` what ``rule`` lets pass, until its context ends.

    ``paths`` has the path of each request, and ``secrets`` each token that went through. With
    ``tls`` it speaks https.
    """

    daemon_threads = True

    def __init__(self, upstream: str, rule: Rule = str, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urllib.parse.urlsplit(upstream)
        self.rule = rule
        self.paths: list[str] = []
        self.secrets: set[str] = set()
        self.ended = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
            self.url = f"https://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self.stop()

    def __enter__(self) -> Self:
        return self

    def stop(self) -> None:
        """End the server, so that connections are refused. May be called twice."""
        self.ended.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients that hang up early are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    server: Faulty
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.close_connection = True
        self.server.paths.append(self.path)
        self._remember(self.headers)
        ruled = self.server.rule(self.path)
        if isinstance(ruled, str):
            self._forward(ruled, body)
            return
        if ruled.head is not None:
            self.wfile.write(ruled.head + ruled.body)
        elif ruled.status:
            headers = dict(ruled.headers)
            if ruled.content_type is not None:
                headers["Content-Type"] = ruled.content_type
            missing = ruled.missing if ruled.again is None else 2**40
            self._send(ruled.status, headers, ruled.body, missing)
        while ruled.again is not None and not self.server.ended.wait(ruled.again):
            self.wfile.write(ruled.body)
        if ruled.hang:
            self.server.ended.wait(_HANG_SECONDS)

    def _forward(self, path: str, body: bytes) -> None:
        upstream = self.server.upstream
        with contextlib.closing(
            http.client.HTTPConnection(str(upstream.hostname), upstream.port, timeout=60)
        ) as real:
            headers = {
                key: value
                for key, value in self.headers.items()
                if key.lower() not in _NOT_FORWARDED
            }
            real.request(self.command, path, body, headers)
            answer = real.getresponse()
            # The services make links to the host of the request, and do not know that this is
            # https.
            host = self.server.url.partition("//")[2]
            document = answer.read().replace(f"http://{host}".encode(), self.server.url.encode())
            self._remember(answer.headers)
            kept = {
                key: value
                for key, value in answer.headers.items()
                if key.lower() not in _NOT_FORWARDED
            }
            self._send(answer.status, kept, document)

    def _send(self, status: int, headers: dict[str, str], body: bytes, missing: int = 0) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) + missing))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _remember(self, headers: Any) -> None:
        self.server.secrets.update(
            headers[name] for name in ("X-Auth-Token", "X-Subject-Token") if headers[name]
        )


# What a test sets in the command's environment. None removes a variable.
Variables = dict[str, str | None]
# Puts a server in front of the real Glance, in the real catalog.
Front = Callable[..., tuple[Faulty, Variables]]


class Authority:
    """A certificate authority for an hour, with its files in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name(
            [x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority of {directory.name}")]
        )
        self.ca = self._write(
            "ca.pem", self._sign(self._name, self._key.public_key(), authority=True)
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """Make a certificate for 127.0.0.1, and return the files of it and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return (
            self._write(f"{name}.crt", self._sign(subject, key.public_key())),
            self._write(f"{name}.key", private),
        )

    def server(self, demand_certificate: bool) -> ssl.SSLContext:
        """Return what a server needs for https, and to demand certificates from its clients."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue("server"))
        if demand_certificate:
            context.load_verify_locations(self.ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, authority: bool = False
    ) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        hour = datetime.timedelta(hours=1)
        builder = (
            x509.CertificateBuilder(
                self._name, subject, key, x509.random_serial_number(), now - hour, now + hour
            )
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(not authority, *(False,) * 4, authority, *(False,) * 3), critical=True
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        return path
