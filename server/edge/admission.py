"""Which TCP connections the hub keeps: limits in total, for each address, and by descriptors (G11).

Every accepted connection is counted from the moment it is made, whatever becomes of it. One that is over a limit is
kept in a small *reserve*, just long enough to see what it asks for: health is answered, everything else refused. The
reserve gives way to newcomers, so that idle sockets cannot fill it.

Without a socket. Each `Entry` has one owner at a time, the protocol of its transport, which releases it once. This
module must not know HTTP, beyond the header in which proxies name their clients.
"""

from collections.abc import Callable, Sequence
from enum import Enum, auto
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import orjson

from agentcast.server.errors import Unavailable

ADMISSION = "agentcast.admission"
"""Where the server's protocols find the `Admission`, in the state of the app's lifespan."""
DESCRIPTORS_USED = 0.8
"""Share of the process's descriptors up to which connections are admitted; the rest is for the reserve, Redis, MCP
servers, files."""
RESERVE = 64
"""Connections over a limit that are kept at the same time; fewer if the process has few descriptors."""

RETRY_AFTER = 5
"""Seconds after which a client that was refused may come back."""
_REASON = Unavailable("this hub has as many connections as it takes, in all or from one address; come back in a moment")
BUSY = orjson.dumps({"error": _REASON.wire()})
"""What is answered, with status 503, to who is refused."""
BUSY_HEADERS = (
    ("content-type", "application/json"),
    ("content-length", str(len(BUSY))),
    ("retry-after", str(RETRY_AFTER)),
    ("connection", "close"),
)

Network = IPv4Network | IPv6Network


class State(Enum):
    ADMITTED = auto()
    RESERVED = auto()
    """It is over a limit: only health is answered."""
    RELEASED = auto()


class Entry:
    """One connection, as it is counted."""

    __slots__ = ("_admission", "_peer", "address", "state", "turn_away")

    def __init__(self, admission: "Admission", peer: str | None) -> None:
        self._admission = admission
        self._peer = peer
        self.address: str | None = None
        """What it is counted under, besides the total."""
        self.state = State.RESERVED
        self.turn_away: Callable[[], None] | None = None
        """Called when a reserved connection has to give way."""

    @property
    def admitted(self) -> bool:
        return self.state is State.ADMITTED

    def forward(self, forwarded: str) -> bool:
        """A request begins, whose `X-Forwarded-For` is `forwarded`: count the connection under the client that a
        trusted proxy names. Whether there is room for it."""
        return self._admission.move(self, self._peer, forwarded)

    def release(self) -> None:
        """The connection is lost. To be called once."""
        self._admission.release(self)


class Admission:
    """The connections of this process."""

    def __init__(self, most: int, most_per_address: int, descriptors: int, proxies: Sequence[Network] = ()) -> None:
        """`descriptors` is how many the process may have; `proxies` are believed about who their clients are."""
        self._most = most
        self._most_per_address = most_per_address
        self._descriptors = int(descriptors * DESCRIPTORS_USED)
        self._places = max(1, min(RESERVE, (descriptors - self._descriptors) // 2))
        self._proxies = proxies
        self._admitted = 0
        self._by_address: dict[str, int] = {}
        self._reserve: dict[Entry, None] = {}

    def __len__(self) -> int:
        """Connections that are admitted."""
        return self._admitted

    def enter(self, peer: str | None, descriptor: int, turn_away: Callable[[], None]) -> Entry:
        """Count a connection of the host `peer`, None if it has no address. Its owner asks whether it is `admitted`.

        The system gives out the lowest free descriptor, so those below a number are all in use when one at or above it
        is given: no more than that many connections can have been admitted.
        """
        entry = Entry(self, peer)
        address = None if peer is None or self._trusts(peer) else _counted(peer)
        if self._admitted < self._most and descriptor < self._descriptors and self._has_room(address):
            entry.state = State.ADMITTED
            self._admitted += 1
            self._count(entry, address)
        else:
            entry.turn_away = turn_away
            self._reserve[entry] = None
            if len(self._reserve) > self._places:
                self._turn_away(next(iter(self._reserve)))
        return entry

    def move(self, entry: Entry, peer: str | None, forwarded: str) -> bool:
        """See `Entry.forward`."""
        if not entry.admitted or peer is None or not self._trusts(peer):
            return entry.admitted
        address = _counted(self._client(peer, forwarded))
        if address == entry.address:
            return True
        self._uncount(entry)
        if not self._has_room(address):
            return False
        self._count(entry, address)
        return True

    def release(self, entry: Entry) -> None:
        """See `Entry.release`."""
        match entry.state:
            case State.ADMITTED:
                self._admitted -= 1
                self._uncount(entry)
            case State.RESERVED:
                self._reserve.pop(entry, None)
                entry.turn_away = None
            case State.RELEASED:
                raise RuntimeError("a connection was released twice")
        entry.state = State.RELEASED

    def _turn_away(self, entry: Entry) -> None:
        del self._reserve[entry]
        if entry.turn_away is not None:
            entry.turn_away()

    # -- Addresses -------------------------------------------------------------------------------------------------

    def _trusts(self, host: str) -> bool:
        if not self._proxies:
            return False
        try:
            address = ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._proxies)

    def _client(self, peer: str, forwarded: str) -> str:
        """The right-most address that is no trusted proxy: what stands further left is what the client says."""
        client = peer
        for hop in reversed(forwarded.split(",")):
            if not hop.strip() or not self._trusts(client):
                break
            client = _without_port(hop.strip())
        return client

    def _has_room(self, address: str | None) -> bool:
        return address is None or self._by_address.get(address, 0) < self._most_per_address

    def _count(self, entry: Entry, address: str | None) -> None:
        entry.address = address
        if address is not None:
            self._by_address[address] = self._by_address.get(address, 0) + 1

    def _uncount(self, entry: Entry) -> None:
        address, entry.address = entry.address, None
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]


def _counted(host: str) -> str:
    """What a host is counted under: its address, or of IPv6 the network of 64 bits, which one customer has."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ip_network((address, 64), strict=False))


def _without_port(hop: str) -> str:
    """Some proxies add the port: `192.0.2.1:4711`, `[2001:db8::1]:4711`."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop
