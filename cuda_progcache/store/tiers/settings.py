# SPDX-License-Identifier: Apache-2.0
"""A tier's settings: its location, how it is used and trusted, and its time limits.

They are written as ``redis://cache.example:6379/0?mode=ro&timeout=1`` or, in a file, as a table of the same options.
Credentials are held in :class:`Secret` objects, which nothing displays. User, password and query are removed from a URL
when it is parsed, and no message repeats a text that couldn't be parsed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from cuda_progcache._util.fields import dataclass, field
from cuda_progcache._util.suggest import did_you_mean
from cuda_progcache.errors import ConfigError, StoreError
from cuda_progcache.store.default_cap import parse_size

_SERVERS = {"redis": "redis", "rediss": "redis", "http": "http", "https": "http", "s3": "object store"}
_SERVERS |= {"gs": "object store", "az": "object store", "oci": "registry", "file": "directory"}
SCHEMES = tuple(_SERVERS)
#: Schemes that are always read-only.
_ONLY_READ = ("oci", "file")
_EVERYWHERE = ("mode", "trust", "keys", "max_bytes")
_TIMES = ("connect_timeout", "timeout", "write_timeout")
_ENTRANCE = ("user", "password", "password_file", "token", "token_file")
#: The options of each kind of service.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "redis": (*_EVERYWHERE, *_TIMES, *_ENTRANCE[:3], "ca_file", "sign_key", "lease_url"),
    "http": (*_EVERYWHERE, *_TIMES, *_ENTRANCE, "ca_file", "sign_key", "lease_url"),
    "object store": (*_EVERYWHERE, *_TIMES, *_ENTRANCE, "endpoint", "region", "sign_key", "lease_url"),
    "registry": (*_EVERYWHERE, *_TIMES, *_ENTRANCE, "ca_file", "tls"),
    "directory": _EVERYWHERE,
}
_SECRET = frozenset(_ENTRANCE)
_PATHS = frozenset({"password_file", "token_file", "ca_file", "sign_key"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,40}")
#: A host name or an IPv6 address; names of buckets and containers are like host names.
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?|[0-9A-Fa-f]*:[0-9A-Fa-f:.]*")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PINNED = re.compile(r"@sha256:[0-9a-f]{64}\Z")
_DATABASE = re.compile(r"/?[0-9]{0,4}")
_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}")


class Secret:
    """A secret text, revealed only to the client that needs it.

    Neither ``repr`` nor ``str`` shows it, and a pickle only contains its origin.

    Parameters
    ----------
    kind : {"given", "environment", "file", "withheld"}
        What ``text`` is: the secret itself; the name of the variable, or the path of the file, that contains it; or
        empty, for one that was given in another process.
    text : str
    """

    __slots__ = ("_kind", "_text")

    def __init__(self, kind: str, text: str = "") -> None:
        self._kind = kind
        self._text = text

    @classmethod
    def parse(cls, text: str) -> Secret:
        """Parse ``${NAME}``, whose variable is read when the secret is needed; any other text is the secret itself."""
        variable = _VARIABLE.fullmatch(text)
        return cls("environment", variable[1]) if variable else cls("given", text)

    @property
    def origin(self) -> str:
        """Where it comes from; for a variable that isn't set, also that."""
        if self._kind == "environment":
            return f"variable {self._text}" + ("" if self._text in os.environ else " (not set)")
        return f"file {self._text}" if self._kind == "file" else self._kind

    def reveal(self) -> str:
        """The text itself.

        Raises
        ------
        StoreError
            Its variable isn't set, its file can't be read, or it was given in another process.
        """
        if self._kind == "given":
            return self._text
        if self._kind == "environment":
            if (value := os.environ.get(self._text)) is not None:
                return value
            raise StoreError(errno.EINVAL, f"the variable {self._text}, which a tier's settings name, isn't set")
        if self._kind == "file":
            try:
                with open(self._text, encoding="utf-8") as file:
                    return file.read().rstrip("\r\n")
            except OSError as exc:
                raise StoreError(exc.errno, f"can't read a tier's secret from {self._text} ({exc.strerror})") from exc
            except UnicodeDecodeError:
                pass  # its message would contain the bytes
            raise StoreError(errno.EINVAL, f"can't read a tier's secret from {self._text} (it is not UTF-8)")
        raise StoreError(
            errno.EINVAL,
            "a tier's secret isn't passed to another process; give it as ${NAME} or password_file, which each process "
            "reads for itself",
        )

    def for_child(self) -> tuple[str, str]:
        """The arguments that recreate it in a child, including the secret: only for a private pipe."""
        try:
            return "given", self.reveal()
        except StoreError:
            return self._kind, self._text  # the child fails on it as this process would

    def __repr__(self) -> str:
        return f"<secret: {self.origin}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return (self._kind, self._text) == (other._kind, other._text)

    def __hash__(self) -> int:
        return hash((self._kind, self._text))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> tuple[type[Secret], tuple[str, str]]:
        return Secret, ("withheld", "") if self._kind == "given" else (self._kind, self._text)


