"""Settings: from the environment (`AGENTCAST_…`) or the command line. Limits that nobody tunes are constants where
they are used."""

from typing import Annotated

from pydantic import Field, IPvAnyNetwork, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

DEMO_AGENTS = "agentcast.agents.demo:registry"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class Settings(BaseSettings):
    """How one hub process is set up. Every field can be given as `AGENTCAST_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="AGENTCAST_", frozen=True)

    agents: Annotated[tuple[str, ...], NoDecode] = (DEMO_AGENTS,)
    """Registries to load, as `package.module:registry`; comma separated in the environment."""
    host: str = "127.0.0.1"
    """Address to bind. Anything but a loopback address lets others in: put a proxy with authentication before it."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port; 0 takes a free one."""
    hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Host names, besides the local ones, under which the hub may be asked (`Host`, `Origin`); `*` is any."""
    mcp_config: str | None = None
    """A JSON file that defines MCP servers, in the `mcpServers` shape."""
    lm: str = "offline"
    """The language model: any string that `dspy.LM` takes, or `offline`."""
    lm_attempts: int = Field(default=4, ge=1)
    """The most attempts of one LM call; 1 is no retries."""
    lm_patience: float = Field(default=120.0, ge=0)
    """Seconds after the start of an LM call in which another attempt may begin, pauses included."""
    lm_backoff: float = Field(default=1.0, ge=0)
    """Seconds before the second attempt; doubled for each further one, up to 30."""
    lm_idle: float = Field(default=120.0, gt=0)
    """Seconds without a byte from the provider after which an attempt has failed."""
    redis: SecretStr | None = None
    """The Redis that several hubs share, as `redis://user:password@host:6379/0` (`rediss://` for TLS); without one, all
    runs live in this process."""
    redis_prefix: str = Field(default="agentcast", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """What all keys in Redis begin with: hubs with the same one belong together."""
    log_level: str = "info"
    grace: float = Field(default=10.0, ge=0)
    """Seconds that running agents get to finish when the hub is to stop."""
    cancel_grace: float = Field(default=5.0, ge=0)
    """Seconds that a cancelled or timed out agent gets to clean up before it is abandoned."""
    heartbeat: float = Field(default=25.0, gt=0)
    """Seconds of silence after which a client is sent a `ping`."""
    slow_client: float = Field(default=30.0, gt=0)
    """Seconds after which a client that takes nothing is cut."""
    max_active: int = Field(default=1_000, ge=1)
    """Runs that may be queued or running in this process; more are refused with `too_many`."""

    max_connections: int = Field(default=10_000, ge=1)
    """TCP connections that the hub keeps; more are refused with status 503. 80 % of the process's descriptors is a
    limit, too. Health is answered in any case."""
    max_connections_per_address: int = Field(default=2_500, ge=1)
    """The same, of one address (of IPv6: of one /64)."""
    trusted_proxies: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = ()
    """Addresses or networks of reverse proxies, comma separated in the environment. A connection from one of them
    counts for the client that its `X-Forwarded-For` names; without this, all clients of a proxy share one limit."""

    @field_validator("agents", "hosts", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """Names under which the hub may be asked, lower case, without port."""
        bound = () if self.host in ("0.0.0.0", "::") else (self.host,)  # noqa: S104 -- compared, not bound
        return frozenset(name.lower() for name in (*LOCAL_HOSTS, *bound, *self.hosts))
