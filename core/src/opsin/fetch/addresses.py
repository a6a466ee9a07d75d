"""Which IP addresses a server may open connections to for its clients."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

_V6_GLOBAL = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_REFUSED = tuple(
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT; a cloud's metadata service lives in it
        "168.63.129.16/32",  # a cloud's host agent: formally global, reachable only from inside
        "192.0.0.0/24",  # protocol assignments; another cloud's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "224.0.0.0/3",  # multicast and reserved
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: any IPv4 address inside
        "3fff::/20",  # documentation
    )
)


def is_allowed(
    text: str, *, allow_loopback: bool = False, private: Sequence[IPv4Network | IPv6Network] = ()
) -> bool:
    """Whether an address is on the public internet, or in a network that the operator has named.

    Addresses that carry an IPv4 address (IPv4-mapped, NAT64) count as what they carry. Python's own table of
    what is global lacks some networks or learned of them late: hence the explicit list.

    Args:
        text: an IPv4 or IPv6 address, as the resolver gave it.
        allow_loopback: whether loopback addresses count as public.
        private: networks whose addresses count as public, whatever else they are; loopback ones do not.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:  # only link-local addresses have one
            return False
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = IPv4Address(int(address) & 0xFFFFFFFF)
    if address.is_loopback:
        return allow_loopback
    if any(address in network for network in private):
        return True
    if isinstance(address, IPv6Address) and address not in _V6_GLOBAL:
        return False
    return address.is_global and not any(address in network for network in _REFUSED)