class Credentials(NamedTuple):
    """The credentials of a tier.

    Attributes
    ----------
    user : Secret or None
        The user name; for S3 the access key's ID, for Azure the account.
    password : Secret or None
        The password; for S3 the secret access key, for Azure the account's key, for Google the service account's JSON.
    token : Secret or None
        A bearer token; for S3 the session token.
    """

    user: Secret | None = None
    password: Secret | None = None
    token: Secret | None = None


@dataclass(frozen=True)
class TierSettings:
    """One tier, as :func:`parse_tier` reads it.

    Attributes
    ----------
    url : str
        Scheme, host, port and path: without user, password and query.
    mode : {"rw", "ro"}
        Whether programs are published there.
    trust : {"anyone", "signed"}
        Which programs are used: those of anyone who can write there, or only those that one of ``keys`` has signed.
    keys : tuple of str
        Public keys: paths of PEM files, or 64 hex digits (Ed25519).
    connect_timeout, timeout, write_timeout : float
        Time limits in seconds: for connecting, for a whole lookup, for a whole write.
    max_bytes : int
        The maximum size of an object; a larger one is neither read nor written.
    lease : TierSettings or None
        The Redis that keeps a fleet's leases, if it is another one.
    sign_key : str or None
        The path of the private key (PEM) that signs what is published.
    ca_file : str or None
        The path of the trusted CA certificates (PEM); None: the system's.
    endpoint, region : str or None
        The location of an object store.
    tls : bool
        Whether a registry uses HTTPS.
    credentials : Credentials
        Never displayed.
    """

    url: str
    mode: str = "rw"
    trust: str = "anyone"
    keys: tuple[str, ...] = ()
    connect_timeout: float = 0.5
    timeout: float = 2.0
    write_timeout: float = 10.0
    max_bytes: int = 64 * 2**20
    lease: TierSettings | None = None
    sign_key: str | None = None
    ca_file: str | None = None
    endpoint: str | None = None
    region: str | None = None
    tls: bool = True
    credentials: Credentials = field(default=Credentials(), repr=False)

    def __post_init__(self) -> None:
        if "?" in self.url or "@" in _PINNED.sub("", self.url):
            raise ConfigError(
                "TierSettings takes a URL without user, password or query; use parse_tier for one that has them"
            )

    @property
    def scheme(self) -> str:
        """``redis``, ``https`` and so on."""
        return self.url.partition(":")[0]

    @property
    def host(self) -> str:
        """The host; for an object store, the bucket; empty for a directory."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int | None:
        """The port, if given."""
        return urlsplit(self.url).port

    @property
    def path(self) -> str:
        """The prefix after the host, without slashes at its ends; for a directory, its absolute path."""
        path = urlsplit(self.url).path
        return unquote(path) if self.scheme == "file" else path.strip("/")

    @property
    def pinned(self) -> bool:
        """Whether the URL contains the digest of all its contents, so that nobody can replace them."""
        return self.scheme == "oci" and "@" in self.path

    @property
    def lease_url(self) -> str | None:
        """The URL of the Redis that keeps a fleet's leases, if it is another one."""
        return None if self.lease is None else self.lease.url

    def shown(self) -> dict[str, Any]:
        """All options, for display and JSON; for secrets, only their origin."""
        told = {name: getattr(self, name) for name in ("url", *_EVERYWHERE, *_TIMES)}
        told["keys"] = list(self.keys)
        for name in ("lease_url", "sign_key", "ca_file", "endpoint", "region"):
            if (value := getattr(self, name)) is not None:
                told[name] = value
        if not self.tls:
            told["tls"] = False
        for name, secret in self.credentials._asdict().items():
            if secret is not None:
                told[name] = secret.origin
        return told

    def for_child(self) -> dict[str, Any]:
        """The values that recreate it in a child (:meth:`of_parent`), including secrets: only for a private pipe."""
        told = {name: getattr(self, name) for name in _PLAIN}
        told["lease"] = None if self.lease is None else self.lease.for_child()
        told["credentials"] = [None if secret is None else secret.for_child() for secret in self.credentials]
        return told

    @classmethod
    def of_parent(cls, told: Mapping[str, Any]) -> TierSettings:
        """Recreate settings from the result of :meth:`for_child`, or its JSON."""
        made = dict(told)
        made["keys"] = tuple(made["keys"])
        made["lease"] = None if made["lease"] is None else cls.of_parent(made["lease"])
        made["credentials"] = Credentials(*[None if one is None else Secret(*one) for one in made["credentials"]])
        return cls(**made)


