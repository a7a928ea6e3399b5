"""The job, in FLARE's simulator: a process a site, as in a deployment.

    python examples/flare/job.py [--clients N] [--rounds R] [--output FILE] [--workspace DIR]
"""

import argparse
import sys
from pathlib import Path

from controller import ScalarController
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner

HERE = Path(__file__).parent


def make_job(clients: int, rounds: int, output: Path) -> FedJob:
    """Controller and client script, each with the module that both use."""
    job = FedJob(name="meerkat", min_clients=clients)
    job.to_server(ScalarController(clients, rounds, deadline=60, output=str(output.resolve())))
    job.to_clients(
        ScriptRunner(
            script=str(HERE / "client.py"),
            script_args=f"--clients {clients}",
            framework=FrameworkType.NUMPY,
            launch_external_process=True,
            command=f"{sys.executable} -u",
        )
    )
    job.add_file_to_server(str(HERE / "federation.py"))
    job.add_file_to_clients(str(HERE / "federation.py"))
    return job


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("flare.json"))
    parser.add_argument("--workspace", default="/tmp/nvflare/meerkat")
    arguments = parser.parse_args()
    job = make_job(arguments.clients, arguments.rounds, arguments.output)
    job.simulator_run(arguments.workspace, n_clients=arguments.clients)
    print(arguments.output.read_text())
