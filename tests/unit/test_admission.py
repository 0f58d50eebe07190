"""Which connections are kept (G11): totals, addresses, descriptors, proxies, and the reserve for health."""

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentcast.server.edge.admission import RESERVE, Admission, Entry

PROXY = "10.0.0.1"
PROXIES = (ip_network("10.0.0.0/24"),)
DESCRIPTORS = 10_000


def nothing() -> None:
    pass


def enter(admission: Admission, peer: str | None = "192.0.2.1", descriptor: int = 10) -> Entry:
    return admission.enter(peer, descriptor, nothing)


def test_connections_are_admitted_up_to_the_total_and_again_when_one_is_released() -> None:
    admission = Admission(2, 2, DESCRIPTORS)
    entries = [enter(admission, f"192.0.2.{number}") for number in range(3)]
    assert [entry.admitted for entry in entries] == [True, True, False]
    entries[0].release()
    assert enter(admission, "192.0.2.9").admitted
    assert len(admission) == 2


def test_each_address_has_a_limit_of_its_own() -> None:
    admission = Admission(100, 2, DESCRIPTORS)
    assert [enter(admission, "192.0.2.1").admitted for _ in range(3)] == [True, True, False]
    assert enter(admission, "192.0.2.2").admitted


def test_a_customer_of_ipv6_has_one_limit_for_all_addresses_of_its_network() -> None:
    admission = Admission(100, 2, DESCRIPTORS)
    hosts = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"]
    assert [enter(admission, host).admitted for host in hosts] == [True, True, False, True]


def test_an_ipv4_address_is_the_same_on_a_socket_of_ipv6() -> None:
    admission = Admission(100, 1, DESCRIPTORS)
    assert enter(admission, "192.0.2.1").admitted
    assert not enter(admission, "::ffff:192.0.2.1").admitted


def test_connections_without_an_address_count_in_total_only() -> None:
    admission = Admission(3, 1, DESCRIPTORS)
    assert [enter(admission, None).admitted for _ in range(4)] == [True, True, True, False]


def test_four_fifths_of_the_descriptors_are_for_connections() -> None:
    admission = Admission(10_000, 10_000, 100)
    assert enter(admission, descriptor=79).admitted
    assert not enter(admission, descriptor=80).admitted


def test_the_reserve_gives_way_to_newcomers_oldest_first() -> None:
    admission, turned_away = Admission(0, 0, DESCRIPTORS), []
    for number in range(RESERVE + 2):
        admission.enter(None, 10, lambda number=number: turned_away.append(number))  # type: ignore[misc]
    assert turned_away == [0, 1]


def test_the_reserve_fits_into_the_descriptors_that_are_left() -> None:
    admission, turned_away = Admission(10, 10, 50), []
    for _ in range(6):
        admission.enter(None, 45, lambda: turned_away.append(1))
    assert len(turned_away) == 1


def test_a_reserved_connection_that_ends_makes_room() -> None:
    admission, turned_away = Admission(0, 0, DESCRIPTORS), []
    entries = [admission.enter(None, 10, lambda: turned_away.append(1)) for _ in range(RESERVE)]
    entries[3].release()
    enter(admission)
    assert not turned_away


def test_a_connection_is_released_once() -> None:
    entry = enter(Admission(1, 1, DESCRIPTORS))
    entry.release()
    with pytest.raises(RuntimeError, match="twice"):
        entry.release()


# -- Behind a proxy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("203.0.113.9, 198.51.100.7", "198.51.100.7"),  # the client may say what it likes, on the left
        ("203.0.113.9, 198.51.100.7, 10.0.0.2", "198.51.100.7"),
        ("198.51.100.7:4711", "198.51.100.7"),
        ("[2001:db8::1]:4711", "2001:db8::/64"),
        ("10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("unknown", "unknown"),
        ("", PROXY),
        ("198.51.100.7, ", PROXY),
    ],
)
def test_behind_a_proxy_the_rightmost_untrusted_address_counts(forwarded: str, address: str) -> None:
    entry = enter(Admission(10, 1, DESCRIPTORS, PROXIES), PROXY)
    assert entry.address is None
    assert entry.forward(forwarded)
    assert entry.address == address


def test_who_is_no_trusted_proxy_cannot_name_another_client() -> None:
    entry = enter(Admission(10, 1, DESCRIPTORS, PROXIES), "192.0.2.1")
    assert entry.forward("198.51.100.7")
    assert entry.address == "192.0.2.1"


def test_a_connection_of_a_proxy_counts_for_one_client_after_the_other() -> None:
    admission = Admission(10, 1, DESCRIPTORS, PROXIES)
    one, other = enter(admission, PROXY), enter(admission, PROXY)
    assert one.forward("198.51.100.1")
    assert one.forward("198.51.100.1")
    assert not other.forward("198.51.100.1")
    assert one.forward("198.51.100.2")
    assert other.forward("198.51.100.1")


@given(st.lists(st.tuples(st.sampled_from(["enter", "forward", "release"]), st.integers(0, 5), st.integers(0, 3))))
def test_nothing_stays_counted_that_is_gone(steps: list[tuple[str, int, int]]) -> None:
    admission = Admission(4, 2, DESCRIPTORS, PROXIES)
    entries: list[Entry] = []
    for step, which, host in steps:
        if step == "enter":
            entries.append(enter(admission, PROXY if host == 3 else f"192.0.2.{host}"))
        elif entries and step == "forward":
            entries[which % len(entries)].forward(f"198.51.100.{host}")
        elif entries:
            entries.pop(which % len(entries)).release()
        held = [entry for entry in entries if entry.admitted]
        assert len(admission) == len(held) <= 4
        counts = [sum(one.address == entry.address for one in held) for entry in held if entry.address]
        assert all(count <= 2 for count in counts)
    for entry in entries:
        entry.release()
    assert len(admission) == 0
    assert not admission._by_address
    assert not admission._reserve