_PLAIN = ("url", *_EVERYWHERE, *_TIMES, "sign_key", "ca_file", "endpoint", "region", "tls")


def parse_tier(given: str | Mapping[str, Any], *, where: str = "", folder: str | None = None) -> TierSettings:
    """Parse a tier's URL, or a table with its ``url`` and options.

    Parameters
    ----------
    given : str or mapping
        For instance ``https://host/prefix?mode=ro``. A password, or ``${NAME}`` for a variable that contains it, is
        written before the host or among the options.
    where : str
        Where the text is from, for messages.
    folder : str, optional
        The directory that relative paths are relative to; None: the current directory.

    Returns
    -------
    TierSettings

    Raises
    ------
    ConfigError
        It isn't a URL, its scheme is unknown, or an option is unknown or has an invalid value. The message doesn't
        contain anything that may be a secret.
    """
    reader = _Reader(where or "a tier", os.path.abspath(folder or os.curdir))
    if isinstance(given, str):
        return reader.read(given, {})
    table: Any = given
    url = table.get("url") if isinstance(table, Mapping) else None
    if not isinstance(url, str):
        raise reader.refuse("must be a URL or a table with a url")
    return reader.read(url, {name: value for name, value in table.items() if name != "url"})


class _Reader:
    """Parses one tier. Its error messages repeat nothing that may be a secret."""

    def __init__(self, where: str, folder: str) -> None:
        self.where = where
        self.folder = folder

    def refuse(self, why: str) -> ConfigError:
        return ConfigError(f"{self.where} {why}")

    def read(self, text: str, table: Mapping[str, Any]) -> TierSettings:
        scheme, colon, rest = text.partition(":")
        if not colon or not _NAME.fullmatch(scheme) or any(ord(letter) <= 32 or ord(letter) == 127 for letter in text):
            raise self.refuse(f"isn't a URL such as redis://host:6379 (schemes: {', '.join(SCHEMES)})")
        if (scheme := scheme.lower()) not in _SERVERS:
            raise self.refuse(f"has an unknown scheme{did_you_mean(scheme, SCHEMES)}")
        options = self.options(scheme, rest, table)
        url, entrance = self.address(scheme, rest.partition("?")[0])
        if twice := entrance.keys() & options.keys():
            raise self.refuse(f"has its {min(twice)} twice: before the host and as an option")
        return self.made(url, scheme, options | entrance)

    def options(self, scheme: str, rest: str, table: Mapping[str, Any]) -> dict[str, Any]:
        """The options from the URL and the table, by name."""
        address, _, query = rest.partition("?")
        if "#" in rest:
            raise self.refuse("contains '#', which must be written as %23")
        if "@" in query or (scheme != "oci" and "@" in address.removeprefix("//").partition("/")[2]):
            raise self.refuse("has an '@' after its host: write '/', '?' and '@' in a password as %2F, %3F and %40")
        pairs = [pair.partition("=") for pair in query.split("&") if pair]
        if any(not equals or not _NAME.fullmatch(name) for name, equals, _ in pairs):
            raise self.refuse("has an option that isn't of the form name=value")
        found: dict[str, Any] = {}
        for name, value in [*((name, unquote(value)) for name, _, value in pairs), *table.items()]:
            self.known(scheme, str(name).replace("-", "_"))
            if (name := str(name).replace("-", "_")) in found:
                raise self.refuse(f"has the option {name} twice")
            found[name] = value
        return found

    def known(self, scheme: str, name: str) -> None:
        allowed = _OPTIONS[_SERVERS[scheme]]
        if name in allowed:
            return
        if not _NAME.fullmatch(name):
            raise self.refuse("has an option with an invalid name")
        if any(name in others for others in _OPTIONS.values()):
            raise self.refuse(f"has the option {name}, which {scheme} doesn't take{did_you_mean(name, allowed)}")
        raise self.refuse(f"has the unknown option {name!r}{did_you_mean(name, allowed)}")

    def address(self, scheme: str, rest: str) -> tuple[str, dict[str, Any]]:
        """The URL without credentials, and user and password as options."""
        if scheme == "file":
            return self.directory(rest), {}
        port: int | None = None
        try:
            parts = urlsplit(f"{scheme}:{rest}")
            port, host = parts.port, parts.hostname or ""
        except ValueError:
            host = ""  # the exception's message would contain the text
        if not rest.startswith("//") or not _HOST.fullmatch(host) or port == 0:
            raise self.refuse(f"has no valid host; write {scheme}://host{_SHAPES[_SERVERS[scheme]]}")
        path = parts.path.rstrip("/")
        if scheme == "oci" and "@" in _PINNED.sub("", path):
            raise self.refuse("has an '@' in its path that doesn't start an image's @sha256:...")
        if _SERVERS[scheme] == "redis" and not _DATABASE.fullmatch(path):
            raise self.refuse("has a path that isn't a database number, as in redis://host:6379/0")
        if _SERVERS[scheme] == "registry" and len(path) < 2:
            raise self.refuse("names no image; write oci://registry/name:tag")
        if any(piece in {".", ".."} for piece in unquote(path).split("/")):
            raise self.refuse("has '.' or '..' in its path")
        entrance = {"user": parts.username, "password": parts.password}
        named = {name: unquote(value) for name, value in entrance.items() if value}
        host = f"[{host}]" if ":" in host else host
        return f"{scheme}://{host}{'' if port is None else f':{port}'}{path}", named

    def directory(self, rest: str) -> str:
        host, path = "", rest
        if rest.startswith("//"):
            host, slash, path = rest.removeprefix("//").partition("/")
            path = slash + path
        if host not in {"", "localhost"} or not path:
            raise self.refuse("doesn't name a directory on this machine; write file:///path/of/a/layer")
        from urllib.parse import quote

        return f"file://{quote(os.path.normpath(os.path.join(self.folder, unquote(path))))}"

    def made(self, url: str, scheme: str, options: dict[str, Any]) -> TierSettings:
        """Check each value, and that they are consistent."""
        read_only = scheme in _ONLY_READ
        values: dict[str, Any] = {"mode": "ro" if read_only else "rw"}
        secrets: dict[str, Secret] = {}
        for name, value in options.items():
            if name in _SECRET:
                self.secret(name, value, secrets)
            elif name == "lease_url":
                values["lease"] = self.lease(value)
            else:
                values[name] = self.value(name, value)
        if read_only and values["mode"] != "ro":
            raise self.refuse(f"is read-only: {scheme} doesn't take mode=rw")
        if values.get("trust") == "signed" and not values.get("keys"):
            raise self.refuse("has trust=signed but no keys to check signatures with")
        if values["mode"] == "ro" and "sign_key" in values:
            raise self.refuse("has a sign_key, but with mode=ro nothing is published")
        return TierSettings(url, **values, credentials=Credentials(**secrets))

    def secret(self, name: str, value: Any, secrets: dict[str, Secret]) -> None:
        what = name.removesuffix("_file")
        if not isinstance(value, str) or not value:
            raise self.refuse(f"needs a non-empty string as its {name}")
        if what in secrets:
            raise self.refuse(f"has its {what} twice: as {what} and as {what}_file")
        secrets[what] = Secret.parse(value) if name == what else Secret("file", self.local(value))

    def lease(self, value: Any) -> TierSettings:
        reader = _Reader(f"{self.where}: its lease_url", self.folder)
        if not isinstance(value, str):
            raise reader.refuse("must be a string")
        lease = reader.read(value, {})
        if _SERVERS[lease.scheme] != "redis":
            raise reader.refuse("must be a Redis server")
        return lease

    def local(self, path: str) -> str:
        return os.path.normpath(os.path.join(self.folder, os.path.expanduser(path)))

    def value(self, name: str, value: Any) -> Any:
        if name in {"mode", "trust"}:
            allowed = {"mode": ("rw", "ro"), "trust": ("anyone", "signed")}[name]
            if value not in allowed:
                raise self.refuse(f"has {name}={value!r}; valid: {', '.join(allowed)}")
            return value
        if name in _TIMES:
            return self.seconds(name, value)
        if name == "max_bytes":
            return self.size(value)
        if name == "tls":
            return self.switch(value)
        if name == "keys":
            return self.public_keys(value)
        if not isinstance(value, str) or not value:
            raise self.refuse(f"needs a non-empty string as its {name}")
        if name == "endpoint" and not re.fullmatch(r"https?://[^\s@?#]+", value):
            raise self.refuse("has an endpoint that isn't of the form http(s)://host:port")
        return self.local(value) if name in _PATHS else value

    def seconds(self, name: str, value: Any) -> float:
        try:
            seconds = float(value) if not isinstance(value, bool) else 0.0
        except (TypeError, ValueError):
            seconds = 0.0
        if not 0 < seconds <= 3600:
            raise self.refuse(f"has {name}={value!r}, but needs a number of seconds above 0 and at most 3600")
        return seconds

    def size(self, value: Any) -> int:
        try:
            size = parse_size(value) if isinstance(value, str) else 0 if isinstance(value, bool) else int(value)
        except (TypeError, ValueError):
            size = 0
        if not 0 < size < 2**32:
            raise self.refuse(f"has max_bytes={value!r}, but needs a size below 4 GB, such as 64MB")
        return size

    def switch(self, value: Any) -> bool:
        told = {True: True, False: False, "yes": True, "true": True, "no": False, "false": False}
        try:
            return told[value]
        except (KeyError, TypeError):
            raise self.refuse(f"has tls={value!r}; valid: yes, no") from None

    def public_keys(self, value: Any) -> tuple[str, ...]:
        listed: Sequence[Any] = value.split(",") if isinstance(value, str) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(key, str) and key for key in listed):
            raise self.refuse("needs a list of paths, or of keys of 64 hex digits, as its keys")
        return tuple(key.lower() if _HEX_KEY.fullmatch(key) else self.local(key) for key in listed)


#: The form of what follows the host, for messages.
_SHAPES = {"redis": ":6379/0", "http": "/prefix", "object store": "/prefix", "registry": "/name:tag", "directory": ""}
