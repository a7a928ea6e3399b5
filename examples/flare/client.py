"""Client of an NVIDIA FLARE site: loads model and data once, then answers the requests of all rounds."""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import nvflare.client as flare
import torch
from federation import MASK, make_client


def main(sites: int) -> None:
    """Answers requests until the job is over.

    Args:
        sites: number of sites in the job.
    """
    torch.set_num_threads(1)  # the last bits of a forward pass depend on the number of threads
    flare.init()
    number = int(flare.get_site_name().removeprefix("site-"))
    client = make_client(Path(__file__).with_name(MASK), number - 1, sites)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        begun = time.perf_counter()
        answer = client.handle(received.params["message"].tobytes())
        metrics = {"process": os.getpid(), "seconds": time.perf_counter() - begun}
        flare.send(flare.FLModel(params={"message": np.frombuffer(answer, dtype=np.uint8)}, metrics=metrics))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, required=True, help="number of sites in the job")
    main(parser.parse_args().sites)
