"""Constants shared by several tests."""

import os

import torch

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Factor by which `make fuzz` increases the number of examples of the fuzz tests.
FUZZ = int(os.environ.get("MEERKAT_FUZZ", "1"))
# Name of a report property of a test: (method, task, change of the held-out loss, elements). conftest.py prints a table
# of them at the end of the test session.
COMBINATION = "combination"
