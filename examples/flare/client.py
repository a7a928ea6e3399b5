"""A site of NVIDIA FLARE: loads model and data once, then answers the requests of all rounds."""

import argparse
import os
import time

import numpy as np
import nvflare.client as flare
import torch
from federation import make_client


def main(clients: int) -> None:
    """Runs until the job is over."""
    torch.set_num_threads(1)  # the last bits of a forward depend on it
    flare.init()
    client = make_client(int(flare.get_site_name().removeprefix("site-")) - 1, clients)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        begun = time.perf_counter()
        reply = client.handle(received.params["message"].tobytes())
        told = {"process": os.getpid(), "seconds": time.perf_counter() - begun}
        flare.send(flare.FLModel(params={"message": np.frombuffer(reply, dtype=np.uint8)}, metrics=told))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, required=True)
    main(parser.parse_args().clients)
