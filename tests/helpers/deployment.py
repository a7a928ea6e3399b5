"""Flower's own programs on loopback, with TLS and keys made here: a SuperLink, SuperNodes, and `flwr run`."""

import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

APP = Path(__file__).parents[2] / "examples" / "flower"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(holds: Callable[[], Any], seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def programs(directory: Path) -> Path:
    """Flower's programs for this interpreter, wherever Flower is installed."""
    directory.mkdir()
    for entry in importlib.metadata.distribution("flwr").entry_points:
        if entry.group == "console_scripts":
            module, _, function = entry.value.partition(":")
            script = directory / entry.name
            script.write_text(
                f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
            )
            script.chmod(0o755)
    return directory


def _certificate(subject: str, issuer: str, key: Any, signing: Any, *, authority: bool) -> bytes:
    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(subject))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    if authority:
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
            decipher_only=False,
        )  # fmt: skip
        builder = builder.add_extension(usage, critical=True)
    else:
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(signing, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_certificates(directory: Path) -> None:
    """ca.pem, server.pem and server.key."""
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    (directory / "ca.pem").write_bytes(_certificate("test CA", "test CA", authority, authority, authority=True))
    (directory / "server.pem").write_bytes(_certificate("localhost", "test CA", server, authority, authority=False))
    (directory / "server.key").write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def make_keys(directory: Path, name: str) -> Path:
    """A SuperNode's private key; the public one lies beside it, as NAME.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = directory / name
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    private.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    return private


@dataclass
class Deployment:
    """A SuperLink that is up, and what belongs to it."""

    directory: Path
    port: int
    environment: dict[str, str]
    options: list[str] = field(default_factory=list)  # of the SuperLink
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        """A process in a group of its own, whose output goes to NAME.log."""
        with open(self.directory / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.directory,
                env=self.environment,
                start_new_session=True,
            )
        return self.processes[name]

    def log(self, name: str) -> str:
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self, name: str) -> None:
        """SIGKILL to the process and all it started, but for the worker, which has to see to itself."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def superlink(self) -> None:
        """Starts the SuperLink, and waits until it listens."""
        self.start(
            "superlink", "flower-superlink", "--ssl-certfile", self.directory / "server.pem",
            "--ssl-keyfile", self.directory / "server.key", "--ssl-ca-certfile", self.directory / "ca.pem",
            "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", self.port, *self.options,
        )  # fmt: skip
        wait_until(lambda: listens(self.port), 60, "the SuperLink listens")

    def register(self, key: Path) -> None:
        done = subprocess.run(
            ["flwr", "supernode", "register", str(key.with_suffix(".pub")), "here"],
            env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def three_nodes(self) -> None:
        """Nodes that are the clients 0 to 2, each with a key of its own; waits until the SuperLink has let them in."""
        for i in range(3):
            self.register(key := make_keys(self.directory, f"key{i}"))
            self.node(f"node{i}", key, f"client-id={i}")
        wait_until(lambda: all("SuperNode ID" in self.log(f"node{i}") for i in range(3)), 60, "three nodes are there")

    def node(
        self, name: str, key: Path | None, config: str, *, certificate: bool = True, stock: bool = False
    ) -> subprocess.Popen[bytes]:
        """A SuperNode: the engine's, or Flower's own."""
        program = ["flower-supernode"] if stock else [sys.executable, "-m", "meerkat_engine.fed.flower.node.supernode"]
        trusted = ["--root-certificates", self.directory / "ca.pem"] if certificate else []
        authenticated = ["--auth-supernode-private-key", key] if key is not None else []
        return self.start(
            name, *program, *trusted, *authenticated, "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", free_ports(1)[0], "--node-config", config,
        )  # fmt: skip

    def run(
        self, name: str, app: Path = APP, options: tuple[str, ...] = (), **settings: object
    ) -> subprocess.Popen[bytes]:
        """`flwr run` of an app, which ends when the run is over."""
        toml = {key.replace("_", "-"): value if isinstance(value, int | float) else str(value)
                for key, value in settings.items()}  # fmt: skip
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in toml.items())
        return self.start(name, "flwr", "run", app, "here", "--stream", "--run-config", given, *options)

    def finish(self, name: str, seconds: float) -> str:
        """Waits for a process; returns its output."""
        try:
            self.processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end within {seconds} s:\n{self.log(name)[-4000:]}") from None
        return self.log(name)


@contextmanager
def deployment(directory: Path, *, authenticated: bool = True, database: bool = False) -> Iterator[Deployment]:
    """A SuperLink with TLS, its state in memory or in a file; everything that was started is killed in the end."""
    home = directory / "flwr"
    home.mkdir()
    runtime = directory / "rt"
    runtime.mkdir(mode=0o700)
    make_certificates(directory)
    (port,) = free_ports(1)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{directory / "ca.pem"}"\n'
    )
    environment = os.environ | {
        "PATH": f"{programs(directory / 'bin')}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "XDG_RUNTIME_DIR": str(runtime),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }
    options = ["--enable-supernode-auth"] if authenticated else []
    options += ["--database", str(directory / "state.db")] if database else []
    found = Deployment(directory, port, environment, options)
    try:
        found.superlink()
        yield found
    finally:
        for name in list(found.processes):
            with suppress(ProcessLookupError):
                found.kill(name)
        try:
            wait_until(lambda: not workers(runtime), 30, "every worker ended with its SuperNode")
        finally:
            end_all(directory)
        shutil.rmtree(runtime)


def end_all(directory: Path) -> None:
    """Ends what Flower's programs started in sessions of their own, such as a ServerApp whose SuperLink has gone."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if int(process.name) != os.getpid() and any(word.startswith(bytes(directory) + b"/") for word in words):
                os.kill(int(process.name), signal.SIGKILL)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def workers(runtime: Path) -> list[int]:
    """Process ids of the workers whose socket is in a runtime directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"meerkat_engine.fed.flower.node.worker" in words and any(
            word.startswith(str(runtime).encode()) for word in words
        ):
            found.append(int(process.name))
    return found
