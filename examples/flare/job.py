"""Makes the job and runs it in NVIDIA FLARE's simulator, with one process per site.

    python examples/flare/job.py [--sites N] [--rounds R] [--workspace DIR] [--output FILE] [--export DIR]

With ``--export`` it writes the job instead, for submission to a deployment.
"""

import argparse
import sys
from pathlib import Path

from controller import ScalarController
from federation import MASK, make_mask
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner

HERE = Path(__file__).resolve().parent


def make_job(sites: int, rounds: int, workspace: Path, output: Path) -> FedJob:
    """Makes a job of controller and client script, each with the mask and the module that both import."""
    workspace.mkdir(parents=True, exist_ok=True)
    make_mask().save(workspace / MASK)
    job = FedJob(name="meerkat", min_clients=sites)
    job.to_server(ScalarController(sites, rounds, deadline=60, output=str(output.resolve())))
    job.to_server({"server": {"task_request_interval": 0.05}})  # seconds between polls of a site; FLARE's default is 2
    job.to_clients(
        ScriptRunner(
            script=str(HERE / "client.py"),
            script_args=f"--sites {sites}",
            launch_external_process=True,  # one process for the whole job
            command=f"{sys.executable} -u",
            framework=FrameworkType.NUMPY,
        )
    )
    for file in (HERE / "federation.py", workspace / MASK):
        job.add_file_to_server(str(file))
        job.add_file_to_clients(str(file))
    return job


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workspace", type=Path, default=Path("runs/flare"))
    parser.add_argument("--output", type=Path, default=Path("flare.json"))
    parser.add_argument("--export", type=Path)
    arguments = parser.parse_args()
    job = make_job(arguments.sites, arguments.rounds, arguments.workspace, arguments.output)
    if arguments.export:
        job.export_job(str(arguments.export))
    else:
        job.simulator_run(str(arguments.workspace / "simulator"), n_clients=arguments.sites)
        print(arguments.output.read_text())
