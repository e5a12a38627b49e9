"""A certificate authority of the test's own, and what it signs; the openssl program makes each in milliseconds."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["Authority"]


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Authority:
    """Signs certificates into `folder`; `certificate` is its own."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.certificate = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        _openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", str(self._key))
        _openssl(
            "req", "-x509", "-new", "-key", str(self._key), "-subj", f"/CN={name}", "-days", "2",
            "-addext", "basicConstraints=critical,CA:TRUE", "-out", str(self.certificate),
        )  # fmt: skip

    def sign(
        self, name: str, subject: str, alternatives: str = "IP:127.0.0.1,DNS:localhost", password: str = ""
    ) -> Path:
        """A PEM file with a new key (PKCS#8, encrypted with the password if there is one) and its certificate."""
        key, request, signed = (self.folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={alternatives}\n")
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(key))
        _openssl("req", "-new", "-key", str(key), "-subj", subject, "-out", str(request))
        _openssl(
            "x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self._key),
            "-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", str(signed),
        )  # fmt: skip
        if password:
            hidden = self.folder / f"{name}.hidden"
            _openssl("pkcs8", "-topk8", "-in", str(key), "-out", str(hidden), "-passout", f"pass:{password}")
            key = hidden
        pem = self.folder / f"{name}.pem"
        pem.write_text(key.read_text() + signed.read_text())
        return pem
