"""Addresses and networks whose word is taken, for settings that name peers.

A peer counts by the address its connection comes from; no header has a say in that. An IPv4
address that arrives mapped into IPv6 (`::ffff:10.0.0.5`, on a socket for both) is the same peer.
"""

import ipaddress
from dataclasses import dataclass
from urllib.parse import unquote

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Networks:
    """Empty: nobody."""

    networks: tuple[_Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Networks":
        """Reads addresses and CIDRs, separated by commas. Raises ValueError with a sentence."""
        networks: list[_Network] = []
        for entry in filter(None, (part.strip() for part in text.split(","))):
            try:
                network = ipaddress.ip_network(entry)
            except ValueError:
                raise ValueError(
                    f"must be addresses or networks such as 10.0.0.5 or 10.0.0.0/24, not {entry!r}"
                ) from None
            if not network.prefixlen:
                raise ValueError(f"must not be everybody, which {entry} is")
            networks.append(network)
        return cls(tuple(networks))

    def __bool__(self) -> bool:
        return bool(self.networks)

    def __str__(self) -> str:
        return ",".join(
            str(each.network_address if each.num_addresses == 1 else each) for each in self.networks
        )

    def __contains__(self, address: str) -> bool:
        """Whether `address`, without a port, is one of them; what is no address is not."""
        try:
            found = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
            found = found.ipv4_mapped
        return any(found in network for network in self.networks)


LOOPBACK = Networks.parse("127.0.0.0/8,::1")


def address_of_peer(peer: str) -> str:
    """The address in gRPC's name of a peer: `ipv6:%5B::1%5D:4711` is `::1`. "" for what has none,
    such as a Unix socket."""
    kind, _, where = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return unquote(where).rpartition(":")[0].strip("[]")
