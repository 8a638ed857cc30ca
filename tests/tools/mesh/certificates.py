"""Mesh identities as an issuer writes them: two authorities, and a folder per identity that is replaced atomically."""

import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TRUST_DOMAIN = "spiffe://cluster.local/ns/default/sa/"
LIFE = timedelta(hours=1)


class Authority:
    def __init__(self, name):
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self.certificate = (
            builder(self.name, self.name, self.key).add_extension(constraints, critical=True).sign(self.key, hashes.SHA256())
        )

    def issue(self, identity):
        """Issues a mesh identity: certificate and key in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(TRUST_DOMAIN + identity)])
        certificate = (
            builder(x509.Name([]), self.name, key).add_extension(names, critical=True).sign(self.key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return certificate.public_bytes(pem), secret


def builder(subject, issuer, key):
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + LIFE)
    )


class Identities:
    """Files `IDENTITY/current/{certificate,key,roots}.pem`. Both roots are always trusted, as during a root rotation."""

    def __init__(self, folder, names):
        self.folder, self.names = Path(folder), names
        self.authorities = [Authority("first"), Authority("second")]
        self.rotate(0)

    def rotate(self, authority):
        """Issues new certificates and keys for all identities, by this authority."""
        roots = b"".join(a.certificate.public_bytes(serialization.Encoding.PEM) for a in self.authorities)
        for name in self.names:
            home = self.folder / name
            target = home / f"from-{authority}"
            target.mkdir(parents=True)
            certificate, key = self.authorities[authority].issue(name)
            for file, content in {"certificate": certificate, "key": key, "roots": roots}.items():
                (target / f"{file}.pem").write_bytes(content)
            # One rename replaces the three files, as the kubelet does.
            link = home / "next"
            link.symlink_to(target.name)
            os.replace(link, home / "current")

    def path(self, name):
        return str(self.folder / name / "current")
