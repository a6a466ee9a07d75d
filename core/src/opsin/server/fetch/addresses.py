"""Which IP addresses a server may open connections to for its clients."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

_V4_REFUSED = tuple(
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT; a cloud's metadata service lives in it
        "168.63.129.16/32",  # a cloud's host agent: formally global, reachable only from inside
        "192.0.0.0/24",  # protocol assignments; another cloud's metadata service
        "192.88.99.0/24",  # 6to4 relays
        "224.0.0.0/3",  # multicast and reserved
    )
)

_V6_GLOBAL = IPv6Network("2000::/3")
_V6_REFUSED = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: any IPv4 address inside
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")


def is_allowed(text: str, *, allow_loopback: bool = False) -> bool:
    """Whether an address is on the public internet (or, if that is allowed, on this machine's loopback).

    Addresses that carry an IPv4 address (IPv4-mapped, NAT64) count as what they carry. Beside what Python
    calls global, this knows what its tables lack or learned late: hence the explicit lists.

    Args:
        text: an IPv4 or IPv6 address, as the resolver gave it.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:  # only link-local addresses have one
            return False
        carried = _carried(address)
        if carried is None:
            if address.is_loopback:
                return allow_loopback
            return (
                address.is_global
                and address in _V6_GLOBAL
                and not any(address in network for network in _V6_REFUSED)
            )
        address = carried
    if address.is_loopback:
        return allow_loopback
    return address.is_global and not any(address in network for network in _V4_REFUSED)


def _carried(address: IPv6Address) -> IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None
