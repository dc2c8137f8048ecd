"""TLS between gateway, programs and services: certificates from files, checked before use.

gRPC says of a bad certificate only that it cannot listen or cannot connect. So files are first read
by Python's own `ssl`, whose errors can be told apart, and a handshake in memory shows what a real
one would end with: an expired certificate, one of another authority, one for another name.
Certificates are read at start; a renewed one takes effect with a restart.
"""

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from services.common.settings import Settings, SettingsError

PROBE_TIMEOUT_S = 2.0

_TIME_ERRORS = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED

Options = Sequence[tuple[str, str | int]]


@dataclass(frozen=True)
class ServerTls:
    """How a service shows who it is, and whose certificates it asks for (`client_ca`)."""

    cert: Path
    key: Path
    client_ca: Path | None

    @classmethod
    def of(cls, settings: Settings) -> "ServerTls | None":
        """None where services speak in the clear. Raises SettingsError, one sentence, for files
        that cannot serve."""
        if not (settings.tls_cert and settings.tls_key):
            return None
        found = cls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
        _check_ca("TDB_TLS_CLIENT_CA", found.client_ca)
        context = found.context("TDB_TLS_CERT", "TDB_TLS_KEY")
        _check_dates("TDB_TLS_CERT", context, _trusting(found.cert, ssl.PROTOCOL_TLS_CLIENT))
        return found

    def context(self, cert_variable: str, key_variable: str) -> ssl.SSLContext:
        context = _trusting(self.client_ca, ssl.PROTOCOL_TLS_SERVER)
        _load(context, self.cert, self.key, cert_variable, key_variable)
        return context

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.cert.read_bytes())],
            self.client_ca.read_bytes() if self.client_ca else None,
            require_client_auth=self.client_ca is not None,
        )


@dataclass(frozen=True)
class ClientTls:
    """Whose certificates a client of services accepts, and how it shows who it is where they ask.
    `name` is the name in their certificate, "" where that is the address connected to."""

    ca: Path
    cert: Path | None
    key: Path | None
    name: str

    @classmethod
    def of(cls, settings: Settings) -> "ClientTls | None":
        """None where services speak in the clear. Raises SettingsError, one sentence, for files
        that cannot serve."""
        if not settings.tls_ca:
            return None
        found = cls(
            settings.tls_ca, settings.tls_client_cert, settings.tls_client_key, settings.tls_name
        )
        _check_ca("TDB_TLS_CA", found.ca)
        context = found.context()
        if found.cert and found.key:
            server = _trusting(found.cert, ssl.PROTOCOL_TLS_SERVER)
            server.load_cert_chain(found.cert, found.key)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            _check_dates("TDB_TLS_CLIENT_CERT", server, context)
        return found

    def context(self) -> ssl.SSLContext:
        context = _trusting(self.ca, ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = True
        if self.cert and self.key:
            _load(context, self.cert, self.key, "TDB_TLS_CLIENT_CERT", "TDB_TLS_CLIENT_KEY")
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(),
            self.key.read_bytes() if self.key else None,
            self.cert.read_bytes() if self.cert else None,
        )

    def options(self) -> list[tuple[str, str | int]]:
        return [("grpc.ssl_target_name_override", self.name)] if self.name else []

    def trouble(self, target: str) -> str:
        """Why TLS with the service at `target`, `host:port`, fails; "" when it does not, or when
        nothing listens there. Blocks for up to two time-outs."""
        host, _, port = target.removeprefix("dns:///").rpartition(":")
        address = (host.strip("[]"), int(port) if port.isdigit() else 0)
        context = self.context()
        context.set_alpn_protocols(["h2"])
        try:
            plain = socket.create_connection(address, PROBE_TIMEOUT_S)
        except OSError:
            return ""
        try:
            with context.wrap_socket(plain, server_hostname=self.name or address[0]) as wrapped:
                # In TLS 1.3 a service looks at our certificate after the handshake. If it is
                # content it speaks first; gRPC's hangs up without a word if not.
                if wrapped.recv(1):
                    return ""
        except ssl.SSLCertVerificationError as error:
            return f"its certificate is not accepted: {_reason(error)}"
        except ssl.SSLError as error:
            if (error.reason or "") in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
                return "it does not speak TLS, which TDB_TLS_CA asks for"
        except TimeoutError:
            return ""
        except OSError:
            pass
        if self.cert:
            return "it does not accept the certificate in TDB_TLS_CLIENT_CERT"
        return "it asks for a certificate (TDB_TLS_CLIENT_CERT), and none was shown"


