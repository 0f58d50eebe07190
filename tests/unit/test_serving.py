"""What `agentcast serve` sets up before it serves (G11)."""

import resource

import pytest

from agentcast.server.cli.serving import DESCRIPTORS, raise_descriptor_limit

INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        ((1_024, 4_096), (4_096, 4_096)),
        ((1_024, 10**9), (DESCRIPTORS, 10**9)),
        ((1_024, INFINITY), (DESCRIPTORS, INFINITY)),
        ((4_096, 4_096), None),
        ((10**6, 10**6), None),
        ((INFINITY, INFINITY), None),
    ],
)
def test_the_soft_limit_of_descriptors_is_raised(
    limits: tuple[int, int], wanted: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, to: given.append(to))
    raise_descriptor_limit()
    assert given == ([] if wanted is None else [wanted])


def test_a_system_that_refuses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_descriptor_limit()
