"""Settings of the transport that every service and the command share: read once, then passed down."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from treadle.errors import FailedPrecondition
from treadle.security.credentials import Credentials
from treadle.security.key_file import KeyFile
from treadle.security.server_security import ServerSecurity, ServerTls


class TransportConfig(BaseSettings):
    """TLS, keys and where to bind (`TREADLE_*`); the same for all services of a suite."""

    model_config = SettingsConfigDict(
        env_prefix="TREADLE_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    tls_certificate: Path | None = None
    """PEM chain of this process, shown by its ports, and by its calls under mutual TLS."""
    tls_private_key: Path | None = None
    tls_client_ca: Path | None = None
    """PEM roots; who calls must show a certificate of theirs."""
    tls_ca: Path | None = None
    """PEM roots that calls to other services trust; turns TLS on for them."""
    keys_file: Path | None = None
    """Hashed keys; who calls must show one."""
    api_key: SecretStr = SecretStr("")
    """The key that calls to other services show."""
    api_key_file: Path | None = None
    """The same from a file."""
    trusted_network: bool = Field(default=False)
    """Ports beyond loopback may be open to anybody: the network is private."""

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_private_key is None):
            raise ValueError("TREADLE_TLS_CERTIFICATE and TREADLE_TLS_PRIVATE_KEY go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError(
                "TREADLE_TLS_CLIENT_CA needs TREADLE_TLS_CERTIFICATE and TREADLE_TLS_PRIVATE_KEY"
            )
        if self.api_key.get_secret_value() and self.api_key_file is not None:
            raise ValueError("set TREADLE_API_KEY or TREADLE_API_KEY_FILE, not both")
        return self

    def server(self) -> ServerSecurity:
        """How a port is guarded; reads the keys. Raises FailedPrecondition."""
        tls = None
        if self.tls_certificate is not None and self.tls_private_key is not None:
            tls = ServerTls(self.tls_certificate, self.tls_private_key, self.tls_client_ca)
        keys = None if self.keys_file is None else KeyFile.read(self.keys_file)
        return ServerSecurity(tls=tls, keys=keys, trusted_network=self.trusted_network)

    def credentials(self) -> Credentials:
        """What calls to other services show; reads the files. Raises FailedPrecondition."""
        key = self.api_key.get_secret_value()
        if self.api_key_file is not None:
            try:
                key = self.api_key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise FailedPrecondition(
                    f"the key in {self.api_key_file} cannot be read: {error}", reason="KEY_UNREADABLE"
                ) from error
        if self.tls_ca is None:
            return Credentials(api_key=key)
        return Credentials.from_files(
            api_key=key, ca=self.tls_ca, certificate=self.tls_certificate, private_key=self.tls_private_key
        )
