"""Runs Flower's own programs on loopback, with TLS and fresh keys: a SuperLink, SuperNodes, and `flwr run`."""

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
    """Returns ports that no process listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def wait_until(condition: Callable[[], Any], seconds: float, description: str) -> None:
    """Waits until a condition is true; fails the test after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {description}"
        time.sleep(0.1)


def programs(directory: Path) -> Path:
    """Makes a directory with Flower's programs for this interpreter, wherever Flower is installed."""
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
    def common_name(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(common_name(subject))
        .issuer_name(common_name(issuer))
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
    """Writes ca.pem, server.pem and server.key."""
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    (directory / "ca.pem").write_bytes(_certificate("test CA", "test CA", authority, authority, authority=True))
    (directory / "server.pem").write_bytes(_certificate("localhost", "test CA", server, authority, authority=False))
    (directory / "server.key").write_bytes(
        server.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def make_keys(directory: Path, name: str) -> Path:
    """Writes a SuperNode's key pair, NAME and NAME.pub; returns the private key's path."""
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
    """A SuperLink and the processes that belong to it.

    Attributes:
        directory: holds keys, certificates and logs.
        port: the SuperLink's port.
        environment: environment variables of all processes.
        options: further options of the SuperLink.
        processes: name -> running process.
    """

    directory: Path
    port: int
    environment: dict[str, str]
    options: list[str] = field(default_factory=list)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        """Starts a process in a new session; its output goes to NAME.log."""
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
        """Returns the output of a process so far."""
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self, name: str) -> None:
        """Sends SIGKILL to a process and its children, except the worker, which must end by itself."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def superlink(self) -> None:
        """Starts the SuperLink and waits until it listens."""
        self.start(
            "superlink", "flower-superlink", "--ssl-certfile", self.directory / "server.pem",
            "--ssl-keyfile", self.directory / "server.key", "--ssl-ca-certfile", self.directory / "ca.pem",
            "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", self.port, *self.options,
        )  # fmt: skip
        wait_until(lambda: listens(self.port), 60, "the SuperLink listens")

    def register(self, key: Path) -> None:
        """Registers the public half of a SuperNode's key."""
        done = subprocess.run(
            ["flwr", "supernode", "register", str(key.with_suffix(".pub")), "here"],
            env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def three_nodes(self) -> None:
        """Starts the nodes of clients 0 to 2, each with its own key; waits until the SuperLink has admitted them."""
        for i in range(3):
            self.register(key := make_keys(self.directory, f"key{i}"))
            self.node(f"node{i}", key, f"client-id={i}")
        wait_until(lambda: all("SuperNode ID" in self.log(f"node{i}") for i in range(3)), 60, "three nodes are online")

    def node(
        self, name: str, key: Path | None, config: str, *, certificate: bool = True, flowers_own: bool = False
    ) -> subprocess.Popen[bytes]:
        """Starts a SuperNode, the engine's or Flower's own.

        Args:
            name: name of the process.
            key: private key, or None for a node without one.
            config: value of ``--node-config``.
            certificate: whether the node gets the CA's certificate.
            flowers_own: whether to start ``flower-supernode`` instead of the engine's SuperNode.
        """
        program = (
            ["flower-supernode"] if flowers_own else [sys.executable, "-m", "meerkat_engine.fed.flower.node.supernode"]
        )
        trusted = ["--root-certificates", self.directory / "ca.pem"] if certificate else []
        authenticated = ["--auth-supernode-private-key", key] if key is not None else []
        return self.start(
            name, *program, *trusted, *authenticated, "--superlink", f"127.0.0.1:{self.port}",
            "--host", "127.0.0.1", "--port", free_ports(1)[0], "--node-config", config,
        )  # fmt: skip

    def run(
        self, name: str, app: Path = APP, options: tuple[str, ...] = (), **settings: object
    ) -> subprocess.Popen[bytes]:
        """Starts `flwr run` on an app; the process ends with the run."""
        toml = {key.replace("_", "-"): value if isinstance(value, int | float) else str(value)
                for key, value in settings.items()}  # fmt: skip
        run_config = " ".join(f"{key}={json.dumps(value)}" for key, value in toml.items())
        return self.start(name, "flwr", "run", app, "here", "--stream", "--run-config", run_config, *options)

    def finish(self, name: str, seconds: float) -> str:
        """Waits for a process to end and returns its output."""
        try:
            self.processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end within {seconds} s:\n{self.log(name)[-4000:]}") from None
        return self.log(name)


@contextmanager
def deployment(directory: Path, *, authenticated: bool = True, database: bool = False) -> Iterator[Deployment]:
    """Runs a SuperLink with TLS, its state in memory or in a file; kills everything that was started at the end."""
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
    running = Deployment(directory, port, environment, options)
    try:
        running.superlink()
        yield running
    finally:
        for name in list(running.processes):
            with suppress(ProcessLookupError):
                running.kill(name)
        try:
            wait_until(lambda: not workers(runtime), 30, "every worker ended with its SuperNode")
        finally:
            end_all(directory)
        shutil.rmtree(runtime)


def end_all(directory: Path) -> None:
    """Kills processes that Flower's programs started in new sessions, such as a ServerApp without a SuperLink."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if int(process.name) != os.getpid() and any(word.startswith(bytes(directory) + b"/") for word in words):
                os.kill(int(process.name), signal.SIGKILL)


def listens(port: int) -> bool:
    """Whether a process listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def workers(runtime: Path) -> list[int]:
    """Process ids of the workers whose sockets are in a runtime directory."""
    ids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"meerkat_engine.fed.flower.node.worker" in words and any(
            word.startswith(str(runtime).encode()) for word in words
        ):
            ids.append(int(process.name))
    return ids
