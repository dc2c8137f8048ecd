"""Whose call it is: the one rule of the gateway and of every service.

    a user named by a peer   a proxy tells the gateway in TDB_USER_HEADER, the gateway tells a
                             service in `x-tdb-user`; believed of the peers in a setting only, and
                             refused from anybody else, because ignoring it would let someone work
                             under a name that is not the one they think
    a token                  `authorization: Bearer TOKEN`, where TDB_TOKENS is set
    a certificate            the common name of a client's, where a service asks for certificates
                             and for no tokens
    nobody                   `local`, where nothing of this is configured

A peer that is believed needs no token. What it sends as `authorization` is its own affair, except
a token of ours that belongs to somebody else: then one of the two is wrong.
"""

import re
from collections.abc import Sequence

from services.common.calls import LOCAL_USER
from services.common.errors import PermissionDenied, Unauthenticated
from services.common.networks import LOOPBACK, Networks
from services.common.settings import Settings
from services.common.tokens import Tokens

USER_METADATA = "x-tdb-user"

_USER = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,128}\Z")  # as tokens: visible ASCII without the comma


class Identity:
    """Answers `user` for each call. `header` is where believed peers name the user, `variable` the
    setting that says which peers those are."""

    def __init__(
        self,
        tokens: Tokens,
        believed: Networks,
        *,
        header: str,
        variable: str,
        certificates: bool = False,
    ) -> None:
        self._tokens = tokens
        self._believed = believed
        self._header = header
        self._variable = variable
        self._certificates = certificates

    @classmethod
    def of_service(cls, settings: Settings) -> "Identity":
        return cls(
            settings.tokens,
            believed_gateways(settings),
            header=USER_METADATA,
            variable="TDB_TRUSTED_GATEWAYS",
            certificates=settings.tls_client_ca is not None,
        )

    @classmethod
    def of_gateway(cls, settings: Settings) -> "Identity":
        return cls(
            settings.tokens,
            settings.trusted_proxies,
            header=settings.user_header,
            variable="TDB_TRUSTED_PROXIES",
        )

    def user(
        self, named: Sequence[str], peer: str, authorization: str = "", certificate: str = ""
    ) -> str:
        """The user of a call from the address `peer`. `named` are the values of the header,
        `certificate` is the common name of the peer's. Raises Unauthenticated, PermissionDenied."""
        token_user = self._tokens.user_of(authorization) if self._tokens else None
        if named:
            return self._named(named, peer, token_user)
        if self._tokens:
            if token_user is None:
                raise Unauthenticated(
                    "this server asks for a token: send authorization: Bearer TOKEN",
                    reason="TOKEN_REQUIRED",
                )
            return token_user
        if self._certificates:
            if not _USER.match(certificate):
                raise Unauthenticated(
                    "the certificate's common name must name the user: visible ASCII without a "
                    "comma, at most 128 characters",
                    reason="CERTIFICATE_WITHOUT_NAME",
                )
            return certificate
        if self._believed:
            raise PermissionDenied(
                f"this server learns from {self._header} who calls, which the peers in "
                f"{self._variable} send; this call came without it",
                reason="USER_REQUIRED",
            )
        return LOCAL_USER

    def _named(self, named: Sequence[str], peer: str, token_user: str | None) -> str:
        if peer not in self._believed:
            raise PermissionDenied(
                f"{self._header} is believed of the peers in {self._variable} only, and "
                f"{peer or 'this peer'} is none of them",
                reason="USER_NOT_BELIEVED",
            )
        user = named[0]
        if len(named) > 1 or not _USER.match(user):
            raise PermissionDenied(
                f"{self._header} must name one user, once: visible ASCII without a comma, at most "
                "128 characters",
                reason="USER_MALFORMED",
            )
        if token_user not in (None, user):
            raise PermissionDenied(
                f"{self._header} names one user and the token belongs to another",
                reason="TWO_USERS",
            )
        return user


def believed_gateways(settings: Settings) -> Networks:
    """The peers that a service believes: those of the setting, else, behind a proxy, a gateway on
    this machine."""
    if settings.trusted_gateways or not settings.trusted_proxies:
        return settings.trusted_gateways
    try:
        own = Networks.parse(settings.host)
    except ValueError:  # a name: on another interface it is to be set
        return LOOPBACK
    return Networks((*LOOPBACK.networks, *own.networks))


def metadata_for(settings: Settings, user: str) -> list[tuple[str, str]]:
    """What a service sends another one when it works for `user`."""
    token = settings.service_token.value
    if not token and settings.tokens:
        pairs = settings.tokens.pairs
        token = next((each for name, each in pairs if name == user), pairs[0][1])
    if token:
        return [("authorization", f"Bearer {token}")]
    return [(USER_METADATA, user)] if believed_gateways(settings) else []
