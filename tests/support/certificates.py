"""A certificate for localhost, made by openssl on the spot."""

import subprocess
from pathlib import Path


def make_certificate(path: Path) -> None:
    """Write cert.pem with key.pem, and locked.pem, the same key with the password "word", to directory `path`."""
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    more = ["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    lock = "openssl ec -in key.pem -aes256 -passout pass:word -out locked.pem"
    for command in ([*make.split(), *more], lock.split()):
        subprocess.run(command, cwd=path, check=True, capture_output=True)
