"""A port's TLS: certificates are read again when their files change, so that rotation needs no restart."""

from __future__ import annotations

import logging
import ssl

import grpc

from treadle.errors import FailedPrecondition
from treadle.security.pem import read_pem
from treadle.security.server_security import ServerTls

logger = logging.getLogger(__name__)


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials that follow their files; raises FailedPrecondition (PEM_UNREADABLE, TLS_UNUSABLE).

    gRPC asks for the certificate at each handshake. Files that cannot be used are logged, and the last good
    ones go on.
    """
    current = _read(tls)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal current
        try:
            found = _read(tls)
        except FailedPrecondition as error:
            logger.error("the certificate is kept as it was: %s", error)
            return None
        if found == current:
            return None
        current = found
        logger.info("certificate read again", extra={"path": str(tls.certificate)})
        return _configuration(found)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(current),
        fetch,  # type: ignore[arg-type]  # None means: as before
        require_client_authentication=tls.client_ca is not None,
    )


_Files = tuple[bytes, bytes, bytes | None]


def _read(tls: ServerTls) -> _Files:
    files = (
        read_pem(tls.private_key, "the private key"),
        read_pem(tls.certificate, "the certificate"),
        None if tls.client_ca is None else read_pem(tls.client_ca, "the callers' CA"),
    )
    try:
        tls.ssl_context()
    except (OSError, ssl.SSLError) as error:
        raise FailedPrecondition(
            f"the certificate in {tls.certificate} and the key in {tls.private_key} cannot be used: {error}",
            reason="TLS_UNUSABLE",
        ) from error
    return files


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    private_key, certificate, client_ca = files
    return grpc.ssl_server_certificate_configuration(
        [(private_key, certificate)], root_certificates=client_ca
    )