def channel(target: str, options: Options, tls: ClientTls | None) -> grpc.aio.Channel:
    """A channel to a service, with TLS where it speaks that."""
    if tls is None:
        return grpc.aio.insecure_channel(target, options)
    return grpc.aio.secure_channel(target, tls.credentials(), [*options, *tls.options()])


def check_together(server: ServerTls | None, client: ClientTls | None, host: str) -> None:
    """Whether a gateway on this machine, which connects to `host`, and its services would accept
    each other. Raises SettingsError."""
    if (server is None) != (client is None):
        raise SettingsError(
            "TDB_TLS_CERT is how services show who they are and TDB_TLS_CA how the gateway checks "
            "it: set both, or neither."
        )
    if server is None or client is None:
        return
    if server.client_ca and not client.cert:
        raise SettingsError(
            "TDB_TLS_CLIENT_CA is set, so services ask for a certificate: the gateway needs "
            "TDB_TLS_CLIENT_CERT and TDB_TLS_CLIENT_KEY."
        )
    name = client.name or host
    try:
        _handshake(server.context("TDB_TLS_CERT", "TDB_TLS_KEY"), client.context(), name)
    except _Refused as refused:
        refuser, variable, ca = (
            ("services", "TDB_TLS_CLIENT_CERT", "TDB_TLS_CLIENT_CA")
            if refused.by_server
            else ("the gateway", "TDB_TLS_CERT", "TDB_TLS_CA")
        )
        hint = "" if client.name or refused.by_server else " (TDB_TLS_NAME says which name it has)"
        raise SettingsError(
            f"{refuser} would not accept {variable} by {ca}: {refused}{hint}."
        ) from None


class _Refused(Exception):
    def __init__(self, reason: str, *, code: int, by_server: bool) -> None:
        super().__init__(reason)
        self.code = code
        self.by_server = by_server


def _trusting(ca: Path | None, protocol: "ssl._SSLMethod") -> ssl.SSLContext:
    """A context that accepts what `ca` has signed, or `ca` itself; without one, anybody."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if ca is not None:
        context.load_verify_locations(ca)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(
    context: ssl.SSLContext, cert: Path, key: Path, cert_variable: str, key_variable: str
) -> None:
    """Raises SettingsError where the two are not a certificate and its key."""

    def no_password() -> str:
        raise SettingsError(
            f"{key_variable}: {key} is encrypted; a key without a password is needed."
        )

    for variable, path, kind in (
        (cert_variable, cert, b"CERTIFICATE-----"),
        (key_variable, key, b"PRIVATE KEY-----"),
    ):
        if kind not in path.read_bytes():
            what = "certificate" if path == cert else "private key"
            raise SettingsError(f"{variable}: {path} holds no {what} in PEM.")
    try:
        context.load_cert_chain(cert, key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(
                f"{key_variable}: {key} is not the key of the certificate in {cert_variable}."
            ) from None
        raise SettingsError(
            f"{cert_variable} and {key_variable} cannot be used: {error.reason or error}."
        ) from None


def _check_ca(variable: str, ca: Path | None) -> None:
    """Raises SettingsError where the file holds no certificate, or only expired ones."""
    if ca is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError:
        raise SettingsError(f"{variable}: {ca} holds no certificate in PEM.") from None
    ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in context.get_ca_certs()]
    if ends and max(ends) < time.time():
        raise SettingsError(f"{variable}: the certificate in {ca} has expired.")


def _check_dates(variable: str, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """One of the contexts trusts the other's certificate, which is out of date or is not."""
    try:
        _handshake(server, client, None)
    except _Refused as refused:
        if refused.code in _TIME_ERRORS:
            raise SettingsError(f"{variable}: the {refused}.") from None


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> None:
    """A handshake in memory. Raises _Refused for what either side finds wrong with the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides: list[tuple[bool, Callable[[], None]]] = [
        (False, client.wrap_bio(to_client, to_server, server_hostname=name).do_handshake),
        (True, server.wrap_bio(to_server, to_client, server_side=True).do_handshake),
    ]
    for _ in range(4):
        for by_server, proceed in sides:
            try:
                proceed()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                raise _Refused(
                    _reason(error), code=error.verify_code, by_server=by_server
                ) from None
            except ssl.SSLError as error:
                raise _Refused(str(error.reason or error), code=0, by_server=by_server) from None


def _reason(error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message.rstrip(".")
    return reason[:1].lower() + reason[1:]
